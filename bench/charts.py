"""Timing records as PNG plots: for each case, every provider's time over torch's with its interval. Needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

#: Cases of one plot.
CASES = 12


def draw(records: list[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """Write ``NAME-1.png`` …; without matplotlib say so, and write nothing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []
    rows = [r for r in records if r["kind"] == "timing" and r["provider"] != "torch"]
    cases, written = list(dict.fromkeys(r["case"] for r in rows)), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(cases), CASES), 1):
        shown = cases[start : start + CASES]
        written.append(folder / f"{name}-{number}.png")
        figure = _figure(pyplot, [r for r in rows if r["case"] in shown], shown)
        figure.savefig(written[-1], dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return written


def _figure(pyplot: Any, rows: list[dict[str, Any]], cases: list[str]) -> Any:
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.16 * len(providers) * len(cases)))
    for j, provider in enumerate(providers):
        mine = [r for r in rows if r["provider"] == provider]
        heights = [cases.index(r["case"]) + 0.8 * j / len(providers) for r in mine]
        ratios = [float(r["ratio"]) for r in mine]
        spread = [[float(r["ratio"]) - float(r["low"]) for r in mine], [float(r["high"]) - float(r["ratio"]) for r in mine]]
        axes.errorbar(ratios, heights, xerr=spread, fmt="o", markersize=3, label=provider)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.4 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time over torch's; median over rounds, 95 % interval")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
