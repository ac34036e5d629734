"""Fault events: one per call and role with a suspect row, as people and log files read them."""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch

from abft import ledger, sites

VERSION = 1

#: Labels put on events (release, request, …); set by ``abft.context``.
labels: ContextVar[dict[str, str]] = ContextVar("abft_labels")
#: The hash of the calibration in force (``Calibration.apply``); empty without one.
calibration = ""


@dataclass(frozen=True)
class FaultEvent:
    """What one product with suspect rows learnt.

    rows: how many; row, col: the worst of them (col only where one wrong element explains it; for a fault in
    a weight the weight's own row, which is the output's column); residual, bound: of that row, in units of Y; cause: transient,
    persistent, weight, panel or unknown; verdict: what became of it; context: labels in force; calibration: hash of the one in force.
    """

    v: int
    time: float
    step: int
    rank: int
    host: str
    device: str
    uuid: str
    site: str
    role: str
    backend: str
    dtype: str
    shape: tuple[int, int, int]
    rows: int
    row: int
    col: int | None
    residual: float
    bound: float
    cause: str
    verdict: ledger.Verdict
    context: dict[str, str]
    message: str
    calibration: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict by its name."""
        return asdict(self) | {"verdict": self.verdict.name, "shape": list(self.shape)}


def rank() -> int:
    """This process's rank; 0 when there is no group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _uuid(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def message(site: str, role: str, record: dict[str, Any], device: str) -> str:
    """One sentence that names everything needed to find the fault again."""
    col = ", column unknown" if record["col"] < 0 else f", column {record['col']}"
    residual, bound = ledger.bits_float(record["residual"]), ledger.bits_float(record["bound"])
    verdict = ledger.VERDICTS[record["verdict"]]
    element = _element(record)
    changed = "" if element is None else f" ({'weight' if len(element) == 2 else 'bias'} element {', '.join(map(str, element))})"
    unit, again = record["unit"], record["repaired_on"]
    where = "" if unit < 0 else f", computed on SM {unit}" + ("" if again < 0 else f" and again on SM {again}")
    return (
        f"{verdict.name} at {site} ({role}): {record['rows']} row(s), worst row {record['row']}{col}, residual {residual:.4g} "
        f"against a bound of {bound:.4g}, cause {ledger.CAUSES[record['cause']]}{changed}; "
        f"rank {rank()}, device {device}{where}, step {record['step']}. "
        f"{verdict.value[0].upper()}{verdict.value[1:]}."
    )


def _element(record: dict[str, Any]) -> tuple[int, ...] | None:
    """The changed element of a weight (row, column) or bias (column,): the host's records carry it, a device's hold its numbers."""
    if record.get("element") is not None:
        return record["element"]
    return (record["element_row"], record["element_col"]) if record["element_row"] >= 0 else None


def from_record(record: dict[str, Any], context: dict[str, str] | None = None) -> FaultEvent:
    """The event of one ledger record; context: its labels, if not those in force now."""
    site = sites.site_of(record["site"]).name
    role = ledger.ROLE_NAMES[record["role"]]
    device = record["device"]
    return FaultEvent(
        v=VERSION,
        time=time.time(),
        step=record["step"],
        rank=rank(),
        host=ledger.HOST,
        device=device,
        uuid=_uuid(device),
        site=site,
        role=role,
        backend=ledger.BACKEND_NAMES[record["backend"]],
        dtype=str(ledger.DTYPES[record["dtype"]])[6:],
        shape=(record["m"], record["n"], record["k"]),
        rows=record["rows"],
        row=record["row"],
        col=None if record["col"] < 0 else record["col"],
        residual=ledger.bits_float(record["residual"]),
        bound=ledger.bits_float(record["bound"]),
        cause=ledger.CAUSES[record["cause"]],
        verdict=ledger.VERDICTS[record["verdict"]],
        context=dict(labels.get({}) if context is None else context),
        message=message(site, role, record, device),
        calibration=calibration,
    )
