"""Envelopes: the range in which a measure of a module's output stays, learnt from samples that depend on each other.

    measures    mean / rms · ln rms · ln max |y| · share of NaN and Inf
    range       m ± s √(1 + 1/n′) t(1 − p/2, n′ − 1),     n′ = n (1 − ρ) / (1 + ρ)

m, s, ρ: mean, standard deviation and lag-one correlation of the n samples; p: the stated probability that a clean sample leaves
the range. It is the prediction interval of Student's t for one more sample of an AR(1) process, so few or dependent samples widen it by
themselves. A non-finite share where calibration saw none needs no statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abft import encoding
from abft.native import library

MEASURES = ("mean", "rms", "max", "nonfinite")
MEAN, RMS, MAX, NONFINITE = range(len(MEASURES))
#: Probability that one clean sample of one measure leaves its range.
FALSE_ALARM = 1e-6
#: No range is narrower than this (of the ratio, or of a logarithm): rounding is no event.
LEAST = 1e-3
#: Independent samples a range needs, in n′.
LEAST_SAMPLES = 4.0
_TINY = 1e-30


def measure(y: Tensor) -> Tensor:
    """(mean, rms, max |y|, non-finite share) of the finite elements of y, fp32 (4,), on its device; nothing waits.

    One pass where the compiled one runs (abft/native/measure.c), on a CPU; torch's own elsewhere.
    """
    y = y.detach()
    return _measured(y) if _is_plain(y) else _measured_in_torch(y)


def _is_plain(y: Tensor) -> bool:
    return y.is_cpu and y.dtype in encoding.DTYPES and y.is_contiguous() and y.numel() > 0 and library.functions() is not None


def _measured(y: Tensor) -> Tensor:
    out = np.empty(4)
    functions = library.functions()
    assert functions is not None
    functions.abft_measure(y.data_ptr(), y.numel(), encoding.DTYPES[y.dtype], out.ctypes.data)
    count = max(y.numel() - out[3], 1.0)
    return torch.tensor([out[0] / count, math.sqrt(out[1] / count), out[2], out[3] / y.numel()], dtype=torch.float32, device="cpu")


def _measured_in_torch(y: Tensor) -> Tensor:
    y = y.float() if y.dtype.itemsize < 4 or not y.is_floating_point() else y
    finite = torch.isfinite(y)
    kept = torch.where(finite, y, torch.zeros((), dtype=y.dtype, device=y.device))
    count = finite.sum().clamp(min=1)
    most = kept.abs().amax() if y.numel() else kept.sum()
    # Scaled by the maximum: squares of what fits into fp32 need not.
    scale = most.clamp(min=_TINY)
    rms = scale * ((kept / scale).square().sum() / count).sqrt()
    return torch.stack([kept.sum() / count, rms, most, 1.0 - finite.sum() / max(y.numel(), 1)]).float()


def transformed(measures: np.ndarray) -> np.ndarray:
    """What ranges are of: (…, 4) measures as (mean/rms, ln rms, ln max, share)."""
    m = np.asarray(measures, np.float64)
    size = np.maximum(m[..., RMS], _TINY)
    return np.stack([m[..., MEAN] / size, np.log(size), np.log(np.maximum(m[..., MAX], _TINY)), m[..., NONFINITE]], -1)


@dataclass(frozen=True)
class Envelope:
    """The range of every measure, transformed: low and high (4,)."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    samples: int
    p: float

    def outside(self, measures: Sequence[float] | np.ndarray) -> list[tuple[str, float]]:
        """(measure, how many half-widths beyond the middle) of those outside; empty for a clean output."""
        out = []
        for name, value, low, high in zip(MEASURES, transformed(np.asarray(measures)), self.low, self.high, strict=True):
            if not low <= value <= high:
                half = max((high - low) / 2, LEAST)
                out.append((name, float((value - (low + high) / 2) / half)))
        return out


def learn(samples: np.ndarray, p: float = FALSE_ALARM) -> Envelope | None:
    """The envelope of samples (n, 4), in the order they were taken; None while they are too few, or too dependent, to say anything."""
    from scipy.stats import t

    values = transformed(samples)
    n = len(values)
    if n < LEAST_SAMPLES:
        return None
    low: list[float] = []
    high: list[float] = []
    for i in range(len(MEASURES)):
        of_measure = values[:, i]
        deviation = float(of_measure.std(ddof=1))
        independent = n * (1 - (rho := _correlation(of_measure))) / (1 + rho)
        if independent < LEAST_SAMPLES:
            return None
        reach = deviation * math.sqrt(1 + 1 / independent) * float(t.ppf(1 - p / 2, independent - 1))
        middle = float(of_measure.mean())
        if i == NONFINITE and not of_measure.any():
            low, high = [*low, 0.0], [*high, 0.0]
        else:
            low, high = [*low, middle - max(reach, LEAST)], [*high, middle + max(reach, LEAST)]
    return Envelope(tuple(low), tuple(high), n, p)


def _correlation(values: np.ndarray) -> float:
    """Lag-one correlation, never below zero: what alternates is not more than independent."""
    centred = values - values.mean()
    power = float((centred**2).sum())
    return 0.0 if power == 0 else min(0.98, max(0.0, float((centred[1:] * centred[:-1]).sum()) / power))
