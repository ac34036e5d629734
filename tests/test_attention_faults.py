"""Faults inside attention: every place and class is seen, repaired to the very bits, and named; detect tells; redundancy votes."""

from __future__ import annotations

import math
import warnings

import oracles
import pytest
import torch

import abft
from abft.attention import problem

#: place → role; and at which matching product: forward first, then backward.
PLACES = {"S": "qk", "dQ": "qk", "dK": "qk", "P": "pv", "l": "pv", "O": "pv", "dP": "pv", "dS": "pv", "dV": "pv"}
IN_FORWARD = ("S", "P", "l", "O")
WHATS = {
    "nullify": {}, "flip of bit 30": {"what": "bitflip", "bit": 30}, "flip of bit 22": {"what": "bitflip", "bit": 22}, "nan": {}, "inf": {}, "-inf": {},
    "near_inf": {}, "scale": {}, "carry": {"bit": 24}, "stuck_at": {"bit": 29},
}  # fmt: skip
QUIET = abft.Policy(on_uncorrected="record")


class Step:
    """One attention, forward and backward, of fixed operands: [out, dq, dk, dv]."""

    def __init__(self, **kwargs):
        generator = torch.Generator().manual_seed(7)
        make = lambda *s: torch.randn(s, generator=generator)  # noqa: E731
        self.operands = make(2, 4, 40, 16), make(2, 2, 48, 16), make(2, 2, 48, 12)
        self.above, self.kwargs = make(2, 4, 40, 12), {"enable_gqa": True, **kwargs}
        self.clean = self()
        self.rows = {"S": 320, "P": 320, "l": 320, "O": 320, "dP": 320, "dS": 320, "dQ": 320, "dK": 192, "dV": 192}
        abft.report(reset=True)

    def __call__(self, policy=QUIET):
        leaves = [t.clone().requires_grad_() for t in self.operands]
        torch.manual_seed(3)
        out = abft.scaled_dot_product_attention(*leaves, policy=policy, **self.kwargs)
        out.backward(self.above)
        return [out.detach()] + [t.grad for t in leaves]

    def struck(self, fault, seed=0, policy=QUIET):
        """(results, report, log) of a step with one fault."""
        abft.report(reset=True)
        with warnings.catch_warnings(), abft.inject.faults(fault, seed=seed) as log:
            warnings.simplefilter("ignore")
            results = self(policy)
        return results, abft.report(), log

    def is_clean(self, results):
        return all(oracles.bits_equal(a, b) for a, b in zip(results, self.clean, strict=True))


@pytest.fixture(scope="module")
def step():
    return Step()


def fault(name, where, call=0, **more):
    options = {"what": name, **WHATS[name]}
    return abft.inject.Fault(options.pop("what"), where, role=PLACES[where], call=call, **options, **more)


@pytest.mark.parametrize("name", WHATS)
@pytest.mark.parametrize("where", PLACES)
def test_a_fault_in_every_place_is_repaired_to_the_very_bits(step, where, name):
    for call in (0, 1) if where in ("S", "P") else (0,):
        for seed in range(3):
            results, report, log = step.struck(fault(name, where, call), seed)
            changed = log[0].effect > 1e-5
            assert step.is_clean(results), "whatever was wrong is right"
            assert report.recomputed == report.detected and report.uncorrected == report.false_alarms == report.input_rows == 0
            assert report.detected >= 1 or not changed, f"effect {log[0].effect:.3g} of {log[0].elements[:1]} was not seen"
            if report.detected:
                event = report.events[-1]
                assert (event.role, event.site, event.verdict.name) == (PLACES[where], "scaled_dot_product_attention", "RECOMPUTED")
                assert 0 <= event.row < step.rows[where] and (not abs(event.residual) <= event.bound or not math.isfinite(event.bound))


@pytest.mark.parametrize("where", PLACES)
def test_a_fault_in_every_place_is_only_told_of_at_level_detect(step, where):
    results, report, _ = step.struck(fault("flip of bit 30", where), policy=abft.Policy(level="detect", on_uncorrected="record"))
    assert report.observed == report.detected >= 1 and not step.is_clean(results)


