"""The second detector: silent over a training run, quick about a marginal unit, sparing with repairs.

    python -m bench statistics [training] [marginal] [spans] [together] [severity] [weighed] [cost] [--steps 500] [--trials 20]
                               [--flips 2000] [--fresh]

training: a model learns under ``detector="both"`` while its statistics drift; residuals are recorded. marginal: recorded residuals,
drawn anew for 132 units of which one is off. spans: the same where checks are one, two and four tiles wide, of a grid as the kernels
deal it (bench/spans.py). together: how often the test of all kinds' noise alarms without a fault. severity: random flips under
``detector="statistical"``. weighed: the same in the Triton kernels, interpreted, bf16 and fp16 on emulated tensor
cores. cost: of ``both`` on top of ``checksum`` (bench/detector_cost.py; a file of its own).
"""

from __future__ import annotations

import argparse
import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import abft
from abft.statistics import devices, watches
from abft.statistics.severity import Budget
from bench import detector_cost, emulated_units, forms, intervals, marginal, recorded, spans, tensor_core
from bench.results import FOLDER, Results

#: What can be measured by itself, and what it writes; the rest of the file stays.
PARTS = {"training": ("training", "residuals"), "marginal": ("marginal", "false alarms", "quarantines"), "severity": ("severity",),
         "weighed": ("weighed",),         "spans": ("span",), "together": ("together",), "cost": ("cost",)}  # fmt: skip
IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "residuals.png"
QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench statistics", description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=96, help="of the cost: two seconds each, after a warm-up of half a minute")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked = {k: v for k, v in vars(options).items() if k not in ("fresh", "parts", "blocks")}
    results = Results("statistics", fresh=options.fresh, **asked)
    parts = options.parts or list(PARTS)
    if "marginal" in parts:
        parts = ["training", *parts]  # whose residuals it draws
    results.drop(*(kind for part in parts for kind in PARTS[part]))
    if "training" in parts:
        run = training(results, options.steps, options.dtype)
        if "marginal" in parts:
            among_peers(results, run, options.trials)
    if "spans" in parts:
        across_spans(results, recorded.train(options.steps, options.dtype), options.trials)
    if "together" in parts:
        alarms_of_all_kinds(results, recorded.train(options.steps, options.dtype))
    if "severity" in parts:
        for group in (None, 128):
            severity(results, options.flips, group)
            # One element is what the gate lets be: of several, which may cancel in some of its sums, it must take none for harmless.
            severity(results, options.flips, group, "warp")
    if "weighed" in parts:
        forms.backend_of("interpreted")
        for pattern, dtype in itertools.product(("element", "warp"), (torch.float32, torch.bfloat16, torch.float16)):
            with nullcontext() if dtype == torch.float32 else emulated_units.tensor_cores(tensor_core.load(), 90):
                severity(results, options.flips, 128, pattern, WEIGHED._replace(dtype=dtype))
    if "cost" in parts:
        detector_cost.measure(Results("statistics-cost", fresh=True, blocks=options.blocks), blocks=options.blocks)
    print(FOLDER / "statistics*.jsonl")
    return 0


def training(results: Results, steps: int, dtype: str) -> recorded.Run:
    run = recorded.train(steps, dtype)
    r = run.report
    tests = {name: sum(a.test == name for a in r.alarms) for name in ("bias", "noise", "outliers")}
    soft = sum(s.severities["S1"] for s in r.statistics)
    residuals = sum(s.residuals for s in r.statistics)
    lows_highs = np.array(list(run.drift.values()))
    results.add(
        "training", key=f"training {dtype}", dtype=dtype, steps=steps, loss=[run.losses[0], run.losses[-1]], rows=r.checks,
        residuals=residuals, detected=r.detected, alarms=len(r.alarms), quarantines=sum(a.quarantine for a in r.alarms), tests=tests,
        above_soft=soft, above_soft_below=intervals.upper_limit(soft, residuals),
        levels={n: max(s.levels[n] for s in r.statistics) for n in tests},
        drift_of_mean=[lows_highs[:, 0].min(), lows_highs[:, 1].max()],
        drift_of_ln_variance=[lows_highs[:, 2].min(), lows_highs[:, 3].max()],
        alarmed=[f"{a.test} at {a.site} ({a.role}), {a.deviation:.3g}" for a in r.alarms],
    )  # fmt: skip
    for site, x in run.x.items():
        z = x / x.std()
        results.add(
            "residuals", key=f"residuals {dtype} {site}", site=site, dtype=dtype, tiles=len(x), sigma=x.std(), kurtosis=(z**4).mean(),
            above_4=(abs(z) > 4).mean(), most=abs(z).max(), tile_effect=z.mean(1).std() * math.sqrt(z.shape[1]),
            quantiles=np.quantile(z, QUANTILES).tolist(),
        )  # fmt: skip
    _draw(run, dtype)
    return run


