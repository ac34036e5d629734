"""A marginal unit among 132 that are sound: tiles of recorded residuals, drawn anew for every unit and batch.

Time to find it: the tests of abft/statistics as they are, on batches of 8 tiles. Time between false alarms: by importance sampling
under the exponential change of measure (Siegmund, Sequential Analysis, 1985, chapters II and X), because nothing can be
simulated for 10¹³ batches: from the recorded increments ℓ of a test, θ with E[e^θℓ] = 1; cycles of the test under the changed
measure reach h often, and e^−θS weighs them; false alarms per batch = P(a cycle reaches h) / E[length of a cycle].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from abft.statistics import cusum
from abft.statistics.accumulators import ABOVE_4, BLOCKS, CAP, COUNT, FIELDS, KINDS, LEVELS, MAXIMA, MAXIMA2, MOST, SQUARES, SUM
from abft.statistics.baseline import REFERENCE, WARM_UP
from abft.statistics.monitor import Monitor

UNITS, TILES = 132, 8
TILES_PER_SECOND = 3e4  # of one unit
#: Tests of shifts that run at once: the mean both ways and the variance, of e and one.
CHARTS = {"bias": 4, "noise": 2}


def tile_sums(x: np.ndarray, sigma: float) -> np.ndarray:
    """Every tile (T, 128) summed as the accumulators do: (T, fields)."""
    out = np.zeros((len(x), len(FIELDS)))
    cut = np.clip(x, -np.sqrt(CAP) * sigma, np.sqrt(CAP) * sigma)
    most = np.abs(x).max(1)
    out[:, COUNT], out[:, SUM], out[:, SQUARES], out[:, MOST] = x.shape[1], cut.sum(1), (cut**2).sum(1), most
    for i, level in enumerate(LEVELS):
        out[:, ABOVE_4 + i] = (np.abs(x) > level * sigma).sum(1)
    out[:, BLOCKS], out[:, MAXIMA], out[:, MAXIMA2] = 1, most, most**2
    return out


@dataclass
class Fleet:
    """Draws batches (units, kinds, fields) from recorded tiles. ``one`` has the tiles of another draw of the same pool."""

    x: np.ndarray  # (T, 128)
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.sigma = float(self.x.std())
        self.clean = tile_sums(self.x, self.sigma)

    def batch(self, marginal: np.ndarray | None = None, unit: int = 0) -> np.ndarray:
        out = np.zeros((UNITS, len(KINDS), len(FIELDS)))
        for kind in (0, 1):
            drawn = self.rng.integers(len(self.x), size=(UNITS, TILES))
            out[:, kind] = self.clean[drawn].sum(1)
            if marginal is not None and kind == 0:
                out[unit, kind] = marginal[drawn[unit]].sum(0)
        return out


def detection(
    x: np.ndarray, defect: str, size: float, trials: int, rng: np.random.Generator, limit: int = 10_000
) -> list[dict[str, float | None]]:
    """Tiles of the marginal unit until its alarm, and what other units said meanwhile."""
    out = []
    for _ in range(trials):
        fleet, unit = Fleet(x, rng), int(rng.integers(UNITS))
        bad = fleet.x + size * fleet.sigma if defect == "bias" else fleet.x.mean() + (fleet.x - fleet.x.mean()) * (1 + size)
        marginal, monitor = tile_sums(bad, fleet.sigma), Monitor(UNITS)
        others = 0
        for _ in range(WARM_UP):
            monitor.add(fleet.batch())
        tiles: float | None = None
        for batch in range(1, limit // TILES + 1):
            signs = monitor.add(fleet.batch(marginal, unit))
            others += sum(s.unit != unit for s in signs)
            if any(s.unit == unit for s in signs):
                tiles = batch * TILES
                break
        out.append({"tiles": tiles, "others": others})
    return out


def increments(x: np.ndarray, batches: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """ℓ of the tests of e on clean fleets, as the monitor computes them."""
    fleet, monitor = Fleet(x, rng), Monitor(UNITS)
    for _ in range(WARM_UP):
        monitor.add(fleet.batch())
    up, noise = [], []
    for _ in range(batches):
        u, v = monitor.baseline.shifts(fleet.batch())
        up.append(u[:, 0])
        noise.append(v[:, 0])
    u, v = np.concatenate(up), np.concatenate(noise)
    return {"bias": np.concatenate([cusum.shift(u, REFERENCE), cusum.shift(-u, REFERENCE)]), "noise": cusum.shift(v, REFERENCE)}


def false_alarms(steps: np.ndarray, rng: np.random.Generator, cycles: int = 20_000, h: float = cusum.THRESHOLD) -> dict[str, float]:
    """Of one test with these increments: θ, batches between false alarms (ARL₀) with its 95 % interval from the simulation."""
    theta = float(brentq(lambda t: np.log(np.mean(np.exp(t * steps))), 0.05, 20.0))
    weights = np.exp(theta * steps)
    cumulative = np.cumsum(weights / weights.sum())
    # Cycles under the changed measure: from 0, until S ≥ h (an alarm) or S ≤ 0.
    level, alive, reached = np.zeros(cycles), np.ones(cycles, bool), np.zeros(cycles)
    while alive.any():
        drawn = np.minimum(np.searchsorted(cumulative, rng.random(int(alive.sum()))), len(steps) - 1)
        level[alive] += steps[drawn]
        done = alive & (level >= h)
        reached[done] = np.exp(-theta * level[done])
        alive &= (level > 0) & (level < h)
    # Lengths of cycles on clean data.
    length, level, alive = np.zeros(cycles), np.zeros(cycles), np.ones(cycles, bool)
    while alive.any():
        level[alive] += rng.choice(steps, int(alive.sum()))
        length[alive] += 1
        alive &= (level > 0) & (level < h)
    p, error = float(reached.mean()), float(reached.std() / np.sqrt(cycles))
    mean = float(length.mean())
    return {"theta": theta, "arl": mean / p, "low": mean / (p + 1.96 * error), "high": mean / max(p - 1.96 * error, 1e-300)}


def per_day(arl: float, charts: int) -> float:
    """False quarantines a day of so many tests on every unit."""
    return UNITS * charts * TILES_PER_SECOND / TILES * 86_400 / arl
