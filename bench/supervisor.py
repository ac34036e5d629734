"""Parts of a long measurement, each in a process of its own and within a time of its own: what hangs or dies costs its share, no more.

A part is a command of ``python -m bench``. Its limit is its weight's share of what is left when it begins, so what one part
does not use the later ones get. It is told a little less (``{seconds}`` in its words), to end by itself. Status 0 is finished,
results.UNFINISHED more to do; parts that finished are skipped when the same folder is given again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results import UNFINISHED, Results
from bench.stamp import ROOT

#: Of a part's limit, what it is told: the rest is for starting, and for ending what was begun.
TOLD = 0.85
#: Seconds from asking a process to end until it is made to.
GRACE = 3.0
#: Bytes of a part's output that are kept, the last ones.
KEPT = 200_000


@dataclass(frozen=True)
class Part:
    """words: after ``python -m bench``; {seconds} and {out} are filled in. weight: share of the time."""

    name: str
    words: tuple[str, ...]
    weight: float
    environment: dict[str, str] = field(default_factory=dict)


def run(parts: Sequence[Part], out: Path, seconds: float, *, program: Sequence[str] = (sys.executable, "-m", "bench"),
        now: Callable[[], float] = time.monotonic) -> list[dict[str, Any]]:  # fmt: skip
    """Run what is not finished yet; returns a record for each part, also of those that had been finished before."""
    results = Results("parts", folder=out)
    end = now() + seconds
    todo = [part for part in parts if (results.find(part.name) or {}).get("outcome") != "finished"]
    for number, part in enumerate(todo):
        limit = (end - now()) * part.weight / sum(p.weight for p in todo[number:])
        if limit <= 0:
            results.add("part", key=part.name, outcome="no time left", limit=0.0, seconds=0.0)
            continue
        print(f"\n== {part.name}, at most {limit:.0f} s", flush=True)
        start = now()
        outcome, status = _run_one(part, out, limit, program)
        results.add("part", key=part.name, outcome=outcome, status=status, limit=limit, seconds=now() - start)
        print(f"== {part.name}: {outcome} after {now() - start:.0f} s", flush=True)
    return [found for part in parts if (found := results.find(part.name)) is not None]


def _run_one(part: Part, out: Path, limit: float, program: Sequence[str]) -> tuple[str, int | None]:
    """(what became of it, exit status). Its output goes to ``NAME.log``."""
    words = [word.format(seconds=f"{limit * TOLD:.1f}", out=out) for word in part.words]
    log = out / f"{part.name}.log"
    with log.open("wb") as file:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            [*program, *words], cwd=ROOT, env={**os.environ, **part.environment}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    tail = log.read_bytes()[-KEPT:]
    log.write_bytes(tail)
    print(tail[-2000:].decode(errors="replace").strip(), flush=True)
    if status is None:
        return "out of time", None
    if status < 0:
        return f"killed by {signal.Signals(-status).name}", status
    return {0: "finished", UNFINISHED: "unfinished"}.get(status, "failed"), status


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except (ProcessLookupError, PermissionError):
            break  # nobody is left
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue  # after the second: stuck in the driver, and nothing helps
