"""How grave a deviation is, from the residual alone: S0 to S4, and the budget of what may be left as it is.

    S0   |x| ≤ u_soft                      statistics only
    S1   u_soft < |x| ≤ 1                  counted: no clean residual looks like it, though rounding could explain it
    S2   τ < |d|, |d| + τ/5 ≤ 10⁻³ ‖y‖     beyond its bound, one element, and too small to harm
    S3   above                             repaired
    S4   not finite, or inconsistent       repaired: several rows, or sums that no single element explains

10⁻³ of the row's L2 norm is harm as abft's campaigns define it (docs/explanation/fault-model.md); τ/5 is 8 σ of the residual's own
noise (κ is 40 σ). ReaLM (arXiv 2503.24053) judges by the same quantity. Only a single error has a size that one residual tells:
sums of several may cancel, so S2 asks that the located column explains every sum, that the sums in which every column weighs 1
(e, one) agree on the size, and that the element there, computed once more in fp64, is off by as much: errors that are powers of two and
lie sixteen columns apart, as a faulty lane's do, have sums like those of one element, which is right. What is weighted by a column's
place (hi, lo) has a bound of its own, tens of times wider where a group spans a row: it tells where an error is, not how large.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

#: Relative L2 change of an output row from which a fault is harmful.
HARMFUL = 1e-3
#: The residual's own noise, of its bound.
NOISE = 0.2


class Severity(IntEnum):
    """The classes above; the greater, the graver."""

    S0 = 0
    S1 = 1
    S2 = 2
    S3 = 3
    S4 = 4


def of_suspect(residual: np.ndarray, bound: np.ndarray, error: float, row_norm2: float) -> Severity:
    """Of one row beyond its bound. residual, bound: (groups, kinds) of e and one; error: what the one located element of this row is off
    by, NaN if none explains what its place says; row_norm2: ‖y‖²."""
    size, noise = abs(residual), NOISE * bound
    worst = max(float(np.max(size + noise)), abs(error))
    if not (np.isfinite(worst) and np.isfinite(error) and np.isfinite(row_norm2)):
        return Severity.S4
    struck = int(np.argmax(size.max(-1)))
    if np.any(abs(size[struck] - abs(error)) > noise[struck]):
        return Severity.S4  # several errors, which cancel in some sums
    return Severity.S2 if worst * worst <= HARMFUL * HARMFUL * row_norm2 else Severity.S3


@dataclass
class Budget:
    """How many harmless deviations (S2) a site may leave unrepaired: a bucket of ``burst`` rows, refilled by ``rate`` per check.

    A site that leaves more is not hit by chance, and its rows are repaired again until the bucket has filled.
    """

    burst: float = 8.0
    rate: float = 1e-6
    left: float = 8.0
    seen: float = 0.0

    def take(self, checks: float) -> bool:
        """Whether one more may be left, after ``checks`` checks of the site in all."""
        self.left = min(self.burst, self.left + self.rate * max(0.0, checks - self.seen))
        self.seen = max(self.seen, checks)
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True
