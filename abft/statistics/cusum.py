"""Sequential tests: cumulative sums of log-likelihood ratios, one per unit, that alarm at a threshold h.

    S ← max(0, S + ℓ),   alarm and start anew where S ≥ h

    a shift of 2k standard deviations       ℓ = 2k (u − k)              u = (value − centre) / s of a batch
    a rate of λ₁ instead of λ₀ per check    ℓ = c ln(λ₁/λ₀) − n (λ₁ − λ₀)   c events among n checks (Poisson)

The mean time between false alarms is at least e^h batches where E[e^ℓ] ≤ 1 on clean data (Wald; Lorden 1971), whatever the
distribution; bench/results/statistics.jsonl holds it against recorded residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

#: h. Real increments are skewed: the θ with E[e^θℓ] = 1 lies between 0.69 and 1.29 (bench/results/statistics.jsonl), and e^0.69h
#: batches of 8 tiles leave 132 units at 3e4 tiles a second far below one false alarm a day.
THRESHOLD = 40.0
#: Units that show less of each other's deviations are no rivals: units with checks of their own.
RIVAL = 0.01
#: By how much the S of one has to exceed its rivals': e^−2·APART·u, u being the deviation of a batch (0.25 and more), bounds the
#: probability that the wrong one does (Wald).
APART = 10.0
#: Deviations beyond k that one batch counts for at most: a test of what persists.
MOST = 6.0


@dataclass
class Cusum:
    """S of every unit. levels, began: (units,)

    began: how many batches had passed when the sum that alarmed last left zero, an estimate of when the change came
    (Hinkley, Biometrika 57, 1970); -1 before an alarm.
    """

    units: int
    threshold: float = THRESHOLD
    levels: np.ndarray = field(init=False)
    evidence: np.ndarray = field(init=False)
    began: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.levels, self.evidence = np.zeros(self.units), np.zeros(self.units)
        self.began = np.full(self.units, -1)
        self._left_zero = np.zeros(self.units, np.int64)
        self._batches = np.zeros(1, np.int64)

    def step(self, ratio: np.ndarray) -> np.ndarray:
        """Add the ℓ (units,) of one batch; which units alarm, and start anew."""
        self.add(ratio)
        return self.alarm(self.levels >= self.threshold)

    def add(self, ratio: np.ndarray, evidence: np.ndarray | None = None) -> None:
        """… without an alarm. evidence: ℓ as it would be if one batch counted for whatever it says. In place (lone.py)."""
        np.copyto(self._left_zero, self._batches, where=~(self.levels > 0))
        self._batches += 1
        np.maximum(0.0, self.levels + ratio, out=self.levels)
        self.evidence[:] = np.where(self.levels > 0, self.evidence + (ratio if evidence is None else evidence), 0.0)

    def alarm(self, alarms: np.ndarray) -> np.ndarray:
        """These units alarm, and start anew."""
        self.began[alarms] = self._left_zero[alarms]
        self.start_anew(alarms)
        return alarms

    @property
    def state(self) -> tuple[np.ndarray, ...]:
        """What ``add`` changes, in place: S, its evidence, when it left zero, how many batches."""
        return self.levels, self.evidence, self._left_zero, self._batches

    def start_anew(self, units: np.ndarray) -> None:
        self.levels[units] = self.evidence[units] = 0.0


def alarms_apart(charts: Sequence[Cusum], alike: np.ndarray) -> list[np.ndarray]:
    """The alarms of one chart, or of two for shifts up and down, of units that show a part of each other's deviations.

    alike (U, U): which part of the second's deviation the first shows; negative: in the other direction. A unit alarms when the evidence
    that its S rests on is also ``APART`` above that of everyone like it, who start anew with it: what they showed is explained
    (Nikiforov, IEEE Trans. Inform. Theory 41, 1995: a change is isolated when its likelihood exceeds that of every other). So no more
    alarms than without. Of several units that are off at once the likeliest alarms first, and others when it is gone; between two that
    have the same partners it may be one of these.
    """
    near = np.abs(alike) > RIVAL
    np.fill_diagonal(near, False)
    out = []
    for i, chart in enumerate(charts):
        rivals = np.where(near & (alike > 0), chart.evidence, 0.0).max(1)
        if len(charts) == 2:
            rivals = np.maximum(rivals, np.where(near & (alike < 0), charts[1 - i].evidence, 0.0).max(1))
        out.append((chart.levels >= chart.threshold) & (chart.evidence >= np.where(rivals > 0, rivals + APART, 0.0)))
    explained = near[:, np.logical_or.reduce(out)].any(1)
    for chart, alarms in zip(charts, out, strict=True):
        chart.alarm(alarms)
        chart.start_anew(explained)
    return out


def shift(u: np.ndarray, k: float, most: float = MOST) -> np.ndarray:
    """ℓ of N(2k, 1) against N(0, 1). One batch counts for no more than k + ``most`` deviations."""
    return 2.0 * k * (np.minimum(u, k + most) - k)


def rate(count: np.ndarray, checks: np.ndarray, expected: np.ndarray | float, suspected: np.ndarray | float) -> np.ndarray:
    """ℓ of Poisson counts at ``suspected`` per check against ``expected`` per check."""
    return count * np.log(np.asarray(suspected) / expected) - checks * (np.asarray(suspected) - expected)
