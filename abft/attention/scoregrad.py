"""From the gradient of the probabilities to that of the scores, and the two sums that it must have.

    δ_i = Σ_t P_it dP_it        dX = P ∘ (dP - δ)
    (1) Σ_t dX_it = 0                                     sees a wrong δ, any wrong element
    (2) Σ_t w_t dX_it = Σ_t w_t P_it dP_it - δ_i Σ_t w_t P_it     sees a row that became zero, to which (1) is blind
    dS = dX ∘ (1 - tanh²)       under a soft-cap only; that factor has no check of its own

w are fixed random numbers, ±U(0.5, 1.5)/1.041.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abft import threshold
from abft.attention import steps
from abft.attention.problem import Tile
from abft.attention.softmax import UNIT, strike
from abft.attention.tally import Tally
from abft.checksum import sketch_coefficients
from abft.faults import Strike
from abft.ledger import Verdict

#: Bound of both sums relative to |δ| + Σ_t |dX|, in units of 2⁻²³ (2⁻⁵²): largest measured 14.5, see bench/results/attention-clean.jsonl.
KAPPA_VANISHING = 48.0
PRODUCT = "dP"


def kappa(keys: int) -> float:
    """The bound of both sums of a row of so many keys, in units."""
    return KAPPA_VANISHING + keys * threshold.KAPPA_PER_KEY


@dataclass(frozen=True)
class SoftmaxGradient:
    """dX (heads, rows, keys); of each row (heads, rows): δ, Σ_t |dX|, and what the sum with w must be."""

    dx: Tensor
    delta: Tensor
    size: Tensor
    weighted: Tensor


def of_softmax(p: Tensor, dp: Tensor, strikes: tuple[Strike, ...] = ()) -> SoftmaxGradient:
    """The gradient of the logits; strikes in "dS" hit it."""
    product = p * dp
    delta = steps.row_sums(p, dp)
    w = _weights(p)
    weighted = torch.matmul(product, w) - delta * torch.matmul(p, w)
    dx = (dp - delta.unsqueeze(-1)).mul_(p)
    strike(dx, "dS", strikes)
    return SoftmaxGradient(dx, delta, dx.abs().sum(-1), weighted)


def _weights(p: Tensor) -> Tensor:
    return sketch_coefficients(p.shape[-1], p.device)[0].to(p.dtype)


def through_scores(dx: Tensor, s: Tensor, tile: Tile) -> Tensor:
    """The gradient of scale · s: dX itself without a soft-cap."""
    o = tile.options
    return dx if o.softcap is None else dx * (1.0 - torch.tanh(s / o.softcap).square_())


def settle(tally: Tally, found: SoftmaxGradient, p: Tensor, dp: Tensor, tile: Tile) -> SoftmaxGradient:
    """The gradient to go on with: ``found`` itself if nothing has to be repaired. Findings go to the tally."""
    outcome = tally.outcome(PRODUCT)
    residual, bound = _vanishing(found)
    wrong = ~(residual <= bound)
    if not wrong.any():
        with np.errstate(all="ignore"):
            outcome.worst = max(outcome.worst, float(np.nan_to_num(residual / bound).max(initial=0.0)))
        return found
    rows = np.flatnonzero(wrong)
    finite = (torch.isfinite(p).all(-1) & torch.isfinite(dp).all(-1)).reshape(-1).numpy()[rows]
    _find(tally, Verdict.INPUT, rows[~finite], residual, bound, tile)
    rows = rows[finite]
    if len(rows) == 0 or not tally.repairs:
        _find(tally, tally.only_told, rows, residual, bound, tile)
        return found
    fresh = of_softmax(p, dp)
    outcome.executions += 1
    after, bound_after = _vanishing(fresh)
    still = rows[~(after <= bound_after)[rows]]
    _find(tally, Verdict.RECOMPUTED, np.setdiff1d(rows, still), residual, bound, tile, "transient")
    if len(still):
        at = torch.from_numpy(still)
        wide_p, wide_dp = (t.reshape(-1, t.shape[-1])[at].double() for t in (p, dp))
        exact = of_softmax(wide_p, wide_dp).dx
        flat = fresh.dx.view(-1, p.shape[-1])
        explained = ((flat[at].double() - exact).abs().sum(-1).numpy()) <= bound_after[still]
        flat[at[~explained]] = exact[~explained].to(flat.dtype)
        _find(tally, Verdict.FALSE_ALARM, still[explained], after, bound_after, tile)
        _find(tally, Verdict.RECONSTRUCTED, still[~explained], after, bound_after, tile, "persistent")
    return fresh


def _vanishing(g: SoftmaxGradient) -> tuple[np.ndarray, np.ndarray]:
    """(the larger of the two residuals, their bound) per row."""
    # |δ| + Σ|dX| >= Σ P|dP|: what was added up, with weights of about 1. A wrong δ adds to
    # the residual a million times what it adds to the bound.
    dtype = g.dx.dtype
    scale = g.delta.abs() + g.size
    bound = scale * (kappa(g.dx.shape[-1]) * UNIT[dtype]) + torch.finfo(dtype).tiny
    bound = torch.where(torch.isfinite(scale), bound, -1.0)  # an infinite bound would let anything pass
    residual = torch.maximum(g.dx.sum(-1).abs(), (torch.matmul(g.dx, _weights(g.dx)) - g.weighted).abs())
    return residual.reshape(-1).numpy(), bound.reshape(-1).numpy()


def _find(
    tally: Tally, verdict: Verdict, rows: np.ndarray, residual: np.ndarray, bound: np.ndarray, tile: Tile, cause: str = "unknown"
) -> None:
    if len(rows):
        worst = rows[int(np.nan_to_num(residual[rows], nan=np.inf).argmax())]
        tally.find(PRODUCT, verdict, len(rows), tile.row_of(int(worst)), float(residual[worst]), float(bound[worst]), cause)
