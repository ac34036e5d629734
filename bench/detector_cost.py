"""What the second detector costs on top of the first: a layer under ``checksum``, under ``both``, and under ``checksum`` again.

The difference is smaller than what separates two equal layers that lie elsewhere in memory. So each of three equal layers is in turn
each of the three: blocks of rounds, in every block another of the six assignments, in every round another order. A block counts once, by
the median of its quotients; the interval is that of the median of blocks (bench/intervals.py). Two clocks read the same laps: the wall's,
and the CPU time of the one thread that computes, which leaves out whatever else ran meanwhile.
"""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import torch
from torch import nn

import abft
from abft.statistics import watches
from bench import intervals
from bench.results import Results

NAMES = ("checksum", "both", "checksum again")
ASSIGNMENTS = list(itertools.permutations(range(len(NAMES))))
#: Columns of ``laps``.
CLOCKS = ("wall", "thread")


def measure(results: Results, size: int = 2048, rows: int = 256, blocks: int = 60, rounds: int = 8) -> None:
    """Add a record for each clock and pair; one thread."""
    torch.manual_seed(0)
    x, layers = torch.randn(rows, size), _equal_layers(size)
    drawn, seconds = random.Random(0), []
    for number in range(blocks):
        watches.forget()
        at = [layers[i] for i in ASSIGNMENTS[number % len(ASSIGNMENTS)]]
        for name, layer in zip(NAMES, at, strict=True):
            layer._abft_policy = abft.Policy(detector="both" if name == "both" else "checksum")
        seconds.append(laps(at, x, rounds, drawn))
        results.progress(number + 1, blocks)
    times = np.array(seconds)  # blocks, rounds, names, clocks
    for i, clock in enumerate(CLOCKS):
        for what, one, other in (("both / checksum", 1, 0), ("checksum / checksum", 2, 0)):
            found = np.median(times[:, :, one, i] / times[:, :, other, i], 1)
            low, high = intervals.median(found.tolist())
            results.add(
                "cost", key=f"cost {what} {clock}", what=what, clock=clock, size=size, rows=rows, blocks=blocks, rounds=rounds,
                ratio=float(np.median(found)), interval=[low, high], seconds=float(np.median(times[:, :, 0, i])),
            )  # fmt: skip


def laps(layers: list[nn.Module], x: torch.Tensor, rounds: int, drawn: random.Random) -> list[list[tuple[float, float]]]:
    """Seconds by every clock, of each layer in each round, after two calls of each that do not count (they open its lane)."""
    order, found = list(range(len(layers))), []
    with torch.no_grad():
        for number in range(-2, rounds):
            drawn.shuffle(order)
            now = [(0.0, 0.0)] * len(layers)
            for i in order:
                wall, busy = time.perf_counter(), time.thread_time()
                layers[i](x)
                now[i] = (time.perf_counter() - wall, time.thread_time() - busy)
            if number >= 0:
                found.append(now)
    return found


def _equal_layers(size: int) -> list[nn.Module]:
    first = nn.Linear(size, size)
    layers = []
    for _ in NAMES:
        layer = nn.Linear(size, size)
        layer.load_state_dict(first.state_dict())
        layers.append(abft.protect(layer, abft.Policy(), name="cost"))
    return layers
