"""Sums of x = residual / bound over all checks of a site and role, per kind of checksum: all the second detector ever sees.

    n · Σ x (cut at ±√50 σ̂) · Σ min(x², 50 σ̂²) · max |x| · how many above 4 σ̂, 8 σ̂, 12 σ̂ and the soft threshold ·
    blocks · Σ of their maxima · Σ of the squares of these

x is the residual in units of its own bound τ, which is the model of its noise times a constant (κ of abft/threshold.py): what
the texts call z, σ_z = 1/40 … 1/400 of it, is x / σ̂. Rows are cut at √50 σ̂, so that one repaired fault does not look like a
thousand small ones. A block is 32 rows × the groups of a product, or its rows where there are fewer.

The layout is that of ``abft_statistics`` in abft/native/judge.c, and has no place of its own for a unit: on a device there is
one such record per site, role and multiprocessor. Sums only grow; readers take differences, so nobody ever waits for a writer.
"""

from __future__ import annotations

import ctypes

import numpy as np

KINDS = ("e", "one", "hi", "lo")
FIELDS = ("count", "sum", "squares", "most", "above_4", "above_8", "above_12", "above_soft", "blocks", "maxima", "maxima2")
COUNT, SUM, SQUARES, MOST, ABOVE_4, ABOVE_8, ABOVE_12, ABOVE_SOFT, BLOCKS, MAXIMA, MAXIMA2 = range(len(FIELDS))
#: Levels counted, in σ̂; the fourth is the soft threshold.
LEVELS = (4.0, 8.0, 12.0)
#: One check adds no more than this to Σx², in σ̂².
CAP = 50.0
#: Rows of a block.
BLOCK = 32
#: σ̂ of x before anything was seen: κ is 40 to 60 σ of typical noise (docs/explanation/thresholds.md).
PRIOR_SIGMA = 1.0 / 40.0


class _Statistics(ctypes.Structure):
    _fields_ = [
        ("level2", ctypes.c_double * (4 * len(KINDS))),
        ("cap2", ctypes.c_double * len(KINDS)),
        ("kept", ctypes.c_double * (len(KINDS) * len(FIELDS))),
    ]


class Accumulator:
    """What one thread has seen of one site and role. kept: (kinds, fields); level2 (4, kinds) and cap2 (kinds,): squares of what is counted
    above, and of the cut; all float64, where the compiled passes find them."""

    def __init__(self) -> None:
        self._words = _Statistics()
        self.address = ctypes.addressof(self._words)
        self.level2 = np.frombuffer(self._words.level2, np.float64).reshape(4, len(KINDS))
        self.cap2 = np.frombuffer(self._words.cap2, np.float64)
        self.kept = np.frombuffer(self._words.kept, np.float64).reshape(len(KINDS), len(FIELDS))
        self._view = memoryview(self._words.kept).cast("B").cast("d")
        self.scale(np.full(len(KINDS), PRIOR_SIGMA), np.full(len(KINDS), np.inf))

    def scale(self, sigma: np.ndarray, soft: np.ndarray) -> None:
        """Count from now on above multiples of ``sigma`` (kinds,), and above ``soft`` (kinds,), both in units of the bound."""
        for i, level in enumerate(LEVELS):
            self.level2[i] = np.square(level * sigma)
        self.level2[3] = np.square(soft)
        self.cap2[:] = CAP * np.square(sigma)

    @property
    def count(self) -> float:
        """Checks of the first kind so far."""
        return self._view[COUNT]

    def add(self, x: np.ndarray) -> None:
        """Add x (rows, groups, kinds): what judge.c does, for products that are judged elsewhere. NaN counts as the largest."""
        kinds = x.shape[-1]
        if not x.size:
            return
        x2 = np.nan_to_num(np.square(x, dtype=np.float64), nan=np.inf, posinf=np.inf)
        capped = np.minimum(x2, self.cap2[:kinds])
        kept = self.kept[:kinds]
        kept[:, COUNT] += x2.shape[0] * x2.shape[1]
        kept[:, SUM] += (np.sign(np.nan_to_num(x)) * np.sqrt(capped)).sum((0, 1))
        kept[:, SQUARES] += capped.sum((0, 1))
        for i in range(4):
            kept[:, ABOVE_4 + i] += (x2 > self.level2[i, :kinds]).sum((0, 1))
        # What is no number has no place in a moment: the bound's own largest, 1, stands for everything above it.
        maxima = np.minimum(np.maximum.reduceat(x2.max(1), np.arange(0, len(x2), BLOCK), axis=0), 1.0)
        kept[:, MOST] = np.maximum(kept[:, MOST], np.sqrt(maxima.max(0)))
        kept[:, BLOCKS] += len(maxima)
        kept[:, MAXIMA] += np.sqrt(maxima).sum(0)
        kept[:, MAXIMA2] += maxima.sum(0)
