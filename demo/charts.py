"""The results as PNG plots, one colour per arm in all of them (Okabe and Ito's palette: told apart by everyone)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .retrieval import ArmResult, Retrieval
from .training import YARDSTICK, Run

COLOURS = {
    "fault-free": "#000000",
    YARDSTICK: "#999999",
    "unprotected": "#D55E00",
    "NaN watching": "#E69F00",
    "protected": "#0072B2",
    "DMR": "#009E73",
}
STYLE = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


class PlotsUnavailable(Exception):
    """matplotlib is missing; the numbers are in the record all the same."""


def wrong_answers(result: Retrieval, path: Path) -> None:
    """Bars of delivered wrong answers, and of wrong lists of five, by share of forwards hit and arm."""
    plt = _pyplot()
    arms = [arm for arm in result.arms if arm.rate > 0]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
        figure.suptitle(
            f"Retrieval with all-MiniLM-L6-v2 under faults, {arms[0].requests} requests per bar", x=0.01, ha="left"
        )
        _bars(left, arms, "wrong", "wrong answers delivered\n(the best passage is another)")
        _bars(right, arms, "wrong_lists", "wrong lists delivered\n(the best five are others)")
        left.legend(loc="upper left")
        figure.savefig(path)
        plt.close(figure)


def _bars(axes, arms: Sequence[ArmResult], count: str, label: str) -> None:
    rates = sorted({arm.rate for arm in arms})
    names = list(dict.fromkeys(arm.arm for arm in arms))
    width = 0.8 / len(names)
    for position, name in enumerate(names):
        counts = [getattr(arm, count) for arm in arms if arm.arm == name]
        places = [index + (position - (len(names) - 1) / 2) * width for index in range(len(rates))]
        bars = axes.bar(places, counts, width * 0.92, color=COLOURS[name], label=name)
        # A bar of height zero is invisible, and zero is the point.
        axes.bar_label(bars, padding=2, color=COLOURS[name], fontweight="bold")
    axes.set_xticks(range(len(rates)), [f"{rate:.0%}" for rate in rates])
    axes.set_xlabel("share of the forwards struck by a fault")
    axes.set_ylabel(label)
    # At least a few units of height, or a single wrong answer would look like a catastrophe.
    axes.set_ylim(0, max(5, 1.25 * max(getattr(arm, count) for arm in arms)))


def loss_curves(runs: Sequence[Run], path: Path) -> None:
    """The runs of one rate and seed: the losses, and below them how far each is from the fault-free one."""
    plt = _pyplot()
    reference = next(run for run in runs if run.arm == "fault-free")
    rate = max(run.rate for run in runs)
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        for run in runs:
            if run.arm != YARDSTICK:  # to the eye the same line
                _loss_line(top, run)
        gaps = [_gap_line(bottom, run, reference) for run in runs if run is not reference]
        # A struck forward can report any loss, up to 1e38; the picture is about where training goes.
        top.set_ylim(0.85 * min(reference.losses), 1.15 * max(reference.losses))
        top.set_ylabel("training loss (nats per character)")
        top.set_title(f"A character GPT learns Python's sources, {rate:.0%} of the steps struck by a fault")
        top.legend(loc="upper right")
        if any(gaps):  # a logarithmic axis needs something positive
            bottom.set_yscale("log")
        bottom.set_ylabel("|Δloss| to fault-free")
        bottom.set_xlabel("step")
        # A run that never differs leaves the plot empty: the legend says so instead.
        bottom.legend(loc="lower right", fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def _loss_line(axes, run: Run) -> None:
    # The fault-free line is broad and pale, so that the protected one can be seen to lie on it.
    broad = run.arm == "fault-free"
    died = next((step for step, loss in enumerate(run.losses) if math.isnan(loss)), None)
    (line,) = axes.plot(
        run.losses,
        color=COLOURS[run.arm],
        label=run.arm if died is None else f"{run.arm}: NaN from step {died} on",
        linewidth=5 if broad else 1.3,
        alpha=0.25 if broad else 1.0,
        zorder=1 if broad else 3 if run.arm == "protected" else 2,
        linestyle=(0, (4, 2)) if run.arm == "NaN watching" else "-",
    )
    if died:  # a line that just ends is easily overlooked
        axes.plot(died - 1, run.losses[died - 1], "X", color=line.get_color(), markersize=11, zorder=4)


def _gap_line(axes, run: Run, reference: Run) -> bool:
    """Draw |Δloss|; False if there was nothing to draw."""
    gaps = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
    largest = max(gap if math.isfinite(gap) else math.inf for gap in gaps)
    label = f"{run.arm}: 0 at every step" if largest == 0 else run.arm
    # Zero has no place on a logarithmic axis: such steps leave a gap in the line.
    shown = [gap if 0 < gap < math.inf else math.nan for gap in gaps]
    axes.plot(shown, color=COLOURS[run.arm], label=label, linewidth=1.2, marker=".", markersize=4)
    return any(gap > 0 for gap in shown)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsUnavailable(f"no plots: matplotlib cannot be imported ({error}).") from error
    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    return plt
