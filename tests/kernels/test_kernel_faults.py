"""Faults inside the kernel: found in the right row, repaired to the very bits, counted once; and what is blind by construction."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from kernel_harness import DEVICE, DTYPES, INF, NAN, NULLIFY, assert_right, at, counters_of, fresh_ledger, operands, records_of, run

from abft import checksum, ledger
from abft.faults import BitOperation, Region, Strike

M, N, K = 128, 400, 96
#: What happens to the fp32 pattern of an accumulator. Flips of low bits are below any bound, and harmless (thresholds.md).
CLASSES = {
    "nullify": NULLIFY,
    **{f"bit{b}": BitOperation(flip=1 << b) for b in (20, 22, 23, 25, 26, 27, 28, 29, 30, 31)},
    "bits-30-and-3": BitOperation(flip=1 << 30 | 1 << 3),
    "three-bits": BitOperation(flip=1 << 24 | 1 << 22 | 1 << 17),
    "stuck-at-one": BitOperation(keep=~(3 << 24), flip=3 << 24),
    "carry": BitOperation(add=1 << 22),
    "borrow": BitOperation(add=-(1 << 23)),
    "nan": NAN,
    "inf": INF,
    "minus-inf": BitOperation(keep=0, flip=0xFF800000),
    "near-inf": BitOperation(keep=0, flip=0x7F7FFFFF),
    "beyond-squares": BitOperation(keep=0, flip=0x60000000),
}
#: pattern → columns of one row; patterns of several rows follow.
ROW_PATTERNS = {
    "element": Region(0, 1, 37, 38),
    "stride-2": Region(0, 1, 0, 128, 2),
    "stride-16": Region(0, 1, 128, 256, 16),
    "row": Region(0, 1, 0, N),
    "last-column": Region(0, 1, N - 1, N),
}


def moved(region: Region, row: int) -> Region:
    return Region(row, row + 1, region.col0, region.col1, region.stride)


def harm(clean, struck):
    """Relative L2 change per row; what is not finite is infinitely harmful."""
    return np.nan_to_num(oracles.relative_change(clean.cpu(), struck.cpu()), nan=np.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("pattern", ROW_PATTERNS)
def test_every_harmful_accumulator_fault_is_found_and_repaired(pattern, dtype):
    """Every class at once, each in a row of its own."""
    a, w = operands(M, N, K, dtype)
    rows = {name: 3 + 5 * i for i, name in enumerate(CLASSES)}
    strikes = tuple(Strike("accumulator", moved(ROW_PATTERNS[pattern], rows[name]), CLASSES[name]) for name in CLASSES)
    clean, result, seen = run(a, w), run(a, w, strikes=strikes), run(a, w, strikes=strikes, level="detect")
    harmful = set(np.flatnonzero(harm(clean.y, seen.y) >= 1e-3).tolist())
    assert len(harmful) >= len(CLASSES) - 3  # a flipped bit of a zero exponent may do little
    assert harmful <= set(result.suspect_rows) <= set(rows.values())
    untouched = [r for r in range(M) if r not in result.suspect_rows]
    assert oracles.bits_equal(result.y[result.suspect_rows], clean.y[result.suspect_rows])
    assert harm(clean.y, result.y)[untouched].max() < 1e-3
    assert result.counters["recomputed"] == result.detected == len(result.suspect_rows) == seen.counters["observed"] == seen.detected
    assert result.counters["checks"] == M and len(result.records) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_fragments_and_tiles(dtype):
    a, w = operands(M + 40, N, K, dtype)
    clean = run(a, w)
    fragment, tile, ragged_tile = Region(16, 32, 8, 16), Region(0, 128, 128, 256), Region(128, 168, 384, 400)
    for region, operation in ((fragment, NULLIFY), (tile, BitOperation(flip=1 << 24)), (ragged_tile, NAN)):
        result = run(a, w, strikes=(Strike("accumulator", region, operation),))
        assert result.suspect_rows == list(range(region.row0, region.row1))
        assert oracles.bits_equal(result.y, clean.y)
        assert result.counters["recomputed"] == result.detected == region.row1 - region.row0


OPERAND_CLASSES = {
    "nullify": lambda bits: BitOperation(keep=0),
    "sign": lambda bits: BitOperation(flip=1 << (bits - 1)),
    "exponent": lambda bits: BitOperation(flip=1 << (bits - 2)),
    "nan": lambda bits: BitOperation(keep=0, flip=(1 << (bits - 1)) - 1),
    "carry": lambda bits: BitOperation(add=1 << (bits - 5)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_wrong_operand_in_one_data_tile_is_found(dtype):
    a, w = operands(M, N, K, dtype)
    width = 8 * a.element_size()
    rows = {name: 7 * (i + 1) for i, name in enumerate(OPERAND_CLASSES)}
    strikes = tuple(
        Strike("operand", Region(rows[name], rows[name] + 1, 0, K, 3), OPERAND_CLASSES[name](width), tile0=128, tile1=256) for name in rows
    )
    clean, result, seen = run(a, w), run(a, w, strikes=strikes), run(a, w, strikes=strikes, level="detect")
    assert result.suspect_rows == sorted(rows.values())
    assert oracles.bits_equal(result.y, clean.y) and result.counters["recomputed"] == len(rows)
    # Only the struck tile's columns saw it.
    outside = [c for c in range(N) if not 128 <= c < 256]
    assert oracles.bits_equal(seen.y[:, outside], clean.y[:, outside]) and not oracles.bits_equal(seen.y, clean.y)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_faults_after_the_sums_are_blind_by_construction(dtype):
    """Rounding, storing and memory come after the check: thresholds.md, egress."""
    a, w = operands(M, N, K, dtype)
    strike = Strike("output", at(5, 200, rows=2, cols=9, stride=4), BitOperation(flip=1 << (8 * a.element_size() - 2)))
    clean, result = run(a, w), run(a, w, strikes=(strike,))
    expected = clean.y.cpu().clone()
    strike.hit(expected)
    assert oracles.bits_equal(result.y.cpu(), expected) and not oracles.bits_equal(result.y, clean.y)
    assert result.detected == 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_strike_does_to_an_accumulator_what_it_says(name):
    """fp32 results without bias are the accumulators, and level detect leaves them as they are."""
    a, w = operands(20, 140, 30, torch.float32)
    strike = Strike("accumulator", Region(2, 9, 5, 130, 7), CLASSES[name])
    clean, result = run(a, w), run(a, w, strikes=(strike,), level="detect")
    expected = clean.y.cpu().clone()
    strike.hit(expected)
    assert oracles.bits_equal(result.y.cpu(), expected)


def test_a_strike_hits_its_own_batch():
    a, w = (torch.stack(t) for t in zip(*(operands(9, 40, 20, torch.float32, seed) for seed in range(3)), strict=True))
    result = run(a, w, strikes=(Strike("accumulator", Region(2, 3, 5, 6, batch=1), NAN),))
    assert result.suspect_rows == [9 + 2] or result.status[1, 0, 2] == 3
    assert result.counters["recomputed"] == 1 and result.records[0]["row"] == 9 + 2
    assert oracles.bits_equal(result.y, run(a, w).y)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_record_says_what_was_found(dtype):
    a, w = operands(M, N, K, dtype)
    words = fresh_ledger()
    words[ledger.STEP] = ledger._step
    strike = Strike("accumulator", at(77, 333), BitOperation(flip=1 << 30))
    result = run(a, w, torch.randn(N).to(dtype), strikes=(strike,), words=words, role="dgrad")
    (record,) = result.records
    expected = {"site": 3, "role": 1, "rows": 1, "row": 77, "col": 333, "m": M, "n": N, "k": K, "step": ledger._step}
    assert {name: record[name] for name in expected} == expected
    assert ledger.DTYPES[record["dtype"]] == dtype and ledger.BACKEND_NAMES[record["backend"]] == "triton"
    assert result.verdict() == "RECOMPUTED" and ledger.CAUSES[record["cause"]] == "transient"
    assert record["sequence"] > 0 and result.counters["executions"] == 2


def test_several_wrong_columns_have_no_column():
    a, w = operands(M, N, K, torch.float32)
    result = run(a, w, strikes=(Strike("accumulator", at(77, 300, cols=2), NULLIFY),))
    assert result.records[0]["col"] == -1 and result.counters["recomputed"] == 1


@pytest.mark.parametrize("kind", checksum.FULL.kinds)
def test_every_sum_is_judged_and_judged_again(kind):
    """Errors in four columns that cancel in all sums of a row but one; fp32 results without bias are the accumulators."""
    a, w = operands(M, N, K, torch.float32)
    clean = run(a, w)
    width = clean.plan.layout.groups.width
    weights = np.stack([checksum.column_weights(name, width) for name in checksum.FULL.kinds])
    columns, errors = oracles.seen_by_one_sum(weights, checksum.FULL.kinds.index(kind))
    wrong = clean.y.cpu()[77, columns] + torch.from_numpy(errors).float()
    patterns = wrong.view(torch.int32).tolist()
    strikes = tuple(Strike("accumulator", at(77, int(c)), BitOperation(keep=0, flip=p)) for c, p in zip(columns, patterns, strict=True))
    result, returned = run(a, w, strikes=strikes), run(a, w, strikes=strikes, again=strikes)
    assert result.suspect_rows == [77] and oracles.bits_equal(result.y, clean.y)
    assert result.counters["recomputed"] == result.detected == 1
    assert returned.counters["reconstructed"] == returned.detected == 1 and returned.counters["false_alarms"] == 0


# --- faults that stay -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_fault_that_returns_is_persistent(dtype):
    """Its rows are delivered from an independent product (test_independent.py)."""
    a, w = operands(M, N, K, dtype)
    strike = (Strike("accumulator", at(9, 20, rows=3), NULLIFY), Strike("accumulator", at(50, 300), NAN))
    result = run(a, w, strikes=strike, again=strike)
    assert result.counters["reconstructed"] == result.detected == 4 and result.verdict() == "RECONSTRUCTED"
    assert ledger.CAUSES[result.records[0]["cause"]] == "persistent"


def test_another_fault_in_the_repetition_is_of_unknown_cause():
    a, w = operands(M, N, K, torch.float32)
    result = run(a, w, strikes=(Strike("accumulator", at(9, 20), NULLIFY),), again=(Strike("accumulator", at(9, 21), NULLIFY),))
    assert result.counters["reconstructed"] == result.detected == 1
    assert ledger.CAUSES[result.records[0]["cause"]] == "unknown"
    assert_right(result, a, w)


def test_verdicts_of_one_call_are_counted_apart_and_the_gravest_speaks():
    a, w = operands(M, N, K, torch.float32)
    a[100, 3] = float("nan")
    first = (Strike("accumulator", at(9, 20), NULLIFY), Strike("accumulator", at(30, 20, rows=4), INF))
    result = run(a, w, strikes=first, again=first[:1])
    c = result.counters
    assert (c["reconstructed"], c["recomputed"], c["input_rows"]) == (1, 4, 1)
    assert result.verdict() == "RECONSTRUCTED" and (result.records[0]["rows"], result.records[0]["row"]) == (1, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_detect_changes_nothing_and_says_so(dtype):
    a, w = operands(M, N, K, dtype)
    strike = (Strike("accumulator", at(9, 20, rows=3, cols=8), BitOperation(flip=1 << 29)),)
    result = run(a, w, strikes=strike, level="detect")
    assert result.counters["observed"] == result.detected == 3 and result.verdict() == "OBSERVED"
    assert not oracles.bits_equal(result.y, run(a, w).y)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("what", ["nullify", "nan", "inf", "bit30"])
def test_a_check_that_goes_wrong_itself_is_repeated(what, dtype):
    """A whole check tile, and one number of it: the result was right and stays, and the failure is told."""
    a, w = operands(M, N, K, dtype)
    clean = run(a, w)
    for region in (Region(0, M, 0, 64), at(9, 0), at(40, 2, rows=16, cols=8)):
        result = run(a, w, strikes=(Strike("checksum", region, CLASSES[what]),))
        assert result.suspect_rows == list(range(region.row0, region.row1))
        assert oracles.bits_equal(result.y, clean.y)
        assert result.counters["recomputed"] == result.detected == region.row1 - region.row0
        assert {record["cause"] for record in result.records} == {ledger.CAUSES.index("transient")}


def test_a_fault_in_the_panel_is_found_and_leaves_the_result_right():
    a, w = operands(M, N, K, torch.float32)
    strike = Strike("panel", Region(1, 2, 10, 11), BitOperation(flip=1 << 29))  # the second column: ones of group 0
    result = run(a, w, strikes=(strike,))
    assert result.detected == 0 and result.counters["false_alarms"] == M  # the panel was rebuilt, and then agreed
    assert oracles.bits_equal(result.y, run(a, w).y)
    nan = run(a, w, strikes=(Strike("panel", Region(0, 1, 10, 11), NAN),))
    assert nan.counters["false_alarms"] == M and nan.detected == nan.counters["input_rows"] == nan.counters["overflow_rows"] == 0


# --- operands that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("level", ["correct", "detect"])
def test_operands_that_are_not_finite_are_input_and_no_fault(value, dtype, level):
    a, w = operands(40, 300, K, dtype)
    a[7, 3] = a[9, 90] = float(value)
    clean = run(*operands(40, 300, K, dtype))
    result = run(a, w, level=level)
    assert result.detected == 0 and result.counters["input_rows"] == 2 and result.verdict() == "INPUT"
    assert not torch.isfinite(result.y[[7, 9]]).any(-1).all()
    rest = [r for r in range(40) if r not in (7, 9)]
    assert oracles.bits_equal(result.y[rest], clean.y[rest])


def test_a_weight_that_is_not_finite_is_input_in_every_row():
    a, w = operands(40, 600, K, torch.float32)
    w[577, 3] = float("inf")
    result = run(a, w)
    assert result.detected == 0 and result.counters["input_rows"] == 40


def test_a_fault_beside_poisoned_rows_is_still_repaired():
    a, w = operands(40, 300, K, torch.float32)
    a[7, 3] = float("nan")
    strike = (Strike("accumulator", at(8, 20), NAN),)
    result, clean = run(a, w, strikes=strike), run(a, w)
    assert (result.counters["recomputed"], result.counters["input_rows"]) == (1, 1)
    assert oracles.bits_equal(result.y[8], clean.y[8])


# --- the ledger ---------------------------------------------------------------------------------------


def test_calls_add_up_and_sites_stay_apart():
    a, w = operands(M, N, K, torch.float32)
    words = fresh_ledger()
    strike = (Strike("accumulator", at(9, 20, rows=3), NULLIFY),)
    run(a, w, words=words, site=5)
    run(a, w, words=words, site=6, strikes=strike)
    run(a[:50], w, words=words, site=5, strikes=strike, level="detect")
    five, six = counters_of(words, 5), counters_of(words, 6)
    assert (five["checks"], five["products"], five["observed"], five["recomputed"]) == (M + 50, 2, 3, 0)
    assert (six["checks"], six["products"], six["observed"], six["recomputed"]) == (M, 1, 0, 3)
    assert [r["site"] for r in records_of(words)] == [6, 5]
    sequences = [r["sequence"] for r in records_of(words)]
    assert sequences == sorted(set(sequences))


def test_the_ring_wraps():
    a, w = operands(4, 30, 20, torch.float32)
    words = fresh_ledger()
    words[ledger.HEAD] = ledger.RING - 1
    for row in (1, 2):
        run(a, w, words=words, strikes=(Strike("accumulator", at(row, 2), NAN),))
    assert int(words[ledger.HEAD]) == ledger.RING + 1
    assert [r["row"] for r in records_of(words)[-2:]] == [1, 2]


def test_the_worst_clean_ratio_only_rises():
    a, w = operands(30, 200, 300, torch.float32)
    words = fresh_ledger()
    first = run(a, w, words=words).worst
    assert run(a[:1] * 0, w, words=words).worst == first > 0
    assert words.device == DEVICE
