"""Which tiles a product takes: quickest by an independent simulation, none that would need another panel; repaired whichever they are."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import oracles
import pytest
import torch
from abft.triton_kernels import configs, tile_time
from kernel_harness import DEVICE, DTYPES, NULLIFY, Strike, assert_right, at, operands, run

from abft.backends import triton as backend
from abft.faults import BitOperation
from bench import audited, predictions
from bench.results import FOLDER

FLOATS = [key for key in configs.CONFIGS if key[1] != "int8"]
CHOOSING = [key for key, table in configs.CONFIGS.items() if len(table) > 1]
ROWS = (65, 128, 300, 512, 2048, 8192)
SHAPES = [(1024, 4096), (4096, 4096), (577, 300), (384, 384), (1536, 384), (40, 24), (14336, 4096)]


def plan(architecture, kind, m, n, k, group=None, **where):
    dtype = torch.bfloat16 if kind == "16-bit" else torch.float32
    return backend.plan(n, k, dtype, architecture, kind == "tf32", "full", group, m, **where)


def name(config):
    return config.bm, config.bn


# --- the table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind"), configs.CONFIGS, ids=str)
def test_candidates_differ_in_tiles_and_not_in_arithmetic(architecture, kind):
    first, *others = configs.CONFIGS[architecture, kind]
    for c in others:
        assert (c.bk, c.precision, c.descriptors, c.resident) == (first.bk, first.precision, first.descriptors, first.resident)
        assert c.bm * c.bn < first.bm * first.bn and first.bn % c.bn == 0
    if (architecture, kind) in configs.DECODE:
        assert {c.bk for c in configs.DECODE[architecture, kind]} == {first.bk}
    if architecture == 90 and kind != "ieee":  # warpgroup MMA
        assert all(c.bm >= 64 and c.warps % 4 == 0 for c in (first, *others))


@pytest.mark.parametrize("group", [None, 1024, 200, 128, 48, 16])
@pytest.mark.parametrize(("architecture", "kind"), FLOATS, ids=str)
def test_no_number_of_rows_changes_the_panel_and_groups_are_whole_tiles(architecture, kind, group):
    for n, k in SHAPES:
        layouts = set()
        for m, batch in itertools.product(ROWS, (1, 5)):
            p = plan(architecture, kind, m, n, k, group, batch=batch)
            layouts.add(id(p.layout))
            groups = p.layout.groups
            assert groups.count == 1 or groups.width == p.tiles_per_group * p.config.bn
            assert groups.count > 1 or p.tiles_per_group * p.config.bn >= groups.width > (p.tiles_per_group - 1) * p.config.bn
        assert len(layouts) == 1  # the same object: by it abft.panels finds the panel


# --- the choice ---------------------------------------------------------------------------------------


def done(architecture, kind, config, m, n, k, checks, programs, batch=1):
    """Cycles until the last program is done, every check tile given to whoever is least busy. With the kernel's own estimate of a tile."""
    blocks = batch * -(-m // config.bm)
    data, check = blocks * -(-n // config.bn), blocks * -(-checks // config.bc)
    tile = tile_time.tile_cycles(architecture, kind, config.bm, config.bn, config.bk, config.warps, k)
    checking = tile_time.tile_cycles(architecture, kind, config.bm, config.bc, config.bk, config.warps, k, tile_time.CHECK_BESIDES)
    busy = [tile * len(range(p, data, programs)) for p in range(programs)]
    heapq.heapify(busy)
    for _ in range(check):
        heapq.heapreplace(busy, busy[0] + checking)
    return max(busy), checking


@pytest.mark.parametrize(("architecture", "kind"), CHOOSING, ids=str)
def test_no_candidate_would_be_done_much_sooner(architecture, kind):
    """Dealing in the kernel is at most one check tile later than least busy first (test_waves.py)."""
    programs, seen = configs.PROGRAMS[architecture], set()
    for (n, k), m in itertools.product(SHAPES, ROWS):
        p = plan(architecture, kind, m, n, k)
        seen.add(name(p.config))
        took, checking = done(architecture, kind, p.config, m, n, k, p.layout.columns, programs)
        for table in configs.CONFIGS[architecture, kind]:
            for other in configs._with_check_tiles(table, architecture, kind, k, p.layout.columns):
                best, _ = done(architecture, kind, other, m, n, k, p.layout.columns, programs)
                assert took * (1 - configs.ADVANTAGE) <= best + checking, (m, n, k, name(p.config), name(other))
    assert len(seen) > 1


def test_few_tiles_are_cut_smaller_and_many_are_not():
    # k and v of Llama 3 8B at 512 rows: 32 tiles of 128 × 128 for 132 multiprocessors, or 128 of 64 × 64.
    assert name(plan(90, "16-bit", 512, 1024, 4096).config) == (64, 64)
    assert name(plan(90, "16-bit", 8192, 1024, 4096).config) == name(plan(90, "16-bit", 4096, 4096, 4096).config) == (128, 128)
    # A batch, or fewer multiprocessors, leaves nothing idle.
    assert name(plan(90, "16-bit", 512, 1024, 4096, batch=16).config) == (128, 128)
    assert name(plan(90, "16-bit", 512, 1024, 4096, programs=16).config) == (128, 128)


def test_half_a_tile_takes_more_than_half_the_time():
    whole, half = (tile_time.step_cycles(90, "16-bit", 128, bn, 64, 8) for bn in (128, 64))
    assert whole == 128 * 128 * 64 / 2048 == 512
    assert half == (128 + 64) * 64 * 2 / 64 == 384  # bringing its operands, not multiplying them: 256
    # Ampere multiplies at half the rate, so there it does not.
    assert tile_time.step_cycles(80, "16-bit", 128, 64, 32, 8) == tile_time.step_cycles(80, "16-bit", 128, 128, 32, 8) / 2


def test_check_tiles_hold_the_panel_and_are_no_wider_than_data_tiles():
    widths = {n: plan(90, "16-bit", 8192, n, 4096).config.bc for n in (384, 1024, 2048, 4096, 28672)}
    assert widths == {384: 16, 1024: 32, 2048: 64, 4096: 128, 28672: 128}
    # 2048 rows of the last leave room for 56 whole tiles beside the fourteenth round, and have 64 wide check tiles, or 112 narrow ones.
    assert plan(90, "16-bit", 2048, 14336, 4096).config.bc == 64
    c = plan(90, "16-bit", 8192, 4096, 4096).config
    assert 0.9 < c.check_cost < 1  # as many columns as a data tile, but fewer sums
    assert plan(90, "16-bit", 8192, 4096, 4096, 32).config.bc == 64


def test_nothing_is_simulated_for_a_product_like_an_earlier_one(several, monkeypatch):
    first = run(*operands(130, 272, 144, torch.float32)).plan
    monkeypatch.setattr(configs, "makespan", None)
    assert run(*operands(190, 272, 144, torch.float32)).plan is first  # rows count by 64s


# --- against the audit ----------------------------------------------------------------------------------


def audited_tiles():
    """(config, instructions of a step, and besides, of the data tile; of the check tile) of every bf16 product on sm_90."""
    rows = [r for r in audited.rows(audited.newest()) if (r["kernel"], r["operands"], r["arch"]) == ("checked_product", "bf16", "sm_90")]
    plain = [r for r in rows if r["config"]["BN"] >= 64 and r["case"] in ("full", "short", "second", "third")]
    return [(r["config"], *((tile["step"]["issued"], tile["besides"]["issued"]) for tile in r["tiles"])) for r in plain]


def test_the_estimate_counts_what_was_compiled():
    """Instructions of a step within a tenth of the audited; what a tile takes besides within a fifth."""
    found = audited_tiles()
    assert {(c["BM"], c["BN"]) for c, *_ in found} == {name(c) for c in configs.CONFIGS[90, "16-bit"]}
    for config, *tiles in found:
        estimates = (tile_time.DATA_BESIDES, config["BN"]), (tile_time.CHECK_BESIDES, config["BC"])
        for (step, besides), ((by_warp, by_number), columns) in zip(tiles, estimates, strict=True):
            assert step == pytest.approx(tile_time.STEP_ISSUED, rel=0.1)
            issuing = besides * config["num_warps"] / tile_time.ISSUED_PER_CYCLE
            assert by_warp * config["num_warps"] + by_number * config["BM"] * columns == pytest.approx(issuing, rel=0.2)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("audit-triton*.jsonl")), ids=lambda file: file.stem)
