"""The second detector of one site and role: batches in, alarms out.

Tests of batches: the mean of x (both ways) and the variance, of the checksums e and one (e does not see what shifts a whole row,
one does), and the rates above 8 σ̂ and 12 σ̂, of all kinds. What a lone unit's *mean* says is hardware; its variance and its
outliers may be data, and a soft threshold passed is one row: these ask people to look. What sets one unit apart from its peers
is the unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from abft.statistics.accumulators import ABOVE_8, ABOVE_12, COUNT, FIELDS, KINDS, MOST
from abft.statistics.baseline import RATIO, Baseline, moments
from abft.statistics.cusum import Cusum, rate, shift
from abft.statistics.severity import Budget, Severity

#: Kinds whose means and variances are tested: e, and one.
TESTED = (0, 1)
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
        self._noise = [Cusum(self.units) for _ in TESTED]
        self._rates = [Cusum(self.units) for _ in (8, 12)]

    def add(self, batch: np.ndarray, pooled: np.ndarray | None = None) -> list[Sign]:
        """One batch; the signs of those units whose tests alarm. pooled (kinds, fields): of all checks, where units share them."""
        if pooled is None:
            pooled = batch.sum(0)
            pooled[:, MOST] = batch[..., MOST].max(0)
        for total, more in ((self.total, batch), (self.pooled, pooled)):
            most = np.maximum(total[..., MOST], more[..., MOST])
            total += more
            total[..., MOST] = most
        self.last, self.compared = pooled, int((batch[:, 0, COUNT] > 0).sum())
        if not self.baseline.frozen:
            self.baseline.learn(batch, pooled)
            return []
        return self._test(batch)

    def _test(self, batch: np.ndarray) -> list[Sign]:
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
            alarms = self._up[i].step(shift(u, k)) | self._down[i].step(shift(-u, k))
            signs += self._signs("bias", alarms, off, True)
            centre = base.noise[kind] if base.alone else float(np.median(noise[there, kind]))
            alarms = self._noise[i].step(shift(noise_u[:, kind], float(noise_k[kind])))
            signs += self._signs("noise", alarms, np.exp(noise[:, kind] - centre), not base.alone)
        for test, (expected, suspected), at in zip(self._rates, base.rates, (ABOVE_8, ABOVE_12), strict=True):
            count, checks = batch[:, :, at].max(1), batch[:, 0, COUNT]
            normal = np.maximum(expected, _peers_rate(count, checks))
            alarms = test.step(rate(count, checks, normal, np.maximum(suspected, RATIO * normal)))
            signs += self._signs("outliers", alarms, count / np.maximum(checks, 1.0), not base.alone)
        return signs

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

    def note(self, severity: Severity, rows: int = 1) -> None:
        """Count rows beyond their bound (S2 to S4)."""
        self.severities[severity] = self.severities.get(severity, 0) + rows


def _peers_rate(count: np.ndarray, checks: np.ndarray) -> np.ndarray:
    """Events per check of all the other units in the same batch, times two for what so few can tell; zero for a lone unit."""
    others = checks.sum() - checks
    return 2.0 * (count.sum() - count) / np.maximum(others, 1.0)
