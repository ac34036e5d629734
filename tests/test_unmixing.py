"""Units that share checks and columns: what is a unit's own is told from its partners' and its columns', by the thresholds in force."""

from __future__ import annotations

import numpy as np
import pytest

from abft.statistics.accumulators import ABOVE_4, COUNT, FIELDS, KINDS, SQUARES, SUM
from abft.statistics.baseline import WARM_UP
from abft.statistics.monitor import Monitor
from abft.statistics.unmixing import Shared, unmixed

SIGMA, ROWS = 0.02, 128


def grid(units: int, tiles_m: int, tiles_n: int, per_group: int, tall: int = 8) -> list[tuple[int, list[int]]]:
    """(group, units of its tiles) of every check's block, as persistent programs take tiles in columns of ``tall`` row blocks."""
    unit = {}
    for index in range(tiles_m * tiles_n):
        first = index // (tall * tiles_n) * tall
        height = min(tiles_m - first, tall)
        inside = index % (tall * tiles_n)
        unit[first + inside % height, inside // height] = index % units
    columns = range(0, tiles_n, per_group)
    return [(g, [unit[m, n] for n in range(at, min(at + per_group, tiles_n))]) for m in range(tiles_m) for g, at in enumerate(columns)]


def batch(rng, design, units: int, effects: np.ndarray, bias: np.ndarray, noise: np.ndarray, times: int = 1) -> Shared:
    """Sums of e of heavy-tailed residuals: every group has a mean of its own, every unit adds its part."""
    part = np.array([np.bincount(mine, minlength=units) for _, mine in design * times], float)
    group = np.eye(len(effects))[[g for g, _ in design * times]]
    scale = np.sqrt(part @ noise**2 / part.sum(1)) * np.sqrt(4 / 6)
    x = SIGMA * (rng.standard_t(6, (len(part), ROWS)) * scale[:, None] + (group @ effects + part @ bias)[:, None])
    records = np.zeros((len(part), len(KINDS), len(FIELDS)))
    records[:, 0, COUNT], records[:, 0, SUM], records[:, 0, SQUARES] = ROWS, x.sum(1), (x * x).sum(1)
    for i, level in enumerate((4, 8, 12)):
        records[:, 0, ABOVE_4 + i] = (abs(x) > level * SIGMA).sum(1)
    sums = (np.tensordot(who.T, records, 1) for who in (part, group))
    return Shared(*sums, (ROWS * part.T @ group).astype(np.int32), (ROWS * part.T @ part).astype(np.int32))


@pytest.mark.parametrize("per_group", [1, 2, 4])
def test_a_unit_is_told_from_its_columns_and_is_likeliest_among_its_partners(per_group):
    """The effects of groups are several times the bias that is looked for, and a grid gives a unit few of them."""
    rng, units, bad = np.random.default_rng(0), 22, 7
    design = grid(units, 24, 8, per_group)
    effects = rng.standard_normal(8 // per_group)
    bias = np.zeros(units)
    bias[bad] = 0.25
    shared = batch(rng, design, units, effects, bias, np.ones(units), times=12)
    own, alike = unmixed(shared)
    there = own[:, 0, COUNT] > 0
    assert there.all()
    found = own[:, 0, SUM] / own[:, 0, COUNT] / SIGMA
    certain = 1 / np.sqrt(own[:, 0, COUNT])
    # What one unit adds shows in those like it, by as much as they are.
    expected = bias[bad] * alike[:, bad] * certain / certain[bad]
    off = found - expected
    assert np.all(abs(off - np.median(off)) < 5 * certain)
    deviations = (found - np.median(found)) / certain
    assert np.argmax(deviations) == bad and deviations[bad] > 4
    # Nearly all that a check says is used.
    assert np.median(own[:, 0, COUNT] / np.diag(shared.pairs)) > 0.6
    raw = shared.units[:, 0, SUM] / shared.units[:, 0, COUNT] / SIGMA
    assert np.ptp(np.delete(raw, bad)) > bias[bad]  # their own sums set innocent units further apart


@pytest.mark.parametrize(("per_group", "bias", "noise"), [(2, 0.3, 1.3), (4, 0.3, 1.6), (4, -2.0, 3.0)])
def test_only_the_marginal_unit_alarms_though_it_shares_its_checks(per_group, bias, noise):
    """Thresholds in force; bias, noise, small and so large that every batch says as much as it may; partners stay silent."""
    rng, units, bad = np.random.default_rng(1), 22, 7
    design, effects = grid(units, 24, 8, per_group), np.random.default_rng(2).standard_normal(8 // per_group) * 0.1
    none, same = np.zeros(units), np.ones(units)
    m = Monitor(units)

    def signs(count: int, bias: np.ndarray, noise: np.ndarray) -> set[tuple[str, int, bool]]:
        out = set()
        for _ in range(count):
            shared = batch(rng, design, units, effects, bias, noise)
            own, alike = unmixed(shared)
            out |= {(s.test, s.unit, s.quarantine) for s in m.add(own, shared.pooled(), alike)}
        return out

    assert signs(WARM_UP + 100, none, same) == set()
    assert m.baseline.frozen and m.pooled[0, COUNT] == (WARM_UP + 100) * len(design) * ROWS
    biased = none.copy()
    biased[bad] = bias
    assert signs(100, biased, same) == {("bias", bad, True)}
    loud = same.copy()
    loud[bad] = noise
    found = signs(100, none, loud)
    assert {unit for _, unit, _ in found} == {bad} and "noise" in {test for test, _, _ in found}


def test_noise_of_all_kinds_is_found_where_no_kind_shows_it():
    """Arithmetic that is noisier is so in every sum: four kinds together say in fewer batches what none says alone."""
    rng, units, bad = np.random.default_rng(4), 16, 3
    m = Monitor(units)
    rows = 8192

    def drawn(louder: float) -> np.ndarray:
        out = np.zeros((units, len(KINDS), len(FIELDS)))
        out[..., COUNT] = rows
        scale = np.ones(units)
        scale[bad] += louder
        out[..., SUM] = SIGMA * np.sqrt(rows) * rng.standard_normal((units, len(KINDS)))
        out[..., SQUARES] = SIGMA**2 * scale[:, None] ** 2 * (rows + np.sqrt(2 * rows) * rng.standard_normal((units, len(KINDS))))
        return out

    for _ in range(WARM_UP + 50):
        assert m.add(drawn(0.0)) == []
    assert 0.4 < m.baseline.together < 0.6  # four independent kinds
    told = next(signs for _ in range(300) if (signs := m.add(drawn(0.006))))
    assert {(s.unit, s.test, s.quarantine) for s in told} == {(bad, "noise", True)}
    *each, together = m.charts("noise")
    assert together.began[bad] >= 0 and all(chart.began.max() == -1 for chart in each)


def test_what_cannot_be_compared_is_not():
    """A unit with columns to itself, two that share every check, two alone with a group: nobody can tell; the rest goes on."""
    rng = np.random.default_rng(3)
    design = [(0, [0]), *((1, [u]) for u in (1, 2, 3, 4)), (2, [5, 6]), (1, [5, 6]), (3, [7]), (3, [8])]
    bias = np.zeros(9)
    bias[[0, 2, 5]] = 5.0
    own, _ = unmixed(batch(rng, design, 9, np.array([0, 1.0, -2.0, 0]), bias, np.ones(9), times=20))
    assert (own[:, 0, COUNT] > 0).tolist() == [False, True, True, True, True, False, False, False, False]
    found = own[1:5, 0, SUM] / own[1:5, 0, COUNT] / SIGMA
    assert np.argmax(found) == 1 and found[1] - np.median(found) > 4
    m = Monitor(9)
    for _ in range(WARM_UP + 50):
        shared = batch(rng, design, 9, np.zeros(4), np.zeros(9), np.ones(9))
        own, alike = unmixed(shared)
        assert m.add(own, shared.pooled(), alike) == []
    assert np.isfinite(m.baseline.mean_deviation[0])
