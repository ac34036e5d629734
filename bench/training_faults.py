"""Training with 5, 10 and 20 % of the steps struck: does the run end where a fault-free one would?

    spread       of the held-out losses of the fault-free runs: where one more seed would end with 95 %, by Student's prediction interval
    protected    abft repairs, StepGuard replays the rest: bit-equal to the fault-free run of its seed, if every fault was repaired
    unprotected  the same faults, nobody looks: inside the spread (then the mixture is benign to so short a training), or not

The demo's arms (demo/training.py) on a smaller GPT, each seed with weights, data and faults of its own. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from bench import intervals
from bench.results import FOLDER, Results
from demo.gpt import Shape
from demo.progress import Progress
from demo.training import ARMS, Distance, Run, Text, train

FAULT_FREE, UNPROTECTED, PROTECTED = ARMS[0], ARMS[1], ARMS[3]
RATES = (0.05, 0.1, 0.2)
#: A run that ended this far from the fault-free one of its seed, in nats of held-out loss, went elsewhere: no rounding does that.
ELSEWHERE = 1e-3
IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "training_under_faults.png"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench training-faults", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results("training-faults", fresh=options.fresh, steps=options.steps, seeds=options.seeds)
    measure(results, options.steps, options.seeds)
    _draw(results.records)
    print(FOLDER / "training-faults.jsonl")
    return 0


def measure(results: Results, steps: int, seeds: int, rates: tuple[float, ...] = RATES, shape: Shape | None = None) -> None:
    """Every run that is not in the file yet, then what they say together."""
    text = Text.read()
    shape = shape or Shape(text.symbols, context=32, width=32, heads=2, layers=1)
    arms = [(FAULT_FREE, 0.0), *((arm, rate) for rate in rates for arm in (UNPROTECTED, PROTECTED))]
    with Progress("training", seeds * len(arms) * steps) as bar:
        for seed in range(seeds):
            reference: Run | None = None
            for arm, rate in arms:
                key = f"{arm} {rate:g} seed {seed} steps {steps}"
                if results.find(key) is not None:
                    continue
                if reference is None:  # a resumed campaign computes it again: a record has no parameters
                    reference = train(FAULT_FREE, text, steps=steps, rate=0.0, seed=seed, bar=bar, shape=shape)
                run = reference if arm == FAULT_FREE else train(arm, text, steps=steps, rate=rate, seed=seed, bar=bar, shape=shape)
                _keep(results, key, run, Distance.between(run, reference))
    runs = [r for r in results.records if r["kind"] == "run" and r["steps"] == steps]
    results.replace("summary", steps=steps, seeds=len({r["seed"] for r in runs}), arms=list(summaries(runs)))


def _keep(results: Results, key: str, run: Run, distance: Distance) -> None:
    faults = run.faults
    # Not by four digits: a difference of losses is what is asked.
    results.add(
        "run", key=key, arm=run.arm, rate=run.rate, seed=run.seed, steps=len(run.losses), held_out=f"{run.held_out:.7f}",
        held_out_off=distance.held_out, largest_off=distance.max_loss, parameters_off=distance.parameters, bit_equal=distance.bit_equal,
        injected=faults.injected, harmful=faults.harmful, struck=faults.struck, detected=faults.detected, repaired=faults.repaired,
        missed=faults.missed, largest_undetected=faults.largest_undetected, false_alarms=faults.false_alarms,
        replays=run.replays, dropped=run.dropped, losses=run.losses,
    )  # fmt: skip


def spread_of(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """The interval in which one more fault-free seed would end with a probability of 95 %, were they normal; at least two are needed."""
    held_out = [float(r["held_out"]) for r in runs if r["arm"] == FAULT_FREE]
    half = float(stats.t.ppf(0.975, len(held_out) - 1)) * np.std(held_out, ddof=1) * np.sqrt(1 + 1 / len(held_out))
    return float(np.mean(held_out) - half), float(np.mean(held_out) + half)


def summaries(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of every arm and rate, beside the spread of the fault-free runs."""
    low, high = spread_of(runs)
    for arm, rate in dict.fromkeys((r["arm"], r["rate"]) for r in runs):
        mine = [r for r in runs if (r["arm"], r["rate"]) == (arm, rate)]
        held_out, off = np.array([float(r["held_out"]) for r in mine]), np.array([float(r["held_out_off"]) for r in mine])
        inside = int(((held_out >= low) & (held_out <= high)).sum())  # NaN is outside
        equal, elsewhere = sum(r["bit_equal"] for r in mine), int((~(np.abs(off) < ELSEWHERE)).sum())
        repaired_all = [r for r in mine if r["detected"] == r["struck"] and r["repaired"] == r["struck"] and not r["dropped"]]
        yield {
            "arm": arm, "rate": rate, "runs": len(mine), "spread": [f"{low:.4f}", f"{high:.4f}"], "inside": inside,
            "inside_interval": list(intervals.proportion(inside, len(mine))), "bit_equal": equal,
            "bit_equal_interval": list(intervals.proportion(equal, len(mine))), "elsewhere": elsewhere,
            "elsewhere_interval": list(intervals.proportion(elsewhere, len(mine))), "worst_off": float(np.abs(off).max()),
            "mean_off": float(off.mean()), "faults": sum(r["injected"] for r in mine), "harmful": sum(r["harmful"] for r in mine),
            "missed": sum(r["missed"] for r in mine), "largest_undetected": max(float(r["largest_undetected"]) for r in mine),
            "all_repaired": len(repaired_all), "all_repaired_bit_equal": sum(r["bit_equal"] for r in repaired_all),
            "replays": sum(r["replays"] for r in mine), "dropped": sum(r["dropped"] for r in mine),
        }  # fmt: skip


