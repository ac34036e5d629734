"""What the checks of attention cost on a CPU: checked, unchecked (level off) and torch's, interleaved, by the thread's CPU time.

    python -m bench attention-times

Ratios are medians over rounds, with quartiles. One thread; the unchecked reference is the same code without the checks.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import abft
from bench import timing
from bench.results import Results

#: (batch, heads, length, width), causal
CASES = (((1, 8, 16, 64), False), ((8, 12, 128, 64), False), ((1, 8, 1024, 64), False), ((1, 8, 1024, 64), True), ((1, 2, 4096, 128), True))
ROUNDS = 9
OFF = abft.Policy(level="off")


def measure(shape: tuple[int, ...], causal: bool, backward: bool) -> dict[str, Any]:
    """Times in ms and their ratios."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, requires_grad=backward) for _ in range(3))
    above = torch.randn(shape)

    def run(function: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(backward):
            out = function(q, k, v, is_causal=causal, **options)
        return torch.autograd.grad(out, (q, k, v), above) if backward else out

    times = timing.race(
        {
            "torch": lambda: run(F.scaled_dot_product_attention),
            "unchecked": lambda: run(abft.scaled_dot_product_attention, policy=OFF),
            "checked": lambda: run(abft.scaled_dot_product_attention),
        },
        clock=timing.HostClock(time.thread_time), rounds=ROUNDS, warm_up=1, lap_seconds=0.05,
    )  # fmt: skip
    laps = {name: np.array(t.seconds) for name, t in times.items()}
    out: dict[str, Any] = {f"{name}_ms": 1e3 * float(np.median(s)) for name, s in laps.items()}
    for other in ("unchecked", "torch"):
        out[f"to_{other}"], out[f"to_{other}_quartiles"] = (
            float(np.median(laps["checked"] / laps[other])), [float(x) for x in np.percentile(laps["checked"] / laps[other], [25, 75])],
        )  # fmt: skip
    return out


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention-times", description=__doc__)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results("attention-times", fresh=options.fresh)
    todo = [(*case, backward) for case in CASES for backward in (False, True)]
    for i, (shape, causal, backward) in enumerate(todo):
        key = f"{'x'.join(map(str, shape))}{' causal' if causal else ''}{' with backward' if backward else ''}"
        if results.find(key) is None:
            print(results.add("times", key=key, **measure(shape, causal, backward)))
        results.progress(i + 1, len(todo), key)
    return 0
