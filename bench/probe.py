"""How a matrix unit accumulates, asked in a few products; and what the published models of such units would answer.

    Per accumulation step of L products: d = RZ_fp32( Σ trunc_F(a_k b_k) + trunc_F(c) ), F fraction bits below the largest
    exponent (MMA-Sim; docs/explanation/thresholds.md). A sequential fused multiply-add rounds to nearest after every product.

A question is one row: 1, then t numbers of 2⁻ᵉ, and in a later step −1, which leaves what the unit kept of the t numbers; every
answer is a small multiple of 2⁻²³ and exact in every operand's type. Second kind: two numbers of 2⁻²⁴ at neighbouring places
j - 1 and j show up if, and only if, they enter one step: that tells where steps begin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

#: K of a question, and where the −1 stands: a step of any kernel's main loop later.
DEPTH, LAST = 256, 255
EXPONENTS, COUNTS = range(22, 28), (3, 7, 15)
PLACES = range(2, 65)
UNIT = Fraction(1, 2**23)


@dataclass(frozen=True)
class Model:
    """L products a step, F fraction bits, truncated; F = 0: rounded to nearest after every product."""

    name: str
    step: int
    fraction: int

    def answer(self, row: list[Fraction]) -> Fraction:
        acc = Fraction(0)
        for start in range(0, len(row), self.step):
            terms = [t for t in (*row[start : start + self.step], acc) if t]
            if self.fraction:
                largest = max(map(_exponent, terms), default=0)
                terms = [_truncated(t, largest - self.fraction) for t in terms]
                total = sum(terms, Fraction(0))
                acc = _truncated(total, _exponent(total) - 23) if total else total
            else:
                acc = _nearest(sum(terms, Fraction(0)))
        return acc


#: Tensor cores as abft.threshold knows them, and what CUDA cores and CPUs do.
MODELS = (
    Model("hopper16", 16, 25), Model("ampere16", 8, 24), Model("hopper_tf32", 8, 25), Model("ampere_tf32", 4, 24), Model("fma32", 1, 0),
)  # fmt: skip


def _exponent(x: Fraction) -> int:
    """⌊log2 |x|⌋"""
    e = abs(x).numerator.bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def _truncated(x: Fraction, bit: int) -> Fraction:
    """Toward zero, to a multiple of 2^bit."""
    scaled = abs(x) / Fraction(2) ** bit
    return (1 if x > 0 else -1) * (scaled.numerator // scaled.denominator) * Fraction(2) ** bit


def _nearest(x: Fraction) -> Fraction:
    """To fp32's 24 bits, ties to even."""
    if not x:
        return x
    spacing = Fraction(2) ** (_exponent(x) - 23)
    return round(x / spacing) * spacing


# --- questions and answers ---------------------------------------------------------------------------


def questions() -> list[list[Fraction]]:
    """Rows of products a_k b_k, (len(COUNTS) · len(EXPONENTS) + len(PLACES)) × DEPTH."""
    rows = []
    for count in COUNTS:
        for e in EXPONENTS:
            rows.append(_row(dict.fromkeys(range(1, count + 1), Fraction(1, 2**e))))
    for j in PLACES:
        rows.append(_row({j - 1: Fraction(1, 2**24), j: Fraction(1, 2**24)}))
    return rows


def _row(small: dict[int, Fraction]) -> list[Fraction]:
    row = [Fraction(0)] * DEPTH
    row[0], row[LAST] = Fraction(1), Fraction(-1)
    for place, value in small.items():
        row[place] = value
    return row


def ask(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, device: torch.device) -> list[int]:
    """A unit's answers, in multiples of 2⁻²³. multiply: (M, K), (N, K) → (M, N), result in ``dtype``."""
    # 2⁻ᵉ is written as 2⁻¹² · 2¹²⁻ᵉ, which even fp16 holds.
    split = 2.0**-12
    rows = torch.tensor([[float(p) for p in row] for row in questions()], dtype=torch.float64)
    small = (rows != 0) & (rows.abs() < 1)
    a = torch.where(small, rows / split, rows).to(device, dtype)
    # Which places are small differs from row to row, so every question brings its own right-hand side.
    w = torch.where(small, split, (rows != 0).double()).to(device, dtype)
    answers = multiply(a, w).diagonal().double().cpu() * 2.0**23
    return [int(x) for x in answers.tolist()]


def expected(model: Model) -> list[int]:
    return [int(model.answer(row) / UNIT) for row in questions()]


def recognised(answers: list[int]) -> list[str]:
    """The models that give exactly these answers."""
    return [model.name for model in MODELS if expected(model) == answers]


def steps(answers: list[int]) -> list[int]:
    """Places at which a new accumulation step begins, as far as the answers tell."""
    return [j for j, found in zip(PLACES, answers[-len(PLACES) :], strict=True) if found == 0]
