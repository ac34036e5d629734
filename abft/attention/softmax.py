"""The softmax between the two products, and the sums that say whether it is right.

    x = logits(s),  m = max x,  p = exp(x - m),  l = Σ p,  P = p / l
    (1) l = Σ exp(½x - ½m)²             from the scores again, through other arguments of exp: sees x, exp, l
    (2) Σ P = 1 (0 where no key is seen)   of the very P that multiplies V: sees the division and P in memory
    (3) 1 - 2⁻⁹ <= l <= keys · (1 + 2⁻⁹)   sees a maximum that is none

An error of x and of its copy in (1) alike is left to the check of the scores, which is taken after they were read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abft import threshold
from abft.attention import steps
from abft.attention.problem import Tile
from abft.faults import Strike
from abft.floating import ACCUMULATOR

#: Bound of (1) and (2) relative to l, in units of 2⁻²³ (2⁻⁵²): largest measured 6.0, see bench/results/attention-clean.jsonl.
KAPPA_SOFTMAX = 48.0
#: The largest p is exp(0) = 1; the range of (3) is wider than any rounding. design: 1 - 2e-3 <= l <= N.
RANGE = 2.0**-9
UNIT = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def kappa(keys: int) -> float:
    """The bound of (1) and (2) for a row of so many keys, in units."""
    return KAPPA_SOFTMAX + keys * threshold.KAPPA_PER_KEY


@dataclass
class Softmax:
    """probabilities (heads, rows, keys); maxima and sums (heads, rows). maxima is 0 where no key is seen."""

    probabilities: Tensor
    maxima: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Evidence:
    """Per row, flattened over the heads: the two residuals relative to l, and where a sum is out of its range."""

    residual: np.ndarray  # (rows, 2)
    bound: float
    outside: np.ndarray  # bool (rows,)

    def suspects(self) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return ~(self.residual <= self.bound).all(-1) | self.outside

    @property
    def worst(self) -> float:
        """Largest residual / bound among the rows that pass."""
        fine = ~self.suspects()
        return float(self.residual[fine].max(initial=0.0)) / self.bound


def logits(s: Tensor, tile: Tile) -> Tensor:
    """x (heads, rows, keys) of scaled scores s; -inf where a key is not seen. It is s itself where nothing is done to the scores."""
    cap, added, hidden = tile.options.softcap, tile.added(), tile.hidden()
    x = s if cap is None else torch.tanh(s / cap).mul_(cap)
    if added is not None:
        x = (tile.view(x) + added).view(x.shape)
    if hidden is not None:
        x = tile.view(x).masked_fill(hidden, -torch.inf).view(x.shape)
    return x


def shifted(x: Tensor, s: Tensor, maxima: Tensor, factor: float = 1.0, out: Tensor | None = None) -> Tensor:
    """factor · (x - m), in ``out``, else written over x unless that is s. A factor of ½ gives exactly half of what 1 gives."""
    if out is None:
        out = torch.empty_like(x) if x is s else x
    return torch.add((maxima * -factor).unsqueeze(-1), x, alpha=factor, out=out)


def exponentials(s: Tensor, tile: Tile, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(p, m) of scaled scores; p in ``out``, if given."""
    x = logits(s, tile)
    m = x.amax(-1)
    m = torch.where(m == -torch.inf, 0.0, m)  # a row that sees no key: exp(-inf - 0) = 0 throughout
    return steps.exp_(shifted(x, s, m, out=out)), m


def divided(p: Tensor, sums: Tensor) -> Tensor:
    """p · (1 / l), in place."""
    return p.mul_(torch.where(sums == 0, 1.0, sums).reciprocal_().unsqueeze(-1))


def softmax(s: Tensor, tile: Tile, strikes: tuple[Strike, ...] = (), out: Tensor | None = None) -> Softmax:
    """The softmax of scaled scores, P in ``out``; strikes in "P" hit its exponentials, those in "l" their sums."""
    p, m = exponentials(s, tile, out)
    strike(p, "P", strikes)
    sums = steps.row_sums(p)
    strike(sums.unsqueeze(-1), "l", strikes)
    return Softmax(divided(p, sums), m, sums)


def remembered(
    s: Tensor, tile: Tile, maxima: Tensor, sums: Tensor, strikes: tuple[Strike, ...] = (), out: Tensor | None = None
) -> Softmax:
    """The same probabilities from the maxima and sums of an earlier softmax of these scores."""
    p = steps.exp_(shifted(logits(s, tile), s, maxima, out=out))
    strike(p, "P", strikes)
    return Softmax(divided(p, sums), maxima, sums)


def strike(values: Tensor, place: str, strikes: tuple[Strike, ...]) -> None:
    """Hit ``values`` in place, with the strikes that lie there."""
    for hit in strikes:
        if hit.place == place:
            hit.hit(values)


def squares(s: Tensor, tile: Tile, maxima: Tensor) -> Tensor:
    """Σ exp(½x - ½m)²: what l must be, computed another way."""
    # Not vector_norm, whose long chains lose what equal small numbers add: 500 units at 32,768 keys, against 10.
    x = logits(s, tile)
    return shifted(x, s, maxima, 0.5, tile.plane.problem.scratch("squares", x)).exp_().square_().sum(-1)


def evidence(s: Tensor, soft: Softmax, total: Tensor, tile: Tile, anew: bool = True) -> Evidence:
    """Judge a softmax of scores s. total: Σ P of what multiplied V. anew: also (1); without it l comes from a softmax that was judged."""
    sums = soft.sums
    expected = squares(s, tile, soft.maxima) if anew else sums
    largest = torch.maximum(expected, sums)
    scale = torch.where(largest == 0, 1.0, largest)
    first = (expected - sums).abs() / scale
    second = (total - (expected > 0).to(total.dtype)).abs()
    outside = ~((sums >= 1 - RANGE) & (sums <= tile.shape[-1] * (1 + RANGE)) | (expected == 0) & (sums == 0))
    residual = torch.stack([first, second], -1).reshape(-1, 2).numpy()
    return Evidence(residual, kappa(tile.shape[-1]) * UNIT[ACCUMULATOR[s.dtype]], outside.reshape(-1).numpy())


def exactly(s: Tensor, tile: Tile, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """(P, m, l) of some rows in fp64, an independent evaluation of what is needed only when two executions agree on a suspect row."""
    x = logits(s.double(), tile).reshape(-1, s.shape[-1])[torch.from_numpy(rows)]
    m = x.amax(-1)
    m = torch.where(m == -torch.inf, 0.0, m)
    p = torch.exp(x - m.unsqueeze(-1))
    sums = p.sum(-1)
    return divided(p, sums), m, sums


def beyond(s: Tensor, tile: Tile) -> np.ndarray:
    """bool (rows,): rows whose logits hold NaN or +inf: such were the operands, and torch delivers NaN."""
    x = logits(s, tile)
    return (torch.isnan(x) | (x == torch.inf)).any(-1).reshape(-1).numpy()