def _draw(records: list[dict[str, Any]], image: Path = IMAGE) -> None:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no plot: {error}")
        return
    runs = [r for r in records if r["kind"] == "run"]
    seeds = sum(r["arm"] == FAULT_FREE for r in runs)
    rates = sorted({r["rate"] for r in runs if r["arm"] != FAULT_FREE})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.axhspan(*spread_of(runs), color="0.9", label=f"one more fault-free seed (95 %, from {seeds})")
    for arm, colour, shift in ((UNPROTECTED, "#D55E00", -0.12), (PROTECTED, "#0072B2", 0.12)):
        for number, rate in enumerate(rates):
            mine = [r for r in runs if (r["arm"], r["rate"]) == (arm, rate)]
            places = number + shift + np.linspace(-0.08, 0.08, len(mine))
            label = arm if number == 0 else None
            left.plot(places, [float(r["held_out"]) for r in mine], "o", color=colour, markersize=4, label=label)
            right.plot(places, [abs(float(r["held_out_off"])) for r in mine], "o", color=colour, markersize=4, label=label)
        died = [sum(not math.isfinite(float(r["held_out"])) for r in runs if (r["arm"], r["rate"]) == (arm, rate)) for rate in rates]
        for number, count in enumerate(died):
            if count:  # a run that is not there is easily overlooked
                place = left.get_xaxis_transform()
                left.text(number + shift, 0.98, f"{count} at NaN", color=colour, ha="center", va="top", transform=place)
    right.set_yscale("symlog", linthresh=1e-8)
    right.set_ylim(-3e-9, None)
    left.set(ylabel="held-out loss after the last step")
    right.set(ylabel="|Δ held-out loss| to the fault-free run of the seed")
    for axes in (left, right):
        axes.set_xticks(range(len(rates)), [f"{rate:.0%}" for rate in rates])
        axes.set_xlabel("share of the steps struck by a fault")
        axes.legend(fontsize=8)
    image.parent.mkdir(exist_ok=True)
    figure.savefig(image, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
