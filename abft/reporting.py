"""Reports: what the ledgers say, as values. Reading waits for the devices; nothing else in the package does."""

from __future__ import annotations

import threading
import warnings
import weakref
from dataclasses import dataclass, field

import numpy as np

from abft import events, ledger, sites
from abft.errors import FaultDetected, UncorrectedFault
from abft.events import FaultEvent
from abft.ledger import COUNTER, WORST, Verdict
from abft.policy import OnUncorrected

MAX_EVENTS = 10_000
_UNREPAIRED = (Verdict.UNCORRECTED, Verdict.OBSERVED)


@dataclass(frozen=True)
class Report:
    """What happened: counts of rows (checks), products, faults by verdict, and the events.

    A check is one output row of one product and role. ``detected == observed + corrected + uncorrected``.
    ``false_alarms``, ``stale``, ``input_rows`` and ``overflow_rows`` are not faults and not in ``detected``.
    ``worst`` is the largest |residual| / bound among clean rows; ``executions`` counts products really computed,
    replicas and repairs included; ``repeated_checks`` those made again under activation checkpointing.
    """

    checks: int = 0
    products: int = 0
    executions: int = 0
    observed: int = 0
    recomputed: int = 0
    reconstructed: int = 0
    uncorrected: int = 0
    false_alarms: int = 0
    stale: int = 0
    input_rows: int = 0
    overflow_rows: int = 0
    weight_faults: int = 0
    repeated_checks: int = 0
    dropped_events: int = 0
    worst: float = 0.0
    bypassed: dict[str, int] = field(default_factory=dict)
    events: tuple[FaultEvent, ...] = ()
    sites: dict[str, Report] = field(default_factory=dict)

    @property
    def corrected(self) -> int:
        return self.recomputed + self.reconstructed

    @property
    def detected(self) -> int:
        return self.observed + self.corrected + self.uncorrected

    def __str__(self) -> str:
        return _table(self)


@dataclass(frozen=True, eq=False)
class Mark:
    """A point in the ledgers' history from which a report can start."""

    counters: np.ndarray
    bypassed: dict[str, int]
    events: int  # made before
    lost: int  # records that rings had overwritten before


@dataclass
class _Peaks:
    """The maxima of every site between one mark and the next (None: the beginning of time)."""

    mark: weakref.ref[Mark] | None
    worst: np.ndarray


_lock = threading.RLock()
_events: list[FaultEvent] = []  # the last MAX_EVENTS, in the order they were made
_made = 0  # events ever made
_read: dict[str, int] = {}  # per ledger: records whose events were made by reading it
_noted: set[tuple[str, int]] = set()  # records beyond those whose events were made when they were written
_peaks: list[_Peaks] = [_Peaks(None, np.zeros(sites.CAPACITY, np.int64))]
_zero: Mark | None = None
_latest: ledger.Snapshot | None = None


def drain(wait: bool = True) -> ledger.Snapshot:
    """Read the ledgers, turn new records into events and react to them as their sites' policies say."""
    global _latest
    if not wait and _latest is not None:
        return _latest
    with _lock:
        snapshot = ledger.snapshot(_read)
        _read.update(snapshot.heads)
        made = []
        for record in snapshot.records:
            key = (record["ledger"], record["place"])
            if key in _noted:
                _noted.discard(key)
                continue
            made.append((record, events.from_record(record)))
        _keep([event for _, event in made])
        _latest = snapshot
    for record, event in made:
        if event.device != "cpu":  # on a CPU the reaction came inside the call
            react(sites.site_of(record["site"]).on_uncorrected, event)
    return snapshot


def note(book: ledger.CpuLedger, site: int, finding: ledger.Finding, product: dict[str, int]) -> FaultEvent:
    """Record a finding of this thread and make its event, now, with the labels and the time of now."""
    with _lock:  # a report of another thread sees both or neither
        record = book.record(site, finding, product)
        event = events.from_record(record)
        _noted.add((record["ledger"], record["place"]))
        _keep([event])
    return event


def _keep(fresh: list[FaultEvent]) -> None:
    global _made
    _made += len(fresh)
    _events.extend(fresh)
    if len(_events) > MAX_EVENTS:
        del _events[: len(_events) - MAX_EVENTS]


def react(how: OnUncorrected, event: FaultEvent) -> None:
    """What the policy does about a fault that was not repaired."""
    if event.verdict not in _UNREPAIRED:
        return
    if callable(how):
        how(event)
    elif how == "raise":
        raise (UncorrectedFault if event.verdict is Verdict.UNCORRECTED else FaultDetected)(event.message)
    elif how == "warn":
        warnings.warn(f"abft: {event.message}", RuntimeWarning, stacklevel=2)


def mark() -> Mark:
    """Now, as a starting point for ``since``."""
    with _lock:
        return _mark_at(drain())


def _mark_at(snapshot: ledger.Snapshot) -> Mark:
    now = Mark(snapshot.counters.copy(), snapshot.bypassed, _made, _lost(snapshot))
    _start_peaks(now, snapshot)
    return now


