"""What the second detector costs on top of the first: a layer under ``checksum``, under ``both``, and under ``checksum`` again.

The difference is smaller than what separates two equal layers that lie elsewhere in memory. So each of three equal layers is in turn
each of the three: blocks of rounds, in every block another of the six assignments, in every round another order. A lap is as many calls
as complete a batch of statistics, which is compared with what is normal once in each: baselines were learnt before. A block says one
quotient, the median of its laps'; six blocks, one of each assignment, say one, their geometric mean, in which what sets the layers apart
cancels. The interval is that of the median of sixes (bench/intervals.py). Two clocks read the same laps: the wall's, and the CPU time of
the one thread that computes, which leaves out whatever else ran meanwhile.
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
from abft.statistics.baseline import BATCH, WARM_UP
from bench import intervals
from bench.results import Results

NAMES = ("checksum", "both", "checksum again")
ASSIGNMENTS = list(itertools.permutations(range(len(NAMES))))
#: Columns of ``laps``.
CLOCKS = ("wall", "thread")


def measure(results: Results, size: int = 2048, rows: int = 256, blocks: int = 96, rounds: int = 4) -> None:
    """Add a record for each clock and pair; one thread. blocks: as many sixes as they make."""
    blocks = max(1, blocks // len(ASSIGNMENTS)) * len(ASSIGNMENTS)
    torch.manual_seed(0)
    watches.forget()
    x, layers, calls = torch.randn(rows, size), _equal_layers(size), -(-BATCH // rows)
    _learn(layers, x.repeat(calls, 1))
    learnt = sum(monitor.baseline.frozen and monitor.baseline.size == calls * rows for monitor in watches.monitors().values())
    assert learnt == len(layers), "every lap of every layer is a batch that is tested"
    drawn, seconds, alarms = random.Random(0), [], watches.raised()
    for number in range(blocks):
        at = [layers[i] for i in ASSIGNMENTS[number % len(ASSIGNMENTS)]]
        for name, layer in zip(NAMES, at, strict=True):
            layer._abft_policy = abft.Policy(detector="both" if name == "both" else "checksum")
        seconds.append(laps(at, x, rounds, calls, drawn))
        results.progress(number + 1, blocks)
    times, alarms = np.array(seconds), watches.raised() - alarms  # blocks, rounds, names, clocks
    for i, clock in enumerate(CLOCKS):
        for what, one, other in (("both / checksum", 1, 0), ("checksum / checksum", 2, 0)):
            found = quotients(times[..., one, i], times[..., other, i])
            low, high = intervals.median(found.tolist())
            results.add(
                "cost", key=f"cost {what} {clock}", what=what, clock=clock, size=size, rows=rows, blocks=blocks, rounds=rounds, calls=calls,
                ratio=float(np.median(found)), interval=[low, high], seconds=float(np.median(times[:, :, 0, i])) / calls, alarms=alarms,
            )  # fmt: skip


def quotients(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of seconds (blocks, rounds), the quotient of every six blocks."""
    of_blocks = np.median(np.log(one / other), 1)
    return np.exp(of_blocks.reshape(-1, len(ASSIGNMENTS)).mean(1))


def laps(layers: list[nn.Module], x: torch.Tensor, rounds: int, calls: int, drawn: random.Random) -> list[list[tuple[float, float]]]:
    """Seconds by every clock, of so many calls of each layer in each round, after a round that does not count (it opens their lanes)."""
    order, found = list(range(len(layers))), []
    with torch.no_grad():
        for number in range(-1, rounds):
            drawn.shuffle(order)
            now = [(0.0, 0.0)] * len(layers)
            for i in order:
                wall, busy = time.perf_counter(), time.thread_time()
                for _ in range(calls):
                    layers[i](x)
                now[i] = (time.perf_counter() - wall, time.thread_time() - busy)
            if number >= 0:
                found.append(now)
    return found


def _learn(layers: list[nn.Module], x: torch.Tensor) -> None:
    """What is normal, of each layer, in batches of all rows of x."""
    with torch.no_grad():
        for layer in layers:
            layer._abft_policy = abft.Policy(detector="both")
            for _ in range(WARM_UP):
                layer(x)


def _equal_layers(size: int) -> list[nn.Module]:
    first = nn.Linear(size, size)
    layers = []
    for _ in NAMES:
        layer = nn.Linear(size, size)
        layer.load_state_dict(first.state_dict())
        layers.append(abft.protect(layer, abft.Policy(), name="cost"))
    return layers
