"""Failure prediction on simulated fleets that the predictor has not seen. What the simulation assumes: bench/fleet.py.

    python -m bench prediction [--fleets 200] [--fresh]

Fitted on training fleets, threshold taken from validation fleets, judged on held-out ones. An alarm is the first window in which a device's
probability reaches the threshold. It is right if the device, left alone, has an uncorrected fault within the horizon; a failure is foreseen
if its alarm came at most the horizon and at least the lead time before it. The limit is the recall expected of somebody who knows
every device's present and future rate, whatever the precision: no features and no weights can be expected to do better.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from abft.prediction import Weights, features
from bench import fleet as fleets
from bench import intervals
from bench.fleet import STEPS, Assumptions, Fleet
from bench.results import Results

HORIZON, LEAD = 100, 2  # windows
#: Minutes lost to an uncorrected fault (finding it, work since the last checkpoint, the restart), and to a device drained at one.
UNPLANNED, PLANNED = 60.0, 15.0
WANTED = 0.94  # precision on the validation fleets
VARIANTS = {
    "doubling twice as slow": {"doubling": 12.0},
    "doubling four times as slow": {"doubling": 24.0},
    "doubling twice as fast": {"doubling": 3.0},
    "a tenth of the failures sudden": {"shares": (0.85, 0.04, 0.03, 0.072, 0.008)},
    "three tenths of the failures sudden": {"shares": (0.85, 0.04, 0.03, 0.056, 0.024)},
    "clean residuals do not drift": {"noise": 0.0},
}


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench prediction", description=__doc__, formatter_class=form)
    parser.add_argument("--fleets", type=int, default=200, help="held out")
    parser.add_argument("--training", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args(argv)
    results = Results("prediction", fresh=options.fresh, folder=options.out, fleets=options.fleets, training=options.training,
                      seed=options.seed, horizon_steps=HORIZON * STEPS, lead_steps=LEAD * STEPS, minutes=[UNPLANNED, PLANNED])  # fmt: skip
    base = Assumptions()
    weights = train(base, options.training, options.seed)
    # As text: the records' four digits would be other weights.
    results.replace("weights", key="weights", text=weights.to_json())
    for name, assumptions in {"as assumed": base, **{n: replace(base, **changes) for n, changes in VARIANTS.items()}}.items():
        if results.find(name) is None:
            count = options.fleets if name == "as assumed" else max(1, options.fleets // 4)
            results.add("fleets", key=name, fleets=count, **judge(weights, assumptions, count, options.seed + 10_000))
            print(name, json.dumps({k: v for k, v in results.records[-1].items() if k not in ("reliability", "kind", "key")}))
    return 0


def train(base: Assumptions, count: int, seed: int) -> Weights:
    """Fitted to ``count`` fleets, the threshold from as many others."""
    known = [fleets.simulate(base, seed + i) for i in range(count)]
    labels = [fails_within(f) for f in known]
    keep = np.arange(base.windows) % 4 == 0  # neighbouring windows say nearly the same
    labels = [np.where(keep[None, :], label, np.nan) for label in labels]
    weights = Weights.fit(
        np.concatenate([f.history for f in known]), np.concatenate(labels), window=STEPS, horizon=HORIZON * STEPS,
        source="simulated fleets, bench/fleet.py; bench/results/prediction.jsonl",
    )  # fmt: skip
    weights = replace(weights, coefficients=tuple(round(c, 4) for c in weights.coefficients), intercept=round(weights.intercept, 4))
    validation = [fleets.simulate(base, seed + 5_000 + i) for i in range(count)]
    weights = weights.calibrated(np.concatenate([f.history for f in validation]), np.concatenate([fails_within(f) for f in validation]))
    weights = replace(weights, calibration=tuple((round(s, 3), float(f"{p:.5g}")) for s, p in weights.calibration))
    for threshold in np.arange(0.2, 0.99, 0.02):
        weights = replace(weights, threshold=round(float(threshold), 2))
        right, raised = np.sum([alarms(weights, f)[:2] for f in validation], 0)
        if raised and right / raised >= WANTED:
            break
    return weights


def fails_within(fleet: Fleet) -> np.ndarray:
    return fleets.fails_within(fleet, HORIZON)


def alarms(weights: Weights, fleet: Fleet) -> tuple[int, int, int, int]:
    """(alarms that were right, alarms, failures foreseen, failures) among devices whose record is long enough to tell."""
    p = weights.probability(features(fleet.history))
    length = fleet.history.shape[1]
    alive = (fleet.failed[:, None] < 0) | (np.arange(length)[None, :] < fleet.failed[:, None])
    over = (p >= weights.threshold) & alive
    first = np.where(over.any(1), over.argmax(1), -1)
    ahead = fleet.failed - first
    told = (first >= 0) & ((fleet.failed >= 0) | (first + HORIZON < length))
    right = told & (fleet.failed >= 0) & (ahead <= HORIZON)
    foreseen = (first >= 0) & (fleet.failed >= 0) & (ahead <= HORIZON) & (ahead >= LEAD)
    return int(right.sum()), int(told.sum()), int(foreseen.sum()), int((fleet.failed >= 0).sum())


def judge(weights: Weights, assumptions: Assumptions, count: int, seed: int) -> dict[str, Any]:
    totals, sudden, most = np.zeros(4, int), 0, np.zeros(2)
    edges = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0001])
    binned = np.zeros((len(edges) - 1, 3))
    squares, windows, base = 0.0, 0, 0.0
    for i in range(count):
        fleet = fleets.simulate(assumptions, seed + i)
        totals += alarms(weights, fleet)
        most += fleets.foreseeable(fleet, HORIZON, LEAD)
        sudden += int(((fleet.kind == fleets.KINDS.index("sudden")) & (fleet.failed >= 0)).sum())
        y = fails_within(fleet)
        p = weights.probability(features(fleet.history))[~np.isnan(y)]
        y = y[~np.isnan(y)]
        which = np.digitize(p, edges) - 1
        for column, values in enumerate((np.ones_like(y), p, y)):
            binned[:, column] += np.bincount(which, values, len(edges) - 1)
        squares, windows, base = squares + float(((p - y) ** 2).sum()), windows + len(y), base + float(y.sum())
    right, raised, foreseen, failures = (int(v) for v in totals)
    lost = UNPLANNED * failures
    with_it = UNPLANNED * (failures - foreseen) + PLANNED * (foreseen + raised - right)
    share = base / windows
    return {
        "alarms": raised, "right": right, "precision": right / max(1, raised), "precision_interval": intervals.proportion(right, raised),
        "failures": failures, "foreseen": foreseen, "recall": foreseen / max(1, failures),
        "recall_interval": intervals.proportion(foreseen, failures), "sudden": sudden, "limit": most[0] / most[1],
        "downtime_saved": 1 - with_it / max(1e-9, lost), "brier": squares / windows, "brier_of_base_rate": share * (1 - share),
        "reliability": [{"windows": int(n), "said": s / n, "was": w / n} for n, s, w in binned if n],
    }  # fmt: skip
