"""Adaptive protection on a small model, with real faults at exaggerated rates; a step of the rate; and what the model says of real ones.

    python -m bench adaptive [--passes 2000] [--rates 0.003 0.03 0.3] [--fresh]

Per rate (faults per product, Mixture.gpu_2026) the adaptive policy and every fixed level run the same passes; an escape is a pass whose
output differs in a row by more than the profile's harm from the clean one. Times are of passes without an injector, plan by plan in turn,
in seconds of the one thread that computes (a shared machine's waiting left out).
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn

import abft
from abft import inject
from abft.policies import Adaptive, Profile
from abft.policies.rates import HOUR, Estimate, Gamma
from bench.results import Results

WIDTH, LAYERS, ROWS = 256, 3, 32
FIXED = ("off", "1/64", "1/16", "1/4", "correct", "dmr", "correct+dmr")
BATCH = 50  # passes between updates
#: Of a site that would be off one of so many products is checked. At these rates a change is looked for within thousands of products.
WATCH = 16
QUIET = abft.Policy(on_uncorrected="record")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench adaptive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=2000, help="of the model, per rate and policy")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.03, 0.3], help="faults per product")
    parser.add_argument("--target", type=float, default=6e6, help="escaped harmful faults per 1e9 products")
    parser.add_argument("--rounds", type=int, default=41, help="laps of each plan that are timed")
    parser.add_argument("--trials", type=int, default=100, help="faults per site that measure its sensitivity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    parser.add_argument("--plots", type=Path, help="folder for a PNG of the step; needs matplotlib")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results("adaptive", fresh=options.fresh, folder=options.out, passes=options.passes, target=options.target, seed=options.seed,
                      rounds=options.rounds, trials=options.trials, watch=WATCH, width=WIDTH, layers=LAYERS, rows=ROWS)  # fmt: skip
    profile = abft.policies.profile(model(), inputs(), trials=options.trials, rounds=options.rounds, seed=options.seed)
    if results.find("profile") is None:
        results.add("profile", key="profile", seconds=profile.seconds, sites={n: vars(s) for n, s in profile.sites.items()})
    for rate in options.rates:
        if results.find(f"rate {rate:g}") is None:
            _one_rate(results, profile, rate, options)
        results.progress(options.rates.index(rate) + 1, len(options.rates) + 1, f"rate {rate:g}")
    if results.find("step") is None:
        _step(results, profile, options)
    if results.find("extrapolation") is None:
        _extrapolate(results, profile)
    results.progress(len(options.rates) + 1, len(options.rates) + 1, "step")
    if options.plots:
        draw(results.find("step") or {}, options.plots)
    return 0


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.GELU()]
    return nn.Sequential(*layers)


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def adaptive(profile: Profile, target: float, **more: Any) -> tuple[Adaptive, nn.Module]:
    choices = {"watch": WATCH, "settle": 20 * BATCH, "infeasible": "exceed", **more}
    policy = Adaptive(target_escape=target, budget=10.0, profile=profile, policy=QUIET, **choices)
    return policy, abft.protect(model(), policy)


# --- campaigns ----------------------------------------------------------------------------------------------


def struck(subject: nn.Module, passes: int, rate: float, seed: int, harm: float) -> tuple[int, int, int]:
    """(harmful escapes, faults that struck, passes) of the subject at so many faults per product."""
    x = inputs()
    with torch.no_grad():
        clean = model()(x).double()
        escapes = 0
        try:
            with inject.faults(inject.Mixture.gpu_2026(), rate=min(1.0, LAYERS * rate), seed=seed) as log:
                for _ in range(passes):
                    change = (subject(x).double() - clean).norm(dim=1) / clean.norm(dim=1)
                    escapes += not bool((change <= harm).all())
        except abft.NotInjected:  # of few passes at a low rate
            pass
    return escapes, len(log), passes


def _one_rate(results: Results, profile: Profile, rate: float, options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for level in FIXED:
        _, subject = adaptive(profile, options.target, levels=[level], watch=None)
        rows.append({"level": level, **_tally(struck(subject, options.passes, rate, options.seed + 7, profile.harm), options.target)})
    policy, subject = adaptive(profile, options.target)
    learning, kept = (0, 0, 0), (0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for batch in range(2 * options.passes // BATCH):
            found = struck(subject, BATCH, rate, options.seed + 1000 + batch, profile.harm)
            settled = batch >= options.passes // BATCH
            learning, kept = (learning, _plus(kept, found)) if settled else (_plus(learning, found), kept)
            policy.update()
    row = {"level": "adaptive", **_tally(kept, options.target), "learning": _tally(learning, options.target)}
    assert policy.plan is not None
    plan = policy.plan
    row |= {"plan": plan.options, "changes": len(policy.history) - 1, "expected_escape": plan.escape, "expected_cost": plan.cost}
    rows.append(row)
    for each, seconds in zip(rows, _times(policy, subject, [*FIXED, None], options.rounds), strict=True):
        each["seconds"] = seconds
    fitting = [r for r in rows[:-1] if r["met"]]
    cheapest = min(fitting, key=lambda r: r["seconds"], default=None)
    results.add(
        "rate", key=f"rate {rate:g}", rate=rate, target=options.target, rows=rows, met=row["met"],
        cheapest_fixed=None if cheapest is None else cheapest["level"],
        over_cheapest=None if cheapest is None else row["seconds"] / cheapest["seconds"],
    )  # fmt: skip


def _plus(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _tally(found: tuple[int, int, int], target: float) -> dict[str, Any]:
    escapes, faults, passes = found
    products = LAYERS * passes
    low, high = (stats.chi2.ppf(0.025, 2 * escapes) / 2 if escapes else 0.0), stats.chi2.ppf(0.975, 2 * escapes + 2) / 2
    return {
        "escapes": escapes, "faults": faults, "products": products, "per_billion": 1e9 * escapes / max(1, products),
        "interval": [1e9 * low / max(1, products), 1e9 * high / max(1, products)], "met": 1e9 * escapes / max(1, products) <= target,
    }  # fmt: skip


def _times(policy: Adaptive, subject: nn.Module, levels: list[str | None], rounds: int) -> list[float]:
    """Seconds of a pass under each level everywhere (None: the plan), the shortest of laps taken in turn."""
    own, x = policy.plan, inputs()
    seconds: list[list[float]] = [[] for _ in levels]
    with torch.no_grad():
        for number in range(rounds):
            order = [(i + number) % len(levels) for i in range(len(levels))]
            for i in order:
                level = levels[i]
                policy.plan = own if level is None else policy.fixed(level)
                policy.enforce()
                for _ in range(4):
                    subject(x)  # lanes open again
                start = time.thread_time()
                for _ in range(16):
                    subject(x)
                seconds[i].append((time.thread_time() - start) / 16)
    policy.plan = own
    policy.enforce()
    abft.report(reset=True)
    return [min(s) for s in seconds]


# --- a step -------------------------------------------------------------------------------------------------


def _step(results: Results, profile: Profile, options: argparse.Namespace) -> None:
    low, high = min(options.rates), max(options.rates)
    policy, subject = adaptive(profile, options.target)
    trace, batch, per_phase = [], 0, max(12, options.passes // BATCH // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for rate in (low, high, low):
            for _ in range(per_phase):
                escapes, _, _ = struck(subject, BATCH, rate, options.seed + 5000 + batch, profile.harm)
                plan = policy.update()
                trace.append({"rate": rate, "escapes": escapes, "cost": plan.cost, "believed": policy.rates["cpu"].device.mean})
                batch += 1
    costs = [c["cost"] for c in trace]
    moves = [b - a for a, b in zip(costs, costs[1:], strict=False) if abs(b - a) > 0.1 * max(costs)]
    turns = sum(a * b < 0 for a, b in zip(moves, moves[1:], strict=False))
    up = next((i for i, c in enumerate(trace[per_phase:]) if c["cost"] > 0.8 * max(costs)), None)
    results.add(
        "step", key="step", low=low, high=high, updates_per_phase=per_phase, passes_per_update=BATCH, changes=len(policy.history) - 1,
        turns=turns, updates_until_strong=up, trace=trace,
        history=[{"seen": seen, "plan": plan.options, "cost": plan.cost} for seen, plan in policy.history],
    )  # fmt: skip


def draw(step: dict[str, Any], folder: Path) -> Path:
    """The step as a picture: the rate, what is believed of it, what the plan costs, and what escaped. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    trace = step["trace"]
    passes = [step["passes_per_update"] * (i + 1) for i in range(len(trace))]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5), layout="constrained")
    above.step(passes, [100 * float(t["cost"]) for t in trace], where="post", color="tab:blue")
    above.set_ylabel("cost of the plan, %")
    below.bar(passes, [t["escapes"] for t in trace], width=0.8 * step["passes_per_update"], color="tab:red", label="escapes per update")
    expected = [LAYERS * step["passes_per_update"] * float(t["rate"]) for t in trace]
    below.step(passes, expected, where="mid", color="black", linewidth=0.8, label="faults that strike, expected")
    below.set_yscale("symlog", linthresh=1)
    below.set_xlabel("passes of the model")
    below.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "adaptive_step.png", dpi=110)
    pyplot.close(figure)
    return folder / "adaptive_step.png"


# --- what the model says of real rates ------------------------------------------------------------------------


def _extrapolate(results: Results, profile: Profile) -> None:
    rows = []
    for per_hour in (1e-7, 1e-5, 1e-3):
        for target in (1e-2, 1e-4, 1e-6):
            policy, _ = adaptive(profile, target)
            policy.rates = {"cpu": Estimate(prior=Gamma(1e4, 1e4 / (per_hour / HOUR)))}  # known to a hundredth
            plan = policy._best(target)
            fitting = [level for level in FIXED if policy.fixed(level).met]
            cheapest = min((policy.fixed(level).cost for level in fitting), default=None)
            rows.append({"per_hour": per_hour, "target": target, "met": plan.met, "escape": plan.escape, "cost": plan.cost,
                         "plan": plan.options, "cheapest_fixed": cheapest})  # fmt: skip
    results.add("extrapolation", key="extrapolation", rows=rows, assumes="the profile's seconds per product; predicted, not measured")
