"""Plans and samples on the kernels' backend: the same decisions, made before the kernel is chosen."""

from __future__ import annotations

import torch
from torch import nn

import abft
from abft import inject, plans, sites
from abft.policies import Adaptive


def test_plans_and_samples_reach_the_kernels() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32, device=device), torch.randint(-9, 10, (16, 32), device=device).float()
    for parameter in layer.parameters():
        # Whole numbers, whose sums are exact: what torch computes where the level is off has the same bits, whatever its order.
        parameter.data = torch.randint(-9, 10, parameter.shape, device=device).float()
    base = abft.Policy(backend="triton", on_uncorrected="record")
    abft.protect(layer, base.replace(level="planned"), name="kernels")
    abft.report(reset=True)
    plans._counts.clear()
    site = sites.site_of(sites.number_of(layer._abft_site))
    with torch.no_grad():
        wanted = layer(x)
        for plan, products, left_alone in (
            (base.replace(level="off"), 0, {"level off": 4}),
            (base.replace(every=2), 2, {plans.NOT_SAMPLED: 2}),
            (base, 4, {}),
        ):
            site.plan = plan
            abft.report(reset=True)
            assert all(torch.equal(layer(x), wanted) for _ in range(4))
            report = abft.report(reset=True)
            assert (report.products, report.bypassed) == (products, left_alone)
        with inject.faults(inject.Fault("nullify", pattern="row")):
            assert torch.equal(layer(x), wanted)
    assert abft.report(reset=True).corrected == 1


def test_the_statistical_rung_leaves_what_harms_nobody_to_the_kernels() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 128, device=device), torch.randn(20, 24, device=device)
    base = abft.Policy(backend="triton", group=128, on_uncorrected="record")
    plan = Adaptive(target_escape=1e9, budget=100.0, policy=base, levels=["statistical"])
    abft.protect(layer, plan, name="weighed by plan")
    assert [choice.option for choice in plan.plan.sites] == ["statistical"]
    with torch.no_grad():
        wanted = layer(x)
        abft.report(reset=True)
        for bit, tolerated in ((14, 1), (29, 0)):
            with inject.faults(inject.Fault("bitflip", bit=bit)) as log:
                delivered = layer(x)
            report = abft.report(reset=True)
            assert (report.tolerated, report.corrected) == (tolerated, 1 - tolerated), bit
            assert torch.equal(delivered, wanted) == (not tolerated) and (log[0].effect < 1e-3) == bool(tolerated)
