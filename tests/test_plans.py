"""Policies that change from one product to the next: sampled ones, and those that a plan puts in force at a site."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import abft
from abft import inject, plans, sites
from abft.policy import Policy

RECORD = {"on_uncorrected": "record"}


@pytest.fixture(autouse=True)
def clean_slate():
    plans._counts.clear()  # blocks begin with the test, whatever the sites have computed before
    abft.report(reset=True)
    yield
    abft.report(reset=True)


def site_of(module: nn.Module) -> sites.Site:
    return sites.site_of(sites.number_of(module._abft_site))


@pytest.mark.parametrize("every", [2, 3, 16])
def test_one_of_every_block_is_protected(every: int) -> None:
    layer = abft.protect(nn.Linear(8, 8), Policy(every=every, **RECORD), name=f"one of {every}")
    with torch.no_grad():
        for _ in range(every * 5):
            layer(torch.randn(2, 8))
    report = abft.report()
    assert report.products == 5
    assert report.bypassed == {plans.NOT_SAMPLED: every * 5 - 5}


def test_the_place_in_the_block_does_not_repeat() -> None:
    places = [plans.chosen_place(block, 7, "fprop", 4) for block in range(4000)]
    counts = torch.bincount(torch.tensor(places), minlength=4)
    # Binomial(4000, 1/4): six standard deviations are 164.
    assert (counts - 1000).abs().max() < 164
    pairs = torch.bincount(torch.tensor([4 * a + b for a, b in zip(places, places[1:], strict=False)]), minlength=16)
    assert (pairs - 250).abs().max() < 6 * (250 * 15 / 16) ** 0.5


def test_forward_and_gradients_are_sampled_each_by_themselves() -> None:
    layer = abft.protect(nn.Linear(8, 8), Policy(every=4, **RECORD), name="both ways")
    for _ in range(40):
        layer(torch.randn(2, 8, requires_grad=True)).sum().backward()
    report = abft.report()
    assert report.products == 30
    assert report.bypassed == {plans.NOT_SAMPLED: 90}


def test_a_fault_is_missed_as_often_as_stated() -> None:
    layer = abft.protect(nn.Linear(16, 16), Policy(every=4, **RECORD), name="sampled")
    x, runs = torch.randn(4, 16), 800
    with torch.no_grad(), inject.faults(inject.Fault("nullify", pattern="row", probability=1.0)) as log:
        for _ in range(runs):
            layer(x)
    assert len(log) == runs
    assert abft.report().detected == runs // 4  # each hit; exactly one of four products is looked at


def test_sampled_products_are_bit_equal() -> None:
    plain = nn.Linear(16, 16)
    x = torch.randn(4, 16)
    wanted = plain(x)
    layer = abft.protect(plain, Policy(every=3, **RECORD))
    assert all(torch.equal(layer(x), wanted) for _ in range(9))


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_count(every: object) -> None:
    with pytest.raises(abft.PolicyError, match="every"):
        Policy(every=every)  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"every": 2}, {"redundancy": "dmr"}])
def test_a_plan_decides_alone(more: dict[str, object]) -> None:
    with pytest.raises(abft.PolicyError, match="plan"):
        Policy(level="planned", **more)  # type: ignore[arg-type]


def test_dynamic_policies_travel_as_values() -> None:
    for policy in (Policy(level="planned"), Policy(every=5)):
        assert Policy.from_dict(policy.to_dict()) == policy and policy.dynamic
    assert not Policy().dynamic


# --- planned ------------------------------------------------------------------------------------------------


def test_without_a_plan_products_are_corrected() -> None:
    layer = abft.protect(nn.Linear(16, 16), Policy(level="planned", **RECORD))
    x = torch.randn(4, 16)
    with torch.no_grad(), inject.faults(inject.Fault("nullify", pattern="row")):
        layer(x)
    assert abft.report().recomputed == 1


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (Policy(level="off", **RECORD), {"bypassed": {"level off": 1}, "detected": 0, "products": 0}),
        (Policy(level="detect", **RECORD), {"observed": 1, "products": 1}),
        (Policy(level="correct", **RECORD), {"recomputed": 1, "products": 1}),
        (Policy(level="off", redundancy="dmr", **RECORD), {"recomputed": 1, "executions": 3}),
        (Policy(level="correct", redundancy="tmr", **RECORD), {"recomputed": 1, "executions": 3}),
    ],
    ids=["off", "detect", "correct", "dmr", "correct-tmr"],
)
def test_a_plan_is_in_force_at_its_site(plan: Policy, wanted: dict[str, object]) -> None:
    layer = abft.protect(nn.Linear(16, 16), Policy(level="planned", **RECORD))
    other = abft.protect(nn.Linear(16, 16), Policy(level="planned", **RECORD), name="other")
    site_of(layer).plan = plan
    x = torch.randn(4, 16)
    with torch.no_grad(), inject.faults(inject.Fault("nullify", pattern="row", site="Linear")):
        layer(x)
    assert {name: getattr(abft.report(), name) for name in wanted} == wanted
    abft.report(reset=True)
    with torch.no_grad(), inject.faults(inject.Fault("nullify", pattern="row", site="other")):
        other(x)
    assert abft.report().recomputed == 1  # the neighbour has no plan


def test_gradients_follow_the_plan_of_the_moment() -> None:
    layer = abft.protect(nn.Linear(16, 16), Policy(level="planned", **RECORD))
    y = layer(torch.randn(4, 16, requires_grad=True))
    site_of(layer).plan = Policy(level="off", **RECORD)
    y.sum().backward()
    assert abft.report().products == 1
    assert abft.report().bypassed == {"level off": 2}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_plans_change_without_compiling_again(backend: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    abft.protect(model, Policy(level="planned", **RECORD), name=f"compiled {backend}")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 16)
    wanted = model(x)
    abft.report(reset=True)
    for plan in (Policy(level="off", **RECORD), Policy(**RECORD), Policy(every=2, **RECORD), Policy(level="off", redundancy="tmr", **RECORD)):
        for module in (model[0], model[2]):
            site_of(module).plan = plan
        for _ in range(2):
            assert torch.equal(compiled(x), wanted)
    report = abft.report()
    assert counter.frame_count == 1
    assert report.products == 0 + 4 + 2 + 4
    assert report.bypassed == {"level off": 4, plans.NOT_SAMPLED: 2}


def test_a_new_module_of_the_same_name_has_no_plan() -> None:
    layer = abft.protect(nn.Linear(4, 4), Policy(level="planned"), name="again")
    site_of(layer).plan = Policy(level="off")
    number = site_of(layer).index
    del layer
    layer = abft.protect(nn.Linear(4, 4), Policy(level="planned"), name="again")
    assert site_of(layer).index == number and site_of(layer).plan is None


def test_coverage_says_what_is_in_force() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    abft.protect(model, Policy(level="planned"))
    site_of(model[0]).plan = Policy(level="off")
    site_of(model[1]).plan = Policy(every=4)
    coverage = abft.coverage(model, torch.randn(4, 16))
    assert [m.covered for m in coverage.modules] == [False, True]
    assert "one of 4" in coverage.modules[1].policy
    assert coverage.flop_share == pytest.approx(3 / 5 / 4)  # of layer 1: forward and two gradients of five products in all


def test_a_captured_graph_protects_every_product(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    text = Policy(every=8).text
    assert all(plans.now(text, 3, "fprop", on_gpu=True).level == "correct" for _ in range(16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert sum(plans.now(text, 3, "fprop", on_gpu=True).level == "correct" for _ in range(16)) == 2


def test_replicas_of_a_sampled_product_are_left_out_with_it() -> None:
    layer = abft.protect(nn.Linear(8, 8), Policy(level="off", redundancy="dmr", every=2, **RECORD), name="half")
    with torch.no_grad():
        for _ in range(6):
            layer(torch.randn(2, 8))
    assert abft.report().executions == 6 and abft.report().products == 3