def test_every_candidate_was_compiled_and_none_spills(file):
    # What kernels of attention may spill is said where they are audited (tests/compile/test_audit.py).
    rows = [r for r in audited.rows(file) if not r["case"].startswith(("attention", "gradient", "decode"))]
    assert rows and all(r["spills"] == r["local"] == 0 for r in rows)
    for (architecture, kind), table in configs.CONFIGS.items():
        operand = {"16-bit": "bf16"}.get(kind, kind)
        names = ("checked_int_product", "recompute_exactly") if kind == "int8" else ("checked_product", "recompute", "unchecked_product")
        for config, kernel in itertools.product(table, names):
            found = [r for r in rows if (r["arch"], r["operands"], r["kernel"]) == (f"sm_{architecture}", operand, kernel)]
            assert (config.bm, config.bn, config.bk) in {tuple(r["config"][size] for size in ("BM", "BN", "BK")) for r in found}


def test_predictions_let_the_unchecked_product_choose_its_own_tiles():
    """Else the ratio would flatter the check."""
    r = predictions.predict(512, 1024, 4096)
    assert r["unchecked_cycles"] <= r["cycles"] / r["same_tile_ratio"] and r["ratio"] >= r["same_tile_ratio"]
    assert r["ratio"] == r["cycles"] / r["unchecked_cycles"]


