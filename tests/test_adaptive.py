"""Adaptive protection: the planner against brute force, the estimate of rates, plans in force, planning anew, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import abft
from abft import inject, sites
from abft.policies import Adaptive, Profile, SiteProfile, counted, options, planner, rates
from abft.policies.options import BY_NAME, CAMPAIGNS, LADDER

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
HUGE = 1e30


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    abft.report(reset=True)
    yield
    abft.report(reset=True)


# --- planner ------------------------------------------------------------------------------------------------


def by_brute_force(values: list[list[float]], uses: list[list[float]], limit: float) -> float | None:
    totals = [
        (sum(v[j] for v, j in zip(values, each, strict=True)), sum(u[j] for u, j in zip(uses, each, strict=True)))
        for each in itertools.product(*(range(len(v)) for v in values))
    ]
    return min((value for value, used in totals if used <= limit), default=None)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tightness=st.floats(0.02, 1.0))
def test_the_planner_finds_what_brute_force_finds(seed: int, tightness: float) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    values, uses = [], []
    for _ in range(n):
        k = int(rng.integers(1, 6))
        values.append(list(rng.exponential(size=k)))
        uses.append(list(10 ** rng.uniform(-6, 1, size=k)))
    limit = tightness * sum(max(u) for u in uses)
    wanted = by_brute_force(values, uses, limit)
    found = planner.minimise(values, uses, limit)
    if wanted is None:
        assert found is None
        return
    assert found is not None and found.used <= limit
    # A plan that fits by less than the planner's slack may be overlooked, so it is also compared with what fits more loosely.
    at_most = by_brute_force(values, uses, limit * (1 - 2e-6))
    assert wanted * (1 - 1e-12) <= found.value <= (at_most if at_most is not None else np.inf) * (1 + 1e-6)


def test_what_does_not_fit_is_said() -> None:
    assert planner.minimise([[1.0, 2.0]], [[5.0, 3.0]], 2.0) is None
    assert planner.minimise([], [], 1.0) == planner.Solution((), 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="option"):
        planner.minimise([[]], [[]], 1.0)


def test_hundreds_of_sites_are_planned_to_the_end() -> None:
    rng = np.random.default_rng(1)
    values = [sorted(rng.exponential(size=10)) for _ in range(300)]
    uses = [sorted(10 ** rng.uniform(-5, 0, size=10), reverse=True) for _ in range(300)]
    found = planner.minimise(values, uses, 8.0)
    assert found is not None and found.used <= 8.0
    # Lagrangian duality bounds every choice from below, for any multiplier.
    bound = max(sum(min(v + m * u for v, u in zip(vs, us, strict=True)) for vs, us in zip(values, uses, strict=True)) - m * 8.0 for m in np.geomspace(1e-3, 1e3, 400))
    assert bound <= found.value * (1 + 1e-9) and found.value - bound <= 2 * planner.NEAR * found.value
    assert found.gap <= planner.NEAR


# --- rates --------------------------------------------------------------------------------------------------


def test_the_prior_is_what_fleets_saw() -> None:
    prior = rates.fleet()
    low, high = (r / rates.HOUR for r in rates.FLEET_RANGE)
    assert prior.quantile(0.05) == pytest.approx(low, rel=1e-6) and prior.quantile(0.95) == pytest.approx(high, rel=1e-6)
    llama3 = 6 / (54 * 24 * 16384) / rates.HOUR
    assert prior.quantile(0.05) < llama3 < prior.quantile(0.95)


@pytest.mark.parametrize("rate", [1e-9, 1e-4, 1.0, 1e4])
def test_the_estimate_finds_the_rate(rate: float) -> None:
    rng = np.random.default_rng(3)
    estimate = rates.Estimate()
    for _ in range(50):
        seconds = 4 / rate
        estimate.observe({"a": (int(rng.poisson(rate * seconds / 2)), seconds / 2), "b": (int(rng.poisson(rate * seconds / 2)), seconds / 2)})
    # 200 faults: a relative deviation of 1/√200; five of them.
    assert estimate.device.mean == pytest.approx(rate, rel=5 / 200**0.5)
    assert estimate.site("a").mean == pytest.approx(rate, rel=5 / 100**0.5)


def test_a_step_is_followed_both_ways_and_quiet_stays_quiet() -> None:
    rng = np.random.default_rng(4)
    estimate, regimes = rates.Estimate(), []
    for rate in (1.0, 50.0, 1.0):
        for _ in range(100):
            estimate.observe({"a": (int(rng.poisson(rate * 2.0)), 2.0)})
        regimes.append(estimate.regimes)
        assert estimate.device.mean == pytest.approx(rate, rel=0.35)  # ~200 and more faults, less what a late change took
    # One change at the start (the rate lies far above any fleet's), one at each step.
    assert regimes == [1, 2, 3]


def test_regimes_are_not_imagined() -> None:
    rng = np.random.default_rng(5)
    imagined = 0
    for _ in range(20):
        estimate = rates.Estimate(prior=rates.Gamma(0.5, 0.5))
        for _ in range(100):
            estimate.observe({"a": (int(rng.poisson(3.0)), 3.0)})
        imagined += estimate.regimes
    # 2000 tests, two-sided, at 1e-4 each, but of overlapping counts; some are expected, a handful at most.
    assert imagined <= 4


def test_a_site_that_is_worse_is_told_apart() -> None:
    estimate = rates.Estimate()
    for _ in range(10):
        estimate.observe({"good": (0, 100.0), "bad": (10, 100.0)})
    assert estimate.site("bad").mean == pytest.approx(0.1, rel=0.1)
    assert estimate.site("good").mean < 0.002
    assert estimate.site("new").mean == pytest.approx(estimate.device.mean)


# --- what the campaigns say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [*CAMPAIGNS.values(), *options.STATISTICAL_CAMPAIGNS.values()], ids=lambda c: c.file)
def test_detection_rates_are_the_committed_ones(known: options.Campaign) -> None:
    records = [json.loads(line) for line in (RESULTS / f"{known.file}.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = next(r for r in reversed(records) if r["kind"] == "summary")
    total = {key: sum(summary["places"][place][key] for place in ("accumulator", "output", "operand")) for key in ("trials", "harmful", "harmful_detected", "detected")}
    assert summary["harmful_from"] == known.harm
    assert (total["trials"], total["harmful"]) == (known.trials, known.harmful)
    assert (total["harmful"] - total["harmful_detected"], total["trials"] - total["detected"]) == (known.harmful_missed, known.missed)


def test_what_an_option_lets_through() -> None:
    def escape(name: str, dtype: str = "float32", harm: float = 1e-3, **more: bool) -> float:
        return BY_NAME[name].escape(dtype, harm, replayed=more.get("replayed", False))

    assert escape("off") == 1.0
    assert escape("correct") == pytest.approx(-np.log(0.05) / 11069, rel=1e-3)  # rule of three
    assert escape("1/4") == pytest.approx(1 - (1 - escape("correct")) / 4)
    assert escape("detect") == 1.0 and escape("detect", replayed=True) == escape("correct")
    assert escape("dmr") == pytest.approx(options.REPEATING) and escape("correct+dmr") == pytest.approx(escape("correct") * options.REPEATING)
    # In half precision a CPU's checks see little below 1e-2: what is harmful at 1e-3 is then counted as missed.
    assert escape("correct", "bfloat16", 1e-2) < 1e-3 < 0.05 < escape("correct", "bfloat16", 1e-3)


def test_the_statistical_rung_is_for_those_who_ask_and_where_it_was_measured() -> None:
    rung = options.STATISTICAL
    policy, model = adaptive(1e6, levels=["statistical"])
    assert {c.option for c in policy.plan.sites} == {"statistical"} and rung.policy(abft.Policy()).detector == "statistical"
    assert BY_NAME["correct"].escape("float32", 1e-3, replayed=False) < rung.escape("float32", 1e-3, replayed=False) < 0.01
    assert rung.escape("float64", 1e-3, replayed=False) == 1.0 and rung.seen("float64") == 0.0  # no campaign: nothing is promised
    torch.manual_seed(0)
    x, right = torch.randn(8, 32), None
    with torch.no_grad():
        right = model(x)
        with inject.faults(inject.Fault("bitflip", bit=30)):
            assert torch.equal(model(x), right)
    report = abft.report()
    assert report.corrected == 1
    assert [plan.detector for plan in plans_in_force(model) if plan is not None] == ["statistical"] * 3
    for module, base in ((nn.Linear(8, 8).double(), abft.Policy()), (nn.Linear(8, 8).double(), abft.Policy(backend="triton"))):
        with pytest.raises(abft.errors.PolicyError, match="statistical.*cannot have"):
            abft.protect(module, Adaptive(target_escape=1e9, budget=100.0, policy=base, levels=["statistical"]), name="refused")
        by_default = Adaptive(target_escape=1e9, budget=100.0, policy=base)
        abft.protect(module, by_default, name="allowed")
        assert "statistical" not in by_default.plan.options.values()


def test_what_the_kernels_leave_comes_on_top_of_what_their_checks_miss() -> None:
    rung, correct = options.STATISTICAL, BY_NAME["correct"]
    for dtype, gate in options.GATES.items():
        records = [json.loads(line) for line in (RESULTS / "statistics.jsonl").read_text(encoding="utf-8").splitlines()]
        weighed = [r for r in records if r["kind"] == "weighed" and r["dtype"] == {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]]
        assert {r["pattern"] for r in weighed} == {"element", "warp"}
        assert vars(gate) == {name: sum(r[name] for r in weighed) for name in vars(gate)}
        below = rung.escape(dtype, 1e-3, replayed=False, kernels=True) - correct.escape(dtype, 1e-3, replayed=False)
        assert below == pytest.approx(1 - 0.05 ** (1 / gate.harmful)) and gate.harmful_left == 0
        assert rung.escape(dtype, 1e-4, replayed=False, kernels=True) > below  # what it leaves may then do harm
        assert correct.escape(dtype, 1e-3, replayed=False, kernels=True) == correct.escape(dtype, 1e-3, replayed=False)
    policy = Adaptive(target_escape=1e9, budget=100.0, policy=abft.Policy(backend="triton"), levels=["statistical", "correct"])
    abft.protect(nn.Linear(8, 8), policy, name="by kernels")
    assert policy.let_through("", rung) == rung.escape("float32", 1e-3, replayed=False, kernels=True)
    policy.base, policy._devices = abft.Policy(), dict.fromkeys(policy._devices, "cuda:0")
    assert "backend" in policy._why_not_statistical(""), "auto may take a backend that keeps no statistics"


def test_counted_costs_are_near_the_measured_ones() -> None:
    """Within a factor of three of the measured overhead, for every case of layers on a CPU that takes a millisecond or more."""
    records = [json.loads(line) for line in (RESULTS / "time-linear-cpu.jsonl").read_text(encoding="utf-8").splitlines()]
    torch_seconds = {r["case"]: r["seconds"] for r in records if r["kind"] == "timing" and r["provider"] == "torch"}
    measured = {r["case"]: r["ratio"] for r in records if r["kind"] == "timing" and r["provider"] == "abft" and "square-1024" in r["case"] and "forward" in r["case"]}
    assert measured
    for case, ratio in measured.items():
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.split()[1]]
        site = counted({"l": nn.Linear(1024, 1024, bias=False).to(dtype)}, rows=1024).sites["l"]
        assert torch_seconds[case] > 1e-3
        assert 1 / 3 < site.cost(BY_NAME["correct"]) / site.seconds / (ratio - 1) < 3


# --- plans in force -------------------------------------------------------------------------------------------


def three(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def profile_of(*names: str, dtype: str = "float32", sensitivity: float = 1.0, seconds: float = 1.0, harm: float = 1e-3) -> Profile:
    costs = {"off": 0.0, "detect": 0.1, "correct": 0.1, "dmr": 1.1, "tmr": 2.1, "correct+dmr": 1.2, "correct+tmr": 2.2}
    site = SiteProfile(1, seconds, {k: v * seconds for k, v in costs.items()}, dtype, (32, 32, 32), sensitivity, 100)
    return Profile(dict.fromkeys(names, site), len(names) * seconds, harm)


THREE = ("0", "2", "4")


def prior_escape(policy: Adaptive, level: str) -> float:
    return policy.fixed(level).escape


def adaptive(target: float, model: nn.Module | None = None, **more: object) -> tuple[Adaptive, nn.Module]:
    model = model or three()
    policy = Adaptive(**{"target_escape": target, "budget": 10.0, "profile": profile_of(*THREE), "policy": abft.Policy(on_uncorrected="record"), **more})  # type: ignore[arg-type]
    abft.protect(model, policy)
    return policy, model


def plans_in_force(model: nn.Module) -> list[abft.Policy | None]:
    return [sites.site_of(sites.number_of(m._abft_site)).plan for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(("factor", "wanted"), [(2.0, {"1/256"}), (0.5, {"correct", "1/4", "1/16", "1/64", "1/256"}), (1e-3, {"correct"}), (5e-5, {"correct+dmr"})])
def test_the_tighter_the_target_the_stronger_the_plan(factor: float, wanted: set[str]) -> None:
    unprotected = prior_escape(adaptive(HUGE)[0], "off")
    policy, model = adaptive(factor * unprotected)
    plan = policy.plan
    assert plan is not None and plan.met and set(plan.options.values()) <= wanted
    for choice, put in zip(plan.sites, plans_in_force(model), strict=True):
        option = policy.named(choice.option)
        assert put is not None and (put.level, put.redundancy, put.every) == (option.level, option.redundancy, option.every)
    assert plan.escape <= policy.target
    assert all(plan.cost <= policy.fixed(level).cost for level in BY_NAME if level != "off" and policy.fixed(level).met)


def test_off_is_watched_unless_it_is_wanted_so() -> None:
    assert set(adaptive(HUGE)[0].plan.options.values()) == {"1/256"}
    assert set(adaptive(HUGE, watch=1000)[0].plan.options.values()) == {"1/1000"}
    assert set(adaptive(HUGE, watch=None)[0].plan.options.values()) == {"off"}


def test_sensitive_sites_get_more() -> None:
    base = profile_of(*THREE)
    profile = replace(base, sites={**base.sites, "2": replace(base.sites["2"], sensitivity=1e-6)})
    loose = adaptive(HUGE, profile=profile)[0]
    policy = adaptive(1e-2 * prior_escape(loose, "off"), profile=profile)[0]
    assert policy.plan.options == {"0": "correct", "2": "1/256", "4": "correct"}


def test_critical_modules_get_everything() -> None:
    policy, model = adaptive(HUGE, critical=["re:[04]"])
    assert policy.plan.options == {"0": "correct+tmr", "2": "1/256", "4": "correct+tmr"}
    with torch.no_grad():
        model(torch.randn(2, 32))
    assert abft.report().executions >= 6
    assert "critical" in str(policy.explain())
    with pytest.raises(abft.PolicyError, match="match no protected module"):
        adaptive(HUGE, critical=["nothing"])


def test_hybrid_checksums_where_they_are_strong_replication_where_not() -> None:
    """A layer in bfloat16 beside two in float32, and harm from 1e-3: its check alone lets too much through."""
    base = profile_of(*THREE)
    profile = replace(base, sites={**base.sites, "4": replace(base.sites["4"], dtype="bfloat16")})
    unprotected = prior_escape(adaptive(HUGE, profile=profile)[0], "off")
    policy = adaptive(1e-2 * unprotected, profile=profile)[0]
    assert policy.plan.options == {"0": "correct", "2": "correct", "4": "correct+dmr"}


@pytest.mark.parametrize(
    ("target", "budget", "message"),
    [(0.0, 10.0, "no plan meets"), (1e-4, 0.01, "above the budget")],
    ids=["target out of reach", "budget too small"],
)
def test_what_cannot_be_met_is_refused_before_anything_is_touched(target: float, budget: float, message: str) -> None:
    relative = target * prior_escape(adaptive(HUGE)[0], "off")
    model = three()
    with pytest.raises(abft.PolicyError, match=message):
        adaptive(relative, model, budget=budget)
    assert type(model[0]) is nn.Linear
    policy, _ = adaptive(relative, model, budget=budget, infeasible="exceed")
    assert not (policy.plan.met and policy.plan.affordable)
    assert "NOT MET" in str(policy.explain()) or "ABOVE" in str(policy.explain())
    assert policy.plan.options != dict.fromkeys(THREE, "1/256")  # the budget gives way, not the protection


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_escape": -1}, "target_escape"), ({"budget": float("nan")}, "budget"), ({"confidence": 1.0}, "confidence"), ({"watch": 1}, "watch"),
        ({"levels": ["strong"]}, "levels"), ({"levels": []}, "levels"), ({"infeasible": "ignore"}, "infeasible"), ({"relax": 0.5}, "relax"),
        ({"policy": abft.Policy(timing="deferred")}, "deferred"), ({"policy": abft.Policy(roles={"fprop"})}, "promise too much"),
        ({"policy": abft.Policy(panel="lean")}, "promise too much"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(abft.PolicyError, match=message):
        Adaptive(**{"target_escape": 1.0, "budget": 0.1, **changes})  # type: ignore[arg-type]


def test_a_profile_of_another_model_is_refused() -> None:
    with pytest.raises(abft.PolicyError, match="profile knows nothing"):
        adaptive(1.0, nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))))


def test_a_profile_is_a_text_file(tmp_path: Path) -> None:
    profile = profile_of(*THREE)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    with pytest.raises(abft.PolicyError, match="version"):
        Profile.from_json((tmp_path / "profile.json").read_text().replace('"version": 1', '"version": 0'))


def test_explaining() -> None:
    policy, _ = adaptive(1e-4 * prior_escape(adaptive(HUGE)[0], "off"))
    text = str(policy.explain())
    for word in ("site", "level", "costs", "why", "one level everywhere", *THREE, *set(policy.plan.options.values())):
        assert word in text
    assert "would let through" in text


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = adaptive(1e6)[0].explain().picture(tmp_path / "plan.png")
    assert path.stat().st_size > 10_000


# --- evidence ---------------------------------------------------------------------------------------------------


def run(model: nn.Module, passes: int, probability: float, seed: int) -> None:
    x = torch.randn(4, 32)
    with torch.no_grad():
        if not probability:
            for _ in range(passes):
                model(x)
            return
        with inject.faults(inject.Fault("nullify", pattern="row", probability=probability), seed=seed):
            for _ in range(passes):
                model(x)


def test_the_plan_follows_a_step_of_the_rate_both_ways_without_oscillating() -> None:
    """Real faults, real reports: sampled while it is quiet, correcting while one of twenty products is wrong, and back."""
    # A second per product makes the prior's rate one in millions of products; the target allows four escapes in a thousand products.
    policy, model = adaptive(4e6, settle=100, watch=16)  # 150 checks per phase at least
    quiet = dict(policy.plan.options)
    levels: list[dict[str, str]] = []
    for phase, probability in enumerate((0.0, 0.05, 0.0)):
        for batch in range(8):
            run(model, 100, probability, seed=100 * phase + batch)
            policy.update()
        levels.append(dict(policy.plan.options))
    assert set(quiet.values()) == {"1/16"} and levels[0] == quiet
    assert set(levels[1].values()) == {"correct"}
    assert levels[2] == quiet
    assert len(policy.history) <= 1 + 2 + 3  # the first plan, one or two up, and a few on the way down
    costs = [plan.cost for _, plan in policy.history]
    assert costs == [*sorted(costs[: costs.index(max(costs)) + 1]), *sorted(costs[costs.index(max(costs)) + 1 :], reverse=True)]  # up once, down once


def test_evidence_is_what_the_report_says() -> None:
    policy, model = adaptive(1.0, levels=["correct"], infeasible="exceed")
    run(model, 400, 0.02, seed=1)
    with pytest.warns(RuntimeWarning, match="no plan meets"):
        policy.update()
    faults = policy.rates["cpu"].faults()
    assert faults == abft.report().detected  # a row each
    assert policy.seen == 1200
    seen = BY_NAME["correct"].seen("float32")
    assert policy.rates["cpu"].device.mean == pytest.approx(faults / (1200 * seen), rel=0.05)
    assert policy.update().options == policy.plan.options  # nothing new: nothing changes
    assert policy.seen == 1200


def test_a_report_given_by_hand_is_taken() -> None:
    policy, model = adaptive(1e6)
    run(model, 300, 0.0, seed=0)
    report = abft.report()
    assert policy.update(report).met and policy.seen == report.products


def test_updating_needs_a_model() -> None:
    with pytest.raises(RuntimeError, match="protect"):
        Adaptive(target_escape=1.0, budget=1.0).update()


def test_when_the_rate_outgrows_the_budget_protection_wins() -> None:
    policy, model = adaptive(1e6, budget=0.01, settle=100, watch=16)
    with pytest.warns(RuntimeWarning, match="above the budget"):
        for batch in range(4):
            run(model, 100, 0.2, seed=batch)
            policy.update()
    assert set(policy.plan.options.values()) == {"correct"} and policy.plan.met and not policy.plan.affordable


# --- from end to end --------------------------------------------------------------------------------------------


def test_measured_on_the_spot_planned_and_in_force() -> None:
    model, x = three(64), torch.randn(16, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    profile = abft.policies.profile(model, x, trials=12, rounds=3)
    assert type(model[0]) is nn.Linear and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(profile.sites) == list(THREE)
    for site in profile.sites.values():
        assert site.shape == (16, 64, 64) and site.dtype == "float32" and site.products == 1
        assert 0 < site.sensitivity <= 1 and site.trials == 12
        assert 0 <= site.costs["off"] <= site.costs["correct"] <= site.costs["correct+dmr"] <= site.costs["correct+tmr"]
        assert site.cost(BY_NAME["1/4"]) == pytest.approx(0.75 * site.costs["off"] + 0.25 * site.costs["correct"])
    policy = Adaptive(target_escape=1.0, budget=100.0, profile=profile, levels=["correct"])
    wanted = model(x)
    abft.protect(model, policy)
    assert torch.equal(model(x), wanted)
    abft.unprotect(model)
    assert type(model[0]) is nn.Linear


def test_sensitivity_tells_a_layer_that_matters_from_one_that_does_not() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + 0 * self.ignored(x).nan_to_num(0, 0, 0)

    profile = abft.policies.profile(Half(), torch.randn(4, 16), trials=40, rounds=1)
    assert profile.sites["ignored"].sensitivity == pytest.approx(0.5 / 41)
    assert profile.sites["used"].sensitivity > 0.5


def test_modules_that_were_born_checked_and_attention_are_profiled() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(16, 2, batch_first=True), abft.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model, x = Block(), torch.randn(2, 8, 16)
    profile = abft.policies.profile(model, x, trials=4, rounds=1)
    policy = Adaptive(target_escape=HUGE, budget=1e6, profile=profile, levels=["correct"])
    abft.protect(model, policy)
    abft.report(reset=True)
    with torch.no_grad():
        model(x)
    assert {name: site.products for name, site in profile.sites.items()} == {name: site.products for name, site in abft.report().sites.items()}


def test_profiling_with_gradients() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    profile = abft.policies.profile(model, torch.randn(8, 16), training=True, trials=9, rounds=1)
    assert [site.products for site in profile.sites.values()] == [2, 3]  # nobody asks for the first layer's dgrad
    assert all(p.grad is None for p in model.parameters())


def test_compiled_models_follow_their_plan() -> None:
    policy, model = adaptive(1e6)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(4, 32)
    with torch.no_grad():
        wanted = compiled(x)
        for level in LADDER:
            policy.plan = policy.fixed(level.name)
            policy.enforce()
            abft.report(reset=True)
            assert torch.equal(compiled(x), wanted)
            report = abft.report()
            assert report.products + sum(report.bypassed.values()) == 3
    assert counter.frame_count == 1


# --- what was measured ------------------------------------------------------------------------------------------


def test_the_committed_measurement_reaches_the_goals() -> None:
    records = [json.loads(line) for line in (RESULTS / "adaptive.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = [r for r in records if r["kind"] == "rate"]
    assert len({r["rate"] for r in measured}) >= 3
    for r in measured:
        own = r["rows"][-1]
        assert own["level"] == "adaptive" and r["met"] and own["per_billion"] <= r["target"], r["rate"]
        assert r["over_cheapest"] <= 1.1, r["rate"]
        assert any(not row["met"] for row in r["rows"]) or r["rate"] == min(m["rate"] for m in measured)  # the target means something
    step = next(r for r in records if r["kind"] == "step")
    assert step["turns"] <= 1  # up, and down again


@pytest.mark.slow
def test_the_campaign_can_be_run_in_small(tmp_path: Path) -> None:
    from bench import adaptive as campaign

    arguments = ["--passes", "50", "--rates", "0.2", "--rounds", "1", "--trials", "2", "--out", str(tmp_path)]
    assert campaign.main(arguments) == 0
    records = [json.loads(line) for line in (tmp_path / "adaptive.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = {row["level"]: row for r in records if r["kind"] == "rate" for row in r["rows"]}
    assert rows["off"]["escapes"] > 10 and rows["correct"]["escapes"] == 0
    assert {r["kind"] for r in records} == {"stamp", "profile", "rate", "step", "extrapolation"}
