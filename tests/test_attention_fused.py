"""The compiled pass over attention's forward: what it computes, what it sees, and that its steps give the same bits."""

from __future__ import annotations

import itertools
import math
import threading

import oracles
import pytest
import torch
from torch.nn import functional as F

import abft
from abft import attend
from abft.attend import More, attention_at
from abft.attention import fused, steps
from abft.attention.fused import IN_OUT, IN_PROBABILITIES, IN_SCORES, IN_SUM, Struck
from abft.inject import Fault, faults
from abft.native import library
from abft.ops import attention_again

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=f"nothing compiled: {library.why_not()}")
QUIET = abft.Policy(on_uncorrected="record")
DETECT = abft.Policy(level="detect", on_uncorrected="record")


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _operands(shape=(2, 3, 70, 24), keys=150, depth=20, dtype=torch.float32):
    return _random(*shape, dtype=dtype), _random(*shape[:2], keys, shape[3], dtype=dtype, seed=1), _random(*shape[:2], keys, depth, dtype=dtype, seed=2)


@pytest.fixture
def passes(monkeypatch):
    """How often the pass ran."""
    ran = []
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda *a: ran.append(1) or run(*a))
    return ran


@pytest.fixture
def struck(monkeypatch):
    """Strike the next pass, or every one."""

    def strike(hit, always=False):
        left = itertools.repeat(hit) if always else iter([hit])
        monkeypatch.setattr(fused, "strike", lambda: next(left, None))

    return strike


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_exponentials_are_within_two_units_of_the_last_place(scale):
    x = -(_random(100_003).abs() * scale)
    x[:4] = torch.tensor([0.0, -87.33, -88.0, -math.inf])
    found, exact = steps.exp_(x.clone()).double(), x.double().exp()
    normal = exact >= torch.finfo(torch.float32).tiny * 1.001
    assert ((found - exact).abs() <= 2 * 2.0**-23 * exact)[normal].all()
    assert (found[~normal] <= 2.0**-125).all() and found[0] == 1 and found[3] == 0
    assert steps.exp_(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 7, 33, 5), (3, 65, 17, 130), (2, 64, 300, 129), (5, 8, 16, 300)], ids=str)
def test_products_are_chains_of_fma(shape):
    heads, rows, columns, depth = shape
    a, w = _random(heads, rows, depth), _random(heads, columns, depth, seed=1)
    exact = a.double() @ w.double().mT
    # Every rounding is at most half a unit of a partial sum, and there are as many as products and chains.
    room = (depth + depth / steps.CHUNK + 1) * 2.0**-24 * (a.double().abs() @ w.double().abs().mT)
    for left, right in ((a, w), (a.mT.contiguous().mT, w.mT.contiguous().mT), (_random(heads, rows, 2 * depth)[..., ::2], w)):
        assert ((steps.multiply(left, right).double() - left.double() @ w.double().mT).abs() <= room * 4).all()
    assert ((steps.multiply(a, w).double() - exact).abs() <= room).all()


@pytest.mark.parametrize("rows, keys", [(1, 1), (3, 127), (5, 128), (2, 1000)])
def test_row_sums(rows, keys):
    p = _random(rows, keys).abs()
    torch.testing.assert_close(steps.row_sums(p).double(), p.double().sum(-1), rtol=20 * 2.0**-24, atol=0)


