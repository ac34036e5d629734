"""What a repetition cannot decide, an independent product does: a persistent unit, or a false alarm."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import oracles
import pytest
import torch
import triton
import triton.language as tl
from abft.triton_kernels import configs, gemm, independent, launch
from abft.triton_kernels.tiles import matrix
from kernel_harness import DEVICE, DTYPES, INF, NAN, NULLIFY, at, judged, operands, run
from torch import nn

import abft
from abft import checksum, ledger
from abft.backends import triton as backend
from abft.faults import BitOperation, Region, Strike

pytestmark = pytest.mark.slow

M, N, K = 150, 700, 60  # two row blocks, two groups of columns of which one is ragged
#: Columns [384, 700) are the second group.
SECOND = slice(384, 700)
FLIP = BitOperation(flip=1 << 28)


def cause_of(result):
    return ledger.CAUSES[result.records[-1]["cause"]]


def persistent(*args, strikes, **options):
    """A product whose repetition is struck alike."""
    return run(*args, strikes=strikes, again=strikes, **options)


def assert_rounded(y, exact):
    """One rounding of the exact product, but for fp64's own."""
    exact = exact.double()
    oracles.assert_within(y.cpu(), exact, oracles.ROUNDOFF[y.dtype] * exact.abs() * (1 + 2.0**-12) + 2.0**-40)


# --- a unit that is always wrong --------------------------------------------------------------------


