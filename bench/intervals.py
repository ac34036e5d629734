"""Exact (Clopper–Pearson) intervals for a proportion: valid for any n, also for zero events."""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import beta


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