# --- several candidates in the interpreter ----------------------------------------------------------------


@pytest.fixture
def several(monkeypatch):
    """128 × 128, 128 × 64 and 64 × 64 for the interpreter, too."""
    if DEVICE.type == "cuda":
        pytest.skip("a GPU has several of its own")
    (first,) = configs.INTERPRETED
    monkeypatch.setattr(configs, "INTERPRETED", (first, replace(first, bn=64), replace(first, bm=64, bn=64)))
    caches = (backend.plan, backend._layout)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


#: Rows, columns, the tile that three programs take for them.
CHOSEN = [(130, 192, (64, 64)), (128, 96, (128, 64)), (256, 192, (128, 128))]


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize(("m", "n", "tile"), CHOSEN)
def test_every_candidate_is_right_silent_and_repairs_to_the_bits(several, m, n, tile, dtype):
    a, w = operands(m, n, 96, dtype)
    bias = torch.randn(n).to(dtype)
    clean = run(a, w, bias)
    assert name(clean.plan.config) == tile
    assert_right(clean, a, w, bias)
    assert clean.detected == 0 and clean.suspect_rows == []
    strikes = (
        Strike("accumulator", at(m - 1, n - 1), NULLIFY), Strike("accumulator", at(3, 1, cols=n - 1, stride=7), BitOperation(flip=1 << 29)),
        Strike("operand", at(66, 0, cols=96), NULLIFY, 0, 32),
    )  # fmt: skip
    struck = run(a, w, bias, strikes=strikes)
    assert struck.suspect_rows == [3, 66, m - 1] and struck.counters["recomputed"] == struck.detected == 3
    assert oracles.bits_equal(struck.y, clean.y)


def test_products_of_different_tiles_read_one_panel(several):
    """A panel built for one tile is silent, and finds a fault in the right row, under another."""
    w = torch.nn.Parameter(torch.randn(192, 32).to(DEVICE) / 6, requires_grad=False)
    tiles, panels = set(), set()
    for m in (130, 256, 16):
        clean = run(torch.randn(m, 32), w, source=w)
        tiles.add(name(clean.plan.config))
        panels.add(clean.panel.columns.data_ptr())
        assert clean.detected == 0 and clean.suspect_rows == []
    struck = run(torch.randn(130, 32), w, source=w, strikes=(Strike("accumulator", at(128, 100), NULLIFY),))
    assert struck.suspect_rows == [128] and struck.counters["recomputed"] == 1 and panels == {struck.panel.columns.data_ptr()}
    assert tiles == {(64, 64), (128, 128), (16, 32)}


def test_a_checkpointed_layer_has_the_bits_of_one_that_is_not(several):
    import abft

    layer = abft.Linear(32, 192, policy=abft.Policy(backend="triton"))
    x = torch.randn(130, 32, requires_grad=True)
    kept = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum(), [x, layer.weight]
    )  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    report = abft.report()
    assert report.detected == 0 and report.repeated_checks == 130
