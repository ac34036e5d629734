"""Who is watched: accumulators per thread, monitors per site, role and shape, and the alarms they raised.

A product adds to its thread's accumulator, in the pass that judges it. When a batch is complete the thread that completed it
compares it with what is normal: tens of microseconds every thousand rows or more, nothing in between, nothing at all unless
the policy's detector asks for it.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from abft import events, ledger, sites
from abft.statistics import lone
from abft.statistics.accumulators import ABOVE_8, ABOVE_12, ABOVE_SOFT, COUNT, MOST, Accumulator
from abft.statistics.baseline import Baseline, moments
from abft.statistics.monitor import Monitor, Sign
from abft.statistics.severity import Severity

#: Sites × roles × shapes that are watched; functions of ever new shapes must not fill the memory.
MOST_WATCHED = 8192
MOST_ALARMS = 10_000

_log = logging.getLogger("abft")
#: Who computes: threads of this host, or the multiprocessors of a device (abft/statistics/devices.py).
HOST = "host"
#: (site, its tenant, role, columns, depth, dtype, who computes)
Key = tuple[int, int, str, int, int, torch.dtype, str]
#: … in words, the same in every process: (site, role, columns, depth, dtype)
Name = tuple[str, str, int, int, str]


@dataclass(frozen=True)
class Alarm:
    """One test that alarmed: statistics say that something changed which no single check can show.

    test: bias (the mean residual moved), noise (its variance grew) or outliers (large residuals became more frequent), of residuals;
    envelope (the outputs of a module left their usual range). deviation: the bias in σ̂, the variance as a factor, outliers per
    check, or the measure's deviation. unit: the multiprocessor of a device that stands out from its peers (0 of a host). quarantine: data
    do not explain it; otherwise look at what changed (labels, calibration) first. checks: residuals seen of this unit when it alarmed.
    """

    v: int
    time: float
    step: int
    rank: int
    host: str
    site: str
    role: str
    test: str
    unit: int
    deviation: float
    quarantine: bool
    checks: float
    context: dict[str, str]
    calibration: str
    message: str

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SiteStatistics:
    """What the residuals of one site, role and shape look like, since the first.

    residuals: how many, per kind of checksum. sigma: σ̂ of residual / bound (of e). bias, noise: of the last batch, mean in σ̂ and
    variance as a factor of the baseline's. most: largest |residual| / bound of clean rows, in σ̂. above_8, above_12: residuals above so many
    σ̂. soft: the soft threshold, in units of the bound. severities: S1 residuals, S2 to S4 rows, these only where rows are weighed (of
    kernels: where they may be left). levels: the highest sum of each test, of its threshold. warm: whether the baseline is frozen, before
    which nothing alarms. units: multiprocessors of a device (1: a host, or a device whose multiprocessors have no numbers); compared: of
    these, whom the last batch tells apart from the others.
    """

    site: str
    role: str
    shape: tuple[int, int]  # N, K
    dtype: str
    residuals: int
    sigma: float
    bias: float
    noise: float
    most: float
    above_8: int
    above_12: int
    soft: float
    severities: dict[str, int]
    levels: dict[str, float]
    warm: bool
    units: int = 1
    compared: int = 1


class Watch:
    """One thread's part in watching a site, role and shape."""

    def __init__(self, key: Key, monitor: Monitor) -> None:
        self.key, self.monitor = key, monitor
        self._accumulator = Accumulator()
        self.address = self._accumulator.address
        self._folded = self._accumulator.kept.copy()
        self._quiet: lone.Quiet | None = None
        self._due = 0.0
        self._rescale()

    def add(self, x: np.ndarray) -> None:
        """Residuals over bounds (rows, groups, kinds) of a product that was not judged by ``judging``; only rows within them."""
        self._accumulator.add(x)

    def settle(self) -> None:
        """After every product."""
        if self._accumulator.count >= self._due:
            with _lock:
                quiet = self._quiet
                if quiet is not None and quiet.baseline is self.monitor.baseline and quiet.passes():
                    self._due = self._accumulator.count + quiet.size
                    return
                signs = self._fold()
            tell(self.key, self.monitor, signs)

    def _fold(self) -> list[Sign]:
        now = self._accumulator.kept.copy()
        batch = now - self._folded
        if batch[0, COUNT] <= 0:
            return []
        batch[:, MOST] = now[:, MOST]
        self._folded[:] = now
        signs = self.monitor.add(batch[None])
        self._rescale()
        if self.monitor.baseline.frozen and (self._quiet is None or self._quiet.baseline is not self.monitor.baseline):
            self._quiet = lone.quiet(self._accumulator, self._folded, self.monitor)
        return signs

    def _rescale(self) -> None:
        base = self.monitor.baseline
        self._accumulator.scale(base.sigma * base.drifted, base.soft * base.drifted)
        self._due = self._accumulator.count + base.size


_lock = threading.RLock()
_local = threading.local()
_monitors: dict[Key, Monitor] = {}
_known: dict[Name, Baseline] = {}  # by a calibration
_alarms: list[Alarm] = []
_forgotten = 0  # alarms older than the last MOST_ALARMS
_generation = 0


def of(site: int, role: str, columns: int, depth: int, dtype: torch.dtype) -> Watch | None:
    """This thread's watch; None where too many shapes are watched already."""
    mine = getattr(_local, "watches", None)
    if mine is None or _local.generation != _generation:
        mine, _local.generation = {}, _generation
        _local.watches = mine
    key = (site, sites.site_of(site).tenant, role, columns, depth, dtype, HOST)
    found = mine.get(key)
    if found is None and key not in mine:
        found = mine[key] = _new(key)
    return found


