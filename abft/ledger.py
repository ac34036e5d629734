"""The ledger: counters per site and a ring of fault records, in one int64 tensor per device.

    [HEADER][CAPACITY sites × COUNTERS][RING records × RECORD]

Device code adds to it in stream order; the host reads it when somebody asks, and copies points of its history
aside without waiting. On a CPU every thread has its own (concurrent adds to one would be lost); reports sum them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from abft import sites

# --- layout, shared with device code ------------------------------------------------------------

HEADER = 8
#: Records ever written; optimizer step; products of deferred checks whose evidence was overwritten before it was judged.
HEAD, STEP, LOST = 0, 1, 2

COUNTER_NAMES = (
    "checks", "products", "executions", "observed", "recomputed", "reconstructed", "uncorrected",
    "false_alarms", "stale", "input_rows", "overflow_rows", "weight_faults", "repeated_checks", "worst", "tolerated",
)  # fmt: skip
COUNTERS = 16
COUNTER = {name: i for i, name in enumerate(COUNTER_NAMES)}
#: fp32 bits of a non-negative number order like integers, so a maximum can be kept atomically.
WORST = COUNTER["worst"]

_CHECKS, _PRODUCTS, _EXECUTIONS, _REPEATED = (COUNTER[n] for n in ("checks", "products", "executions", "repeated_checks"))

RING = 1024
RECORD_NAMES = (
    "sequence", "site", "role", "verdict", "cause", "rows", "row", "col",
    "residual", "bound", "m", "n", "k", "dtype", "backend", "step",
    "element_row", "element_col", "unit", "repaired_on",
)  # fmt: skip
RECORD = len(RECORD_NAMES)
RING_AT = HEADER + sites.CAPACITY * COUNTERS
WORDS = RING_AT + RING * RECORD

ROLE_NAMES = ("fprop", "dgrad", "wgrad", "qk", "pv")
BACKEND_NAMES = ("reference", "vendor", "triton")
CAUSES = ("unknown", "transient", "persistent", "weight", "panel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


class Verdict(Enum):
    """What became of a suspect row. The value is the explanation."""

    OBSERVED = "the row disagrees with its checksums; the policy only reports"
    RECOMPUTED = "the row was computed again and now agrees with its checksums"
    RECONSTRUCTED = "the row was rebuilt from operands restored, or computed another way, and agrees with its checksums"
    UNCORRECTED = "the row disagrees with its checksums and could not be repaired"
    FALSE_ALARM = "an independent product agrees with the row: the check was wrong, not the data"
    STALE = "the weight had changed densely and unannounced: the present weight's product was delivered"
    INPUT = "an operand already held NaN or Inf"
    OVERFLOW = "finite operands, a result beyond the output type: Inf is what torch delivers"
    TOLERATED = "one element deviates by less than a thousandth of its row: delivered as it is, as the policy wishes"


VERDICTS = tuple(Verdict)
COUNTER_OF = {
    Verdict.OBSERVED: "observed",
    Verdict.RECOMPUTED: "recomputed",
    Verdict.RECONSTRUCTED: "reconstructed",
    Verdict.UNCORRECTED: "uncorrected",
    Verdict.FALSE_ALARM: "false_alarms",
    Verdict.STALE: "stale",
    Verdict.INPUT: "input_rows",
    Verdict.OVERFLOW: "overflow_rows",
    Verdict.TOLERATED: "tolerated",
}


# --- what a backend hands over ------------------------------------------------------------------


@dataclass
class Finding:
    """One call and role with suspect rows: what the event will say."""

    verdict: Verdict
    rows: int
    row: int
    col: int | None
    residual: float
    bound: float
    cause: str = "unknown"
    element: tuple[int, ...] | None = None  # of the weight or bias that changed, where there is one


@dataclass
class Outcome:
    """What one checked product adds to the ledger."""

    checks: int = 0
    executions: int = 1
    worst: float = 0.0
    weight_faults: int = 0
    findings: list[Finding] = field(default_factory=list)


class CpuLedger:
    """One thread's ledger: the same words as on a device, written through numpy."""

    def __init__(self) -> None:
        self.name = ""
        self.words = np.zeros(WORDS, np.int64)
        self._counters = self.words[HEADER:RING_AT].reshape(-1, COUNTERS)
        self._view = memoryview(self.words)  # type: ignore[arg-type]  # plain integers: ten times cheaper to add to than array elements
        self._worst: dict[int, float] = {}
        self._ring = self.words[RING_AT:].reshape(RING, RECORD)

    def count_clean(self, site: int, checks: int, worst: float, repeated: bool) -> None:
        """A product, computed once, of which every check passed."""
        words, at = self._view, HEADER + site * COUNTERS
        words[at + (_REPEATED if repeated else _CHECKS)] += checks
        words[at + _PRODUCTS] += 1
        words[at + _EXECUTIONS] += 1
        if worst > self._worst.get(site, 0.0):
            self._worst[site] = worst
            words[at + WORST] = float_bits(worst)

    def count(self, site: int, outcome: Outcome, repeated: bool) -> None:
        self.count_clean(site, outcome.checks, outcome.worst, repeated)
        self._view[HEADER + site * COUNTERS + _EXECUTIONS] += outcome.executions - 1
        if outcome.findings or outcome.weight_faults:
            row = self._counters[site]
            row[COUNTER["weight_faults"]] += outcome.weight_faults
            for finding in outcome.findings:
                amount = 1 if finding.verdict is Verdict.STALE else finding.rows
                row[COUNTER[COUNTER_OF[finding.verdict]]] += amount

    def record(self, site: int, finding: Finding, product: dict[str, int]) -> dict[str, Any]:
        """Write one finding to the ring; returns the record as a reader will see it."""
        place = int(self.words[HEAD])
        slot = self._ring[place % RING]
        values = {
            "site": site,
            "verdict": VERDICTS.index(finding.verdict),
            "cause": CAUSES.index(finding.cause),
            "rows": finding.rows,
            "row": finding.row,
            "col": -1 if finding.col is None else finding.col,
            "residual": float_bits(finding.residual),
            "bound": float_bits(finding.bound),
            "step": int(_step),
            "sequence": next_sequence(),
            # Where a device names them: the changed element of the weight, the multiprocessor of a tile and of its repetition.
            **dict.fromkeys(("element_row", "element_col", "unit", "repaired_on"), -1),
            **product,
        }
        for i, name in enumerate(RECORD_NAMES):
            slot[i] = values[name]
        self.words[HEAD] += 1
        return {"device": "cpu", "ledger": self.name, "place": place, "element": finding.element} | values


