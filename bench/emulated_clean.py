"""Clean campaign on emulated tensor cores: fault-free rows of every family; what must not happen is an alarm.

    python -m bench emulated-clean --unit bf16 --rows 1e7 --emulator FOLDER
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from abft.checksum import FULL
from bench import emulator, families, intervals
from bench.clean import DEPTHS, _weight_of
from bench.emulated import UNITS, Product, Unit
from bench.results import Results

#: Multiples of 16: one tile, several, and more than one group.
WIDTHS = (64, 128, 96, 256, 128, 512, 1024)
#: Values outside fp32's normal range go through the emulator's scalar form, a thousand times slower.
SCALAR_ROWS = 40


def measure(
    em: emulator.Emulator, unit: Unit, activation: str, k: int, rows: int, seed: int, batch: int
) -> tuple[int, int, int, dict[str, float]]:
    """(rows, alarms of any kind, rows judged by the range-safe form, worst ratio per weight family and kind)"""
    slow = activation == "denormal"
    share = SCALAR_ROWS if slow else math.ceil(rows / len(families.WEIGHTS))
    total = alarms = range_safe = 0
    worst: dict[str, float] = {}
    for i, weight in enumerate(families.WEIGHTS):
        g = families.generator(seed, k, i, *activation.encode())
        n = WIDTHS[(i + len(activation) + k // 64) % len(WIDTHS)]
        product = Product(em, unit, unit.operand(families.weights(weight, n, k, g)), FULL.kinds)
        for start in range(0, share, batch):
            x = unit.operand(families.ACTIVATIONS[activation](min(batch, share - start), k, g), activation)
            checks = product.judge(product.multiply(x, slow=slow), product.predict(x, slow=slow), k)
            total += len(x)
            alarms += int(checks.suspect.sum())
            range_safe += checks.range_safe
            for j, kind in enumerate(FULL.kinds):
                where = f"{weight}/{n}/{kind}"
                worst[where] = max(worst.get(where, 0.0), float(np.max(checks.ratio[..., j])))
    return total, alarms, range_safe, worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench emulated-clean", description=__doc__)
    parser.add_argument("--unit", default="bf16", choices=UNITS)
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    emulator.add_option(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    em, unit = emulator.load(options.emulator), UNITS[options.unit]
    results = Results(f"clean-emulated-{unit.name}", fresh=options.fresh, rows=options.rows, seed=options.seed, model=unit.model)
    cells = [(a, k) for k in DEPTHS for a in families.ACTIVATIONS]
    for i, (activation, k) in enumerate(cells):
        key = f"{activation} k{k} rows{options.rows:g} seed{options.seed}"
        if results.find(key) is None:
            share, batch, _ = DEPTHS[k]
            rows = math.ceil(options.rows * share * _weight_of(activation))
            total, alarms, range_safe, worst = measure(em, unit, activation, k, rows, options.seed, min(batch, 16384))
            results.add("cell", key=key, activation=activation, k=k, rows=total, alarms=alarms, range_safe=range_safe, worst=worst)
        results.progress(i + 1, len(cells), key)
    print(summarise(results))
    return 0


def summarise(results: Results) -> str:
    cells = [r for r in results.records if r["kind"] == "cell"]
    rows, alarms = sum(r["rows"] for r in cells), sum(r["alarms"] for r in cells)
    worst = {kind: max(float(v) for r in cells for w, v in r["worst"].items() if w.endswith("/" + kind)) for kind in FULL.kinds}
    by_family: dict[str, float] = {}
    for r in cells:
        by_family[r["activation"]] = max(by_family.get(r["activation"], 0.0), *map(float, r["worst"].values()))
    per_k = {k: max(float(v) for r in cells if r["k"] == k for v in r["worst"].values()) for k in sorted({r["k"] for r in cells})}
    limit = intervals.upper_limit(alarms, rows)
    results.replace(
        "summary", rows=rows, alarms=alarms, rate_below=limit, confidence=0.95, worst=worst, worst_by_family=by_family, worst_by_k=per_k
    )
    return (
        f"{results.path.stem}: {alarms} alarms in {rows:,} rows (rate below {limit:.2g} at 95 %), worst residual "
        f"{', '.join(f'{kind} {value:.3f}' for kind, value in worst.items())} of its bound"
    )
