"""Draw the dataflow of checked attention and its checks: python docs/attention_figure.py

Boxes are what is computed, flags what is checked there; docs/explanation/attention.md says what each must be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parent / "images" / "attention_checks.png"
HEIGHT = 0.62
INK, FAINT, GIVEN, COMPUTED, CHECK = "#1c2733", "#8795a1", "#eef1f4", "#d6e6f5", "#fbe3cf"


@dataclass(frozen=True)
class Box:
    """Something computed, centred at (x, y)."""

    x: float
    y: float
    text: str
    width: float = 1.7
    given: bool = False


FORWARD = {
    "Q": Box(0.5, 3.2, "Q", 0.7, True),
    "K": Box(0.5, 2.0, "K", 0.7, True),
    "V": Box(8.5, 2.0, "V", 0.7, True),
    "S": Box(2.3, 3.2, "S = scale·Q Kᵀ"),
    "x": Box(4.5, 3.2, "x = S (cap, mask)\nm = max x"),
    "p": Box(6.6, 3.2, "p = exp(x − m)\nl = Σ p"),
    "P": Box(8.5, 3.2, "P = p / l", 1.3),
    "O": Box(10.4, 3.2, "O = P V", 1.3),
}
FORWARD_ARROWS = [("Q", "S"), ("K", "S"), ("S", "x"), ("x", "p"), ("p", "P"), ("P", "O"), ("V", "O")]
FORWARD_CHECKS = [
    ("S", "above", "rows of S against\nQ · (checksums of K)"),
    ("x", "above", "1 ≤ l ≤ keys,\nwithin 2⁻⁹"),
    ("p", "above", "l = Σ exp(½x − ½m)²,\nfrom S again"),
    ("P", "above", "Σ P = 1,\nof the P used"),
    ("O", "above", "rows of O against\nP · (checksums of V)"),
]
BACKWARD = {
    "dO": Box(0.5, 3.2, "dO", 0.7, True),
    "V": Box(0.5, 2.0, "V", 0.7, True),
    "dP": Box(2.3, 3.2, "dP = dO Vᵀ"),
    "S": Box(2.3, 0.8, "S again;\nm, l as saved", given=True),
    "P": Box(5.0, 0.8, "P = exp(x − m) / l"),
    "dX": Box(5.0, 3.2, "dX = P∘(dP − δ)\nδ = Σ P dP", 1.9),
    "dQ": Box(7.9, 3.2, "dQ = dX K", 1.5),
    "dK": Box(7.9, 2.0, "dK = dXᵀ Q", 1.5),
    "dV": Box(7.9, 0.8, "dV = Pᵀ dO", 1.5),
}
BACKWARD_ARROWS = [("dO", "dP"), ("V", "dP"), ("S", "P"), ("P", "dX"), ("dP", "dX"), ("dX", "dQ"), ("dX", "dK"), ("P", "dV")]
BACKWARD_CHECKS = [
    ("dP", "above", "rows of dP against\ndO · (checksums of Vᵀ)"),
    ("dX", "above", "Σ dX = 0,\nΣ w dX as predicted"),
    ("S", "above", "rows of S against\nQ · (checksums of K)"),
    ("P", "below", "Σ P = 1: exp once more, and\nm, l, Q, K as the forward saw them"),
    ("dQ", "right", "rows of dQ against\ndX · (checksums of K)"),
    ("dK", "right", "rows, and columns:\n1ᵀdK = Σ (Σ dX) Q"),
    ("dV", "right", "rows, and columns:\n1ᵀdV = Σ (Σ P) dO"),
]


def box(axes: Axes, b: Box) -> None:
    style = FancyBboxPatch(
        (b.x - b.width / 2, b.y - HEIGHT / 2), b.width, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor=GIVEN if b.given else COMPUTED, edgecolor=INK, linewidth=0.9,
    )  # fmt: skip
    axes.add_patch(style)
    axes.text(b.x, b.y, b.text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)


def arrow(axes: Axes, a: Box, b: Box) -> None:
    """Level between boxes of one row, straight up within a column, else from the right side of a to the left one of b."""
    if a.x == b.x:
        start, end = (a.x, a.y + HEIGHT / 2 + 0.02), (b.x, b.y - HEIGHT / 2 - 0.03)
    else:
        lower = 0.0 if a.y == b.y else HEIGHT / 4 * (1 if b.y < a.y else -1)
        start, end = (a.x + a.width / 2 + 0.02, a.y - lower), (b.x - b.width / 2 - 0.03, b.y + lower)
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0})


def check(axes: Axes, at: Box, side: str, text: str) -> None:
    if side == "right":
        begin, x, y = (at.x + at.width / 2 + 0.03, at.y), at.x + at.width / 2 + 1.25, at.y
    else:
        way = 1 if side == "above" else -1
        begin, x, y = (at.x, at.y + way * (HEIGHT / 2 + 0.03)), at.x, at.y + way * (HEIGHT / 2 + 0.45)
    axes.plot([begin[0], x], [begin[1], y], color=FAINT, linewidth=0.9, linestyle=":", zorder=0)
    label = {"boxstyle": "round,pad=0.35,rounding_size=0.15", "facecolor": CHECK, "edgecolor": "#c9803f", "linewidth": 0.8}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=INK, bbox=label, linespacing=1.3)


def draw(axes: Axes, title: str, boxes: dict[str, Box], arrows: list[tuple[str, str]], checks: list[tuple[str, str, str]],
         bottom: float) -> None:  # fmt: skip
    axes.set_xlim(0.05, 11.25)
    axes.set_ylim(bottom, 4.55)
    axes.axis("off")
    axes.text(0.15, 4.3, title, fontsize=11, fontweight="bold", color=INK, va="center")
    for a, b in arrows:
        arrow(axes, boxes[a], boxes[b])
    for b in boxes.values():
        box(axes, b)
    for name, side, text in checks:
        check(axes, boxes[name], side, text)


def main() -> None:
    bottoms = 1.55, -0.3
    heights = [4.55 - b for b in bottoms]
    figure, (forward, backward) = pyplot.subplots(2, 1, figsize=(11.2, sum(heights)), gridspec_kw={"height_ratios": heights})
    draw(forward, "Forward", FORWARD, FORWARD_ARROWS, FORWARD_CHECKS, bottoms[0])
    draw(backward, "Backward", BACKWARD, BACKWARD_ARROWS, BACKWARD_CHECKS, bottoms[1])
    figure.subplots_adjust(0, 0, 1, 1, hspace=0)
    figure.savefig(OUT, dpi=110, metadata={"Software": ""})


if __name__ == "__main__":
    main()
