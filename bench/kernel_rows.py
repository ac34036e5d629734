"""Fault-free rows of one product through the kernels, forward and backward: checked, alarms, the largest residual over its bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import abft
from bench import intervals
from bench.attention_clean import FAMILIES
from bench.results import Results

#: Beyond what half precision holds of scores, or what it squares.
ONLY_BF16 = ("logits of 1e4",)


def families_of(dtype: torch.dtype) -> list[str]:
    """The families of numbers that a type can hold."""
    return [f for f in FAMILIES if dtype != torch.float16 or f not in ONLY_BF16]


def measure(product: str, family: str, shape: tuple[int, ...], causal: bool, dtype: torch.dtype, policy: abft.Policy, *,
            heads: tuple[int, int] = (1, 1), device: str = "cpu") -> dict[str, Any]:  # fmt: skip
    """Rows checked forward and backward, alarms among them, largest residual over bound.

    shape: of attention (queries, keys, columns of a head), with heads = (batch, heads); of a linear layer (rows, N, K).
    """
    torch.manual_seed(sum(shape) + len(family))
    make = FAMILIES[family]
    abft.report(reset=True)
    if product == "attention":
        queries, keys, width = shape
        leaves = [make(*heads, n, width).to(device, dtype).requires_grad_() for n in (queries, keys, keys)]
        out = abft.scaled_dot_product_attention(*leaves, is_causal=causal, policy=policy)
    else:
        rows, n, k = shape
        leaves = [make(1, rows, k)[0].to(device, dtype).requires_grad_(), (torch.randn(n, k) / k**0.5).to(device, dtype).requires_grad_()]
        out = abft.linear(*leaves, policy=policy)
    return _part("forward") | _backward(out, leaves)


def _backward(out: Tensor, leaves: list[Tensor]) -> dict[str, Any]:
    torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out))
    return _part("backward")


def _part(name: str) -> dict[str, Any]:
    report = abft.report(reset=True)
    alarms = report.detected + report.false_alarms + report.stale + report.input_rows
    found = {"rows": report.checks, "alarms": alarms, "worst": report.worst, "unchecked": sum(report.bypassed.values())}
    return {f"{name}_{what}": value for what, value in found.items()}


def summarise(results: Results) -> str:
    """Write a summary of the cells, per product and direction; returns it as lines."""
    cells = [r for r in results.records if r["kind"] == "cell"]
    said = []
    for product in ("linear", "attention"):
        mine = [r for r in cells if r["product"] == product]
        for part in ("forward", "backward") if mine else ():
            rows, alarms = (sum(r[f"{part}_{what}"] for r in mine) for what in ("rows", "alarms"))
            worst, unchecked = max(r[f"{part}_worst"] for r in mine), sum(r[f"{part}_unchecked"] for r in mine)
            limit = intervals.upper_limit(alarms, rows)
            results.add("summary", product=product, part=part, rows=rows, alarms=alarms, rate_below=limit, worst=worst, unchecked=unchecked)
            said.append(f"{product} {part}: {alarms} alarms in {rows:,} rows (rate below {limit:.2g}), worst {worst:.3f} of its bound")
    return "\n".join(said)
