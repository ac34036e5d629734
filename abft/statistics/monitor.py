"""The second detector of one site and role: batches in, alarms out.

Tests of batches: the mean of x (both ways) and the variance, of the checksums e and one (e does not see what shifts a whole row,
one does), of peers the variance of all kinds together, and the rates above 8 σ̂ and 12 σ̂, of all kinds. What a lone unit's *mean*
says is hardware; its variance and its outliers may be data, and a soft threshold passed is one row: these ask people to look. What sets
one unit apart from its peers is the unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from abft.statistics.accumulators import ABOVE_8, ABOVE_12, COUNT, FIELDS, KINDS, MOST
from abft.statistics.baseline import RATIO, Baseline, moments
from abft.statistics.cusum import Cusum, alarms_apart, rate, shift
from abft.statistics.severity import Budget, Severity

#: Kinds whose means and variances are tested: e, and one.
TESTED = (0, 1)
#: k of the variance of all kinds: what one kind shows as 0.5 deviations, the k that it is tuned to, four show as 1.
TOGETHER = 0.5
TESTS = ("bias", "noise", "outliers")


@dataclass(frozen=True)
class Sign:
    """A test that alarmed. deviation: of the mean in σ̂, of the variance as a factor, or outliers per check; in the last batch."""

    test: str
    unit: int
    deviation: float
    quarantine: bool
    checks: float  # of the unit's, when it alarmed


@dataclass
class Monitor:
    """Learns what is normal, then tests every batch (units, kinds, fields)."""

    units: int = 1
    baseline: Baseline = field(default=None)  # type: ignore[assignment]
    budget: Budget = field(default_factory=Budget)
    severities: dict[Severity, int] = field(default_factory=dict)
    weighs: bool = True  # whether anybody weighs rows beyond their bound

    def __post_init__(self) -> None:
        if self.baseline is None:
            self.baseline = Baseline(self.units)
        self.total = np.zeros((self.units, len(KINDS), len(FIELDS)))
        #: Of all checks, each once: so far, and of the last batch.
        self.pooled = np.zeros((len(KINDS), len(FIELDS)))
        self.last = np.zeros_like(self.pooled)
        self.compared = 0  # units that the last batch could tell something about
        self._told: dict[tuple[str, int], float] = {}
        self._up = [Cusum(self.units) for _ in TESTED]
        self._down = [Cusum(self.units) for _ in TESTED]
        self._noise = [Cusum(self.units) for _ in (*TESTED, "together")]
        self._rates = [Cusum(self.units) for _ in (8, 12)]

    def add(self, batch: np.ndarray, pooled: np.ndarray | None = None, alike: np.ndarray | None = None) -> list[Sign]:
        """One batch; the signs of those units whose tests alarm. Where units share checks (unmixing.py): pooled (kinds, fields) of all
        checks; alike (units, units), how much of each other's deviations they show."""
        if pooled is None:
            pooled = batch.sum(0)
            pooled[:, MOST] = batch[..., MOST].max(0)
        for total, more in ((self.total, batch), (self.pooled, pooled)):
            most = np.maximum(total[..., MOST], more[..., MOST])
            total += more
            total[..., MOST] = most
        self.last[:], self.compared = pooled, int((batch[:, 0, COUNT] > 0).sum())
        if not self.baseline.frozen:
            self.baseline.learn(batch, pooled)
            return []
        return self._test(batch, np.eye(self.units) if alike is None else alike)

    def _test(self, batch: np.ndarray, alike: np.ndarray) -> list[Sign]:
        base = self.baseline
        mean_u, noise_u = base.shifts(batch)
        mean_k, noise_k = base.references()
        mean, noise = moments(batch)
        there = batch[:, 0, COUNT] > 0
        signs: list[Sign] = []
        for i, kind in enumerate(TESTED):
            if not batch[:, kind, COUNT].any():
                continue
            centre = base.mean[kind] if base.alone else float(np.median(mean[there, kind]))
            off = (mean[:, kind] - centre) / base.sigma[kind]
            u, k = mean_u[:, kind], float(mean_k[kind])
            self._add_shift(self._up[i], u, k)
            self._add_shift(self._down[i], -u, k)
            up, down = alarms_apart((self._up[i], self._down[i]), alike)
            signs += self._signs("bias", up | down, off, True)
            centre = base.noise[kind] if base.alone else float(np.median(noise[there, kind]))
            self._add_shift(self._noise[i], noise_u[:, kind], float(noise_k[kind]))
            (alarms,) = alarms_apart((self._noise[i],), alike)
            signs += self._signs("noise", alarms, np.exp(noise[:, kind] - centre), not base.alone)
        if not base.alone:
            self._add_shift(self._noise[-1], base.of_all_kinds(noise_u), TOGETHER)
            (alarms,) = alarms_apart(self._noise[-1:], alike)
            off = np.exp((noise - np.median(noise[there], 0) if there.any() else np.zeros_like(noise)).mean(1))
            signs += self._signs("noise", alarms, off, True)
        for test, (expected, suspected), at in zip(self._rates, base.rates, (ABOVE_8, ABOVE_12), strict=True):
            count, checks = batch[:, :, at].max(1), batch[:, 0, COUNT]
            normal = np.maximum(expected, _peers_rate(count, checks))
            test.add(rate(count, checks, normal, np.maximum(suspected, RATIO * normal)))
            (alarms,) = alarms_apart((test,), alike)
            signs += self._signs("outliers", alarms, count / np.maximum(checks, 1.0), not base.alone)
        return signs

    @staticmethod
    def _add_shift(chart: Cusum, u: np.ndarray, k: float) -> None:
        chart.add(shift(u, k), shift(u, k, np.inf))

    def _signs(self, test: str, alarms: np.ndarray, deviation: np.ndarray, quarantine: bool) -> list[Sign]:
        return [Sign(test, int(u), float(deviation[u]), quarantine, float(self.total[u, 0, COUNT])) for u in np.flatnonzero(alarms)]

    def is_news(self, sign: Sign) -> bool:
        """Whether to tell it: what persists alarms again and again, and is told each time the residuals have doubled."""
        key = sign.test, sign.unit
        if sign.checks < self._told.get(key, 0.0):
            return False
        self._told[key] = 2.0 * sign.checks
        return True

    def levels(self) -> dict[str, float]:
        """The highest S of every test, of its threshold: 1 is an alarm."""
        tests = {"bias": self._up + self._down, "noise": self._noise, "outliers": self._rates}
        return {name: max(float(c.levels.max()) / c.threshold for c in charts) for name, charts in tests.items()}

    def charts(self, test: str) -> list[Cusum]:
        """The sums of a test."""
        return {"bias": self._up + self._down, "noise": self._noise, "outliers": self._rates}[test]

    def charts_of_mean(self, sign: int) -> list[Cusum]:
        """Of the mean, up (1) or down (-1)."""
        return self._up if sign > 0 else self._down

    def note(self, severity: Severity, rows: int = 1) -> None:
        """Count rows beyond their bound (S2 to S4)."""
        self.severities[severity] = self.severities.get(severity, 0) + rows


def _peers_rate(count: np.ndarray, checks: np.ndarray) -> np.ndarray:
    """Events per check of all the other units in the same batch, times two for what so few can tell; zero for a lone unit."""
    others = checks.sum() - checks
    return 2.0 * (count.sum() - count) / np.maximum(others, 1.0)
