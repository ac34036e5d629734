"""int8 products through ``abft.int_mm`` on a CPU: clean rows, faults of every class, and what the check costs.

    python -m bench integer

Sums are exact, so there is no bound and no floor: ``harmful`` counts every fault that changed the result at all. Cost as in
``bench host``: CPU time of pairs in turn, the median of the ratios, against ``torch._int_mm`` with the same weight.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import abft
from abft.inject import Fault
from bench import campaign, intervals
from bench.host import interleaved
from bench.results import Results

M, K, N = 64, 128, 1200
ROWS_AT_A_TIME = 20_000
WHATS = {name: campaign.WHATS[name] for name in ("nullify", "flip1", "flip2-lsb", "flip4-lsb", "carry", "stuck-at")}
PLACES = {
    "accumulator": ("element", "row", "warp", "fragment", "tile"),
    "output": ("element", "row", "warp", "fragment", "tile"),
    "operand": ("element", "row", "warp", "fragment", "tile"),
    "weight": ("element",),
    "weight-multi": ("warp", "fragment"),
    "panel": ("element", "row", "fragment"),
}
#: (low, high) of the numbers: everything, one sign, small, and the ends of the type.
FAMILIES = {"uniform": (-128, 128), "positive": (0, 128), "small": (-3, 4), "lowest": (-128, -126), "highest": (126, 128)}
COST = ((1, 1024, 1024), (16, 1024, 1024), (128, 1024, 1024))


def numbers(generator: torch.Generator, *shape: int, low: int = -128, high: int = 128) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8, generator=generator)


def clean(rows: int, generator: torch.Generator) -> dict[str, Any]:
    """Alarms in fault-free rows of every family of both operands."""
    abft.report(reset=True)
    wrong = 0
    for low, high in FAMILIES.values():
        for low_w, high_w in FAMILIES.values():
            w = nn.Buffer(numbers(generator, N, K, low=low_w, high=high_w))
            for start in range(0, rows, ROWS_AT_A_TIME):
                a = numbers(generator, min(ROWS_AT_A_TIME, rows - start), K, low=low, high=high)
                wrong += int((abft.int_mm(a, w.t()) != torch._int_mm(a, w.t())).sum())
    r = abft.report()
    alarms = r.detected + r.false_alarms
    return {"rows": r.checks, "alarms": alarms, "differ": wrong, "rate_below": intervals.upper_limit(alarms, r.checks), "worst": r.worst}


def strike(fault: Fault, seed: int, generator: torch.Generator) -> dict[str, bool]:
    """What became of one fault in one product."""
    a, w = numbers(generator, M, K), nn.Buffer(numbers(generator, N, K))
    policy = abft.Policy(weights="frozen", on_uncorrected="record")
    right = abft.int_mm(a, w.t(), policy=policy)
    abft.report(reset=True)
    with abft.inject.faults(fault, seed=seed) as log:
        y = abft.int_mm(a, w.t(), policy=policy)
    r = abft.report()
    changed = log[0].effect > 0 or (fault.where == "panel" and bool(r.false_alarms))
    one = len(log[0].elements) == 1 and fault.where in ("accumulator", "output")
    located = one and bool(r.events) and (r.events[0].row, r.events[0].col) == log[0].elements[0][:2]
    return {
        "changed": changed, "detected": r.detected > 0 or (fault.where == "panel" and r.false_alarms > 0),
        "repaired": torch.equal(y, right), "one": one, "located": located,
    }  # fmt: skip


def campaign(place: str, trials: int, generator: torch.Generator, results: Results) -> dict[str, Any]:
    where: Any = place.split("-")[0]
    total = dict.fromkeys(("trials", "harmful", "harmful_detected", "detected", "repaired", "one", "located"), 0)
    for pattern in PLACES[place]:
        for name, words in WHATS.items():
            seen = [strike(Fault(where=where, pattern=pattern, **words), seed, generator) for seed in range(trials)]
            seen = [s for s in seen if s["changed"]]
            found = [s for s in seen if s["detected"]]
            row = {
                "trials": trials, "harmful": len(seen), "harmful_detected": len(found), "detected": len(found),
                **{key: sum(s[key] for s in found) for key in ("repaired", "one", "located")},
            }  # fmt: skip
            results.add("class", place=place, pattern=pattern, fault=name, **row)
            total = {key: total[key] + row[key] for key in total}
    return total | {"harmful_detected_at_least": intervals.lower_limit(total["harmful_detected"], total["harmful"])}


def cost(m: int, k: int, n: int, generator: torch.Generator) -> dict[str, Any]:
    a, w = numbers(generator, m, k), nn.Buffer(numbers(generator, n, k))
    b = w.t()
    timed = interleaved(lambda: torch._int_mm(a, b), lambda: abft.int_mm(a, b))
    return {"m": m, "k": k, "n": n, "torch_us": timed["one_us"], "checked_us": timed["other_us"], **timed}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench integer", description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000, help="clean rows per pair of families")
    parser.add_argument("--trials", type=int, default=20, help="faults per class, place and pattern")
    options = parser.parse_args(argv)
    results = Results("integer", fresh=True, m=M, k=K, n=N, rows=options.rows, trials=options.trials)
    generator = torch.Generator().manual_seed(0)
    results.add("clean", families=FAMILIES, **clean(options.rows, generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = {place: campaign(place, options.trials, generator, results) for place in PLACES}
    for shape in COST:
        results.add("cost", **cost(*shape, generator))
    results.replace("summary", places=places)
    return 0
