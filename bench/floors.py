"""Detectability floors: the smallest single deviation that is found, relative to its row's L2 norm, per backend, dtype and K.

    python -m bench floors [--emulator FOLDER]

One element of every row is moved by a log-uniform fraction of the row's norm. Reported: the smallest found, the sizes of
which half and 99 % are found, the largest missed, and what threshold.expected_floor predicts for typical rows. Measured with
Gaussian operands, and with one dominating output column, which is the worst case.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import abft
from abft import threshold
from abft.backends import reference
from abft.checksum import FULL
from bench import emulator, families
from bench.clean import DTYPES
from bench.emulated import UNITS, Product
from bench.results import Results

DEPTHS = (64, 512, 2048, 4096)
WIDTHS = (256, 1024)
DATA = {"gauss": ("gauss", "gauss"), "one output dominates": ("gauss", "big-output")}
ROWS = 8000


def deviations(rows: int, columns: int, norms: np.ndarray, low: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(column, deviation) per row; sizes log-uniform over four decades from ``low``."""
    size = low * 10.0 ** rng.uniform(0, 4, rows)
    return rng.integers(0, columns, rows), rng.choice([-1.0, 1.0], rows) * size * norms


def summary(size: np.ndarray, found: np.ndarray) -> dict[str, float]:
    order = np.argsort(size)
    size, found = size[order], found[order]
    # Above this size at most 1 % (half) of the larger deviations near it are missed: bins of 200.
    bins = [(size[i], found[i : i + 200].mean()) for i in range(0, len(size) - 200, 50)]
    at = {share: next((float(s) for s, f in bins if f >= share), float("inf")) for share in (0.5, 0.99)}
    return {
        "smallest_found": float(size[found].min(initial=np.inf)),
        "half_found": at[0.5],
        "99%_found": at[0.99],
        "largest_missed": float(size[~found].max(initial=0.0)),
    }


def on_reference(dtype: torch.dtype, k: int, n: int, data: tuple[str, str], rng: np.random.Generator) -> dict[str, Any]:
    """The delivered result is wrong: judged through abft.verify_matmul."""
    g = families.generator(k, n, 3)
    x, w = families.activations(data[0], ROWS, k, g, dtype), families.weights(data[1], n, k, g, dtype)
    y = torch.nn.functional.linear(x, w)
    norms = torch.linalg.vector_norm(y.double(), dim=1).numpy()
    p = reference.plan(n, k, dtype, "full", None)
    expected = threshold.expected_floor(p.arithmetic, k, p.layout.groups)
    columns, moves = deviations(ROWS, n, norms, expected / 100, rng)
    wrong = y.clone()
    index = (torch.arange(ROWS), torch.from_numpy(columns))
    wrong[index] = (y[index].double() + torch.from_numpy(moves)).to(dtype)
    real = (wrong[index].double() - y[index].double()).abs().numpy() / norms
    found = abft.verify_matmul(x, w.T, wrong).suspect.numpy()
    changed = real > 0
    return {"group": p.layout.groups.width, "expected": expected, **summary(real[changed], found[changed])}


def on_unit(em: emulator.Emulator, name: str, k: int, n: int, data: tuple[str, str], rng: np.random.Generator) -> dict[str, Any]:
    """An accumulator is wrong, before anything is rounded."""
    unit, g, rows = UNITS[name], families.generator(k, n, 3), ROWS // (1 + k // 1024)
    product = Product(em, unit, unit.operand(families.weights(data[1], n, k, g)), FULL.kinds)
    x = unit.operand(families.ACTIVATIONS[data[0]](rows, k, g))
    acc = product.multiply(x)
    norms = np.linalg.norm(acc.astype(np.float64), axis=1)
    expected = threshold.expected_floor(unit.arithmetic, k, product.groups)
    columns, moves = deviations(rows, n, norms, expected / 100, rng)
    wrong, index = acc.copy(), (np.arange(rows), columns)
    wrong[index] = (acc[index].astype(np.float64) + moves).astype(np.float32)
    real = np.abs(wrong[index].astype(np.float64) - acc[index]) / norms
    found = product.judge(wrong, product.predict(x), k).suspect
    changed = real > 0
    return {"group": product.groups.width, "expected": expected, **summary(real[changed], found[changed])}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench floors", description=__doc__)
    emulator.add_option(parser)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results("floors", fresh=options.fresh)
    em = emulator.load(options.emulator) if options.emulator else None
    backends = [("reference", d) for d in ("fp32", "bf16", "fp16")] + ([("emulated", u) for u in UNITS] if em else [])
    todo = [(b, d, k, n, data) for b, d in backends for k in DEPTHS for n in WIDTHS for data in DATA]
    for i, (backend, name, k, n, data) in enumerate(todo):
        key = f"{backend} {name} k{k} n{n} {data}"
        if results.find(key) is None:
            rng = np.random.default_rng([k, n, *key.encode()])
            if backend == "reference":
                found = on_reference(DTYPES[name], k, n, DATA[data], rng)
            else:
                found = on_unit(em, name, k, n, DATA[data], rng)  # type: ignore[arg-type]
            results.add("floor", key=key, backend=backend, dtype=name, k=k, n=n, data=data, **found)
        results.progress(i + 1, len(todo), key)
    print(table(results))
    return 0


def table(results: Results) -> str:
    head = f"{'backend':<10}{'dtype':<13}{'K':>6}{'N':>6}{'group':>7}  {'data':<22}{'expected':>10}{'half':>10}{'99 %':>10}{'missed':>10}"
    lines = [head]
    for r in results.records:
        if r["kind"] == "floor":
            numbers = "".join(f"{float(r[name]):>10.2g}" for name in ("expected", "half_found", "99%_found", "largest_missed"))
            lines.append(f"{r['backend']:<10}{r['dtype']:<13}{r['k']:>6}{r['n']:>6}{r['group']:>7}  {r['data']:<22}{numbers}")
    return "\n".join(lines)
