"""Result files: JSON lines, one per finished piece of work, so that a stopped campaign goes on where it was."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from bench import stamp

FOLDER = Path(__file__).resolve().parent / "results"
#: Exit status of a command that ran out of time (--seconds): call it again, and it goes on (EX_TEMPFAIL).
UNFINISHED = 75


class Results:
    """An append-only file of records; ``key`` identifies a piece of work. Each run begins with a stamp."""

    def __init__(self, name: str, *, fresh: bool = False, folder: Path | None = None, **configuration: Any) -> None:
        self.path = (folder or FOLDER) / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        self.records = read(self.path)
        self._started = time.monotonic()
        self._stamped = False
        self._configuration = configuration

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a piece of work done in this run or an earlier one."""
        return next((r for r in reversed(self.records) if r.get("key") == key), None)

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        if not self._stamped:
            self._stamped = True
            self._write({"kind": "stamp", **stamp.stamp(), "configuration": self._configuration})
        record = {"kind": kind, **fields}
        self._write(record)
        return record

    def replace(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Add a record and drop earlier ones of its kind (a summary)."""
        self.drop(kind)
        return self.add(kind, **fields)

    def drop(self, *kinds: str) -> None:
        """Forget earlier records of these kinds: they are about to be made anew."""
        self._keep([r for r in self.records if r["kind"] not in kinds])

    def forget(self, key: str) -> None:
        """The same of the records of one piece of work."""
        self._keep([r for r in self.records if r.get("key") != key])

    def _keep(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.path.write_text("".join(dump(r) + "\n" for r in self.records), encoding="utf-8")

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(json.loads(dump(record)))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(dump(record) + "\n")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """One line, rewritten on a terminal, else every tenth."""
        elapsed = time.monotonic() - self._started
        line = f"{self.path.stem}: {done}/{total} after {elapsed:.0f} s {text}"
        if sys.stderr.isatty():
            print(f"\r{line:<100}", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done == total or done % max(1, total // 10) == 0:
            print(line, file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line cut short by a stop is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def dump(record: dict[str, Any]) -> str:
    return json.dumps(_plain(record), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """JSON without NaN: numbers to four digits (eight near one), what is not finite as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        # Rates near one are told apart by what they lack, and quotients by what they differ from it.
        return float(f"{value:.{8 if 0.99 < value < 1.1 else 4}g}") if math.isfinite(value) else str(value)
    return value
