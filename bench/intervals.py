"""Exact intervals: of a proportion (Clopper–Pearson), valid for any n, also for zero events; of a median, whatever the distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import beta, binom


class Interval(NamedTuple):
    low: float
    high: float


def proportion(events: int, trials: int, confidence: float = 0.95) -> Interval:
    """The two-sided interval of events/trials; the whole of [0, 1] without a trial."""
    if not 0 <= events <= trials:
        raise ValueError(f"expected 0 <= events <= trials; got {events} of {trials}")
    tail = (1 - confidence) / 2
    low = 0.0 if events == 0 else float(beta.ppf(tail, events, trials - events + 1))
    high = 1.0 if events == trials else float(beta.ppf(1 - tail, events + 1, trials - events))
    return Interval(low, high)


def upper_limit(events: int, trials: int, confidence: float = 0.95) -> float:
    """The one-sided upper limit: with zero events 1 - 0.05^(1/n), about 3/n."""
    if not 0 <= events <= trials:
        raise ValueError(f"expected 0 <= events <= trials; got {events} of {trials}")
    return 1.0 if events == trials else float(beta.ppf(confidence, events + 1, trials - events))


def lower_limit(events: int, trials: int, confidence: float = 0.95) -> float:
    """The one-sided lower limit: with no failure 0.05^(1/n), about 1 - 3/n."""
    return 1.0 - upper_limit(trials - events, trials, confidence)


def median(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The two-sided interval of the median: between the order statistics that enclose it with at least ``confidence``.

    How many of n independent values lie below the median is binomial with p = 1/2, so nothing is assumed of their distribution
    (David and Nagaraja, Order Statistics, 7.1). Fewer than six values enclose nothing at 95 %: the whole line.
    """
    # The largest number of values that may be left out at either end.
    left_out = int(binom.ppf((1 - confidence) / 2, len(values), 0.5))
    if binom.cdf(left_out, len(values), 0.5) > (1 - confidence) / 2:
        left_out -= 1
    if left_out < 0:
        return Interval(-math.inf, math.inf)
    ordered = sorted(values)
    return Interval(ordered[left_out], ordered[-1 - left_out])
