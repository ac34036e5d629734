"""The results as plain aligned text: what fits a terminal of 100 columns and a README."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import marginal
from .retrieval import Retrieval
from .training import Distance, Run


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, the first left-aligned, numbers right; an empty row leaves a blank line."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells if row) for column in range(len(header))]
    lines = [_line(row, widths) for row in cells]
    lines.insert(1, _line(["─" * width for width in widths], widths))
    return "\n".join(lines)


def retrieval_table(result: Retrieval) -> str:
    header = (
        "arm", "hit", "asked", "faults", "harmful", "detected", "repaired", "missed", "alarms", "wrong", "top-5", "ms",
    )  # fmt: skip
    rows: list[Sequence[object]] = []
    for before, arm in zip([None, *result.arms], result.arms, strict=False):
        if before is not None and arm.rate != before.rate:
            rows.append(())
        faults, watching = arm.faults, arm.arm in ("protected", "DMR")
        rows.append(
            (
                arm.arm,
                f"{arm.rate:.0%}",
                arm.requests,
                faults.injected,
                faults.harmful,
                faults.detected if watching else "–",
                faults.repaired if watching else "–",
                faults.missed,
                faults.false_alarms if watching else "–",
                arm.wrong,
                arm.wrong_lists,
                f"{arm.p50:.1f}",
            )
        )
    return table(header, rows)


def training_table(runs: Sequence[tuple[Run, Distance]]) -> str:
    header = (
        "arm", "hit", "seed", "faults", "harmful", "detected", "repaired", "held-out", "max |Δloss|", "‖Δθ‖/‖θ‖", "ms",
    )  # fmt: skip
    rows: list[Sequence[object]] = []
    for run, distance in runs:
        if rows and run.arm == "fault-free":
            rows.append(())
        faults, watching = run.faults, run.arm == "protected"
        rows.append(
            (
                run.arm,
                f"{run.rate:.0%}",
                run.seed,
                faults.injected,
                faults.harmful,
                faults.detected if watching else "–",
                faults.repaired if watching else "–",
                number(run.held_out, ".4f"),
                number(distance.max_loss, ".1e"),
                number(distance.parameters, ".1e"),
                f"{1e3 * run.seconds / len(run.losses):.0f}",
            )
        )
    return table(header, rows)


def marginal_table(runs: Sequence[tuple[marginal.Run, Distance]]) -> str:
    header = ("arm", "rows checked", "beyond bound", "named", "at step", "began", "back to", "held-out", "max |Δloss|", "‖Δθ‖/‖θ‖")
    rows: list[Sequence[object]] = []
    for run, distance in runs:
        if rows and run.arm == marginal.ARMS[0]:
            rows.append(())
        watched, named = run.arm == "watched", run.blamed >= 0
        rows.append(
            (
                run.arm,
                f"{run.checks:,}" if watched else "–",
                run.detected if watched else "–",
                run.named or "–",
                *((run.found, run.began, run.resumed) if named else ("–", "–", "–")),
                number(run.held_out, ".4f"),
                number(distance.max_loss, ".1e"),
                number(distance.parameters, ".1e"),
            )
        )
    return table(header, rows)


def number(value: float, spec: str) -> str:
    if math.isfinite(value):
        return "0" if value == 0 else format(value, spec)
    return "NaN" if math.isnan(value) else "∞"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    if not row:
        return ""
    numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  " + "  ".join((row[0].ljust(widths[0]), *numbers)).rstrip()
