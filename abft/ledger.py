"""The ledger: counters per site and a ring of fault records, in one int64 tensor per device.

    [HEADER][CAPACITY sites × COUNTERS][RING records × RECORD]

Device code adds to it in stream order; the host reads it when somebody asks. On a CPU every
thread has its own (concurrent adds to one would be lost) and they are summed on report.
"""

from __future__ import annotations

import socket
import threading
import time
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
HEAD, STEP = 0, 1  # records ever written; optimizer step

COUNTER_NAMES = (
    "checks", "products", "executions", "observed", "recomputed", "reconstructed", "uncorrected",
    "false_alarms", "stale", "input_rows", "overflow_rows", "weight_faults", "repeated_checks", "worst",
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
)  # fmt: skip
RECORD = len(RECORD_NAMES)
WORDS = HEADER + sites.CAPACITY * COUNTERS + RING * RECORD

ROLE_NAMES = ("fprop", "dgrad", "wgrad")
BACKEND_NAMES = ("reference", "vendor", "triton")
CAUSES = ("unknown", "transient", "persistent", "weight", "panel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        self._counters = self.words[HEADER : HEADER + sites.CAPACITY * COUNTERS].reshape(-1, COUNTERS)
        self._view = memoryview(self.words)  # type: ignore[arg-type]  # plain integers: ten times cheaper to add to than array elements
        self._worst: dict[int, float] = {}
        self._ring = self.words[HEADER + sites.CAPACITY * COUNTERS :].reshape(RING, RECORD)

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
    for device, words in _device_ledgers.items():
        if device.type == "cuda":
            words[STEP].fill_(step)


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Counters (sites, COUNTERS) summed over devices and threads, bypasses, and the records nobody has read before."""

    counters: np.ndarray
    bypassed: dict[str, int]
    records: tuple[dict[str, Any], ...]
    written: int  # records ever written, to tell how many a ring has lost
    heads: dict[str, int]  # per ledger: records ever written


def snapshot(read: dict[str, int] | None = None) -> Snapshot:
    """Read all ledgers; waits for the devices. ``read``: per ledger, how many of its records are known already."""
    read = read or {}
    total = np.zeros((sites.CAPACITY, COUNTERS), np.int64)
    records: list[dict[str, Any]] = []
    heads = {}
    for words, device, name in _all_words():
        body = words[HEADER : HEADER + sites.CAPACITY * COUNTERS].reshape(-1, COUNTERS)
        worst = np.maximum(total[:, WORST], body[:, WORST])
        total += body
        total[:, WORST] = worst
        head = heads[name] = int(words[HEAD])
        ring = words[HEADER + sites.CAPACITY * COUNTERS :].reshape(RING, RECORD)
        for i in range(max(0, head - RING, read.get(name, 0)), head):
            values = dict(zip(RECORD_NAMES, (int(v) for v in ring[i % RING]), strict=True))
            records.append({"device": device, "ledger": name, "place": i} | values)
    with _lock:
        bypassed = dict(_bypassed)
    records.sort(key=lambda r: r["sequence"])
    return Snapshot(total, bypassed, tuple(records), sum(heads.values()), heads)


def clear_worst() -> None:
    """Start the maxima anew. A maximum, unlike a sum, has no difference between two readings."""
    with _lock:
        ledgers = list(_cpu_ledgers)
    for ledger in ledgers:
        ledger._counters[:, WORST] = 0
        ledger._worst.clear()
    for device, words in _device_ledgers.items():
        if device.type == "cuda":
            words[HEADER : HEADER + sites.CAPACITY * COUNTERS].view(-1, COUNTERS)[:, WORST].zero_()


def _all_words() -> list[tuple[np.ndarray, str, str]]:
    """(words on the host, device, name of the ledger) of every ledger."""
    with _lock:
        out = [(ledger.words, "cpu", ledger.name) for ledger in _cpu_ledgers]
    for device, words in _device_ledgers.items():
        if device.type == "cuda":
            out.append((words.cpu().numpy(), str(device), str(device)))
    return out


HOST = socket.gethostname()
STARTED = time.time()
