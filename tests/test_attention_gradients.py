"""The compiled pass over attention's backward: what it computes, what it sees, and that its steps give the same bits."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from torch.nn import functional as F

import abft
from abft.attend import More, attention_at
from abft.attention import fused_gradients, problem
from abft.attention.fused import IN_DELTA, IN_DK, IN_DP, IN_DQ, IN_DV, IN_DX, IN_PROBABILITIES, IN_SCORES, Struck
from abft.native import library

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=f"nothing compiled: {library.why_not()}")
QUIET = abft.Policy(on_uncorrected="record")
DETECT = abft.Policy(level="detect", on_uncorrected="record")
OFF = abft.Policy(level="off")


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _operands(shape=(2, 3, 70, 24), keys=150, depth=20, dtype=torch.float32, key_heads=None):
    """q, k, v and what is above."""
    heads = key_heads or shape[1]
    sizes = shape, (shape[0], heads, keys, shape[3]), (shape[0], heads, keys, depth), (*shape[:3], depth)
    return [_random(*size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]


def _step(operands, policy=QUIET, function=None, **kwargs):
    """[out, dq, dk, dv]."""
    leaves, above = [t.detach().clone().requires_grad_() for t in operands[:3]], operands[3]
    out = attention_at(None, *leaves, own=policy, **kwargs) if function is None else function(*leaves, **kwargs)
    out.backward(above)
    return [out.detach()] + [t.grad for t in leaves]


def _same(some, others):
    return all(oracles.bits_equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture
def passes(monkeypatch):
    """How often the pass over the backward ran."""
    ran = []
    once = fused_gradients._once
    monkeypatch.setattr(fused_gradients, "_once", lambda *a: ran.append(1) or once(*a))
    return ran


@pytest.fixture
def struck(monkeypatch):
    """Strike the next pass over a backward, or every one."""

    def strike(hit, always=False):
        left = itertools.repeat(hit) if always else iter([hit])
        monkeypatch.setattr(fused_gradients, "strike", lambda: next(left, None))

    return strike


# --- what it computes -----------------------------------------------------------------------------

KINDS = {
    "whole": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": _random(70, 150) > -0.5}, "added": {"attn_mask": _random(2, 1, 70, 150)},
    "padding": {"attn_mask": (torch.arange(150) < torch.tensor([[150], [90]]))[:, None, None]},
    "hidden rows": {"attn_mask": (torch.arange(70) > 9)[:, None].expand(70, 150)}, "aligned below": {"is_causal": True, "more": More(offset=80)},
    "causal window": {"is_causal": True, "more": More(offset=80, window=33)}, "nothing seen": {"is_causal": True, "more": More(offset=-20)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_give_the_same_bits(kind, dtype, passes, monkeypatch):
    operands, kwargs = _operands(dtype=dtype), dict(KINDS[kind])
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].is_floating_point():
        kwargs["attn_mask"] = kwargs["attn_mask"].to(dtype)
    ours = _step(operands, **kwargs)
    assert passes == [1]
    report = abft.report(reset=True)
    assert report.detected == report.input_rows == 0 and report.worst < 0.5 and report.checks == 2 * 420 + 3 * 420 + 2 * 900
    assert _same(ours, _step(operands, OFF, **kwargs))
    monkeypatch.setattr(fused_gradients, "covers", lambda *_: False)
    assert _same(ours, _step(operands, **kwargs)) and abft.report().detected == 0
    if "more" not in kwargs:
        rtol, atol = (0, 4e-6) if dtype == torch.float32 else (0.02, 0.02)
        torch.testing.assert_close(ours, _step(operands, function=F.scaled_dot_product_attention, **kwargs), rtol=rtol, atol=atol)


@pytest.mark.parametrize("elements, rows", [(1 << 20, 256), (9000, 40), (70000, 96)], ids=["one tile", "small tiles", "tiles of many chains"])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_that_share_keys_and_tiles_of_any_height_change_no_bit_between_them(causal, elements, rows, passes, monkeypatch):
    """Sums over queries are chains within tiles: whichever the tiles are, the pass and the steps have the same."""
    monkeypatch.setattr(problem, "ELEMENTS", elements)
    monkeypatch.setattr(problem, "CAUSAL_ROWS", rows)
    operands = _operands((1, 6, 150, 16), keys=170, depth=32, key_heads=2)
    ours = _step(operands, is_causal=causal, enable_gqa=True)
    assert passes == [1]
    monkeypatch.setattr(fused_gradients, "covers", lambda *_: False)
    assert _same(ours, _step(operands, is_causal=causal, enable_gqa=True)) and abft.report().detected == 0
    k, v = (t.repeat_interleave(3, 1) for t in operands[1:3])
    torchs = _step([operands[0], k, v, operands[3]], function=F.scaled_dot_product_attention, is_causal=causal)
    torchs = torchs[:2] + [t.unflatten(1, (2, 3)).sum(2) for t in torchs[2:]]
    torch.testing.assert_close(ours, torchs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_strides_change_no_bit(threads):
    operands = _operands((1, 3, 200, 40), keys=300, depth=64)
    before, expected = torch.get_num_threads(), _step(operands)
    try:
        torch.set_num_threads(threads)
        assert _same(expected, _step([t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands]))
        assert _same(expected, _step([t.mT.contiguous().mT for t in operands]))
        spread = torch.zeros(*operands[3].shape[:-1], 1).expand_as(operands[3])
        assert _same(_step([*operands[:3], spread]), _step([*operands[:3], spread.contiguous()]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kwargs, reason", [
    ({"dropout_p": 0.1}, "dropout"), ({"more": More(softcap=5.0)}, "soft-cap"), ({"own": abft.Policy(group=16)}, "narrow groups"),
    ({"attn_mask": _random(70, 150).requires_grad_()}, "a mask's gradient"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_it_does_not_cover_goes_by_steps(kwargs, reason, passes):
    policy = kwargs.pop("own", QUIET)
    _step(_operands(), policy, **kwargs)
    assert passes == [] and abft.report().detected == 0


# --- what it sees ---------------------------------------------------------------------------------

VALUES = (3.0, -50.0, 1e30, math.inf, math.nan)
ROLES = {
    IN_SCORES: "qk", IN_PROBABILITIES: "pv", IN_DP: "pv", IN_DELTA: "pv", IN_DX: "pv", IN_DQ: "qk", IN_DK: "qk", IN_DV: "pv",
}  # fmt: skip
COLUMNS = {IN_SCORES: 150, IN_PROBABILITIES: 150, IN_DP: 150, IN_DELTA: 1, IN_DX: 150, IN_DQ: 24, IN_DK: 24, IN_DV: 20}
OF_KEYS = (IN_DK, IN_DV)


@pytest.mark.parametrize("kind", ["whole", "causal", "padding", "added"])
@pytest.mark.parametrize("place", ROLES)
def test_a_transient_fault_in_every_place_is_seen_named_and_repaired(place, kind, struck, passes):
    operands = _operands()
    row, column = (1 * 3 + 2) * (150 if place in OF_KEYS else 70) + 31, min(11, COLUMNS[place] - 1)
    clean = _step(operands, **KINDS[kind])
    for value in VALUES:
        for policy in (QUIET, DETECT):
            abft.report(reset=True)
            passes.clear()
            struck(Struck(place, row, column, value))
            found = _step(operands, policy, **KINDS[kind])
            report = abft.report()
            # What is huge or no number goes on into the sums over queries, whose rows are suspect, too.
            assert report.detected >= 1 and (report.detected == 1 or abs(value) > 100 or value != value) and passes == [1, 1], value
            assert (report.recomputed, report.observed) == ((report.detected, 0) if policy is QUIET else (0, report.detected))
            event = next(e for e in report.events if e.role == ROLES[place])
            assert event.cause == "transient" and (event.row == row or report.detected > 1)
            assert not abs(event.residual) <= event.bound or not math.isfinite(event.bound)
            assert _same(found, clean) == (policy is QUIET)


@pytest.mark.parametrize("place", ROLES)
def test_every_row_and_column_is_judged(place, struck):
    operands = _operands((1, 2, 21, 8), keys=133, depth=11)
    rows = 2 * (133 if place in OF_KEYS else 21)
    columns = {IN_DELTA: 1, IN_DQ: 8, IN_DK: 8, IN_DV: 11}.get(place, 133)
    clean = _step(operands)
    for number in range(0, max(rows, columns), 3):
        row, column = number % rows, number % columns
        abft.report(reset=True)
        struck(Struck(place, row, column, 2.5))
        assert _same(_step(operands), clean)
        assert abft.report().recomputed == 1 and abft.report().events[0].row == row


@pytest.mark.parametrize("place", ROLES)
def test_half_precision_hides_nothing(place, struck):
    operands = _operands(dtype=torch.bfloat16)
    clean = _step(operands)
    abft.report(reset=True)
    struck(Struck(place, 5, 0, 2.5))
    assert _same(_step(operands), clean) and abft.report().recomputed == 1


@pytest.mark.parametrize("place", ROLES)
def test_what_is_wrong_every_time_is_taken_from_the_steps(place, struck):
    operands = _operands()
    clean = _step(operands)
    for policy, verdict in ((QUIET, "reconstructed"), (DETECT, "observed")):
        abft.report(reset=True)
        struck(Struck(place, 100, 0, 2.5), always=True)
        found, report = _step(operands, policy), abft.report()
        assert getattr(report, verdict) == report.detected == 1 and _same(found, clean) == (policy is QUIET)
        assert (report.events[0].role, report.events[0].row, report.events[0].cause) == (ROLES[place], 100, "persistent")


def test_a_row_of_the_gradient_that_became_zero_is_seen(struck):
    """Σ dX = 0 holds there, and dQ is the product of what is there: only the second sum tells."""
    operands = _operands()
    clean = _step(operands)
    struck(Struck(IN_DX, 100, -1, 0.0))
    assert _same(_step(operands), clean) and abft.report().recomputed == 1
    event = abft.report().events[0]
    assert (event.role, event.row) == ("pv", 100)


@pytest.mark.parametrize("where", ["q", "k", "v", "above"])
def test_poisoned_operands_are_inputs(where):
    operands = _operands((1, 2, 20, 16), keys=30, depth=16)
    operands[["q", "k", "v", "above"].index(where)][0, 1, 3, 2] = math.nan
    found, report = _step(operands), abft.report()
    assert report.input_rows > 0 and report.detected == report.uncorrected == 0
    for ours, torchs in zip(found, _step(operands, function=F.scaled_dot_product_attention), strict=True):
        assert torch.equal(ours.isnan(), torchs.isnan())


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e-12, 1e12])
def test_numbers_of_any_size_are_no_faults(scale):
    q, k, v, above = _operands()
    for operands in ((q * scale, k, v, above), (q, k, v * scale, above), (q, k, v, above * scale)):
        assert all(t.isfinite().all() for t in _step(operands))
    assert abft.report().detected == 0


def test_statistics_that_changed_since_the_forward_are_no_repair(passes):
    q, k, v = (t.requires_grad_() for t in _operands()[:3])
    out = abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
    node = out.grad_fn
    while "CheckedAttention" not in type(node).__name__:
        node = node.next_functions[0][0]
    node.saved_tensors[-1].data[1, 0, 1, 0, 7] *= 1.5
    out.backward(_operands()[3])
    assert passes == [1, 1] and abft.report().uncorrected == abft.report().detected == 1


def test_redundancy_finds_what_no_check_looks_for(struck):
    operands = _operands()
    clean = _step(operands)
    struck(Struck(IN_DK, 3, 0, 2.5))
    found = _step(operands, abft.Policy(level="off", redundancy="dmr", on_uncorrected="record"))
    assert _same(found, clean) and abft.report().recomputed == 1
