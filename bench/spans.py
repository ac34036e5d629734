"""A marginal unit whose checks span several tiles of other units: how many tiles until it is found, and whether it alone is.

A product of 32 × 32 tiles is dealt to 132 units as the kernels deal it (tiles.tile_of, programs that take tiles in turn), over and
over: a unit has the same partners for ever. Residuals are recorded ones, drawn anew; the residual of a check is the sum of its tiles',
over a bound that is √tiles as wide. What is wrong with a unit is what it adds to *its tile's* part: the bias is 0.1 σ of a tile, 0.05 σ of
a check of four; + 2 % of a tile's noise is + 1 % of such a check's variance.

Information (of normal residuals): n rows tell a shift of d σ from none with n d²/2 nats, and a variance 1 + v from 1 with n v²/4; an
alarm takes h of them. How many rows of its own a unit's rows are worth (A_uu of abft/statistics/unmixing.py) says how many tiles that is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from abft.statistics.accumulators import COUNT, FIELDS, KINDS
from abft.statistics.baseline import WARM_UP
from abft.statistics.cusum import THRESHOLD, shift
from abft.statistics.devices import BATCH
from abft.statistics.monitor import TOGETHER, Monitor
from abft.statistics.unmixing import Shared, unmixed
from bench.marginal import UNITS, tile_sums

#: Row blocks and tiles of columns of the product; row blocks of a column of tiles (Config.tall).
TILES_M, TILES_N, TALL = 32, 32, 8
ROWS = 128
#: Checks that are made of recorded tiles once, of which every batch is drawn.
CHECKS = 8192


def dealt(tiles_m: int, tiles_n: int, units: int) -> np.ndarray:
    """(tiles_m, tiles_n): who computes each tile."""
    index = np.arange(tiles_m * tiles_n)
    first = index // (TALL * tiles_n) * TALL
    height, inside = np.minimum(tiles_m - first, TALL), index % (TALL * tiles_n)
    out = np.empty((tiles_m, tiles_n), int)
    out[first + inside % height, inside // height] = index % units
    return out


@dataclass
class Grid:
    """Draws batches of products. x (T, ROWS, kinds): recorded tiles; span: tiles of a check."""

    x: np.ndarray
    span: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.unit = dealt(TILES_M, TILES_N, UNITS).reshape(-1, self.span)  # (checks, tiles)
        groups = TILES_N // self.span
        self.group = np.eye(groups)[np.tile(np.arange(groups), TILES_M)]
        self.part = np.zeros((len(self.unit), UNITS))
        for tiles in self.unit.T:
            np.add.at(self.part, (np.arange(len(self.unit)), tiles), 1.0)
        assert self.part.max() == 1.0, "a unit has one tile of a check at most"
        self.products = -(-BATCH * UNITS // (TILES_M * TILES_N * ROWS))
        self.sigma, mean = self.x.std((0, 1)), self.x.mean((0, 1))
        drawn = self.x[self.rng.integers(len(self.x), size=(CHECKS, self.span))]  # (checks, tiles, rows, kinds)
        self._total, self._tile = drawn.sum(1), drawn[:, 0] - mean
        self._clean = self._records(0.0, 0.0)
        self._marginal: dict[tuple[float, float], np.ndarray] = {}

    def _records(self, bias: float, noise: float) -> np.ndarray:
        """Of every drawn check (CHECKS, kinds, fields), one tile of which is off."""
        total = self._total + self._tile * noise
        total[..., 0] += bias * self.sigma[0]
        out = np.zeros((CHECKS, len(KINDS), len(FIELDS)))
        for kind in range(total.shape[-1]):
            out[:, kind] = tile_sums(total[..., kind] / np.sqrt(self.span), float(self.sigma[kind]))
        return out

    @property
    def tiles(self) -> float:
        """Of a unit, in a batch."""
        return self.products * TILES_M * TILES_N / UNITS

    def batch(self, unit: int = 0, bias: float = 0.0, noise: float = 0.0) -> Shared:
        """One batch, with a marginal unit: bias in σ of a tile, of e; noise as a factor beyond one, of all kinds, as arithmetic has it."""
        index = self.rng.integers(CHECKS, size=(self.products, len(self.unit)))
        records = self._clean[index]
        if bias or noise:
            if (bias, noise) not in self._marginal:
                self._marginal[bias, noise] = self._records(bias, noise)
            bad = (self.unit == unit).any(1)
            records[:, bad] = self._marginal[bias, noise][index[:, bad]]
        records = records.sum(0)
        n = self.products * ROWS
        sums = (np.tensordot(who.T, records, 1) for who in (self.part, self.group))
        return Shared(*sums, (n * self.part.T @ self.group).astype(np.int32), (n * self.part.T @ self.part).astype(np.int32))

    def worth(self) -> float:
        """Checks of its own that a check of a unit is worth: the median of the units."""
        own, _ = unmixed(self.batch())
        return float(np.median(own[:, 0, COUNT])) / (self.tiles * ROWS)


def learnt(grid: Grid) -> Monitor:
    """A monitor that has seen what is normal."""
    monitor = Monitor(UNITS)
    for _ in range(WARM_UP):
        _add(monitor, grid.batch())
    return monitor


def _add(monitor: Monitor, shared: Shared) -> list[Any]:
    own, alike = unmixed(shared)
    return monitor.add(own, shared.pooled(), alike)


def detection(grid: Grid, monitor: Monitor, bias: float, noise: float, limit: int) -> dict[str, float | None]:
    """Tiles of a marginal unit, drawn by lot, until its first alarm; alarms of others until then."""
    monitor, unit, others = copy.deepcopy(monitor), int(grid.rng.integers(UNITS)), 0
    for batch in range(1, int(limit // grid.tiles) + 1):
        signs = _add(monitor, grid.batch(unit, bias, noise))
        others += sum(s.unit != unit for s in signs)
        if any(s.unit == unit for s in signs):
            return {"tiles": batch * grid.tiles, "others": others}
    return {"tiles": None, "others": others}


def increments(grid: Grid, monitor: Monitor, batches: int) -> np.ndarray:
    """ℓ of the test of all kinds' noise, of sound units, as the monitor computes them."""
    out = []
    for _ in range(batches):
        own, _ = unmixed(grid.batch())
        out.append(shift(monitor.baseline.of_all_kinds(monitor.baseline.shifts(own)[1]), TOGETHER))
    return np.concatenate(out)


def false_signs(grid: Grid, monitor: Monitor, batches: int) -> int:
    """Alarms of sound units."""
    monitor = copy.deepcopy(monitor)
    return sum(len(_add(monitor, grid.batch())) for _ in range(batches))


def least_tiles(grid: Grid, bias: float, noise: float, kinds: int = 1) -> float:
    """What information allows on average: h nats, for normal residuals; of noise in so many kinds of sum, if they were independent."""
    shift, variance = bias / np.sqrt(grid.span), ((1 + noise) ** 2 - 1) / grid.span
    return THRESHOLD / (ROWS * grid.worth() * (shift**2 / 2 + kinds * variance**2 / 4))