def among_peers(results: Results, run: recorded.Run, trials: int) -> None:
    rng = np.random.default_rng(0)
    # Of the second half of the run: units that are compared compute the same step, and no drift lies between their tiles.
    pools = {site: x[len(x) // 2 :] for site, x in run.x.items() if len(x) >= 200}
    for defect, size in (("bias", 0.1), ("noise", 0.02)):
        found = [d for x in pools.values() for d in marginal.detection(x, defect, size, max(1, trials // len(pools)), rng)]
        tiles = [d["tiles"] for d in found if d["tiles"] is not None]
        low, high = intervals.proportion(len(tiles), len(found))
        results.add(
            "marginal", key=f"marginal {defect}", defect=defect, size=size, trials=len(found), pools=len(pools), found=len(tiles),
            found_interval=[low, high], tiles_median=np.median(tiles), tiles_most=max(tiles), others=sum(d["others"] for d in found),
        )  # fmt: skip
    total, worst = 0.0, 0.0
    for test, charts in marginal.CHARTS.items():
        for site, x in pools.items():
            steps = marginal.increments(x, 400, rng)[test]
            arl = marginal.false_alarms(steps, rng)
            per_day = [marginal.per_day(arl[k], charts) for k in ("high", "arl", "low")]
            results.add(
                "false alarms", key=f"false alarms {test} {site}", test=test, site=site, units=marginal.UNITS, tiles=marginal.TILES, **arl,
                per_day=per_day,
            )  # fmt: skip
        of_test = [r for r in results.records if r["kind"] == "false alarms" and r["test"] == test]
        total += float(np.mean([r["per_day"][1] for r in of_test]))
        worst += max(r["per_day"][2] for r in of_test)
    # The two tests of rates: E[e^ℓ] = 1 for Poisson counts, so at least e^h batches each (Lorden).
    rates = marginal.per_day(math.exp(marginal.cusum.THRESHOLD), 2)
    results.add("quarantines", key="quarantines", per_day=total + rates, per_day_worst_site=worst + rates, per_day_of_rates=rates)


def across_spans(results: Results, run: recorded.Run, trials: int) -> None:
    """A marginal unit that shares its checks with three others, with one, and with nobody."""
    rng = np.random.default_rng(0)
    pools = [x[len(x) // 2 :] for x in run.kinds.values() if len(x) >= 200]
    for span in (4, 2, 1):
        grids = [spans.Grid(x, span, rng) for x in pools[:trials]]
        monitors = [spans.learnt(grid) for grid in grids]
        clean = sum(spans.false_signs(grid, monitor, spans.WARM_UP) for grid, monitor in zip(grids, monitors, strict=True))
        for defect, bias, noise in (("bias", 0.1, 0.0), ("noise", 0.0, 0.02)):
            found = []
            for i in range(trials):
                at = i % len(grids)
                found.append(spans.detection(grids[at], monitors[at], bias, noise, limit=20_000))
            tiles = [d["tiles"] or math.inf for d in found]
            within = sum(t <= 10_000 for t in tiles)
            kinds = grids[0].x.shape[-1]
            results.add(
                "span", key=f"span {span} {defect}", span=span, defect=defect, size=bias or noise, trials=trials, pools=len(grids),
                units=spans.UNITS, product=[spans.TILES_M, spans.TILES_N], worth=grids[0].worth(), found=within,
                found_interval=list(intervals.proportion(within, trials)), tiles_median=float(np.median(tiles)), tiles_most=max(tiles),
                others=sum(d["others"] for d in found), clean_batches=spans.WARM_UP * len(grids), clean_alarms=clean,
                least_of_one_kind=spans.least_tiles(grids[0], bias, noise), kinds=kinds,
                least_of_all_kinds=spans.least_tiles(grids[0], bias, noise, kinds),
            )  # fmt: skip
            results.progress(1, 1, f"span {span} {defect}")


def alarms_of_all_kinds(results: Results, run: recorded.Run) -> None:
    """Time between false alarms of the test of all kinds' noise, of units with checks of their own."""
    rng = np.random.default_rng(0)
    per_day: list[list[float]] = []
    found: list[dict[str, float]] = []
    pools = {site: x[len(x) // 2 :] for site, x in run.kinds.items() if len(x) >= 200}
    for i, x in enumerate(pools.values()):
        grid = spans.Grid(x, 1, rng)
        arl = marginal.false_alarms(spans.increments(grid, spans.learnt(grid), 200), rng)
        found.append({"tiles": grid.tiles, **arl})
        # Batches here have more tiles than those of ``marginal``.
        per_day.append([marginal.per_day(arl[k], 1) * marginal.TILES / grid.tiles for k in ("high", "arl", "low")])
        results.progress(i + 1, len(pools))
    thetas, worst = [arl["theta"] for arl in found], min(found, key=lambda arl: arl["arl"])
    results.add(
        "together", key="together", pools=len(pools), units=spans.UNITS, thetas=[min(thetas), max(thetas)], worst=worst,
        per_day=float(np.mean(np.array(per_day)[:, 1])), per_day_worst_site=float(np.max(np.array(per_day)[:, 2])),
    )  # fmt: skip


class Judged(NamedTuple):
    """Who weighs what is beyond its bound, and of which product."""

    kind: str
    backend: str
    rows: int
    k: int
    n: int
    dtype: torch.dtype = torch.float32

    @property
    def type(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def lift_budgets(self) -> None:
        """The gate alone decides."""
        for monitor in watches.monitors().values():
            monitor.budget = Budget(burst=math.inf, left=math.inf)
        for watch in devices._watches.values():
            watch.gate[devices.LEFT] = int(Budget().burst / Budget().rate)  # the whole of it: a product has one such row at most


HOST = Judged("severity", "auto", 16, 256, 4096)
#: The kernels, interpreted, which takes its time.
WEIGHED = Judged("weighed", "triton", 16, 32, 128)


def severity(results: Results, flips: int, group: int | None, pattern: str = "element", by: Judged = HOST) -> None:
    """Random flips in the accumulators of a layer; the budget is lifted.

    What can be saved is ``harmless`` of ``flagged``: a coarser floor flags less of what harms nobody.
    """
    torch.manual_seed(0)
    watches.forget()
    rng = np.random.default_rng(0)
    policy = abft.Policy(detector="statistical", backend=by.backend, group=group, on_uncorrected="record")  # type: ignore[arg-type]
    model = abft.protect(nn.Linear(by.k, by.n, dtype=by.dtype), policy, name=by.kind)
    abft.report(reset=True)
    left, repaired, missed, harmful_left, harmful, harmless = 0, 0, 0, 0, 0, 0
    with torch.no_grad():
        for i in range(flips):
            x = torch.randn(by.rows, by.k, generator=torch.Generator().manual_seed(i)).to(by.dtype)
            by.lift_budgets()
            with abft.inject.faults(abft.inject.Fault("bitflip", bit=int(rng.integers(32)), pattern=pattern), seed=i) as log:
                model(x)
            r = abft.report(reset=True)
            effect = log[0].effect
            harm = not effect < 1e-3
            left += r.tolerated
            repaired += r.corrected
            missed += not (r.tolerated or r.detected)
            harmful += harm
            harmful_left += harm and not r.corrected
            harmless += not harm and bool(r.tolerated or r.corrected)
            if by is not HOST:
                results.progress(i + 1, flips, f"{by.kind} {by.type} {pattern}")
    flagged = left + repaired
    low, high = intervals.proportion(left, flagged)
    results.add(
        by.kind, key=" ".join([by.kind, *([] if by is HOST else [by.type]), str(group), *([] if pattern == "element" else [pattern])]),
        group=group, pattern=pattern, dtype=by.type, rows=by.rows, k=by.k, n=by.n, flips=flips, flagged=flagged, harmless=harmless,
        left=left, saved=left / flagged, saved_interval=[low, high], could_save=harmless / flagged, harmful=harmful,
        harmful_left=harmful_left, harmful_left_below=intervals.upper_limit(harmful_left, harmful), unseen=missed,
    )  # fmt: skip


def _draw(run: recorded.Run, dtype: str) -> None:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no plot: {error}")
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    grid = np.linspace(-7, 7, 71)
    shown = [site for site in run.x if len(run.x[site]) >= 200 and ".0." in site or "head" in site][:8]
    for site in shown:
        z = (run.x[site] / run.x[site].std()).ravel()
        density, _ = np.histogram(z, grid, density=True)
        axes[0].step((grid[1:] + grid[:-1]) / 2, np.maximum(density, 1e-6), where="mid", linewidth=1, label=site.replace("gpt.", ""))
    axes[0].plot(grid, np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), "k--", linewidth=1, label="normal")
    axes[0].set(yscale="log", ylim=(1e-5, 1), xlabel="z = residual / σ of its site", ylabel="density")
    axes[0].set_title(f"Residuals of a training run, {dtype}")
    axes[0].legend(fontsize=7)
    site = shown[0]
    z = run.x[site] / run.x[site].std()
    axes[1].plot(z.mean(1) * math.sqrt(z.shape[1]), ".", markersize=3, label="mean of a tile of 128 rows × √128")
    axes[1].plot((z**2).mean(1), ".", markersize=3, label="mean square of the tile")
    axes[1].set(xlabel="tiles, in the order of training", title=site.replace("gpt.", ""))
    axes[1].legend(fontsize=7)
    IMAGE.parent.mkdir(exist_ok=True)
    figure.savefig(IMAGE, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