def float_bits(value: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float32(value).view(np.int32))


def bits_float(bits: int) -> float:
    return float(np.int64(bits).astype(np.int32).view(np.float32))


# --- the process's ledgers ----------------------------------------------------------------------

_lock = threading.Lock()
_local = threading.local()
_cpu_ledgers: list[CpuLedger] = []
_device_ledgers: dict[torch.device, Tensor] = {}
_bypassed: dict[str, int] = {}
_sequence = 0
_step = 0


def next_sequence() -> int:
    global _sequence
    with _lock:
        _sequence += 1
        return _sequence


def cpu() -> CpuLedger:
    """This thread's ledger."""
    ledger = getattr(_local, "ledger", None)
    if ledger is None:
        ledger = _local.ledger = CpuLedger()
        with _lock:
            ledger.name = f"cpu, thread {len(_cpu_ledgers)}"
            _cpu_ledgers.append(ledger)
    return ledger


def tensor(device: torch.device) -> Tensor:
    """The ledger argument of an operator: real on a GPU, a token on a CPU (whose threads write their own)."""
    ledger = _device_ledgers.get(device)
    return make(device) if ledger is None else ledger


def make(device: torch.device) -> Tensor:
    """The ledger of a device. Call it outside of any tracer: in a graph it would be one more intermediate result."""
    if device not in _device_ledgers:
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            ledger = torch.zeros(WORDS if device.type == "cuda" else 1, dtype=torch.int64, device=device)
        if device.type == "cuda":
            torch._dynamo.mark_static_address(ledger)
        _device_ledgers[device] = ledger
    return _device_ledgers[device]


_scratch: dict[torch.device, Tensor] = {}