KINDS = {
    "whole": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": _random(70, 150) > -0.5}, "added": {"attn_mask": _random(2, 1, 70, 150)},
    "padding": {"attn_mask": (torch.arange(150) < torch.tensor([[150], [90]]))[:, None, None]},
    "of queries": {"attn_mask": _random(70, 1)}, "hidden rows": {"attn_mask": (torch.arange(70) > 9)[:, None].expand(70, 150)},
    "window": {"more": More(window=20)}, "aligned below": {"is_causal": True, "more": More(offset=80)}, "causal window": {"is_causal": True, "more": More(offset=80, window=33)},
    "nothing seen": {"is_causal": True, "more": More(offset=-20)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_give_the_same_bits(kind, dtype, passes, monkeypatch):
    q, k, v = _operands(dtype=dtype)
    kwargs = dict(KINDS[kind])
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].is_floating_point():
        kwargs["attn_mask"] = kwargs["attn_mask"].to(dtype)
    with torch.no_grad():
        y = attention_at(None, q, k, v, own=QUIET, **kwargs)
        assert passes == [1]
        off = attention_at(None, q, k, v, own=abft.Policy(level="off"), **kwargs)
        monkeypatch.setattr(fused, "covers", lambda *_: False)
        z = attention_at(None, q, k, v, own=QUIET, **kwargs)
    assert oracles.bits_equal(y, z) and oracles.bits_equal(y, off) and y.isfinite().all()
    report = abft.report()
    assert report.detected == 0 and report.worst < 0.5
    if "more" not in kwargs:
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, **kwargs), rtol=0.02, atol=2e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_strides_change_no_bit(threads):
    q, k, v = _operands((1, 2, 200, 40), keys=700, depth=64)
    before = torch.get_num_threads()
    with torch.no_grad():
        expected = abft.scaled_dot_product_attention(q, k, v)
        try:
            torch.set_num_threads(threads)
            spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)] + [t.mT.contiguous().mT for t in (q, k, v)]
            assert torch.equal(abft.scaled_dot_product_attention(*spread[:3]), expected)
            assert torch.equal(abft.scaled_dot_product_attention(*spread[3:]), expected)
        finally:
            torch.set_num_threads(before)


def test_grouped_queries_read_the_keys_of_their_group():
    q, k, v = _random(2, 6, 40, 16), _random(2, 2, 50, 16, seed=1), _random(2, 2, 50, 16, seed=2)
    with torch.no_grad():
        y = abft.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        assert torch.equal(y, abft.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))


def test_threads_that_call_at_once_keep_their_own_scratch():
    cases = [_operands((1, 2, n, 32), keys=n + 9, depth=16) for n in (5, 64, 130, 300)]
    wanted, failed = [abft.scaled_dot_product_attention(*c) for c in cases], []

    def repeat(i):
        failed.extend(i for _ in range(20) if not torch.equal(abft.scaled_dot_product_attention(*cases[i]), wanted[i]))

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