@pytest.mark.parametrize("where, out", [("S", 0), ("P", 0), ("l", 0), ("O", 0), ("dQ", 1), ("dK", 2), ("dV", 3)])
def test_the_event_names_the_row(step, where, out):
    seen = 0
    for seed in range(4):
        f = fault("flip of bit 30", where)
        wrong, report, _ = step.struck(f, seed, policy=abft.Policy(level="detect", on_uncorrected="record"))
        changed = [int(r) for r in (wrong[out] != step.clean[out]).any(-1).flatten().nonzero()]
        if report.detected and len(changed) == 1:
            seen += 1
            assert report.events[0].row == changed[0]
    assert seen, "one element of one row is what such a fault changes"


@pytest.mark.parametrize("where", ["accumulator", "operand", "checksum"])
@pytest.mark.parametrize("role", ["qk", "pv"])
def test_the_general_places_strike_attentions_products_too(step, role, where):
    seen = 0
    for call in range(4 if role == "qk" else 3):
        results, report, log = step.struck(abft.inject.Fault("bitflip", where, role=role, bit=30, call=call), seed=call)
        assert (log[0].role, log[0].where) == (role, where)
        assert report.recomputed == report.detected and report.uncorrected == 0
        seen += report.detected
        for got, right in zip(results, step.clean, strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
    assert seen


@pytest.mark.parametrize("pattern", ["row", "warp", "fragment", "tile"])
@pytest.mark.parametrize("where", ["S", "P", "O", "dP", "dS", "dQ", "dK", "dV"])
def test_patterns(step, where, pattern):
    results, report, _ = step.struck(fault("nullify", where, pattern=pattern), seed=1)
    assert step.is_clean(results) and report.recomputed == report.detected >= 1


@pytest.mark.parametrize("kwargs", [{"is_causal": True}, {"dropout_p": 0.3}, {"attn_mask": torch.rand(40, 48) < 0.8}, {"attn_mask": torch.randn(40, 48)}], ids=["causal", "dropout", "boolean", "added"])
@pytest.mark.parametrize("where", PLACES)
def test_masks_and_dropout_hide_no_place(where, kwargs):
    masked, seen = Step(**kwargs), 0
    for seed in range(4):
        results, report, log = masked.struck(fault("inf", where), seed)
        assert masked.is_clean(results) and report.uncorrected == 0
        assert report.detected or log[0].effect < 1e-5
        seen += report.detected
    assert seen


@pytest.mark.parametrize("where", PLACES)
def test_in_one_of_many_blocks(where, monkeypatch):
    monkeypatch.setattr(problem, "ELEMENTS", 3000)
    cut = Step()
    for call in (0, 2):
        results, report, _ = cut.struck(fault("inf", where, call))
        assert cut.is_clean(results) and report.recomputed == report.detected >= 1


@pytest.mark.parametrize("where", PLACES)
def test_half_precision_hides_nothing(where):
    half = Step()
    half.operands = [t.bfloat16() for t in half.operands]
    half.above = half.above.bfloat16()
    half.clean = half()
    abft.report(reset=True)
    for seed in range(3):
        results, report, log = half.struck(fault("nullify", where), seed)
        assert half.is_clean(results)
        assert report.detected or log[0].effect < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_a_persistent_fault_of_the_softmax_is_decided_by_fp64(step, seed, monkeypatch):
    """An exponential unit that is always wrong for one argument repeats its error; fp64 takes its place."""
    from abft.attention import fused, softmax

    monkeypatch.setattr(fused, "covers", lambda *_: False)  # step by step
    right = softmax.exponentials
    place = torch.Generator().manual_seed(seed)
    head, row, key = (int(torch.randint(n, (), generator=place)) for n in (4, 80, 48))

    def wrong(s, tile, out=None):
        p, m = right(s, tile, out)
        p[head, row, key] += 0.25
        return p, m

    monkeypatch.setattr(softmax, "exponentials", wrong)
    abft.report(reset=True)
    with torch.no_grad():
        y = abft.scaled_dot_product_attention(*step.operands, policy=QUIET, enable_gqa=True)
    report = abft.report()
    assert (report.reconstructed, report.detected) == (1, 1) and report.events[0].cause == "persistent"
    torch.testing.assert_close(y, step.clean[0], rtol=0, atol=1e-6)


def test_statistics_that_changed_in_memory_are_seen_by_the_backward(step):

    q, k, v = (t.clone().requires_grad_() for t in step.operands)
    out = abft.scaled_dot_product_attention(q, k, v, policy=QUIET, enable_gqa=True)
    node = out.grad_fn
    while not hasattr(node, "saved_tensors") or "CheckedAttention" not in type(node).__name__:
        node = node.next_functions[0][0]
    statistics = node.saved_tensors[-1]
    statistics.data[1, 0, 1, 1, 7] *= 1.5
    abft.report(reset=True)
    out.backward(step.above)
    report = abft.report()
    # Whether the statistics changed or q and k did, nobody can tell: the step has to be done again.
    assert report.uncorrected == report.detected == 1
    for got, right in zip([t.grad for t in (q, k, v)], step.clean[1:], strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["q", "k"])
def test_operands_that_changed_since_the_forward_are_not_called_repaired(step, which):
    q, k, v = (t.clone().requires_grad_() for t in step.operands)
    out = abft.scaled_dot_product_attention(q, k, v, policy=QUIET, enable_gqa=True)
    {"q": q, "k": k}[which].data[0, 0, 5, 3] += 1.0
    abft.report(reset=True)
    out.backward(step.above)
    report = abft.report()
    assert report.uncorrected == report.detected > 0 and report.corrected == 0


@pytest.mark.parametrize("redundancy, executions", [("dmr", 2), ("tmr", 3)])
@pytest.mark.parametrize("level", ["off", "correct"])
def test_redundancy_executes_all_of_it_again(step, redundancy, executions, level):
    policy = abft.Policy(level=level, redundancy=redundancy, on_uncorrected="record")
    abft.report(reset=True)
    assert step.is_clean(step(policy))
    report = abft.report()
    assert report.executions == executions * 7 and report.products == 7 and report.detected == 0 and report.bypassed == {}
    for where in PLACES:
        results, report, _ = step.struck(fault("flip of bit 30", where), policy=policy)
        assert step.is_clean(results) and report.recomputed == report.detected >= 1


def test_what_is_off_is_struck_and_delivered(step):
    results, report, log = step.struck(fault("inf", "O"), policy=abft.Policy(level="off"))
    assert len(log) == 1 and not step.is_clean(results) and report.detected == 0


def test_reactions(step):
    with abft.inject.faults(fault("inf", "O")), pytest.raises(abft.FaultDetected, match=r"scaled_dot_product_attention \(pv\)"):
        step(abft.Policy(level="detect", on_uncorrected="raise"))
    told = []
    step.struck(fault("inf", "S"), policy=abft.Policy(level="detect", on_uncorrected=told.append))
    assert {event.role for event in told} == {"qk", "pv"}, "the softmax of the wrong scores disagrees with those that the backward computes"


def test_deferred_checks_repair_nothing(step):
    results, report, _ = step.struck(fault("inf", "O"), policy=abft.Policy(timing="deferred", on_uncorrected="record"))
    assert report.uncorrected == report.detected == 1 and not step.is_clean(results)


def test_a_fault_that_finds_no_attention_says_so():
    with pytest.raises(abft.NotInjected), abft.inject.faults(abft.inject.Fault("inf", "S", role="qk")):
        abft.linear(torch.randn(3, 4), torch.randn(5, 4))


def test_mixtures_reach_attention(step):
    mixture = abft.inject.Mixture.gpu_2026()
    sites = set()
    for seed in range(8):
        results, report, log = step.struck(mixture, seed)
        assert report.uncorrected == 0 and math.isfinite(results[0].sum().item())
        sites |= {entry.role for entry in log}
    assert sites <= {"qk", "pv"} and sites
