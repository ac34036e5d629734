"""What protection costs, ours beside repetition: of the timed cases the ones that a reader looks for, and one figure of them.

Figures and tables of the documentation come from here: python docs/tables.py. A bar is a time over torch's at the same case, the median
over rounds, with the exact 95 % interval; *torch again* is torch timed a second time, that is, what such an interval is worth.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.results import dump

Record = dict[str, Any]
COMMANDS = ("linear", "layer", "model", "train")
#: Of single layers, a few; layers, models and steps are all shown.
LINEAR = ("square-1024", "square-4096", "square-8192", "minilm-up-2048", "llama8b-gateup-8192", "llama8b-qo-1")
#: What a model runs in on a device, and how it is called: the first of them that was timed.
DTYPES = {"cpu": ("fp32",), "gpu": ("bf16", "fp32")}
WAYS = {"cpu": ("eager",), "gpu": ("graph", "eager")}
OURS = ("abft", "abft:triton")
#: Beside ours, in the order of the bars.
OTHERS = {"dmr": "DMR", "tmr": "TMR", "torch-again": "torch again"}


@dataclass(frozen=True)
class Bar:
    """A time over torch's, and its interval at 95 %."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Shown:
    """One case. others: by the names of OTHERS, those that took part."""

    name: str
    seconds: float  # torch's
    ours: Bar
    others: dict[str, Bar]
    expected_floor: float | None


def device_of(stem: str) -> tuple[str, str] | None:
    """(command, device) of a result file's name; None: it is not one of those, or of the interpreter, whose times mean nothing."""
    found = re.fullmatch(rf"time-({'|'.join(COMMANDS)})-(.+)", stem)
    return None if found is None or found[2] == "interpreted" else (found[1], found[2])


def shown(records: Iterable[Record], command: str, device: str) -> list[Shown]:
    """Of the records of a command on a device, the cases that are shown, in their order."""
    timed: dict[tuple[str, str], dict[tuple[str, str], dict[str, Record]]] = {}
    for r in records:
        if r.get("kind") == "timing" and (command != "linear" or r["workload"] in LINEAR):
            timed.setdefault((r["workload"], r["passes"]), {}).setdefault((r["dtype"], r["way"]), {})[r["provider"]] = r
    place = "cpu" if device == "cpu" else "gpu"
    out = []
    for (workload, passes), found in timed.items():
        wanted = ((dtype, way) for dtype in DTYPES[place] for way in WAYS[place])
        first = next((key for key in wanted if key in found), None)
        by = found[first] if first else {}
        ours = next((by[name] for name in OURS if name in by), None)
        if first is not None and ours is not None and "torch" in by:
            others = {name: _bar(by[key]) for key, name in OTHERS.items() if key in by}
            called = f"{workload}, {passes}, {first[0]}" + (f", {first[1]}" if place == "gpu" else "")
            out.append(Shown(called, float(by["torch"]["seconds"]), _bar(ours), others, ours.get("expected_floor")))
    return out


def _bar(r: Record) -> Bar:
    return Bar(float(r["ratio"]), float(r["low"]), float(r["high"]))


def digest(rows: list[Shown]) -> str:
    """What a figure was drawn from; it carries it among its words."""
    return hashlib.sha256("\n".join(dump(asdict(row)) for row in rows).encode()).hexdigest()[:16]


# --- the figure -----------------------------------------------------------------------------------

#: (fill, hatch) by bar: told apart without colour, on white, which stays white where a page is dark.
LOOKS = {"abft": ("0.15", ""), "DMR": ("0.75", "///"), "TMR": ("0.9", "..."), "torch again": ("1.0", "")}
INCHES = 0.78  # of a case


def draw(rows: list[Shown], path: Path, machine: str) -> None:
    """Write the figure as a PNG, the same bytes for the same numbers and versions. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(matplotlib.rcParamsDefault | {"backend": "agg", "hatch.linewidth": 0.6}):
        figure, axes = pyplot.subplots(figsize=(8.5, 1.4 + INCHES * len(rows)), facecolor="white")
        axes.set_facecolor("white")
        height = 0.8 / len(LOOKS)
        for j, (name, (fill, hatch)) in enumerate(LOOKS.items()):
            bars = [(i, row.ours if name == "abft" else row.others.get(name)) for i, row in enumerate(rows)]
            at = [(i + (j - 1.5) * height, bar) for i, bar in bars if bar is not None]
            spread = [[bar.ratio - bar.low for _, bar in at], [bar.high - bar.ratio for _, bar in at]]
            axes.barh(
                [y for y, _ in at], [bar.ratio for _, bar in at], 0.92 * height, xerr=spread, color=fill, hatch=hatch, edgecolor="black",
                linewidth=0.6, error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": "0.5" if name == "abft" else "black"}, label=name,
            )  # fmt: skip
            for y, bar in at:
                axes.annotate(f"{bar.ratio:.2f}", (bar.high, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel("time over torch's, median and 95 % interval")
        axes.set_title(machine, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=len(LOOKS), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.5 / figure.get_size_inches()[1], 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None, "Source": digest(rows)})
        pyplot.close(figure)