@pytest.mark.parametrize("kwargs, reason", [
    ({"dropout_p": 0.1}, "dropout"), ({"more": More(softcap=5.0)}, "soft-cap"), ({"own": abft.Policy(group=16)}, "narrow groups"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_it_does_not_cover_goes_by_steps(kwargs, reason, passes):
    with torch.no_grad():
        attention_at(None, *_operands(), **{"own": QUIET, **kwargs})
    assert passes == [] and abft.report().checks == 2 * 2 * 3 * 70


# --- what it sees ---------------------------------------------------------------------------------

VALUES = (0.0, 3.0, -50.0, 1e30, math.inf, -math.inf, math.nan)
ROLES = {IN_SCORES: "qk", IN_PROBABILITIES: "pv", IN_SUM: "pv", IN_OUT: "pv"}


@pytest.mark.parametrize("kind", ["whole", "causal", "padding", "added"])
@pytest.mark.parametrize("place", ROLES)
def test_a_transient_fault_in_every_place_is_seen_named_and_repaired(place, kind, struck, passes):
    q, k, v = _operands()
    row, column = (1 * 3 + 2) * 70 + 31, {IN_SCORES: 11, IN_PROBABILITIES: 11, IN_SUM: 0, IN_OUT: 7}[place]
    with torch.no_grad():
        clean = abft.scaled_dot_product_attention(q, k, v, policy=QUIET, **KINDS[kind])
        for value in VALUES:
            for policy in (QUIET, DETECT):
                abft.report(reset=True)
                passes.clear()
                struck(Struck(place, row, column, value))
                y = abft.scaled_dot_product_attention(q, k, v, policy=policy, **KINDS[kind])
                report = abft.report()
                assert report.detected == 1 and passes == [1, 1], value
                assert (report.recomputed, report.observed) == ((1, 0) if policy is QUIET else (0, 1))
                event = report.events[0]
                assert (event.role, event.row, event.cause) == (ROLES[place], row, "transient")
                assert not abs(event.residual) <= event.bound or not math.isfinite(event.bound)
                assert oracles.bits_equal(y, clean) == (policy is QUIET)


@pytest.mark.parametrize("place", ROLES)
def test_every_row_and_column_is_judged(place, struck):
    q, k, v = _operands((1, 2, 21, 8), keys=133, depth=11)
    columns = {IN_SCORES: 133, IN_PROBABILITIES: 133, IN_SUM: 1, IN_OUT: 11}[place]
    with torch.no_grad():
        clean = abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
        for number in range(max(42, columns)):
            row, column = number % 42, number % columns
            abft.report(reset=True)
            struck(Struck(place, row, column, 2.5))
            assert torch.equal(abft.scaled_dot_product_attention(q, k, v, policy=QUIET), clean)
            assert abft.report().recomputed == 1 and abft.report().events[0].row == row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ROLES)
def test_half_precision_hides_nothing(place, dtype, struck):
    q, k, v = _operands(dtype=dtype)
    with torch.no_grad():
        clean = abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
        # An error of an element of O by 2⁻¹⁰ of it is less than its rounding, and seen: it is judged before.
        struck(Struck(place, 5, 0, 2.5))
        assert torch.equal(abft.scaled_dot_product_attention(q, k, v, policy=QUIET), clean)
    assert abft.report().recomputed == 1


@pytest.mark.parametrize("place", ROLES)
def test_what_is_wrong_every_time_is_taken_from_the_steps(place, struck):
    q, k, v = _operands()
    with torch.no_grad():
        clean = abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
        abft.report(reset=True)
        struck(Struck(place, 100, 0, 2.5), always=True)
        y = abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
        report = abft.report()
        assert torch.equal(y, clean) and report.reconstructed == report.detected == 1
        assert (report.events[0].role, report.events[0].row, report.events[0].cause) == (ROLES[place], 100, "persistent")
        abft.report(reset=True)
        y = abft.scaled_dot_product_attention(q, k, v, policy=DETECT)
        assert not torch.equal(y, clean) and abft.report().observed == abft.report().detected == 1


def test_a_unit_that_computes_wrong_exponentials_is_seen_by_other_arguments(struck):
    """One exponential, wrong by as much as its row's sum times the documented 6e-6 and a little."""
    q, k, v = _operands((1, 1, 4, 16), keys=40, depth=16)
    with torch.no_grad():
        p = torch.softmax(q @ k.mT / 4, -1)[0, 0, 2]
        scores = (q @ k.mT / 4)[0, 0, 2]
        exponential, total = (scores - scores.max()).exp()[5], (scores - scores.max()).exp().sum()
        for factor, seen in ((1.5, 1), (0.2, 0)):
            abft.report(reset=True)
            struck(Struck(IN_PROBABILITIES, 2, 5, float(exponential + factor * fused.softmax.KAPPA_SOFTMAX * 2.0**-23 * total)))
            abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
            assert abft.report().recomputed == seen, (factor, p[5])


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_poisoned_operands_are_inputs(where):
    operands = dict(zip("qkv", _operands((1, 2, 20, 16), keys=30, depth=16), strict=True))
    operands[where][0, 1, 3, 2] = math.nan
    with torch.no_grad():
        y = abft.scaled_dot_product_attention(*operands.values(), policy=QUIET)
    report = abft.report()
    assert report.input_rows > 0 and report.detected == report.uncorrected == 0
    assert torch.equal(y.isnan(), F.scaled_dot_product_attention(*operands.values()).isnan())


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e-12, 1e12, 1e17])
def test_numbers_of_any_size_are_no_faults(scale):
    q, k, v = _operands()
    with torch.no_grad():
        for a, b in ((q * scale, v), (q, v * scale)):
            y = abft.scaled_dot_product_attention(a, k, b, policy=QUIET)
            assert y.isfinite().all()
    assert abft.report().detected == 0


