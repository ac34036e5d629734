"""Clean campaign on the public path: fault-free rows of every family; what must not happen is an alarm.

    python -m bench clean --dtype bf16 --rows 1e7
    python -m bench clean --backend interpreted --dtype fp16 --rows 2e5      the Triton kernels, in Triton's interpreter
    python -m bench clean --backend triton --dtype bf16 --rows 1e9           … on a GPU

Each family of activations meets each family of weights in a protected ``nn.Linear``, forward, and a part of the rows
backward too (dgrad, wgrad). A row is an alarm if it was judged anything but clean, except OVERFLOW where torch's own
result is not finite. ``worst``: the largest |residual| / bound, one site per family, width and K.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn

import abft
from bench import families, forms, intervals
from bench.results import UNFINISHED, Results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
#: K → (share of the rows, rows of one product, rows of one that also goes backward). Long products are dear.
DEPTHS = {64: (0.70, 65536, 4096), 512: (0.25, 16384, 2048), 2048: (0.045, 4096, 1024), 4096: (0.005, 1024, 512)}
#: Result widths, taken in turn: one group, a ragged one, several; all in a few families.
WIDTHS = (64, 128, 200, 96, 33, 256, 384)
SLOW_SHARE = 0.05
#: In Triton's interpreter a launch costs what a million multiplications cost.
DEPTHS_INTERPRETED = {64: (0.78, 4096, 64), 512: (0.2, 1024, 64), 2048: (0.02, 128, 16)}
#: On a GPU: long products, so that launches should not dominate. Not tuned on one.
DEPTHS_CUDA = {64: (0.9, 1 << 20, 4096), 512: (0.08, 1 << 17, 4096), 2048: (0.015, 1 << 15, 2048), 4096: (0.005, 1 << 14, 1024)}


@dataclass
class Tally:
    """What the checks of one piece of work said."""

    rows: int = 0
    alarms: dict[str, int] = field(default_factory=dict)
    overflow: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, report: abft.Report, where: str, overflowed: int) -> None:
        self.rows += report.checks
        said = {
            "detected": report.detected,
            "false_alarms": report.false_alarms,
            "stale": report.stale,
            "input": report.input_rows,
            "overflow": max(0, report.overflow_rows - overflowed),
            "bypassed": sum(report.bypassed.values()),
        }
        for name, number in said.items():
            if number:
                self.alarms[name] = self.alarms.get(name, 0) + number
        self.overflow += report.overflow_rows
        self.worst[where] = max(self.worst.get(where, 0.0), report.worst)


def measure(
    dtype: torch.dtype, activation: str, k: int, rows: int, seed: int, *, batch: int, backward: int, policy: abft.Policy | None = None,
    device: torch.device | str = "cpu",
) -> Tally:  # fmt: skip
    """Fault-free products of one family of activations with every family of weights; at least ``rows`` checks."""
    tally = Tally()
    policy = policy or abft.Policy(on_uncorrected="record")
    share = math.ceil(rows / len(families.WEIGHTS))
    for i, weight in enumerate(families.WEIGHTS):
        g = families.generator(seed, k, i, *activation.encode(), device=device)
        n = WIDTHS[(i + len(activation) + k // 64) % len(WIDTHS)]
        layer = _layer(weight, n, k, dtype, g, bias=i % 2 == 0)
        abft.protect(layer, policy, name=f"clean/{activation}/{weight}/{n}x{k}")
        abft.report(reset=True)
        done, overflowed = 0, 0
        for step in count():
            m = min(batch, share - done) if step else min(backward, share)
            x = families.activations(activation, m, k, g, dtype)
            overflowed += _forward_backward(layer, x, activation, g) if step == 0 else _forward(layer, x)
            done += m
            if done >= share:
                break
        tally.add(abft.report(reset=True), f"{weight}/{n}", overflowed)
    return tally


def _layer(weight: str, n: int, k: int, dtype: torch.dtype, g: torch.Generator, *, bias: bool) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=dtype, device=g.device)
    with torch.no_grad():
        layer.weight.copy_(families.weights(weight, n, k, g, dtype))
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(n, generator=g, device=g.device))
    return layer


def _forward(layer: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return _not_finite_rows(layer(x))


def _forward_backward(layer: nn.Linear, x: Tensor, family: str, g: torch.Generator) -> int:
    x.requires_grad_()
    y = layer(x)
    y.backward(families.activations(family, y.shape[0], y.shape[1], g, y.dtype))
    assert x.grad is not None and layer.weight.grad is not None
    overflowed = sum(_not_finite_rows(t.detach()) for t in (y, x.grad, layer.weight.grad))
    layer.weight.grad = None
    return overflowed


def _not_finite_rows(y: Tensor) -> int:
    return int((~torch.isfinite(y)).any(-1).sum())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench clean", description=__doc__)
    backends = ["reference", "vendor", "auto", "interpreted", "triton"]
    parser.add_argument("--backend", default="reference", choices=backends, help="triton: on a GPU")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    forms.add_options(parser)
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results(f"clean-{forms.name(options)}", fresh=options.fresh, folder=options.out, rows=options.rows, seed=options.seed)
    policy = forms.policy(options)
    depths = {"interpreted": DEPTHS_INTERPRETED, "triton": DEPTHS_CUDA}.get(options.backend, DEPTHS)
    deadline, status = time.monotonic() + options.seconds, 0
    cells = [(a, k) for k in depths for a in families.ACTIVATIONS]
    for i, (activation, k) in enumerate(cells):
        key = f"{activation} k{k} rows{options.rows:g} seed{options.seed}"
        if results.find(key) is None:
            if time.monotonic() > deadline:
                status = UNFINISHED
                break
            share, batch, backward = depths[k]
            rows = options.rows * share * _weight_of(activation)
            t = measure(
                DTYPES[options.dtype], activation, k, math.ceil(rows), options.seed, batch=batch, backward=backward, policy=policy,
                device=forms.device(options),
            )  # fmt: skip
            results.add("cell", key=key, activation=activation, k=k, rows=t.rows, alarms=t.alarms, overflow=t.overflow, worst=t.worst)
        results.progress(i + 1, len(cells), key)
    if any(r["kind"] == "cell" for r in results.records):
        print(summarise(results))
    return status


def _weight_of(activation: str) -> float:
    """This family's part of the rows: the slow ones get few, the others share the rest."""
    slow = len(families.SLOW)
    ordinary = 1 / (len(families.ACTIVATIONS) - slow + slow * SLOW_SHARE)
    return ordinary * (SLOW_SHARE if activation in families.SLOW else 1.0)


def summarise(results: Results) -> str:
    """Write the summary record; returns it as a readable line."""
    cells = [r for r in results.records if r["kind"] == "cell"]
    rows = sum(r["rows"] for r in cells)
    alarms = sum(sum(r["alarms"].values()) for r in cells)
    worst = {}
    for r in cells:
        worst[r["activation"]] = max(worst.get(r["activation"], 0.0), *map(float, r["worst"].values()))
    depths = sorted({r["k"] for r in cells})
    per_k = {k: max(float(v) for r in cells if r["k"] == k for v in r["worst"].values()) for k in depths}
    limit, largest = intervals.upper_limit(alarms, rows), max(worst.values())
    results.replace(
        "summary", rows=rows, alarms=alarms, rate_below=limit, confidence=0.95, worst=largest, worst_by_family=worst, worst_by_k=per_k
    )
    rate = f"rate below {limit:.2g} at 95 %"
    return f"{results.path.stem}: {alarms} alarms in {rows:,} rows ({rate}), worst residual {largest:.3f} of its bound"
