"""Reports: what the ledgers say, as values. Reading waits for the devices; nothing else does, taking a mark neither."""

from __future__ import annotations

import atexit
import sys
import threading
import warnings
import weakref
from dataclasses import dataclass, field, replace

import numpy as np

from abft import events, ledger, pending, sites
from abft.errors import AbftError, FaultDetected, UncorrectedFault
from abft.events import FaultEvent
from abft.ledger import COUNTER, WORST, Frozen, Point, Verdict
from abft.policy import OnUncorrected
from abft.statistics import devices, watches
from abft.statistics.watches import Alarm, SiteStatistics

MAX_EVENTS = 10_000
#: Changes of labels remembered between two readings; records before older ones get the labels of the oldest.
MAX_BOUNDARIES = 256
#: Sites whose statistics are compared when a step is guarded: what is left waits for the next, and a step does not.
STATISTICS_AT_ONCE = 8
_UNREPAIRED = (Verdict.UNCORRECTED, Verdict.OBSERVED)


@dataclass(frozen=True)
class Report:
    """What happened: counts of rows (checks), products, faults by verdict, and the events.

    A check is one output row of one product and role. ``detected == observed + corrected + uncorrected``.
    ``false_alarms``, ``stale``, ``input_rows`` and ``overflow_rows`` are not faults and not in ``detected``.
    ``worst`` is the largest |residual| / bound among clean rows; ``executions`` counts products really computed,
    replicas and repairs included; ``repeated_checks`` those made again under activation checkpointing.

    Of the second detector (``Policy.detector``): ``tolerated`` rows lay beyond their bound, were too little wrong to harm, and were
    delivered; they are not in ``detected``. ``alarms`` were raised by statistics; ``statistics`` is what the residuals of every site,
    role and shape look like now, since the first of them.
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
    tolerated: int = 0
    alarms: tuple[Alarm, ...] = ()
    statistics: tuple[SiteStatistics, ...] = ()

    @property
    def corrected(self) -> int:
        return self.recomputed + self.reconstructed

    @property
    def detected(self) -> int:
        return self.observed + self.corrected + self.uncorrected

    def __str__(self) -> str:
        return _table(self)


@dataclass(eq=False)
class _Window:
    """The maxima of every site between one mark and the next (None: the beginning of time)."""

    mark: weakref.ref[Point] | None
    worst: np.ndarray
    #: Device ledgers as they stood when it ended, until they are read: its maxima, and the counters and heads of the next mark.
    frozen: dict[str, Frozen] = field(default_factory=dict)


@dataclass
class _Boundary:
    """Labels in force when a mark was taken: records written before it and read after it carry them."""

    labels: dict[str, str]
    heads: dict[str, int]
    frozen: dict[str, Frozen]


_lock = threading.RLock()
_events: list[tuple[str, int, FaultEvent]] = []  # (ledger, place) of the last MAX_EVENTS, in the order they were made
_read: dict[str, int] = {}  # per ledger: records whose events were made by reading it
_noted: set[tuple[str, int]] = set()  # records beyond those whose events were made when they were written
_windows: list[_Window] = [_Window(None, np.zeros(sites.CAPACITY, np.int64))]
_boundaries: list[_Boundary] = []
_zero: Point | None = None
_latest: Point | None = None


def drain(wait: bool = True, *, issued_only: bool = False) -> Point:
    """Read the ledgers, turn new records into events and react to them as their sites' policies say.

    Every mark taken since the last reading is completed by the same transfer. issued_only: see ``ledger.read``.
    """
    global _latest
    if not wait and _latest is not None:
        return _latest
    pending.flush()
    if ledger.will_wait(issued_only):
        devices.read(STATISTICS_AT_ONCE if issued_only else None)
    alarms = watches.raised()  # before the counters: an alarm of a product counted here may come later, never be lost
    with _lock:
        ended = [window for window in _windows if window.frozen]
        reading = ledger.read(_read, [*(w.frozen for w in ended), *(b.frozen for b in _boundaries)], issued_only=issued_only)
        if reading.frozen is not None:
            _complete(ended, reading.frozen)
        _read.update(reading.now.heads)
        made = []
        for record in reading.records:
            key = (record["ledger"], record["place"])
            if key in _noted:
                _noted.discard(key)
                continue
            made.append((record, events.from_record(record, _labels_of(*key))))
        if reading.frozen is not None:
            _boundaries.clear()
        _keep([(record["ledger"], record["place"], event) for record, event in made])
        reading.now.alarms = alarms
        _latest = reading.now
    for record, event in made:
        # Of what the host itself has judged it was told inside the call (``note``).
        react(sites.site_of(record["site"]).on_uncorrected, event)
        if event.verdict is Verdict.STALE:
            warn_of_edit(record["site"])
    return reading.now


def _complete(ended: list[_Window], frozen: list[dict[str, np.ndarray]]) -> None:
    """Give windows their maxima, and the marks and boundaries at their ends what they lack."""
    for window, parts in zip(ended, frozen[: len(ended)], strict=True):
        reference = _windows[_windows.index(window) + 1].mark
        following = None if reference is None else reference()
        window.frozen = {}
        for name, words in parts.items():
            counters, head, lost = ledger.unpack(words)
            _raise(window.worst, counters[:, WORST])
            counters[:, WORST] = 0
            if following is not None:
                following.add(name, counters, head, lost)
    for boundary, parts in zip(_boundaries, frozen[len(ended) :], strict=True):
        boundary.heads |= {name: int(words[ledger.HEAD]) for name, words in parts.items()}


def _labels_of(book: str, place: int) -> dict[str, str] | None:
    """The labels of the first boundary that this record was written before; None: those of now."""
    return next((b.labels for b in _boundaries if place < b.heads.get(book, 0)), None)


def note(book: ledger.CpuLedger, site: int, finding: ledger.Finding, product: dict[str, int]) -> FaultEvent:
    """Record a finding of this thread and make its event, now, with the labels and the time of now."""
    with _lock:  # a report of another thread sees both or neither
        record = book.record(site, finding, product)
        event = events.from_record(record)
        key = (record["ledger"], record["place"])
        _noted.add(key)
        _keep([(*key, event)])
    return event


def _keep(fresh: list[tuple[str, int, FaultEvent]]) -> None:
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


_edited: set[int] = set()


def warn_of_edit(site: int) -> None:
    """Once per site: its weight changed, and nobody said so."""
    if site not in _edited:
        _edited.add(site)
        warnings.warn(
            f"abft: the weight or bias at {sites.site_of(site).name} changed without an announcement abft can see "
            "(a write through .data, numpy or a custom kernel); its panel was rebuilt. Call abft.refresh(model) after such writes.",
            stacklevel=2,
        )


def mark() -> Point:
    """Now, as a starting point for ``since``; waits for nothing, what lies on devices is known after the next ``drain``."""
    pending.flush()  # what was computed before belongs before
    with _lock:
        now = ledger.on_host()
        now.alarms = watches.raised()
        _open(now)
        return now


def _open(now: Point) -> None:
    """Begin a window at ``now``: file the maxima so far, and start them anew."""
    last = _windows[-1]
    _raise(last.worst, ledger.take_worst())
    now.counters[:, WORST] = 0
    last.frozen = ledger.freeze()
    _merge()
    _windows.append(_Window(weakref.ref(now), np.zeros(sites.CAPACITY, np.int64)))
    labels = dict(events.labels.get({}))
    if _boundaries and _boundaries[-1].labels == labels:
        _boundaries.pop()
    _boundaries.append(_Boundary(labels, dict(now.heads), {name: copy.head() for name, copy in last.frozen.items()}))
    del _boundaries[:-MAX_BOUNDARIES]


def _merge() -> None:
    """Windows that began at a mark that nobody holds any more become part of those before them."""
    for i in range(len(_windows) - 1, 0, -1):
        before, window = _windows[i - 1], _windows[i]
        if window.mark is not None and window.mark() is None:
            _raise(before.worst, window.worst)
            before.frozen = ledger.fold(before.frozen, window.frozen)
            del _windows[i]


def _raise(worst: np.ndarray, by: np.ndarray) -> None:
    rows = worst[: len(by)]
    np.maximum(rows, by, out=rows)


def _worst_between(start: Point | None, end: Point) -> np.ndarray:
    """The maxima per site; ``end`` is a mark, or a reading, which holds those of its own window."""
    worst = np.zeros(sites.CAPACITY, np.int64)
    _raise(worst, end.counters[:, WORST])
    marks = [None if window.mark is None else window.mark() for window in _windows]
    last = marks.index(end) if end in marks else len(marks)
    first = marks.index(start) if start in marks else 0
    for window in _windows[first:last]:
        _raise(worst, window.worst)
    return worst[: len(end.counters)]


def since(start: Point) -> Report:
    """What happened after ``start``."""
    return between(start, drain())


def between(start: Point | None, end: Point) -> Report:
    """What happened from one point (None: the beginning) to another; marks among them have to be drained."""
    with _lock:
        counters = _difference(start, end)
        counters[:, WORST] = _worst_between(start, end)
        before = {} if start is None else start.bypassed
        bypassed = {reason: n - before.get(reason, 0) for reason, n in end.bypassed.items() if n > before.get(reason, 0)}
        written = sum(end.heads.values()) - (0 if start is None else sum(start.heads.values()))
        kept = _events_between(start, end) if written else ()
        alarms = watches.alarms(0 if start is None else start.alarms, end.alarms)
        return _build(counters, bypassed, kept, max(0, written - len(kept)), alarms)


def _difference(start: Point | None, end: Point) -> np.ndarray:
    counters = end.counters.copy()
    if start is not None:
        counters[: len(start.counters)] -= start.counters
    return counters


def _events_between(start: Point | None, end: Point) -> tuple[FaultEvent, ...]:
    first = {} if start is None else start.heads
    return tuple(event for book, place, event in _events if first.get(book, 0) <= place < end.heads.get(book, 0))


def unrepaired(start: Point, end: Point) -> tuple[int, str]:
    """(rows found wrong and not repaired from one point to another, what the last of them says)."""
    rows = int(_difference(start, end)[:, [COUNTER["observed"], COUNTER["uncorrected"]]].sum())
    if not rows:
        return 0, ""
    with _lock:
        messages = [event.message for event in _events_between(start, end) if event.verdict in _UNREPAIRED]
    return rows, messages[-1] if messages else ""


def report(*, reset: bool = False, wait: bool = True) -> Report:
    """The process-wide report since the start or the last reset.

    Deferred checks are judged first. wait=False returns what has been drained already, without waiting for a device.
    Raises UncorrectedFault if a
    product under ``on_uncorrected="raise"`` on a GPU has left a fault that nobody has raised yet.
    """
    global _zero
    with _lock:
        end = mark() if reset and (wait or _latest is None) else None
    now = drain(wait)
    with _lock:
        out = between(_zero, now if end is None else end)
        if reset:
            if end is None:  # without waiting: what has been drained is reported and left behind
                end = replace(now, counters=now.counters.copy())
                _open(end)
            _zero = end
    return out


@atexit.register
def _last_words() -> None:
    """What nobody has asked for until the process ends is judged now, and said."""
    left = pending.waiting()
    if not left:
        return
    what = f"abft: {left} product(s) with deferred checks were computed after the last report"
    try:
        before = between(None, drain(wait=False)) if _latest is not None else Report()
        found = between(None, drain())
        wrong = found.observed + found.uncorrected - before.observed - before.uncorrected
    except AbftError as error:  # on_uncorrected="raise"
        print(f"{what}: {error}", file=sys.stderr)
    except Exception as error:  # at this point devices may be gone
        print(f"{what}, and could not be judged any more: {error}", file=sys.stderr)
    else:
        print(f"{what}: {wrong} wrong row(s) found at exit", file=sys.stderr)


def _build(
    counters: np.ndarray, bypassed: dict[str, int], kept: tuple[FaultEvent, ...], dropped: int, alarms: tuple[Alarm, ...]
) -> Report:
    by_name: dict[str, list[int]] = {}
    for index in np.flatnonzero(counters[:, :WORST].any(1)):
        by_name.setdefault(sites.site_of(int(index)).name, []).append(int(index))
    seen = watches.snapshot()
    per_site = {
        name: replace(
            _counts(counters[indices], {}, tuple(e for e in kept if e.site == name), 0, {}),
            alarms=tuple(a for a in alarms if a.site == name), statistics=tuple(s for s in seen if s.site == name),
        )
        for name, indices in by_name.items()
    }  # fmt: skip
    return replace(_counts(counters, bypassed, kept, dropped, per_site), alarms=alarms, statistics=seen)


def _counts(
    counters: np.ndarray, bypassed: dict[str, int], kept: tuple[FaultEvent, ...], dropped: int, per_site: dict[str, Report]
) -> Report:
    total = counters.sum(0)
    names = [n for n in ledger.COUNTER_NAMES if n != "worst"]
    return Report(
        **{name: int(total[COUNTER[name]]) for name in names},  # type: ignore[arg-type]
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
    if report.statistics or report.alarms:
        asked = sum(alarm.quarantine for alarm in report.alarms)
        warm = sum(s.warm for s in report.statistics)
        lines.append(
            f"statistics: {len(report.alarms)} alarm(s), {asked} of them for quarantine; tolerated {report.tolerated}; "
            f"{warm} of {len(report.statistics)} sites, roles and shapes past their warm-up"
        )
        lines += [f"  {alarm.message}" for alarm in report.alarms[-10:]]
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