def scratch(device: torch.device) -> Tensor:
    """Words that nobody reads: for replicas, whose checks are not counted."""
    if device not in _scratch:
        with torch.inference_mode(False), torch.no_grad():
            _scratch[device] = torch.zeros(WORDS, dtype=torch.int64, device=device)
    return _scratch[device]


make(torch.device("cpu"))


def bypass(reason: str) -> None:
    """Count one product that torch computed without a check."""
    with _lock:
        _bypassed[reason] = _bypassed.get(reason, 0) + 1


def set_step(step: int) -> None:
    """The step that records carry from now on."""
    global _step
    _step = step
    for _, words in _devices():
        words[STEP].fill_(step)


def step() -> int:
    """The step that the host's records carry."""
    return _step


# --- reading ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Point:
    """The ledgers at one moment: counters (sites in use, COUNTERS) summed over them, records ever written to each, bypasses.

    Taken without waiting it holds what threads have written; the parts of devices are added when they are read.
    """

    counters: np.ndarray
    heads: dict[str, int]
    bypassed: dict[str, int]
    alarms: int = 0  # of the second detector, so far (abft/statistics)

    def add(self, name: str, counters: np.ndarray, head: int, lost: int) -> None:
        """Another ledger's part; nothing, if it is in already."""
        if name not in self.heads:
            counters = counters[: len(self.counters)]  # a site made since has counted nothing at this point
            rows = self.counters[: len(counters)]
            worst = np.maximum(rows[:, WORST], counters[:, WORST])
            rows += counters
            rows[:, WORST] = worst
            self.heads[name] = head
            if lost:
                self.bypassed[LOST_EVIDENCE] = self.bypassed.get(LOST_EVIDENCE, 0) + lost


@dataclass(frozen=True, eq=False)
class Frozen:
    """Header and counters of a device ledger, or its header alone, at one point of its stream."""

    words: Tensor
    ready: Any  # the event after which they are there; None where there are no streams

    def here(self) -> Tensor:
        """The words, for use on the current stream."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.words.device)
            stream.wait_event(self.ready)
            self.words.record_stream(stream)
        return self.words

    def head(self) -> Frozen:
        return Frozen(self.words[:HEADER], self.ready)


@dataclass(frozen=True)
class Reading:
    """The ledgers now, the records nobody has read before, and what was frozen (None: devices were not read)."""

    now: Point
    records: tuple[dict[str, Any], ...]
    frozen: list[dict[str, np.ndarray]] | None


_unread = False
_last: dict[str, tuple[np.ndarray, int, int]] = {}  # per device ledger: what unpack said of it when it was last read


def issued() -> None:
    """Said after every product that went to a device: its ledger has news. After, or a reading in between would take it for read."""
    global _unread
    _unread = True


def on_host() -> Point:
    """What the threads of this process have written."""
    with _lock:
        point = Point(np.zeros((sites.count(), COUNTERS), np.int64), {}, dict(_bypassed))
        ledgers = list(_cpu_ledgers)
    for ledger in ledgers:
        point.add(ledger.name, ledger._counters[: len(point.counters)], int(ledger.words[HEAD]), int(ledger.words[LOST]))
    return point


def read(known: dict[str, int], frozen: Sequence[dict[str, Frozen]] = (), *, issued_only: bool = False) -> Reading:
    """Read all ledgers, each device's and what was frozen of it in one transfer; waits for the devices.

    known: per ledger, how many of its records were read before. issued_only: devices are not waited for, and stand as last
    read, if no product was issued since, or if a CUDA graph is being captured; what a replayed one did is not seen then.
    """
    global _unread
    now = on_host()
    records: list[dict[str, Any]] = []
    with _lock:
        ledgers = list(_cpu_ledgers)
    for ledger in ledgers:
        records += _records(ledger._ring, known.get(ledger.name, 0), now.heads.get(ledger.name, 0), "cpu", ledger.name)
    waited = will_wait(issued_only)
    _unread = _unread and not waited  # before the transfers: what is issued from here on may miss them
    thawed: list[dict[str, np.ndarray]] = [{} for _ in frozen]
    for name, words in _devices():
        if waited:
            copies = [(i, part[name].here()) for i, part in enumerate(frozen) if name in part]
            body, ring, *rest = _fetch([words[: HEADER + now.counters.size], words[RING_AT:], *(copy for _, copy in copies)])
            for (i, _), values in zip(copies, rest, strict=True):
                thawed[i][name] = values
            _last[name] = unpack(body)
            records += _records(ring.reshape(RING, RECORD), known.get(name, 0), _last[name][1], name, name)
        if name in _last:
            now.add(name, *_last[name])
    records.sort(key=lambda r: r["sequence"])
    return Reading(now, tuple(records), thawed if waited else None)


def will_wait(issued_only: bool) -> bool:
    """Whether a reading waits for the devices."""
    return not issued_only or (_unread and not any(_capturing(words) for _, words in _devices()))


def unpack(words: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Header and counters: (counters (sites, COUNTERS), records ever written, deferred products lost)."""
    return words[HEADER:].reshape(-1, COUNTERS), int(words[HEAD]), int(words[LOST])


