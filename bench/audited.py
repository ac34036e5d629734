"""The committed audits of compiled kernels (bench/audit.py), and what differs from them. Imports no Triton."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import FOLDER, read

Row = dict[str, Any]
#: What may not change unnoticed. Counts of single instructions may: they follow every edit of a kernel.
COMPARED = ("config", "registers", "local", "spills", "shared", "warps", "blocks", "matrix", "loads")
ADVICE = "run `python -m bench audit` and commit the result, or find out why"


def path(version: str) -> Path:
    """The audit made with that Triton."""
    return FOLDER / f"audit-triton{version}.jsonl"


def newest() -> Path:
    """The audit of the newest Triton."""
    files = sorted(FOLDER.glob("audit-triton*.jsonl"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])
    if not files:
        raise LookupError(f"{FOLDER} holds no audit of any Triton: run `python -m bench audit`")
    return files[-1]


def rows(file: Path) -> list[Row]:
    """The kernels in a file; none if there is no file."""
    return [r for r in read(file) if r["kind"] == "audit"]


def differences(fresh: Iterable[Row], audited: Iterable[Row]) -> list[str]:
    """What differs, a line for each kernel. Of the audited rows, those of cases that were not compiled afresh are left alone."""
    new, old = _keyed(fresh), _keyed(audited)
    asked = {key[1:4] for key in new}
    lines = []
    for key in [*new, *(key for key in old if key not in new and key[1:4] in asked)]:
        if key not in old:
            text = "not in the committed audit"
        elif key not in new:
            text = "in the committed audit, but no longer launched"
        else:
            changes = (_change(what, old[key].get(what), new[key].get(what)) for what in COMPARED)
            text = ", ".join(change for change in changes if change)
        if text:
            lines.append(f"{_called(new.get(key) or old[key])}: {text}; {ADVICE}")
    return lines


def _keyed(table: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """By kernel, case, operands, architecture, and which of several launches of one kernel in a case."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in table:
        key = (row["kernel"], row["case"], row["operands"], row["arch"])
        nth = next(i for i in itertools.count() if (*key, i) not in found)
        found[(*key, nth)] = row
    return found


def _called(row: Row) -> str:
    """Kernel, config, architecture."""
    tile = " × ".join(str(row["config"][size]) for size in ("BM", "BN", "BK") if size in row["config"])
    return ", ".join([row["kernel"], f"{row['case']} {row['operands']}" + (f" {tile}" if tile else ""), row["arch"]])


def _change(what: str, old: Any, new: Any) -> str:
    if old == new:
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return ", ".join(f"{key} {old.get(key, 'none')} -> {new.get(key, 'none')}" for key in differing)
    return f"{what} {old} -> {new}"
