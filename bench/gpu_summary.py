"""What a folder of ``bench gpu`` holds, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import intervals, timing_table, tuned_table
from bench.results import read

Record = dict[str, Any]
#: Kinds of records that are measurements.
MEASURED = ("ceiling", "test", "probe", "calibration", "timing", "cell", "class", "place", "candidate")


def measured(out: Path) -> bool:
    """Whether anything was."""
    return any(r["kind"] in MEASURED for records in _files(out).values() for r in records)


def of(out: Path, parts: list[Record]) -> str:
    files = _files(out)
    every = [r for records in files.values() for r in records]
    sections = (
        _machine(every), _parts(parts), _ceilings(every), _tests(every), _calibration(every), _campaigns(files), _tuning(every),
        _times(every),
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section)


def _files(out: Path) -> dict[str, list[Record]]:
    return {path.stem: read(path) for path in sorted(out.glob("*.jsonl"))}


def _machine(every: list[Record]) -> Iterator[str]:
    stamp = next((r for r in every if r["kind"] == "stamp"), {})
    yield f"{stamp.get('gpu') or stamp.get('cpu')}; torch {stamp.get('torch')}, Triton {stamp.get('triton')}, commit {stamp.get('commit')}"


def _parts(parts: list[Record]) -> Iterator[str]:
    for r in parts:
        yield f"  {r['key']:<16} {r['outcome']:<20} {r['seconds']:>5.0f} of {r['limit']:.0f} s"


def _ceilings(every: list[Record]) -> Iterator[str]:
    for r in (r for r in every if r["kind"] == "ceiling"):
        if "bytes_per_second" in r:
            yield f"{r['what']}: {r['bytes_per_second'] / 1e9:.0f} GB/s"
        elif "flops_per_second" in r:
            yield f"{r['what']}: {r['flops_per_second'] / 1e12:.2f} TFLOP/s"
        else:
            yield f"{r['what']}: {timing_table.duration(r['seconds'])}"


def _tests(every: list[Record]) -> Iterator[str]:
    tests = [r for r in every if r["kind"] == "test"]
    if tests:
        counted = Counter(r["outcome"] for r in tests)
        yield "kernel tests: " + ", ".join(f"{n} {outcome}" for outcome, n in counted.most_common())
        yield from (f"  {r['outcome'].upper()} {r['test']}" for r in tests if r["outcome"] in ("failed", "died"))
    yield from (f"sanitizer, {r['tool']}: {r['outcome']}" for r in every if r["kind"] == "sanitizer")


def _calibration(every: list[Record]) -> Iterator[str]:
    for r in (r for r in every if r["kind"] == "probe"):
        said = (f"{who} {' or '.join(r[who]['models']) or 'no model known'}" for who in ("kernel", "vendor"))
        yield f"accumulates, {r['dtype']}: {', '.join(said)}"
    cells = [r for r in every if r["kind"] == "calibration"]
    for dtype in dict.fromkeys(r["dtype"] for r in cells):
        mine = [r for r in cells if r["dtype"] == dtype]
        refused = [r["key"] for r in mine if not r["accepted"]]
        worst = max(float(r["worst_of_all_kinds"]) for r in mine)
        rows = sum(r["rows"] for r in mine)
        yield f"calibration, {dtype}: worst |residual| / bound {worst:.2f} in {rows:,} rows; not accepted: {', '.join(refused) or 'none'}"


def _campaigns(files: dict[str, list[Record]]) -> Iterator[str]:
    for name, records in files.items():
        cells = [r for r in records if r["kind"] == "cell" and "rows" in r]
        if cells:
            rows, alarms = sum(r["rows"] for r in cells), sum(sum(r["alarms"].values()) for r in cells)
            worst = max(float(v) for r in cells for v in r["worst"].values())
            yield f"{name}: {alarms} alarms in {rows:,} rows (rate below {intervals.upper_limit(alarms, rows):.2g}), worst {worst:.2f}"
        for part in ("forward", "backward"):  # cells of kernel_rows.py
            mine = [r for r in records if r["kind"] == "cell" and f"{part}_rows" in r]
            if mine:
                rows, alarms = (sum(r[f"{part}_{what}"] for r in mine) for what in ("rows", "alarms"))
                worst = max(float(r[f"{part}_worst"]) for r in mine)
                below = intervals.upper_limit(alarms, rows)
                yield f"{name}, {part}: {alarms} alarms in {rows:,} rows (rate below {below:.2g}), worst {worst:.2f}"
        classes = [r for r in records if r["kind"] == "class"]
        if classes:
            harmful, found, detected, repaired = (
                sum(r.get(what, 0) for r in classes) for what in ("harmful", "harmful_detected", "detected", "repaired")
            )
            yield f"{name}: {found} of {harmful} harmful faults found, {repaired} of {detected} repaired bit for bit"
        places = [r for r in records if r["kind"] == "place"]
        if places:
            harmful, found, detected, repaired, false = (
                sum(r[what] for r in places)
                for what in ("harmful", "harmful_detected", "detected", "repaired_bit_equal", "false_alarms")
            )  # fmt: skip
            yield (f"{name}: {found} of {harmful} harmful faults found, {repaired} of {detected} repaired bit for bit, "
                   f"{false} false alarms")  # fmt: skip


def _tuning(every: list[Record]) -> Iterator[str]:
    tried = [r for r in every if r["kind"] == "candidate"]
    if tried:
        timed, found = sum("ratio" in r for r in tried), tuned_table.entries(every)
        counted = f"{timed} of {len(tried)} candidates × cases timed, the others left out"
        yield f"launch shapes: {counted}; {len(found) or 'none'} to be preferred"
        for entry in found:
            shape = "every shape" if entry["n"] is None else f"N {entry['n']}, K {entry['k']}"
            rows = "many rows" if entry["height"] is None else f"{entry['height']} rows"
            yield f"  {entry['kind']}, {rows}, {shape}: {entry['config'] or 'built in'}, × {entry['ratio']:.3f}"


def _times(every: list[Record]) -> Iterator[str]:
    rows = [r for r in every if r["kind"] == "timing"]
    ceilings = {r["what"]: float(r["flops_per_second"]) for r in every if r["kind"] == "ceiling" and "flops_per_second" in r}
    copied = next((float(r["bytes_per_second"]) for r in every if r["kind"] == "ceiling" and "bytes_per_second" in r), None)
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = [r for r in rows if r["case"] == case]
        yield timing_table.of(f"{case}{_roof(mine[0], ceilings, copied)}", mine)


def _roof(r: Record, ceilings: dict[str, float], copied: float | None) -> str:
    """The shortest time that the measured ceilings allow, if both are known."""
    top = ceilings.get(f"mm {r['dtype']}")
    if top is None or copied is None or "bytes" not in r:
        return ""
    roof = max(2 * r["multiplications"] / top, r["bytes"] / copied)
    return f"   (roofline {timing_table.duration(roof)})"
