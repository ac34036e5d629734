"""Times of competitors in one process, interleaved: what a machine does meanwhile meets all of them alike.

A round times every competitor once, in an order drawn anew. Competitors are compared round by round: the ratio of two is the
median, over the rounds, of the quotient of their laps in one round, with the exact interval of a median (bench/intervals.py). An A/A
row (the baseline under a second name) says what such an interval is worth on the machine at hand.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from bench import intervals

Work = Callable[[], Any]
#: Fewer rounds have no 95 % interval of a median.
FEWEST_ROUNDS = 6


@dataclass(frozen=True)
class Lap:
    """Seconds of one call, and how many of them the host was busy with it."""

    seconds: float
    host: float


class Clock(Protocol):
    def lap(self, work: Work, calls: int) -> Lap: ...


@dataclass(frozen=True)
class HostClock:
    """Calls back to back, with the caches as the last call left them. ``now`` in seconds; time.thread_time leaves out what other
    processes took, and other threads."""

    now: Callable[[], float] = time.perf_counter

    def lap(self, work: Work, calls: int) -> Lap:
        start = self.now()
        for _ in range(calls):
            work()
        seconds = (self.now() - start) / calls
        return Lap(seconds, seconds)


#: Overwritten before every call: twice the largest L2 of the GPUs in question (H200: 50 MB, B200: 126 MB).
FLUSHED = 256 << 20


class DeviceClock:
    """CUDA events around every call, each after the L2 cache was overwritten.

    While the cache is overwritten (some 0.1 ms) the host may run ahead: ``seconds`` holds the host's time only as far as it exceeds
    that. ``host``: what issuing the call takes, which bounds the rate of eager calls from below.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cache = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def lap(self, work: Work, calls: int) -> Lap:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        host = 0.0
        torch.cuda.synchronize(self._device)
        for before, after in events:
            self._cache.zero_()
            before.record()
            start = time.perf_counter()
            work()
            host += time.perf_counter() - start
            after.record()
        torch.cuda.synchronize(self._device)
        return Lap(sum(before.elapsed_time(after) for before, after in events) / calls / 1e3, host / calls)


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()


# --- the race -------------------------------------------------------------------------------------


@dataclass
class Times:
    """Laps of one competitor, a lap for each round."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Seconds: median, and the 20th and 80th of a hundred."""
        p20, median, p80 = np.percentile(self.seconds, [20, 50, 80]).tolist()
        return {"seconds": median, "p20": p20, "p80": p80, "host_seconds": float(np.median(self.host)), "calls": self.calls}


def race(competitors: Mapping[str, Work], *, clock: Clock, rounds: int, seed: int = 0, lap_seconds: float = 0.0, calls: int = 1,
         warm_up: int = 3, deadline: float = math.inf) -> dict[str, Times]:  # fmt: skip
    """Laps of every competitor, by name.

    lap_seconds: calls of a lap are repeated until it takes about so long, at least ``calls`` times. warm_up: laps of each that are
    not counted. deadline, of time.monotonic: after it no further round begins, once there are enough for an interval.
    """
    times = {}
    for name, work in competitors.items():
        for _ in range(max(1, warm_up)):
            lap = clock.lap(work, calls)
        times[name] = Times(max(calls, math.ceil(lap_seconds / lap.seconds) if lap.seconds > 0 else calls))
    order, drawn = list(competitors), random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            drawn.shuffle(order)
            for name in order:
                lap = clock.lap(competitors[name], times[name].calls)
                times[name].seconds.append(lap.seconds)
                times[name].host.append(lap.host)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return times


def ratio(times: Times, baseline: Times) -> dict[str, float]:
    """The median of the quotients of both, round by round, and its 95 % interval."""
    quotients = np.array(times.seconds) / np.array(baseline.seconds)
    low, high = intervals.median(quotients.tolist())
    return {"ratio": float(np.median(quotients)), "low": low, "high": high, "rounds": len(quotients)}