def _start_peaks(now: Mark, snapshot: ledger.Snapshot) -> None:
    """File the maxima since the last mark, and start them anew; those before a mark nobody holds any more are merged."""
    worst = snapshot.counters[:, WORST]
    np.maximum(_peaks[-1].worst, worst, out=_peaks[-1].worst)
    ledger.clear_worst()
    worst[:] = 0
    for i in range(len(_peaks) - 1, 0, -1):
        reference = _peaks[i].mark
        if reference is not None and reference() is None:
            np.maximum(_peaks[i - 1].worst, _peaks[i].worst, out=_peaks[i - 1].worst)
            del _peaks[i]
    _peaks.append(_Peaks(weakref.ref(now), np.zeros(sites.CAPACITY, np.int64)))


def _worst_since(start: Mark | None, now: np.ndarray) -> np.ndarray:
    worst = now.copy()
    for peaks in reversed(_peaks):
        np.maximum(worst, peaks.worst, out=worst)
        if start is not None and peaks.mark is not None and peaks.mark() is start:
            break
    return worst


def _lost(snapshot: ledger.Snapshot) -> int:
    return snapshot.written - _made


def since(start: Mark | None, *, wait: bool = True) -> Report:
    """What happened after ``start``; everything since the last reset, without one."""
    snapshot = drain(wait)
    with _lock:
        return _between(start or _zero, snapshot)


def _between(start: Mark | None, snapshot: ledger.Snapshot) -> Report:
    counters = snapshot.counters.copy()
    counters[:, WORST] = _worst_since(start, counters[:, WORST])
    bypassed = dict(snapshot.bypassed)
    first = lost = 0
    if start is not None:
        counters[:, :WORST] -= start.counters[:, :WORST]
        bypassed = {k: v - start.bypassed.get(k, 0) for k, v in bypassed.items() if v > start.bypassed.get(k, 0)}
        first, lost = start.events, start.lost
    window = _made - first
    kept = tuple(_events[max(0, len(_events) - window) :]) if window else ()
    dropped = window - len(kept) + _lost(snapshot) - lost
    return _build(counters, bypassed, kept, max(0, dropped))


def report(*, reset: bool = False, wait: bool = True) -> Report:
    """The process-wide report since the start or the last reset.

    wait=False returns what has been drained already, without waiting for a device. Raises UncorrectedFault if a
    product under ``on_uncorrected="raise"`` on a GPU has left a fault that nobody has raised yet.
    """
    global _zero
    snapshot = drain(wait)
    with _lock:
        out = _between(_zero, snapshot)
        if reset:
            _zero = _mark_at(snapshot)
    return out


def _build(counters: np.ndarray, bypassed: dict[str, int], kept: tuple[FaultEvent, ...], dropped: int) -> Report:
    by_name: dict[str, list[int]] = {}
    for index in np.flatnonzero(counters[:, :WORST].any(1)):
        by_name.setdefault(sites.site_of(int(index)).name, []).append(int(index))
    per_site = {name: _counts(counters[indices], {}, tuple(e for e in kept if e.site == name), 0, {}) for name, indices in by_name.items()}
    return _counts(counters, bypassed, kept, dropped, per_site)


def _counts(
    counters: np.ndarray, bypassed: dict[str, int], kept: tuple[FaultEvent, ...], dropped: int, per_site: dict[str, Report]
) -> Report:
    total = counters.sum(0)
    names = [n for n in ledger.COUNTER_NAMES if n != "worst"]
    return Report(
        **{name: int(total[COUNTER[name]]) for name in names},
        dropped_events=dropped,
        worst=ledger.bits_float(int(counters[:, WORST].max(initial=0))),
        bypassed=bypassed,
        events=kept,
        sites=per_site,
    )


def _table(report: Report) -> str:
    lines = [
        f"{report.checks:,} rows of {report.products:,} products checked; worst clean residual {report.worst:.2f} of its bound",
        f"detected {report.detected} (recomputed {report.recomputed}, reconstructed {report.reconstructed}, observed {report.observed}, "
        f"uncorrected {report.uncorrected}), weight faults {report.weight_faults}",
        f"not faults: false alarms {report.false_alarms}, stale {report.stale}, input {report.input_rows}, overflow {report.overflow_rows}",
    ]
    lines += [f"not checked: {count:,} × {reason}" for reason, count in sorted(report.bypassed.items())]
    if report.dropped_events:
        lines.append(f"events dropped: {report.dropped_events}")
    if report.sites:
        width = max(len(name) for name in report.sites)
        lines.append(f"{'site':<{width}}  {'checks':>10}  {'detected':>8}  {'worst':>6}")
        shown = sorted(report.sites.items(), key=lambda item: (-item[1].detected, item[0]))
        lines += [f"{name:<{width}}  {r.checks:>10,}  {r.detected:>8}  {r.worst:>6.2f}" for name, r in shown[:40]]
        if len(shown) > 40:
            lines.append(f"… and {len(shown) - 40} more sites")
    return "\n".join(lines)
