"""What to do about rows whose softmax is suspect: compute it again from the judged scores, and ask fp64 where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from abft.attention import softmax
from abft.attention.problem import Tile
from abft.attention.softmax import Evidence, Softmax
from abft.attention.tally import Tally
from abft.ledger import Verdict

#: Where the softmax's findings are kept: its probabilities are the operand of this product.
PRODUCT = "O"


def total(used: Tensor, soft: Softmax, tile: Tile, kept: Tensor | None) -> Tensor:
    """Σ P per row of what multiplied V; under dropout what it kept, scaled back, and what it left out."""
    if kept is None:
        return used.sum(-1)
    return used.sum(-1) * (1.0 - tile.options.dropout) + soft.probabilities.masked_fill(kept.view(used.shape), 0.0).sum(-1)


def settle(
    tally: Tally, s: Tensor, soft: Softmax, sums: Tensor, tile: Tile, *, product: str = PRODUCT,
    again: Callable[[], Softmax] | None = None, anew: bool = True,
) -> Softmax:  # fmt: skip
    """The softmax to go on with: ``soft`` itself if nothing has to be repaired. sums: Σ P of what multiplied.

    again: how it was computed (the softmax of s, unless given). anew: see ``softmax.evidence``. Findings go to the tally.
    """
    outcome = tally.outcome(product)
    first = softmax.evidence(s, soft, sums, tile, anew)
    outcome.worst = max(outcome.worst, first.worst)
    rows = np.flatnonzero(first.suspects())
    if len(rows) == 0:
        return soft
    poisoned = softmax.beyond(s, tile)[rows]
    _find(tally, product, Verdict.INPUT, rows[poisoned], first, tile)
    rows = rows[~poisoned]
    if len(rows) == 0:
        return soft
    if not tally.repairs:
        _find(tally, product, tally.only_told, rows, first, tile)
        return soft
    fresh = softmax.softmax(s, tile) if again is None else again()
    outcome.executions += 1
    second = softmax.evidence(s, fresh, fresh.probabilities.sum(-1), tile, anew)
    still = rows[second.suspects()[rows]]
    _find(tally, product, Verdict.RECOMPUTED, np.setdiff1d(rows, still), first, tile, "transient")
    return _ask_fp64(tally, s, fresh, still, second, tile, product, anew) if len(still) else fresh


def _ask_fp64(tally: Tally, s: Tensor, soft: Softmax, rows: np.ndarray, e: Evidence, tile: Tile, product: str, anew: bool) -> Softmax:
    """Rows that stay suspect: fp64 agrees with what is there, or takes its place.

    In a backward (not ``anew``) what disagrees are the forward's maxima and sums and today's scores. Either may have changed in memory
    since, q and k too, and nothing tells which: rows of fp64 are delivered, and called UNCORRECTED, so that the step is done again.
    """
    at = torch.from_numpy(rows)
    exact = softmax.exactly(s, tile, rows)
    # Copies: maxima and sums may be what the forward saved.
    mended = Softmax(*(t.clone() for t in (soft.probabilities, soft.maxima, soft.sums)))
    flat = mended.probabilities.view(-1, s.shape[-1]), mended.maxima.view(-1), mended.sums.view(-1)
    explained = ((flat[0][at].double() - exact[0]).abs().sum(-1) <= e.bound).numpy()
    _find(tally, product, Verdict.FALSE_ALARM, rows[explained], e, tile)
    wrong = ~explained
    verdict, cause = (Verdict.RECONSTRUCTED, "persistent") if anew else (Verdict.UNCORRECTED, "unknown")
    _find(tally, product, verdict, rows[wrong], e, tile, cause)
    for values, right in zip(flat, exact, strict=True):
        values[at[wrong]] = right[wrong].to(values.dtype)
    return mended


def _find(tally: Tally, product: str, verdict: Verdict, rows: np.ndarray, e: Evidence, tile: Tile, cause: str = "unknown") -> None:
    if len(rows) == 0:
        return
    residual = np.nan_to_num(e.residual[rows].max(-1), nan=np.inf)
    worst = int(residual.argmax())
    tally.find(product, verdict, len(rows), tile.row_of(int(rows[worst])), float(residual[worst]), e.bound, cause)
