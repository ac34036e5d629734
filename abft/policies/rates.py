"""How often faults strike: a Gamma–Poisson estimate per device, and per site within it, that starts from what fleets have seen.

Rates are faults per second of computing. Faults in E seconds at rate ρ are Poisson(ρE); Gamma is conjugate to that: after k faults
Gamma(a, b) becomes Gamma(a + k, b + E).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

HOUR = 3600.0
#: Silent corruptions per chip-hour between which 90 % of the prior lies: the range that V-ABFT cites for production accelerators (arXiv
#: 2602.08043). Llama 3's pre-training lies in it: 6 in 54 days on 16,384 GPUs (arXiv 2407.21783) are 2.8e-7 that were noticed.
FLEET_RANGE = (1e-7, 1e-3)
#: A count that the estimate so far would produce less often than this ends it: another rate is in force.
SURPRISE = 1e-4
#: Pseudo-faults by which a site leans on its device: a site's own rate counts from its first fault on, and outweighs it after a few.
LEAN = 1.0


@dataclass(frozen=True)
class Gamma:
    """Belief about a rate: shape a (faults seen, and before), exposure b in seconds; mean a / b."""

    shape: float
    exposure: float

    @property
    def mean(self) -> float:
        return self.shape / self.exposure

    def quantile(self, p: float) -> float:
        """The rate that is not exceeded with probability p."""
        from scipy import special

        return float(special.gammaincinv(self.shape, p)) / self.exposure

    def observe(self, faults: float, seconds: float) -> Gamma:
        return Gamma(self.shape + faults, self.exposure + seconds)

    def surprise(self, faults: int, seconds: float) -> float:
        """The probability of a count as high, or as low, whichever is smaller (a negative binomial's: Gamma's predictive of counts)."""
        from scipy import special

        p = self.exposure / (self.exposure + seconds)
        as_low = special.betainc(self.shape, faults + 1, p)
        as_high = special.betaincc(self.shape, faults, p) if faults else 1.0
        return float(min(as_low, as_high))


@cache
def fleet() -> Gamma:
    """The prior: the Gamma of which 5 % lies below ``FLEET_RANGE`` and 5 % above. Of shape 0.35, so a few faults outweigh it."""
    from scipy import optimize, special

    low, high = FLEET_RANGE

    def miss(shape: float) -> float:
        return float(special.gammaincinv(shape, 0.95) / special.gammaincinv(shape, 0.05)) - high / low

    shape = float(optimize.brentq(miss, 0.1, 1.0))
    return Gamma(shape, float(special.gammaincinv(shape, 0.95)) / (high / HOUR))


@dataclass
class Estimate:
    """A device's rate and its sites' own, learnt batch by batch; forgets when the rate has changed.

    Evidence is never discounted by age: a quiet month makes the estimate sure. What makes it forget is surprise: when the batches since the
    last settling are improbable (``SURPRISE``) under all that was settled before, a new regime begins with them, from Jeffreys' prior
    Gamma(1/2, 0) instead of the fleet's. ``regimes`` counts them.
    """

    prior: Gamma = field(default_factory=fleet)
    regimes: int = 0
    _settled: Gamma | None = None
    _recent: tuple[int, float] = (0, 0.0)
    _sites: dict[str, tuple[int, float]] = field(default_factory=dict)  # of this regime

    @property
    def device(self) -> Gamma:
        return (self._settled or self.prior).observe(*self._recent)

    def site(self, name: str) -> Gamma:
        """The site's rate: its own faults, leaning on the device's rate by ``LEAN`` pseudo-faults."""
        return Gamma(LEAN, LEAN / self.device.mean).observe(*self._sites.get(name, (0, 0.0)))

    def faults(self) -> int:
        """Faults of the present regime."""
        return sum(k for k, _ in self._sites.values())

    def observe(self, counts: dict[str, tuple[int, float]]) -> bool:
        """Take in (faults, seconds looked at) per site; True if they ended a regime."""
        faults, seconds = sum(k for k, _ in counts.values()), sum(e for _, e in counts.values())
        if seconds <= 0:
            return False
        settled = self._settled or self.prior
        recent = (self._recent[0] + faults, self._recent[1] + seconds)
        if settled.surprise(*recent) < SURPRISE:
            # What is recent may hold some of the old regime; this batch alone decides if it is as surprising.
            fresh = (faults, seconds) if settled.surprise(faults, seconds) < SURPRISE else recent
            self._settled, self._recent = Gamma(0.5, 1e-12).observe(*fresh), (0, 0.0)
            self._sites = dict(counts)
            self.regimes += 1
            return True
        for name, (k, e) in counts.items():
            before = self._sites.get(name, (0, 0.0))
            self._sites[name] = (before[0] + k, before[1] + e)
        self._recent = recent
        if recent[1] >= settled.exposure / 2:
            self._settled, self._recent = settled.observe(*recent), (0, 0.0)
        return False
