"""Records of ``bench scaling`` as one PNG: a panel for each sweep, points with their intervals, curves of what was predicted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]
#: Curves are told apart without colour.
STYLES = {"multiplications": "--", "bytes": ":", "waves": "--"}
MEANINGS = {"K": "K", "N": "N", "M": "M, rows", "G": "G, columns under one check"}
WHITE = "white"  # also where a page is dark


def draw(records: list[Record], folder: Path, name: str) -> list[Path]:
    """Write ``NAME-DTYPE-WAY.png`` for each; without matplotlib say so, and write nothing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []
    rows = [r for r in records if r["kind"] == "scaling"]
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for dtype, way in dict.fromkeys((r["dtype"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["dtype"], r["way"]) == (dtype, way)]
        sweeps = [sweep for sweep in MEANINGS if any(r["sweep"] == sweep for r in mine)]
        figure, axes = pyplot.subplots(1, len(sweeps), figsize=(2 + 2.6 * len(sweeps), 3.8), squeeze=False, sharey=True)
        for panel, sweep in zip(axes[0], sweeps, strict=True):
            _panel(panel, sweep, sorted((r for r in mine if r["sweep"] == sweep), key=lambda r: r["value"]))
        axes[0][0].set_ylabel(f"time, checked over {mine[0]['against']}; {dtype}, {way}")
        _plain(axes[0][0].yaxis)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=len(labels))
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        written.append(folder / f"{name}-{dtype}-{way}.png")
        figure.savefig(written[-1], dpi=120, facecolor=WHITE, metadata={"Software": None})
        pyplot.close(figure)
    return written


def _plain(axis: Any) -> None:
    """Ratios as numbers, not as powers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def _panel(panel: Any, sweep: str, rows: list[Record]) -> None:
    at, ratios = [r["value"] for r in rows], [float(r["ratio"]) for r in rows]
    spread = [[ratio - float(r["low"]) for ratio, r in zip(ratios, rows, strict=True)],
              [float(r["high"]) - ratio for ratio, r in zip(ratios, rows, strict=True)]]  # fmt: skip
    again = [[float(end) for end in r["again"]] for r in rows]
    panel.fill_between(at, [low for low, _ in again], [high for _, high in again], color="0.85", label="torch × torch, 95 %")
    panel.errorbar(at, ratios, yerr=spread, fmt="o", color="black", markersize=4, capsize=3, label="measured, median and 95 %")
    for how in dict.fromkeys(how for r in rows for how in r["predicted"]):
        known = [r for r in rows if how in r["predicted"]]
        curve = [float(r["predicted"][how]) for r in known]
        panel.plot([r["value"] for r in known], curve, STYLES.get(how, "-."), color="black", label=f"counted, by {how}")
    r = rows[0]
    held = ", ".join(f"{letter} {r[letter.lower()]}" for letter in "MNK" if letter != sweep)
    panel.set_title(held, fontsize=8)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(MEANINGS[sweep])
    panel.axhline(1.0, color="black", linewidth=0.6)
