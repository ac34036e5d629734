"""The results as PNG plots, one colour per arm in all of them (Okabe and Ito's palette: told apart by everyone)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from . import marginal
from .retrieval import ArmResult, Retrieval
from .training import YARDSTICK, Run

COLOURS = {
    "fault-free": "#000000",
    YARDSTICK: "#999999",
    "unprotected": "#D55E00",
    "NaN watching": "#E69F00",
    "protected": "#0072B2",
    "DMR": "#009E73",
    "left in": "#D55E00",
    "watched": "#0072B2",
}
ULP = 2.0**-22  # of a float32 loss between 2 and 4
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
        figure.suptitle(f"Retrieval with all-MiniLM-L6-v2 under faults, {arms[0].requests} requests per bar", x=0.01, ha="left")
        _bars(left, arms, "wrong", "wrong answers delivered\n(the best passage differs)")
        _bars(right, arms, "wrong_lists", "wrong lists delivered\n(the best five differ)")
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
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
        for run in runs:
            if run.arm != YARDSTICK:  # to the eye the same line
                _loss_line(top, run)
            if run is not reference:
                _gap_line(bottom, run, reference)
        # A struck forward can report any loss, up to 1e38; the picture is about where training goes.
        top.set_ylim(0.85 * min(reference.losses), 1.15 * max(reference.losses))
        top.set_ylabel("training loss\n(nats per character)")
        top.set_title(f"A character GPT learns Python's sources, {rate:.0%} of the steps struck by a fault")
        top.legend(loc="upper right")
        # Logarithmic down to one ulp of a loss, then linear: a run that never differs has a place, at 0.
        bottom.set_yscale("symlog", linthresh=ULP)
        bottom.set_ylim(-ULP / 3, 30)
        bottom.set_ylabel("|Δloss| to the fault-free run")
        bottom.set_xlabel("step")
        bottom.legend(loc="upper left", ncols=2, fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def marginal_unit(runs: Sequence[marginal.Run], path: Path) -> None:
    """The losses, how far each run is from the fault-free one, and what the statistics said of each device meanwhile."""
    plt = _pyplot()
    reference, watched = runs[0], runs[-1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
        for run in runs:
            broad = run is reference
            look = {"linewidth": 6, "alpha": 0.25} if broad else {"linewidth": 1.4}
            axes[0].plot(run.losses, color=COLOURS[run.arm], label=run.arm, zorder=1 if broad else 2, **look)
            if not broad:
                gaps = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
                label = run.arm if any(gap != 0 for gap in gaps) else f"{run.arm}: 0 at every step, after going back"
                axes[1].plot(gaps, color=COLOURS[run.arm], label=label, linewidth=1.4)
        axes[0].set_ylim(0.85 * min(reference.losses), 1.15 * max(reference.losses))
        axes[0].set_ylabel("training loss\n(nats per character)")
        axes[0].set_title(f"One device of {marginal.DEVICES} turns marginal: a bias that doubles every {marginal.DOUBLING} steps")
        axes[1].set_yscale("symlog", linthresh=ULP)
        axes[1].set_ylim(-ULP / 3, 30)
        axes[1].set_ylabel("|Δloss| to the fault-free run")
        for device, levels in enumerate(zip(*watched.levels, strict=True)):
            blamed = device == watched.blamed
            axes[2].plot(levels, color=COLOURS["left in"] if blamed else "#999999", label=f"device{device}", linewidth=2 if blamed else 1)
        axes[2].axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="alarm")
        axes[2].set_ylabel("cumulative sum of the bias,\nof its threshold")
        axes[2].set_xlabel("step")
        for place in axes:
            place.axvline(marginal.ONSET, color="black", linewidth=0.8, linestyle=":")
            if watched.blamed >= 0:
                place.axvline(watched.found, color=COLOURS["watched"], linewidth=0.8)
        axes[2].annotate("turns marginal", (marginal.ONSET, 0.8), xytext=(-6, 0), textcoords="offset points", ha="right", fontsize=10)
        if watched.blamed >= 0:
            said = f"{watched.named} named and taken out;\nback to step {watched.resumed}"
            axes[2].annotate(said, (watched.found, 0.6), xytext=(6, 0), textcoords="offset points", fontsize=10)
        for place, where in zip(axes, ("upper right", "upper left", "upper left"), strict=True):
            place.legend(loc=where, fontsize=10)
        figure.savefig(path)
        plt.close(figure)


def _loss_line(axes, run: Run) -> None:
    # The fault-free line is broad and pale, so that the protected one can be seen to lie on it.
    broad = run.arm == "fault-free"
    died = next((step for step, loss in enumerate(run.losses) if math.isnan(loss)), None)
    label = run.arm if died is None else f"{run.arm}: NaN from step {died} on"
    look = {"linewidth": 6, "alpha": 0.25} if broad else {"linewidth": 1.4}
    axes.plot(run.losses, color=COLOURS[run.arm], label=label, linestyle=_dashes(run), zorder=1 if broad else 2, **look)
    if died:  # a line that just ends is easily overlooked
        axes.plot(died - 1, run.losses[died - 1], "X", color=COLOURS[run.arm], markersize=11, zorder=4)


def _gap_line(axes, run: Run, reference: Run) -> None:
    gaps = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
    label = run.arm if any(gap != 0 for gap in gaps) else f"{run.arm}: 0 at every step"
    axes.plot(gaps, color=COLOURS[run.arm], label=label, linewidth=1.4, linestyle=_dashes(run))


def _dashes(run: Run):
    # While no loss is ever NaN, watching for it changes nothing: dashes let the line beneath be seen.
    return (0, (3, 3)) if run.arm == "NaN watching" else "-"


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise PlotsUnavailable(f"no plots: matplotlib cannot be imported ({error}).") from error
    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    return plt
