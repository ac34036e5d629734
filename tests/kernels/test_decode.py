"""Few rows: tiles for reading W once. The same bits as many rows have, silence, every fault found and repaired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from abft.triton_kernels import configs, decode
from kernel_harness import DEVICE, DTYPES, NAN, NULLIFY, assert_right, at, operands, run

from abft import threshold
from abft.backends import triton as backend
from abft.faults import BitOperation, Region, Strike

ROWS = (1, 15, 16, 17, 63, 64)
ARCHITECTURES = (80, 90, 100)
#: Linear layers of Llama 3 8B and 70B (N, K).
LLAMA = [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]


def plan(m, n, k=4096, architecture=90, kind="16-bit", group=None, form="full"):
    dtype = torch.bfloat16 if kind == "16-bit" else torch.float32
    return backend.plan(n, k, dtype, architecture, kind == "tf32", form, group, m)


@pytest.mark.parametrize("m", ROWS)
def test_few_rows_are_one_block(m):
    for architecture, kind in configs.DECODE:
        assert m <= plan(m, 4096, 4096, architecture, kind).config.bm <= 64
    assert decode.height(None, "ieee", m) >= m


def test_more_rows_keep_the_tiles_for_many():
    assert all(decode.height(architecture, kind, 65) is None for architecture, kind in configs.DECODE)
    assert plan(65, 4096).config.stages == configs.CONFIGS[90, "16-bit"][0].stages < configs.DECODE[90, "16-bit"][0].stages


@pytest.mark.parametrize("group", [None, 1024, 128, 48, 32, 16])
@pytest.mark.parametrize("n", [4096, 577, 300, 17, 1])
def test_prompts_and_decoding_share_a_panel_and_a_bound(n, group):
    for architecture, kind in configs.DECODE:
        many = plan(65, n, 4096, architecture, kind, group)
        for m in ROWS:
            few = plan(m, n, 4096, architecture, kind, group)
            assert (few.layout, few.arithmetic, few.coefficients) == (many.layout, many.arithmetic, many.coefficients)
            # The same chain of K steps on the same unit, which decides the bits and the bound.
            assert (few.config.bk, few.config.precision) == (many.config.bk, many.config.precision)
            width, bn = few.layout.groups.width, few.config.bn
            assert few.tiles_per_group == -(-width // bn) and (width % bn == 0 or few.layout.groups.count == 1)


def test_warpgroup_mma_has_the_tiles_it_needs():
    for m, (n, _) in ((m, shape) for m in ROWS for shape in LLAMA):
        for kind in ("16-bit", "tf32"):
            c = plan(m, n, 4096, 90, kind).config
            assert c.bm == 64 and c.bn >= 16 and c.bc >= 16 and c.warps % 4 == 0


def test_4096_squared_is_one_tile_for_every_multiprocessor_of_an_h100():
    c = plan(1, 4096).config
    columns = plan(1, 4096).layout.columns
    assert (c.bn, c.bc) == (32, 32) and 4096 // 32 + columns // 32 == 132 == configs.PROGRAMS[90]


@pytest.mark.parametrize("shape", LLAMA, ids=str)
def test_no_program_reads_much_more_than_another(shape):
    """By columns of W and panel; the unchecked product's slowest program reads no fewer, or one tile fewer."""
    n, k = shape
    p = plan(1, n, k)
    data, checks = -(-n // p.config.bn), -(-p.layout.columns // p.config.bc)
    assert p.config.bc == p.config.bn
    rounds, unchecked = -(-(data + checks) // 132), -(-data // 132)
    assert rounds == unchecked or rounds == unchecked + 1 and data + checks > 132 * unchecked
    assert p.layout.columns / n <= 16 / 512 + 1e-9  # the panel's share of W's bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize(("m", "n"), [*((m, 577) for m in ROWS), (1, 1), (17, 1), (16, 40), (63, 40)])
def test_clean_products_are_right_and_silent(m, n, dtype):
    k = 1 if n == 1 else 33 if n == 40 else 300
    a, w = operands(m, n, k, dtype)
    bias = torch.randn(n).to(dtype) if m % 2 else None
    result = run(a, w, bias)
    assert result.plan.config.bm == (16 if m <= 16 else 64) and result.plan.config.bn <= 64
    assert_right(result, a, w, bias)
    assert (result.counters["checks"], result.counters["products"], result.detected) == (m, 1, 0) and result.suspect_rows == []


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter multiplies tiles with a BLAS, whose order of summation follows their shape")
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize(("form", "group"), [("full", None), ("lean", None), ("full", 128), ("full", 48), ("lean", 16)])
def test_a_row_among_many_has_the_bits_of_the_same_row_among_few(form, group, dtype):
    """So answers do not depend on who else is served; held by one BK and one unit for all tiles."""
    a, w = operands(130, 700, 520, dtype)
    many = run(a, w, panel=form, group=group)
    for m in (1, 16, 17, 64):
        few = run(a[:m], w, panel=form, group=group)
        assert oracles.bits_equal(few.y, many.y[:m])
        assert oracles.bits_equal(few.evidence.raw, many.evidence.raw[:, :m])  # what the check tiles computed, too


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_batches_and_transposed_operands(dtype):
    a = torch.randn(3, 21, 70).to(dtype)
    w = (torch.randn(3, 90, 70) / 8).to(dtype)
    plain = run(a, w)
    turned = run(a.mT.contiguous().mT, w.mT.contiguous().mT)
    assert oracles.bits_equal(plain.y, turned.y)
    for b in range(3):
        assert oracles.bits_equal(plain.y[b], run(a[b], w[b]).y)
    struck = run(a, w, strikes=(Strike("accumulator", replace(at(20, 89), batch=2), NULLIFY),))
    assert oracles.bits_equal(struck.y, plain.y) and struck.counters["recomputed"] == struck.detected == 1
    assert struck.records[-1]["row"] == 2 * 21 + 20


CLASSES = {"nullify": NULLIFY, "sign": BitOperation(flip=1 << 31), "exponent": BitOperation(flip=1 << 29), "carry": BitOperation(add=1 << 23), "nan": NAN}
PATTERNS = {"element": Region(0, 1, 37, 38), "stride": Region(0, 1, 1, 300, 7), "row": Region(0, 1, 0, 300), "last": Region(0, 1, 299, 300)}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize(("m", "pattern"), [*((5, pattern) for pattern in PATTERNS), (64, "stride")])
def test_faults_are_found_in_their_rows_and_repaired_to_the_bits(m, pattern, dtype):
    a, w = operands(m, 300, 96, dtype)
    rows = {name: i if m == 5 else 13 * i for i, name in enumerate(CLASSES)}
    region = PATTERNS[pattern]
    strikes = tuple(
        Strike("accumulator", Region(row, row + 1, region.col0, region.col1, region.stride), CLASSES[name]) for name, row in rows.items()
    )
    clean, result, seen = run(a, w), run(a, w, strikes=strikes), run(a, w, strikes=strikes, level="detect")
    assert np.nan_to_num(oracles.relative_change(clean.y.cpu(), seen.y.cpu()), nan=np.inf)[list(rows.values())].min() > 1e-3
    assert result.suspect_rows == sorted(rows.values())
    assert oracles.bits_equal(result.y, clean.y) and not oracles.bits_equal(seen.y, clean.y)
    assert result.counters["recomputed"] == result.detected == len(rows) == seen.counters["observed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("place", ["operand", "panel"])
def test_faults_in_operands_and_panel(place, dtype):
    a, w = operands(9, 300, 96, dtype)
    clean = run(a, w)
    if place == "operand":
        bn = clean.plan.config.bn
        result = run(a, w, strikes=(Strike("operand", at(4, 0, cols=96), NULLIFY, tile0=bn, tile1=2 * bn),))
        assert result.suspect_rows == [4] and result.counters["recomputed"] == result.detected == 1
        assert oracles.bits_equal(result.y, clean.y)
    else:
        result = run(a, w, strikes=(Strike("panel", Region(0, 1, 5, 9), BitOperation(flip=1 << (8 * dtype.itemsize - 2))),))
        assert len(result.suspect_rows) > 0 and oracles.bits_equal(result.y, clean.y)


def test_the_repetition_uses_the_same_config(monkeypatch):
    seen = []
    for name in ("launch", "launch_repair"):
        genuine = getattr(configs.Config, name)
        monkeypatch.setattr(configs.Config, name, lambda self, genuine=genuine: (seen.append(self), genuine(self))[1])
    a, w = operands(7, 300, 96, torch.float32)
    run(a, w, strikes=(Strike("accumulator", at(3, 200), NULLIFY),))
    assert len(set(seen)) == 1 and len(seen) >= 2 and seen[0].bm == 16


def test_the_arithmetic_of_the_bound_is_that_of_the_unit():
    expected = {(80, "16-bit"): threshold.AMPERE_16, (90, "16-bit"): threshold.HOPPER_16, (90, "tf32"): threshold.HOPPER_TF32, (90, "ieee"): threshold.FMA_32}
    for (architecture, kind), arithmetic in expected.items():
        assert all(plan(m, 4096, 4096, architecture, kind).arithmetic is arithmetic for m in (*ROWS, 65))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what the interpreter runs")
def test_the_interpreter_deals_decode_tiles_too():
    assert plan(3, 300, 96, None, "ieee").config.bm == 16 and plan(30, 300, 96, None, "ieee").config.bm == 64
