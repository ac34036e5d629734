"""Residuals of a real training run: the demo's GPT on the standard library's sources, with a warm-up, a cosine schedule and, half
way, other data. While it trains, the second detector watches; from time to time the residuals of a whole product are kept.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

import abft
from abft import sites
from abft.backends import lane, reference
from abft.backends.call import Call
from abft.encoding import bias_sums
from abft.ops import checked
from abft.statistics import watches
from demo.corpus import sources
from demo.gpt import GPT, Shape

BATCH, CONTEXT = 16, 64
TILE = 128
#: Steps between two products whose residuals are kept.
EVERY = 10


@dataclass
class Run:
    """report: of the whole run. x: tiles (T, 128) of e's residual over bound, per site and role, in the order they were computed; kinds: of
    every kind of checksum, (T, 128, kinds).
    drift: per watched site, the (lowest, highest) mean in σ̂ and ln variance over windows of 32 batches."""

    report: abft.Report
    x: dict[str, np.ndarray]
    losses: list[float] = field(default_factory=list)
    drift: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    kinds: dict[str, np.ndarray] = field(default_factory=dict)


def train(steps: int, dtype: str, seed: int = 0) -> Run:
    """Train for so many steps under ``detector="both"``. dtype: fp32, or bf16 by autocast."""
    torch.manual_seed(seed)
    watches.forget()
    text = sources()
    symbols = sorted(set(text))
    data = torch.tensor([symbols.index(c) for c in text[:400_000]])
    model = abft.protect(GPT(Shape(len(symbols), CONTEXT, layers=2)), abft.Policy(detector="both", on_uncorrected="record"), name="gpt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    abft.report(reset=True)
    kept: dict[str, list[np.ndarray]] = {}
    series: dict[str, list[np.ndarray]] = {}
    losses: list[float] = []
    with mock.patch.object(watches.Monitor, "add", _remembering(series)):
        for step in range(steps):
            half = data[: len(data) // 2] if step < steps // 2 else data[len(data) // 2 :]
            at = torch.randint(len(half) - CONTEXT - 1, (BATCH,))
            batch = torch.stack([half[i : i + CONTEXT + 1] for i in at.tolist()])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"), _recording(kept, step % EVERY == EVERY - 1):
                loss = model(batch[:, :-1], batch[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(float(loss.detach()))
    kinds = {key: np.concatenate(tiles) for key, tiles in kept.items()}
    x = {key: tiles[..., 0] for key, tiles in kinds.items()}
    return Run(abft.report(), x, losses, {key: _drift(np.array(v)) for key, v in series.items() if len(v) >= 96}, kinds)


def _remembering(series: dict[str, list[np.ndarray]]) -> Any:
    add = watches.Monitor.add

    def remember(monitor: Any, batch: np.ndarray) -> Any:
        kept = series.setdefault(str(id(monitor)), [])
        count, total, squares = batch[0, 0, :3]
        kept.append(np.array([total / count, squares / count]))
        return add(monitor, batch)

    return remember


def _drift(moments: np.ndarray) -> tuple[float, float, float, float]:
    windows = moments[: len(moments) // 32 * 32].reshape(-1, 32, 2).mean(1)
    mean, noise = windows[:, 0] / np.sqrt(windows[0, 1]), np.log(windows[:, 1] / windows[0, 1])
    return float(mean.min()), float(mean.max()), float(noise.min()), float(noise.max())


def _recording(kept: dict[str, list[np.ndarray]], on: bool) -> Any:
    """Judge each product once more, in plain torch, and keep what it says of e."""
    if not on:
        return nullcontext()
    check = checked._check

    def also(call: Call, y: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = check(call, y, *rest)
        if call.a.dim() == 2 and call.rows >= TILE and call.w.shape[-2] >= 128:
            p = reference.plan_for(call)
            panel = reference.build_panel(call.w, p.layout)
            bias = None if call.bias is None else bias_sums(call.bias, p.layout)
            j = reference.judge(out, reference.sums(out, call.a, panel, bias, p), call.a.shape[-1], p)
            x = ((j.sums.actual - j.sums.predicted) / j.tau)[:, 0]
            tiles = x[: len(x) // TILE * TILE].reshape(-1, TILE, x.shape[-1])
            kept.setdefault(f"{sites.site_of(call.site).name} {call.role}", []).append(tiles)
        return out

    stack = ExitStack()
    stack.enter_context(mock.patch.object(checked, "_check", also))
    stack.enter_context(mock.patch.object(lane, "find", lambda *_: None))  # the shortest way passes _check by
    return stack