def test_roles_are_judged_apart(passes):
    """… and step by step: behind suspect scores the pass looks no further."""
    q, k, v = _operands()
    with torch.no_grad():
        for role, place, seen in (("qk", "S", True), ("qk", "O", False), ("pv", "S", False), ("pv", "O", True)):
            abft.report(reset=True)
            with faults(Fault("scale", place, role="qk" if place == "S" else "pv", index=(3, 0))):
                abft.scaled_dot_product_attention(q, k, v, policy=abft.Policy(roles={role}, on_uncorrected="record"))
            assert (abft.report().recomputed > 0) is seen and abft.report().checks == 420
            assert not passes
            abft.scaled_dot_product_attention(q, k, v, policy=abft.Policy(roles={role}, on_uncorrected="record"))
            assert not passes
        abft.scaled_dot_product_attention(q, k, v)
        assert len(passes) == 1


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_redundancy_finds_what_no_check_looks_for(redundancy, struck):
    q, k, v = _operands()
    with torch.no_grad():
        clean = abft.scaled_dot_product_attention(q, k, v)
        struck(Struck(IN_OUT, 3, 0, 2.5))
        y = abft.scaled_dot_product_attention(q, k, v, policy=abft.Policy(level="off", redundancy=redundancy, on_uncorrected="record"))
    assert torch.equal(y, clean) and abft.report().recomputed == 1


def test_rows_of_suspect_scores_are_judged_where_their_scores_are_not(struck):
    """Scores too large for their check are suspect without a fault; O behind them is pv's concern."""
    q, k, v = (_random(1, 1, 8, 32, seed=i) for i in range(3))
    q[0, 0, 3] *= 1e10
    k[0, 0] *= 1e10
    for roles in ({"pv"}, {"qk", "pv"}):
        struck(Struck(IN_OUT, 3, 2, 1e3))
        abft.report(reset=True)
        y = abft.scaled_dot_product_attention(q, k, v, policy=QUIET.replace(roles=frozenset(roles)))
        # Roles alone go step by step, where nobody strikes.
        assert (y - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-4


def test_inf_in_a_key_is_input_and_no_fault():
    q, k, v = (_random(1, 2, 8, 32, seed=i) for i in range(3))
    k[:, :, 4] = torch.inf
    abft.scaled_dot_product_attention(q, k, v, policy=QUIET)
    found = abft.report(reset=True)
    assert found.detected == 0 and found.input_rows > 0
    assert {e.verdict for e in found.events} == {abft.Verdict.INPUT}


@pytest.mark.parametrize("name", ["S", "O"])
def test_the_statistical_detector_leaves_nothing_inside_attention(monkeypatch, name):
    """What is small among the scores need not be so behind the softmax."""
    from abft.attention import products

    real, left = products._product, [1]

    def struck_once(product, a, w):
        y = real(product, a, w)
        if product == name and left:
            left.clear()
            y = y.clone()
            y[0, 3, 5] += 1e-3
        return y

    q, k, v = (_random(1, 2, 64, 64, seed=i) for i in range(3))
    monkeypatch.setattr(fused, "covers", lambda *a: False)
    clean = abft.scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(products, "_product", struck_once)
    abft.report(reset=True)
    y = abft.scaled_dot_product_attention(q, k, v, policy=QUIET.replace(detector="statistical"))
    found = abft.report(reset=True)
    assert found.recomputed > 0 and found.tolerated == 0 and torch.equal(y, clean)


# --- a call like an earlier one -------------------------------------------------------------------


@pytest.fixture
def decided(monkeypatch):
    """How often an attention was decided anew."""
    anew = []
    whole = attend._why_not
    monkeypatch.setattr(attend, "_why_not", lambda *a, **k: anew.append(1) or whole(*a, **k))
    return anew


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped"])
def test_a_call_like_an_earlier_one_is_not_decided_again(grouped, decided, struck):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in _operands((2, 6, 37, 16), keys=45, depth=16))
    k, v = (k[:, :2], v[:, :2]) if grouped else (k, v)
    mask = _random(2, 1, 37, 45, seed=5) < 1
    policy = abft.Policy(on_uncorrected="record", max_floor=0.5)

    def call(scale=1.0, mask=mask):
        return abft.scaled_dot_product_attention(q * scale, k, v, attn_mask=mask, enable_gqa=grouped, policy=policy)

    with torch.no_grad():
        first, other = call(), call(2.0)
        before = abft.report(reset=True)
        seen = len(decided)
        assert torch.equal(call(2.0), other) and torch.equal(call(), first) and len(decided) == seen
        assert abft.report().checks == before.checks and not abft.report(reset=True).detected
        assert call().transpose(1, 2).is_contiguous()
        struck(Struck(IN_OUT, 2 * 37 + 3, 5, 2.5))
        assert torch.equal(call(), first) and len(decided) == seen
        assert abft.report().recomputed == 1 and abft.report().events[0].row == 2 * 37 + 3
        call(mask=None)
        call(mask=mask.to(torch.float32))
        call(mask=mask.expand(2, 6, 37, 45))
        assert len(decided) == seen + 3
    seen = len(decided)
    assert torch.equal(call(), first) and len(decided) == seen + 1  # there may be gradients
    with torch.no_grad(), faults(Fault("scale", "S", role="qk", index=(3, 0))):
        call()
    assert len(decided) == seen + 2


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_repeated_call_has_room_whatever_the_default_type_is(default):
    q, k, v = _operands((4, 8, 1024, 8), keys=16, depth=8)
    kept = torch.get_default_dtype()
    attention_again._kept.__dict__.clear()
    try:
        torch.set_default_dtype(default)
        with torch.no_grad():
            first = abft.scaled_dot_product_attention(q, k, v)
            assert torch.equal(abft.scaled_dot_product_attention(q, k, v), first)
        room = attention_again._kept.statistics
        assert room.dtype == torch.float32 and room.numel() >= 2 * 4 * 8 * 1024
    finally:
        torch.set_default_dtype(kept)


