"""What the host pays: abft's dispatch beside an empty library operator's, and a small checked linear beside torch's.

    python -m bench host

Pairs are interleaved in short batches and timed by the thread's CPU time, which waiting for a busy machine does not stretch;
a ratio is the median over batches, with its quartiles. ``dispatch``: abft.linear whose products and sums are ready-made, so that
what is left is deciding and counting; with gradients, against an empty operator that has an autograd formula.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import abft
from abft.backends import quick, reference
from bench import timing
from bench.results import Results

BATCHES, CALLS = 400, 25
ROWS, WIDTH = 16, 384


def interleaved(one: Callable[[], Any], other: Callable[[], Any]) -> dict[str, Any]:
    """Times of both in µs and the ratio other / one."""
    clock = timing.HostClock(time.thread_time)
    times = timing.race({"one": one, "other": other}, clock=clock, rounds=BATCHES, calls=CALLS, warm_up=8)
    laps = np.array([times["one"].seconds, times["other"].seconds]) * 1e6
    low, median, high = np.percentile(laps[1] / laps[0], [25, 50, 75])
    return {
        "ratio": median, "quartiles": [low, high], "one_us": float(np.median(laps[0])), "other_us": float(np.median(laps[1])),
        "best_ratio": laps[1].min() / laps[0].min(),
    }  # fmt: skip


def dispatch(grad: bool) -> dict[str, Any]:
    """abft.linear without its arithmetic (product and sums ready-made), against an operator that does nothing."""
    library = torch.library.Library("abft_bench", "FRAGMENT")
    if not hasattr(torch.ops.abft_bench, "nothing"):
        library.define("nothing(Tensor a, Tensor b, Tensor? c) -> Tensor")
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    w, b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
    library.impl("nothing", lambda *_: y, "CPU")
    nothing = torch.ops.abft_bench.nothing.default
    if grad:  # an operator that can be trained through
        torch.library.register_autograd("abft_bench::nothing", lambda ctx, g: (None, None, None), lib=library)
    try:
        ready = mock.patch.multiple(reference, multiply=lambda *_: y), mock.patch.multiple(quick, worst=lambda *_: 0.5)
        with torch.set_grad_enabled(grad), ready[0], ready[1]:
            return interleaved(lambda: nothing(x, w, b), lambda: abft.linear(x, w, b))
    finally:
        library._destroy()


def linear(grad: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A small checked layer against the same layer of torch."""
    plain = nn.Linear(WIDTH, WIDTH, dtype=dtype)
    checked = abft.Linear(WIDTH, WIDTH, dtype=dtype)
    checked.load_state_dict(plain.state_dict())
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    with torch.set_grad_enabled(grad):
        return interleaved(lambda: plain(x), lambda: checked(x))


def functional(grad: bool) -> dict[str, Any]:
    x, w, b = torch.randn(ROWS, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
    with torch.set_grad_enabled(grad):
        return interleaved(lambda: F.linear(x, w, b), lambda: abft.linear(x, w, b))


def graphs(layers: int = 20) -> dict[str, Any]:
    """Graphs that regional compilation makes of identical checked blocks."""
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(F.gelu(self.up(x)))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = abft.protect(nn.Sequential(*[Block() for _ in range(layers)]))
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 64)
    with torch.no_grad():
        model(x)
        model(x)
    return {"layers": layers, "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"])}


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench host", description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    results = Results("host", fresh=True, rows=ROWS, width=WIDTH, batches=BATCHES, calls=CALLS)
    measured = {
        "dispatch, no grad": lambda: dispatch(False),
        "dispatch, grad": lambda: dispatch(True),
        "module, no grad": lambda: linear(False),
        "module, grad": lambda: linear(True),
        "function, no grad": lambda: functional(False),
        "function, grad": lambda: functional(True),
        "module bf16, no grad": lambda: linear(False, torch.bfloat16),
    }
    for name, measure in measured.items():
        r = results.add("host", name=name, **measure())
        low, high = r["quartiles"]
        print(f"{name:<22} {r['one_us']:7.2f} µs → {r['other_us']:7.2f} µs: × {r['ratio']:.2f} ({low:.2f} … {high:.2f})")
    print(results.add("graphs", **graphs()))
    return 0
