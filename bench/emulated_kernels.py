"""The kernels themselves on emulated tensor cores, fault-free: the largest residual over bound of products and of attention, both ways.

    python -m bench emulated-kernels --dtype bf16

Interpreted, with the blocks and the bounds of an architecture (emulated_units.py). What emulated-clean counts in millions of rows with a
model of the kernel, this runs in some thousand rows with the kernel.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import abft
from bench import emulated_units, forms, intervals, tensor_core
from bench.attention_clean import FAMILIES
from bench.results import Results

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: (queries, keys, columns of a head)
ATTENTIONS = ((64, 64, 64), (128, 512, 128), (64, 2048, 64), (16, 4096, 64))
#: (rows, N, K)
PRODUCTS = ((96, 160, 256), (64, 128, 2048))
#: Beyond what half precision holds of scores, or what it squares.
ONLY_BF16 = ("logits of 1e4",)


def measure(product: str, family: str, shape: tuple[int, ...], causal: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Rows checked forward and backward, alarms among them, largest residual over bound."""
    torch.manual_seed(sum(shape) + len(family))
    policy = abft.Policy(backend=forms.backend_of("interpreted"), on_uncorrected="record")  # type: ignore[arg-type]
    make = FAMILIES[family]
    abft.report(reset=True)
    if product == "attention":
        queries, keys, width = shape
        leaves = [make(1, 1, n, width).to(dtype).requires_grad_() for n in (queries, keys, keys)]
        out = abft.scaled_dot_product_attention(*leaves, is_causal=causal, policy=policy)
    else:
        rows, n, k = shape
        leaves = [make(1, rows, k)[0].to(dtype).requires_grad_(), (torch.randn(n, k) / k**0.5).to(dtype).requires_grad_()]
        out = abft.linear(*leaves, policy=policy)
    return _part("forward") | _backward(out, leaves)


def _backward(out: Tensor, leaves: list[Tensor]) -> dict[str, Any]:
    torch.autograd.grad(out, leaves, torch.randn_like(out))
    return _part("backward")


def _part(name: str) -> dict[str, Any]:
    report = abft.report(reset=True)
    alarms = report.detected + report.false_alarms + report.stale + report.input_rows
    found = {"rows": report.checks, "alarms": alarms, "worst": report.worst, "unchecked": sum(report.bypassed.values())}
    return {f"{name}_{what}": value for what, value in found.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench emulated-kernels", description=__doc__)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--architecture", type=int, default=90, choices=emulated_units.ARCHITECTURES)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    forms.backend_of("interpreted")
    torch.set_num_threads(1)
    dtype = DTYPES[options.dtype]
    results = Results(f"kernels-emulated-{options.dtype}", fresh=options.fresh, architecture=options.architecture)
    families = [f for f in FAMILIES if options.dtype == "bf16" or f not in ONLY_BF16]
    todo: list[tuple[str, str, tuple[int, ...], bool]] = [("linear", f, s, False) for f in families for s in PRODUCTS]
    todo += [("attention", f, s, causal) for f in families for s in ATTENTIONS for causal in (False, True) if not causal or s[0] == s[1]]
    with emulated_units.tensor_cores(tensor_core.load(), options.architecture):
        for i, (product, family, shape, causal) in enumerate(todo):
            key = f"{product} {family} {'x'.join(map(str, shape))}{' causal' if causal else ''} sm_{options.architecture}"
            if results.find(key) is None:
                found = measure(product, family, shape, causal, dtype)
                results.add("cell", key=key, product=product, family=family, shape=list(shape), causal=causal, **found)
            results.progress(i + 1, len(todo), key)
    print(summarise(results))
    return 0


def summarise(results: Results) -> str:
    cells = [r for r in results.records if r["kind"] == "cell"]
    said = []
    for product in ("linear", "attention"):
        for part in ("forward", "backward"):
            mine = [r for r in cells if r["product"] == product]
            rows, alarms = (sum(r[f"{part}_{what}"] for r in mine) for what in ("rows", "alarms"))
            worst, unchecked = max(r[f"{part}_worst"] for r in mine), sum(r[f"{part}_unchecked"] for r in mine)
            limit = intervals.upper_limit(alarms, rows)
            results.add("summary", product=product, part=part, rows=rows, alarms=alarms, rate_below=limit, worst=worst, unchecked=unchecked)
            said.append(f"{product} {part}: {alarms} alarms in {rows:,} rows (rate below {limit:.2g}), worst {worst:.3f} of its bound")
    return "\n".join(said)
