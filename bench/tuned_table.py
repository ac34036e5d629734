"""From timed candidates to the table that the kernels read (triton_kernels/tuning.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from abft.triton_kernels import tuning

from bench.results import dump

Record = dict[str, Any]


def entries(records: Iterable[Record]) -> list[Record]:
    """What a table should say, from records of timed candidates (kind, height, m, n, k, dtype, config, ratio, high).

    Of every row of the table of configs, one for all shapes together and one for each (N, K) that does better with another; none
    where the built-in config is not beaten.
    """
    timed = [r for r in records if r["kind"] == "candidate" and "ratio" in r]
    out = []
    for kind, height in dict.fromkeys((r["row"], r["height"]) for r in timed):
        mine = [r for r in timed if (r["row"], r["height"]) == (kind, height)]
        everywhere, ratio = best(mine)
        if everywhere:
            out.append({"kind": kind, "height": height, "n": None, "k": None, "config": everywhere, "ratio": ratio})
        for n, k in dict.fromkeys((r["n"], r["k"]) for r in mine):
            config, ratio = best([r for r in mine if (r["n"], r["k"]) == (n, k)])
            if config != everywhere:
                out.append({"kind": kind, "height": height, "n": n, "k": k, "config": config, "ratio": ratio})
    return out


def best(records: list[Record]) -> tuple[Record, float]:
    """(fields that differ from the built-in config, time over its), over all cases in these records.

    The one with the smallest geometric mean among those that were timed at every case and whose intervals, on the average, lie
    below one. Nothing and 1.0 if there is none.
    """
    cases = {_case(r) for r in records}
    by_config: dict[str, dict[Any, Record]] = {}
    for r in records:
        by_config.setdefault(json.dumps(r["config"], sort_keys=True), {})[_case(r)] = r
    found: tuple[Record, float] = {}, 1.0
    for config, timed in by_config.items():
        if config != "{}" and set(timed) == cases and _mean(timed, "high") < 1 and _mean(timed, "ratio") < found[1]:
            found = json.loads(config), _mean(timed, "ratio")
    return found


def _case(r: Record) -> tuple[Any, ...]:
    return r["dtype"], r["m"], r["n"], r["k"]


def _mean(timed: dict[Any, Record], what: str) -> float:
    """Geometric: a ratio and its inverse weigh the same. An interval without an end has none."""
    return math.exp(sum(math.log(float(r[what])) for r in timed.values()) / len(timed))


def write(file: Path, architecture: int | str, version: str, found: list[Record], measured: Record) -> None:
    """Put a table into a file, in place of an earlier one for the same architecture and Triton; others stay."""
    kept = tuning.tables(file) if file.exists() else []
    kept = [t for t in kept if (t["architecture"], t["triton"]) != (architecture, version)]
    table = {"architecture": architecture, "triton": version, "measured": measured, "entries": found}
    text = ",\n".join(_lines(t) for t in [*kept, table])
    file.write_text(f'{{"format": {tuning.FORMAT}, "tables": [\n{text}\n]}}\n', encoding="utf-8")
    tuning.read(file, version)  # what is written can be read


def _lines(table: Record) -> str:
    """An entry on each line, so that a difference between two tables can be read."""
    head = dump({name: value for name, value in table.items() if name != "entries"})[:-1]
    rows = ",\n".join(f"    {dump(entry)}" for entry in table["entries"])
    return f'{head}, "entries": [\n{rows}\n]}}' if rows else f'{head}, "entries": []}}'