@pytest.mark.parametrize(("form", "weight"), [("full", True), ("lean", False)], ids=["full-weight", "lean-activation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_persistent_fault_is_named_and_the_independent_product_delivered(dtype, weight, form):
    a, w = operands(M, N, K, dtype)
    bias = torch.randn(N).to(dtype)
    source = nn.Parameter(w.to(DEVICE), requires_grad=False) if weight else None
    w = w if source is None else source.detach()
    rows = {9: NULLIFY, 77: FLIP, 100: NAN, 140: INF}
    strikes = tuple(Strike("accumulator", Region(row, row + 1, 400, 600, 3), operation) for row, operation in rows.items())
    clean = run(a, w, bias, source=source, panel=form)
    result = persistent(a, w, bias, strikes=strikes, source=source, panel=form)
    assert result.suspect_rows == list(rows)
    assert result.counters["reconstructed"] == result.detected == len(rows) and result.counters["false_alarms"] == 0
    assert result.verdict() == "RECONSTRUCTED" and cause_of(result) == "persistent"
    exact = oracles.product(a, w.cpu().mT, bias)
    for row in rows:
        assert_rounded(result.y[row, SECOND], exact[row, SECOND])
        assert oracles.bits_equal(result.y[row, :384], clean.y[row, :384])
    rest = [row for row in range(M) if row not in rows]
    assert oracles.bits_equal(result.y[rest], clean.y[rest])
    seen = persistent(a, w, bias, strikes=strikes, source=source, panel=form, level="detect")
    assert seen.counters["observed"] == seen.detected == len(rows) and cause_of(seen) == "persistent"
    assert oracles.bits_equal(seen.y, run(a, w, bias, strikes=strikes, source=source, panel=form, level="detect").y)
    assert not oracles.bits_equal(seen.y, clean.y)


def test_a_weight_is_read_as_it_lies():
    """In backward the kernels see its transpose."""
    g, w = torch.randn(M, N), torch.randn(N, K) / 10
    source = nn.Parameter(w.to(DEVICE), requires_grad=False)
    strikes = (Strike("accumulator", at(77, 20, cols=30), NULLIFY),)
    result = persistent(g, source.detach().mT, strikes=strikes, source=source, role="dgrad", transposed=True)
    assert result.counters["reconstructed"] == result.detected == 1 and cause_of(result) == "persistent"
    assert_rounded(result.y[77], oracles.product(g, w)[77])


def test_each_matrix_of_a_batch_has_its_own():
    a, w = (torch.stack(t) for t in zip(*(operands(40, 300, 60, torch.float16, seed) for seed in range(3)), strict=True))
    clean = run(a, w)
    result = persistent(a, w, strikes=(Strike("accumulator", Region(2, 3, 5, 60, batch=1), NULLIFY),))
    assert result.counters["reconstructed"] == result.detected == 1 and result.records[0]["row"] == 42
    assert_rounded(result.y[1, 2], oracles.product(a[1], w[1].mT)[2])
    result.y[1, 2] = clean.y[1, 2]
    assert oracles.bits_equal(result.y, clean.y)


def test_a_record_names_the_multiprocessor(monkeypatch):
    """Programs stand in for multiprocessors; of the group's tiles, the struck one is named."""
    a, w = operands(M, N, K, torch.float32)
    monkeypatch.setattr(gemm, "smid", lambda: tl.program_id(0))
    monkeypatch.setattr(backend, "_numbered", lambda device: True)
    seen = set()
    for column in (20, 200, 390, 690):
        for strikes in (
            (Strike("accumulator", at(130, column), FLIP),),
            (Strike("accumulator", at(130, column), NAN),),
        ):
            result = persistent(a, w, strikes=strikes)
            (record,) = result.records
            units = result.evidence.units.view(-1, -(-N // 128))
            assert record["unit"] == units[1, column // 128] and ledger.CAUSES[record["cause"]] == "persistent"
            assert record["repaired_on"] >= 0
            seen.add(record["unit"])
    assert len(seen) > 1


def test_a_persistent_fault_beside_a_changed_panel():
    a, w = operands(M, N, K, torch.float32)
    strikes = (Strike("accumulator", at(9, 20, cols=20), NULLIFY), Strike("panel", Region(0, 1, 10, 40), BitOperation(keep=0)))
    result = persistent(a, w, strikes=strikes)
    assert (result.counters["reconstructed"], result.counters["false_alarms"]) == (1, M - 1) == (result.detected, M - 1)
    assert cause_of(result) == "persistent"


def test_a_persistent_fault_beside_an_edit():
    a, w = operands(M, N, K, torch.float32)
    source = nn.Parameter(w.to(DEVICE), requires_grad=False)
    run(a, source.detach(), source=source)
    source.data.mul_(1.5)
    result = persistent(a, source.detach(), strikes=(Strike("accumulator", at(9, 20, cols=20), NULLIFY),), source=source)
    assert (result.counters["reconstructed"], result.counters["stale"]) == (1, 1) and cause_of(result) == "persistent"
    assert_rounded(result.y[9, :384], oracles.product(a, source.detach().cpu().mT)[9, :384])


@contextlib.contextmanager
def struck_twice(role, *strikes):
    """Every product of a role, and its repetition, are struck; the product's role is known when it is checked."""
    number, faults = ledger.ROLE_NAMES.index(role), backend.descriptors(strikes, DEVICE)
    check = launch.check

    def struck(product, evidence, judge, words, site, labels):
        if labels.role != number:
            return check(product, evidence, judge, words, site, labels)
        wrong = gemm.multiply(product, faults)
        evidence.y.copy_(wrong.y)
        return check(product, dataclasses.replace(wrong, y=evidence.y), judge, words, site, labels, faults)

    with mock.patch.object(launch, "check", struck):
        yield


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_through_the_public_api(role):
    """A unit that is always wrong in one of a layer's three products: right numbers go on, and a report tells."""
    layer = abft.Linear(48, 150, device=DEVICE, policy=abft.Policy(backend="triton", on_uncorrected="record"))
    x, g = torch.randn(40, 48, device=DEVICE, requires_grad=True), torch.randn(40, 150, device=DEVICE)
    abft.report(reset=True)
    with struck_twice(role, Strike("accumulator", at(7, 11, cols=20), NULLIFY)):
        y = layer(x)
        y.backward(g)
    (event,) = abft.report().events
    assert abft.report().detected == abft.report().reconstructed == 1 and abft.report().false_alarms == 0
    assert (event.role, event.row, event.cause, event.verdict) == (role, 7, "persistent", abft.Verdict.RECONSTRUCTED)
    result = {"fprop": y, "dgrad": x.grad, "wgrad": layer.weight.grad}[role].detach()
    left, right = {"fprop": (x, layer.weight.mT), "dgrad": (g, layer.weight), "wgrad": (g.mT, x)}[role]
    bias = layer.bias.detach().cpu() if role == "fprop" else None
    assert_rounded(result[7], oracles.product(left.detach().cpu(), right.detach().cpu(), bias)[7])


# --- the data are right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "weight", "level"), [("full", True, "correct"), ("lean", True, "detect"), ("full", False, "correct")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_bound_that_is_too_small_makes_false_alarms(dtype, form, weight, level, monkeypatch):
    """fp64 says of every suspect row whether its data lie within the (too small) bound. Of an activation, its check has to, too."""
    a, w = operands(M, N, 400, dtype, seed=5)
    options = {"source": nn.Parameter(w, requires_grad=False).to(DEVICE) if weight else None, "panel": form}
    clean = run(a, w, **options)
    scale = 0.6 * clean.worst
    usual = backend._bound
    monkeypatch.setattr(backend, "_bound", lambda p, k: _scaled(usual(p, k), scale))
    result = run(a, w, level=level, **options)
    right = {row: _within(clean, oracles.product(a, w.mT), row, scale, weight) for row in result.suspect_rows}
    expected = sum(right.values())
    assert 0 < expected <= len(right) < M
    assert result.counters["false_alarms"] == expected and result.detected == len(right) - expected
    if expected == len(right):
        assert result.verdict() == "FALSE_ALARM" and cause_of(result) == "unknown"
    kept = [row for row in range(M) if right.get(row, True)]
    assert oracles.bits_equal(result.y[kept], clean.y[kept])


def _within(result, exact, row, scale, weight):
    """Whether an exact product explains a row's data (of an activation: and its prediction) in every group that is not explained."""
    sums, tau = judged(result, 400)
    layout = result.plan.layout
    for g in range(layout.groups.count):
        limit = scale * np.asarray(tau)[0, row, g].astype(np.float64)
        r, c = (np.asarray(side)[0, row, g].astype(np.float64) for side in (sums.actual, sums.predicted))
        begin, end = layout.groups.span(g)
        weights = np.stack([checksum.column_weights(kind, end - begin) for kind in layout.form.kinds]).astype(np.float64)
        sides = (r,) if weight else (r, c)
        if (abs(r - c) > limit).any() and any((abs(side - weights @ exact[row, begin:end].numpy()) > limit).any() for side in sides):
            return False
    return True


def _scaled(bound, factor):
    return bound._replace(accumulate=tuple(x * factor for x in bound.accumulate))


def wrongly_built(panel, column, k):
    """A panel that was wrong from the start: what is remembered of its bits agrees with it."""
    size = backend._panel_config().bk
    panel.columns[column, k] += 100
    block = k // size
    total = int(abft.bits.as_integers(panel.columns)[column, block * size : (block + 1) * size].long().sum())
    folded = (total & 0xFFFFFFFF) + (total >> 32)
    panel.memory.integrity[column, block] = folded - (folded >> 31 << 32)


def test_a_check_that_is_always_wrong_is_a_false_alarm_of_a_remembered_weight():
    a, w = operands(12, N, K, torch.float32)
    source = nn.Parameter(w.to(DEVICE), requires_grad=False)
    clean = run(a, source.detach(), source=source)
    wrongly_built(panel_of(source), 0, 3)
    result = run(a, source.detach(), source=source)
    assert result.counters["false_alarms"] == len(result.suspect_rows) > 8 and result.detected == 0
    assert result.verdict() == "FALSE_ALARM" and cause_of(result) == "unknown"
    assert oracles.bits_equal(result.y, clean.y)


def panel_of(source):
    (entry,) = abft.panels.panels_of(source).entries.values()
    return entry.panel


def test_an_activation_that_changed_after_its_panel_was_built_is_no_false_alarm(monkeypatch):
    """Its bits are not remembered: that its present product agrees with the data says nothing."""
    a, w = operands(12, N, K, torch.float32)
    built = backend.build_panel(w.to(DEVICE), run(a, w).plan.layout)
    monkeypatch.setattr(backend, "panel_of", lambda call, p: built)
    assert run(a, w).detected == 0
    wrong = w.clone()
    wrong[7, 11] += 100
    result = run(a, wrong)
    assert result.counters["uncorrected"] == result.detected == 12 and result.counters["false_alarms"] == 0
    assert cause_of(result) == "unknown"


# --- work ---------------------------------------------------------------------------------------------


def test_clean_rows_ask_nobody(monkeypatch):
    """A row with a transient fault neither: the compared product would cost, and fail here."""
    a, w = operands(M, N, K, torch.float32)
    monkeypatch.setattr(independent, "_judge_row", None)
    assert run(a, w).detected == 0
    assert run(a, w, strikes=(Strike("accumulator", at(9, 20), NULLIFY),)).counters["recomputed"] == 1


def test_beyond_a_few_rows_of_a_block_and_group_nobody_is_asked(monkeypatch):
    a, w = operands(M, N, K, torch.float32)
    strikes = (Strike("accumulator", at(5, 20, rows=6, cols=9), NULLIFY), Strike("accumulator", at(140, 20, rows=2), FLIP))
    counts = {}
    for most in (0, 2, 6):
        monkeypatch.setattr(launch, "COMPARED_ROWS", most)
        result = persistent(a, w, strikes=strikes)
        counts[most] = result.counters["reconstructed"], result.counters["uncorrected"]
        assert result.detected == 8 and cause_of(result) == ("persistent" if most else "unknown")
    assert counts == {0: (0, 8), 2: (4, 4), 6: (8, 0)}
    assert 0 < configs.COMPARED_ROWS <= 128 // 8


def test_tf32_operands_are_read_truncated():
    """Alone: the interpreter has no tf32 product."""

    @triton.jit
    def elements(a, w, out, shape, PARTS: tl.constexpr):
        cols = tl.arange(0, independent.COLUMNS)
        tl.store(out + cols, independent.elements(a, w, shape, 0, 2, cols, shape.n, PARTS), mask=cols < shape.n)

    a, w = operands(5, 20, K, torch.float32)
    truncated = [(t.view(torch.int32) & -0x2000).view(torch.float32).double() for t in (a, w)]
    shape = launch.Shape(5, 20, K, 0, 1, 1)
    for parts, (left, right) in ((1, (a.double(), w.double())), (2, truncated)):
        out = torch.zeros(20, dtype=torch.float64, device=DEVICE)
        elements[(1,)](matrix(a.to(DEVICE)), matrix(w.to(DEVICE)), out, shape, PARTS=parts)
        exact = right @ left[2]
        assert ((out.cpu() - exact).abs() <= K * 2.0**-53 * (right.abs() @ left[2].abs())).all()
