"""Sequential tests: cumulative sums of log-likelihood ratios, one per unit, that alarm at a threshold h.

    S ← max(0, S + ℓ),   alarm and start anew where S ≥ h

    a shift of 2k standard deviations       ℓ = 2k (u − k)              u = (value − centre) / s of a batch
    a rate of λ₁ instead of λ₀ per check    ℓ = c ln(λ₁/λ₀) − n (λ₁ − λ₀)   c events among n checks (Poisson)

The mean time between false alarms is at least e^h batches where E[e^ℓ] ≤ 1 on clean data (Wald; Lorden 1971), whatever the
distribution; bench/results/statistics.jsonl holds it against recorded residuals.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

#: h. Real increments are skewed: the θ with E[e^θℓ] = 1 lies between 0.92 and 1.26 (bench/results/statistics.jsonl), and e^0.92h
#: batches of 8 tiles leave 132 units at 3e4 tiles a second far below one false alarm a day.
THRESHOLD = 40.0


@dataclass
class Cusum:
    """S of every unit. levels, began: (units,)

    began: how many batches had passed when the sum that alarmed last left zero, an estimate of when the change came
    (Hinkley, Biometrika 57, 1970); -1 before an alarm.
    """

    units: int
    threshold: float = THRESHOLD
    levels: np.ndarray = field(init=False)
    began: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.levels = np.zeros(self.units)
        self.began = np.full(self.units, -1)
        self._left_zero = np.zeros(self.units, int)
        self._batches = 0

    def step(self, ratio: np.ndarray) -> np.ndarray:
        """Add the ℓ (units,) of one batch; which units alarm, and start anew."""
        self._left_zero = np.where(self.levels > 0, self._left_zero, self._batches)
        self._batches += 1
        self.levels = np.maximum(0.0, self.levels + ratio)
        alarms = self.levels >= self.threshold
        self.began[alarms] = self._left_zero[alarms]
        self.levels[alarms] = 0.0
        return alarms


def shift(u: np.ndarray, k: float) -> np.ndarray:
    """ℓ of N(2k, 1) against N(0, 1). One batch counts for no more than k + 6 deviations: a test of what persists."""
    return 2.0 * k * (np.minimum(u, k + 6.0) - k)


def rate(count: np.ndarray, checks: np.ndarray, expected: np.ndarray | float, suspected: np.ndarray | float) -> np.ndarray:
    """ℓ of Poisson counts at ``suspected`` per check against ``expected`` per check."""
    return count * np.log(np.asarray(suspected) / expected) - checks * (np.asarray(suspected) - expected)
