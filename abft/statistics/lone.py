"""The batch of a lone unit that alarms nobody, in one compiled call (abft/native/batch.c): what ``Monitor.add`` would do with it.

It can only pass: a batch that alarms, or has a number that is not finite, is left to ``Monitor.add`` as it was. Everything it changes it
changes where it lies, so monitors and watches see it. Tests compare the two.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from abft.native import library
from abft.statistics.accumulators import CAP, LEVELS, Accumulator
from abft.statistics.baseline import MEMORY, RATIO, TINY, Baseline
from abft.statistics.cusum import MOST, Cusum
from abft.statistics.monitor import TESTED, Monitor

_POINTER, _DOUBLE = ctypes.c_void_p, ctypes.c_double
_RATES = 2


class _Chart(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("level", "evidence", "left_zero", "batches")]


class _Lone(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("kept", "folded", "total", "pooled", "last", "level2", "cap2")),
        *((name, _POINTER) for name in ("sigma", "soft", "mean", "mean_deviation", "noise_deviation", "noise")),
        *((name, _Chart * len(TESTED)) for name in ("up", "down", "scatter")),
        ("rates", _Chart * _RATES),
        *((name, _DOUBLE * len(TESTED)) for name in ("mean_k", "noise_k")),
        *((name, _DOUBLE * _RATES) for name in ("log_ratio", "excess")),
        ("levels", _DOUBLE * len(LEVELS)),
        *((name, _DOUBLE) for name in ("cap", "tiny", "memory", "threshold", "most")),
    ]


@dataclass(frozen=True, slots=True)
class Quiet:
    """The compiled call for one watch. size: checks of a batch."""

    baseline: Baseline
    size: float
    _call: Any
    _address: int
    _kept: tuple[object, ...]  # what the address leads to

    def passes(self) -> bool:
        """Whether the batch that is complete alarms nobody; then it has been added. Under the lock of all watches."""
        return bool(self._call(self._address))


def quiet(accumulator: Accumulator, folded: np.ndarray, monitor: Monitor) -> Quiet | None:
    """None without a compiler, before the baseline is frozen, and of several units. folded: what ``kept`` was a batch ago."""
    functions, base = library.functions(), monitor.baseline
    if functions is None or not base.frozen or monitor.units != 1:
        return None
    arrays = (
        accumulator.kept, folded, monitor.total, monitor.pooled, monitor.last, accumulator.level2, accumulator.cap2, base.sigma, base.soft,
        base.mean, base.mean_deviation, base.noise_deviation, base.noise,
    )  # fmt: skip
    up, down, scatter, rates = monitor.charts_of_mean(1), monitor.charts_of_mean(-1), monitor.charts("noise"), monitor.charts("outliers")
    charts = up, down, scatter[: len(TESTED)], rates
    states = tuple(array for group in charts for chart in group for array in chart.state)
    if not all(a.flags.c_contiguous and a.flags.writeable and a.dtype in (np.float64, np.int64) for a in (*arrays, *states)):
        return None
    expected = [(low, max(high, RATIO * low)) for low, high in base.rates]
    words = _Lone(
        *(a.ctypes.data for a in arrays),
        *((_Chart * len(group))(*(_chart(chart) for chart in group)) for group in charts),
        *((_DOUBLE * len(TESTED))(*k[list(TESTED)]) for k in base.references()),
        (_DOUBLE * _RATES)(*(np.log(high / low) for low, high in expected)),
        (_DOUBLE * _RATES)(*(high - low for low, high in expected)),
        (_DOUBLE * len(LEVELS))(*LEVELS), CAP, TINY, MEMORY, up[0].threshold, MOST,
    )  # fmt: skip
    return Quiet(base, base.size, functions.abft_batch, ctypes.addressof(words), (words, arrays, states))


def _chart(chart: Cusum) -> _Chart:
    return _Chart(*(a.ctypes.data for a in chart.state))