def _fetch(parts: list[Tensor]) -> list[np.ndarray]:
    """Device tensors on the host, by one transfer."""
    with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
        values = to_host(torch.cat(parts))
    return np.split(values, np.cumsum([len(part) for part in parts[:-1]]))


def to_host(values: Tensor) -> np.ndarray:
    """The only place where the host waits for a ledger."""
    return values.cpu().numpy()


def _records(ring: np.ndarray, known: int, head: int, device: str, name: str) -> list[dict[str, Any]]:
    return [
        {"device": device, "ledger": name, "place": i} | dict(zip(RECORD_NAMES, (int(v) for v in ring[i % RING]), strict=True))
        for i in range(max(0, head - RING, known), head)
    ]


def take_worst() -> np.ndarray:
    """The maxima per site of all threads, which start anew: a maximum, unlike a sum, has no difference between two readings."""
    with _lock:
        ledgers = list(_cpu_ledgers)
    worst = np.zeros(sites.count(), np.int64)
    for ledger in ledgers:
        maxima = ledger._counters[:, WORST]
        np.maximum(worst, maxima[: len(worst)], out=worst)
        maxima[: len(worst)] = 0
        ledger._worst.clear()
    return worst


def freeze() -> dict[str, Frozen]:
    """Copies of the header and the sites in use of every device ledger, in stream order; maxima start anew. Waits for nothing."""
    out, used = {}, sites.count()
    for name, words in _devices():
        if _capturing(words):
            raise RuntimeError(
                "a report cannot begin while a CUDA graph is captured, its counts would begin anew at every replay: "
                "enter protected() or StepGuard.attempt() before the capture"
            )
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            copy = words[: HEADER + used * COUNTERS].clone()
            words[HEADER:RING_AT].view(-1, COUNTERS)[:used, WORST].zero_()
        out[name] = Frozen(copy, torch.cuda.current_stream(words.device).record_event() if words.is_cuda else None)
    return out


def fold(older: dict[str, Frozen], newer: dict[str, Frozen]) -> dict[str, Frozen]:
    """``newer`` with the maxima of ``older``, from whose point no report starts any more."""
    out = dict(newer)
    for name, copy in older.items():
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            before, words = copy.here(), newer[name].here()
            maxima = before[HEADER:].view(-1, COUNTERS)[:, WORST]
            target = words[HEADER:].view(-1, COUNTERS)[: len(maxima), WORST]
            target.copy_(torch.maximum(target, maxima))
        out[name] = Frozen(words, torch.cuda.current_stream(words.device).record_event() if words.is_cuda else None)
    return out


def _capturing(words: Tensor) -> bool:
    return words.is_cuda and torch.cuda.is_current_stream_capturing()


def _devices() -> list[tuple[str, Tensor]]:
    """(name, words) of the ledgers that device code writes; a CPU has a token only."""
    return [(str(device), words) for device, words in _device_ledgers.items() if len(words) == WORDS]


#: The reason under which products of a replayed graph are reported that were never judged.
LOST_EVIDENCE = "deferred check overwritten before it was judged"
HOST = socket.gethostname()
STARTED = time.time()
