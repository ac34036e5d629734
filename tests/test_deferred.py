"""``timing="deferred"`` without kernels: judged at once, nothing repaired, the caller replays; and what it does not go with."""

from __future__ import annotations

import oracles
import pytest
import torch

import abft
from abft.backends import masked
from abft.policy import Policy

DEFERRED = Policy(timing="deferred", on_uncorrected="record")
IMMEDIATE = DEFERRED.replace(timing="immediate")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(48, 130), torch.nn.GELU(), torch.nn.Linear(130, 40)).to(dtype)


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_redundancy_repairs_at_once_and_is_refused(redundancy):
    with pytest.raises(abft.PolicyError, match="redundancy"):
        Policy(timing="deferred", redundancy=redundancy)
    with pytest.raises(abft.PolicyError, match="redundancy"):
        Policy.preset("paranoid").replace(timing="deferred")


def test_it_survives_a_dict_and_a_mapping():
    policy = Policy.preset("inference").replace(timing="deferred")
    assert Policy.from_dict(policy.to_dict()) == policy and policy.weights == "frozen"
    model = abft.protect(net(), {"0": policy, "2": IMMEDIATE})
    assert model[0]._abft_policy == policy


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_clean_counts_are_those_of_immediate_checks(dtype):
    model, x = net(dtype), torch.randn(7, 48).to(dtype)
    with torch.no_grad():
        with abft.protected(IMMEDIATE) as scope:
            clean = model(x)
        immediate = scope.report()
        with abft.protected(DEFERRED) as scope:
            assert oracles.bits_equal(model(x), clean)
        found = scope.report()
    assert found.detected == 0
    assert (found.checks, found.products, found.executions, found.worst) == (14, 2, 2, immediate.worst)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("level", ["correct", "detect"])
def test_a_wrong_row_is_told_and_left_and_the_replay_is_right(level, dtype):
    model, x = net(dtype), torch.randn(7, 48).to(dtype)
    with torch.no_grad():
        clean = model(x)
        with abft.inject.faults(abft.inject.Fault("nullify", pattern="row"), seed=3), abft.protected(DEFERRED.replace(level=level)) as scope:
            wrong = model(x)
        found = scope.report()
        with abft.protected(DEFERRED) as again:
            assert oracles.bits_equal(model(x), clean)
    assert not oracles.bits_equal(wrong, clean) and found.corrected == 0 and found.executions == 2
    assert found.detected == 1 == (found.uncorrected if level == "correct" else found.observed)
    assert found.events[0].verdict is (abft.Verdict.UNCORRECTED if level == "correct" else abft.Verdict.OBSERVED)
    assert again.report().detected == 0


def test_repeated_calls_take_the_quick_way_and_still_find_faults():
    layer, x = abft.Linear(48, 130, policy=DEFERRED), torch.randn(7, 48)
    with torch.no_grad():
        for _ in range(4):
            layer(x)
        with abft.inject.faults(abft.inject.Fault("nullify", pattern="row"), seed=3):
            layer(x)
        layer(x)
    report = abft.report()
    assert (report.products, report.checks, report.uncorrected, report.detected) == (6, 42, 1, 1)


def test_input_and_overflow_are_no_faults():
    layer = abft.Linear(64, 32, bias=False, dtype=torch.float16, policy=DEFERRED)
    with torch.no_grad():
        layer.weight.fill_(30.0)
        x = torch.ones(5, 64).half()
        x[1], x[3, 7] = 100.0, float("nan")
        layer(x)
    report = abft.report()
    assert (report.overflow_rows, report.input_rows, report.detected) == (1, 1, 0)


def test_a_frozen_weight_that_changed_is_a_fault_of_the_weight_and_is_not_repaired():
    layer, x = abft.Linear(48, 130, policy=DEFERRED.replace(weights="frozen")), torch.randn(7, 48)
    with torch.no_grad():
        layer(x)
        layer.weight.data[5, 7] += 1.0
        y = layer(x)
        assert oracles.bits_equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert report.uncorrected == report.detected == 7 and report.corrected == 0 and report.weight_faults == 1
    assert report.events[-1].cause == "weight"


def test_a_dense_unannounced_edit_is_stale_as_ever():
    layer, x = abft.Linear(48, 130, policy=DEFERRED), torch.randn(7, 48)
    with torch.no_grad():
        layer(x)
        layer.weight.data.mul_(1.5)
        with pytest.warns(UserWarning, match="without an announcement"):
            layer(x)
        layer(x)
    report = abft.report()
    assert report.detected == 0 and report.stale == 1


def test_raise_comes_inside_the_call():
    layer, x = abft.Linear(48, 130, policy=DEFERRED.replace(on_uncorrected="raise")), torch.randn(7, 48)
    with torch.no_grad(), abft.inject.faults(abft.inject.Fault("nullify", pattern="row"), seed=3), pytest.raises(abft.UncorrectedFault):
        layer(x)


def test_level_off_and_a_floor_mean_what_they_always_do():
    x = torch.randn(7, 48)
    with torch.no_grad():
        with abft.protected(DEFERRED.replace(level="off")) as scope:
            net()(x)
        assert scope.report().checks == 0 and scope.report().bypassed == {"level off": 2}
        with pytest.raises(abft.PolicyError, match="max_floor"):
            abft.linear(x, torch.randn(40, 48), policy=DEFERRED.replace(max_floor=1e-12))


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_a_step_is_replayed_until_it_is_right(role):
    model = abft.protect(net(), DEFERRED)
    guard = abft.StepGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), DEFERRED)
    x = torch.randn(5, 48)
    model(x).square().mean().backward()
    clean = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with abft.inject.faults(abft.inject.Fault("nullify", role=role, pattern="row"), seed=2):
        while guard.attempt():
            model(x).square().mean().backward()
    assert guard.replays == 1 and guard.last.uncorrected == 1
    assert all(oracles.bits_equal(p.grad, g) for p, g in zip(model.parameters(), clean, strict=True))
    assert guard.step()


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_masks_compute_nothing_again(backend):
    """The code of reference and vendor on a GPU, on a CPU."""
    from abft import ledger, sites
    from abft.backends.call import Call
    from abft.faults import BitOperation, Region, Strike

    torch.manual_seed(2)
    a, w = torch.randn(9, 64), torch.randn(140, 64) / 8
    strike = Strike("accumulator", Region(4, 5, 3, 90), BitOperation(keep=0))
    for level, name in (("correct", "uncorrected"), ("detect", "observed")):
        words = torch.zeros(ledger.WORDS, dtype=torch.int64)
        call = Call(a, w, None, None, False, "fprop", DEFERRED.replace(level=level), 3, (strike,))
        y = masked.product(call, words, sites.as_tensor(sites.site_of(sites.OVERFLOW), torch.device("cpu")), backend)
        counters = dict(zip(ledger.COUNTER_NAMES, words[ledger.HEADER :][: ledger.COUNTERS].tolist(), strict=False))
        assert (y[4, 3:90] == 0).all()
        assert (counters[name], counters["checks"], counters["executions"], counters["recomputed"]) == (1, 9, 1, 0)


def test_verifying_what_does_not_wait_does_nothing():
    before = abft.report().checks
    abft.verify_deferred()
    assert abft.report().checks == before