def _new(key: Key) -> Watch | None:
    monitor = monitor_of(key)
    return None if monitor is None else Watch(key, monitor)


def monitor_of(key: Key, units: int = 1) -> Monitor | None:
    """The monitor of so many units; None where too many shapes are watched already."""
    with _lock:
        monitor = _monitors.get(key)
        if monitor is None:
            if len(_monitors) >= MOST_WATCHED:
                ledger.bypass(f"statistics of more than {MOST_WATCHED} sites and shapes")
                return None
            monitor = _monitors[key] = Monitor(units)
            known = _known.get(name_of(key))
            if known is not None and known.units == units:
                monitor.baseline = copy.deepcopy(known)
        return monitor


def generation() -> int:
    """How often everything was forgotten."""
    return _generation


def know(baselines: Mapping[Name, Baseline]) -> None:
    """From now on these are normal, without a warm-up; everything seen before is forgotten."""
    global _known
    with _lock:
        _known = dict(baselines)
        forget()


def name_of(key: Key) -> Name:
    """The key in words."""
    site, _, role, columns, depth, dtype, _ = key
    return sites.site_of(site).name, role, columns, depth, str(dtype)[6:]


def monitors() -> dict[Key, Monitor]:
    """All monitors; what threads have added and nobody has compared stays with them."""
    with _lock:
        return dict(_monitors)


def forget() -> None:
    """Learn anew what is normal, everywhere: after the hardware was exchanged, or the model."""
    global _generation
    with _lock:
        _generation += 1
        _monitors.clear()


# --- alarms -------------------------------------------------------------------------------------


def tell(key: Key, monitor: Monitor, signs: list[Sign]) -> None:
    """Raise the alarms that are news. Called without a lock: a log's handler may wait for a thread that makes a report."""
    with _lock:
        news = [sign for sign in signs if monitor.is_news(sign)]
    name, role, columns, depth, dtype = name_of(key)
    for sign in news:
        who = "" if monitor.units == 1 else f", multiprocessor {sign.unit} of {key[-1]}"
        of = f"{dtype}, N={columns}, K={depth}{who}"
        raise_alarm(name, role, sign.test, sign.deviation, sign.quarantine, sign.checks, unit=sign.unit, of=of)


_MEANINGS = {
    "bias": "the mean residual moved by {:+.3f} σ",
    "noise": "the variance of residuals is {:.2f} times what it was",
    "outliers": "{:.2g} of the residuals lie above 8 σ",
}


def raise_alarm(
    site: str, role: str, test: str, deviation: float, quarantine: bool, checks: float, *, unit: int = 0, of: str = "", meaning: str = ""
) -> Alarm:
    """Remember an alarm, and say it to the log."""
    global _forgotten
    what = meaning or _MEANINGS[test].format(deviation)
    advice = (
        "No data explain this: quarantine the unit and test it."
        if quarantine
        else "New data may explain this: compare what changed (release, data, calibration) and the unit's peers before blaming it."
    )
    of_what = "samples" if meaning else "residuals"
    message = f"{test} at {site} ({role}{', ' + of if of else ''}): {what} after {checks:,.0f} {of_what}; rank {events.rank()}. {advice}"
    alarm = Alarm(
        events.VERSION, time.time(), ledger.step(), events.rank(), ledger.HOST, site, role, test, unit, deviation, quarantine, checks,
        dict(events.labels.get({})), events.calibration, message,
    )  # fmt: skip
    with _lock:
        _alarms.append(alarm)
        if len(_alarms) > MOST_ALARMS:
            del _alarms[0]
            _forgotten += 1
    _log.warning("%s", message)
    return alarm


def raised() -> int:
    """Alarms so far."""
    with _lock:
        return _forgotten + len(_alarms)


def alarms(first: int, last: int) -> tuple[Alarm, ...]:
    """The alarms from number ``first`` to before ``last``, those still remembered."""
    with _lock:
        return tuple(_alarms[max(0, first - _forgotten) : max(0, last - _forgotten)])


# --- what is seen -------------------------------------------------------------------------------


def snapshot() -> tuple[SiteStatistics, ...]:
    """What every watched site and role looks like, completed batches only."""
    with _lock:
        return tuple(_statistics(key, monitor) for key, monitor in _monitors.items() if monitor.pooled[0, COUNT])


def _statistics(key: Key, monitor: Monitor) -> SiteStatistics:
    name, role, columns, depth, dtype = name_of(key)
    base, total = monitor.baseline, monitor.pooled
    mean, noise = moments(monitor.last)
    normal = base.noise if base.frozen and base.alone else 2 * np.log(base.sigma)
    weighed = list(Severity)[2:] if monitor.weighs else []
    severities = {"S1": int(total[:, ABOVE_SOFT].sum())} | {s.name: monitor.severities.get(s, 0) for s in weighed}
    return SiteStatistics(
        name, role, (columns, depth), dtype, int(total[0, COUNT]), float(base.sigma[0]), float((mean[0] - base.mean[0]) / base.sigma[0]),
        float(np.exp(noise[0] - normal[0])), float(total[0, MOST] / base.sigma[0]), int(total[:, ABOVE_8].sum()),
        int(total[:, ABOVE_12].sum()), float(base.soft[0]), severities, monitor.levels(), base.frozen, monitor.units,
        monitor.compared,
    )  # fmt: skip