def test_a_scale_that_is_a_tensor_is_read_at_every_call():
    q, k, v = _operands((1, 2, 5, 8), keys=7, depth=8)
    scale = torch.tensor(0.1)
    with torch.no_grad():
        for value in (0.1, 5.0, 0.3):
            scale.fill_(value)
            wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=value)
            assert (abft.scaled_dot_product_attention(q, k, v, scale=scale) - wanted).abs().max() < 1e-5


def test_what_another_thread_forgot_is_decided_anew(decided):
    q, k, v = _operands((1, 2, 5, 8), keys=7, depth=8)
    with torch.no_grad():
        first = abft.scaled_dot_product_attention(q, k, v)
        assert attention_again.take(("no such key",), (q, k, v), 0) is None
        attention_again._known.clear()
        seen = len(decided)
        assert torch.equal(abft.scaled_dot_product_attention(q, k, v), first) and len(decided) == seen + 1


def test_kernels_that_were_asked_for_are_asked_again():
    """What decides is the policy: a repeated call must not be given to another backend."""
    q, k, v = _operands((1, 2, 5, 8), keys=7, depth=8)
    with torch.no_grad():
        known = [attention_again.key_of(q, k, v, None, False, None, False, abft.Policy(backend=b)) for b in ("auto", "triton")]
    assert known[0] is not None and known[1] is None


def test_the_result_lies_as_torchs_does():
    for q in (_random(2, 3, 70, 24), _random(2, 70, 72).unflatten(-1, (3, 24)).transpose(1, 2), _random(3, 70, 24), _random(70, 24)):
        for _ in range(2):  # the second call is like the first
            with torch.no_grad():
                assert abft.scaled_dot_product_attention(q, q, q).stride() == F.scaled_dot_product_attention(q, q, q).stride()
        assert abft.scaled_dot_product_attention(q, q, q).stride() == F.scaled_dot_product_attention(q, q, q).stride()
