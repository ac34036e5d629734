"""The forward pass: scores, softmax, values, each judged before the next tile is begun.

The scores are judged after the softmax has read them, and the softmax after its probabilities have multiplied V: what is
judged is what was used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft.attention import fused, judgement, products, softmax
from abft.attention.problem import Attended, Problem, Tile
from abft.attention.products import Panels
from abft.attention.softmax import Softmax
from abft.attention.tally import Tally


def attend(problem: Problem, tally: Tally, weights: bool = False, first: fused.Passed | None = None) -> Attended:
    """Attention of a problem; (B, H, G, L, S) probabilities too if ``weights``. first: its compiled pass, if that has run."""
    q, v = problem.q, problem.v
    tally.expect("S", problem.rows, problem.keys, q.shape[-1])
    tally.expect("O", problem.rows, v.shape[-1], problem.keys)
    if fused.covers(problem, tally, weights):
        return fused.attend(problem, tally, lambda books: _by_steps(problem, books, False), first)
    return _by_steps(problem, tally, weights)


def _by_steps(problem: Problem, tally: Tally, weights: bool) -> Attended:
    q, whole = problem.q, problem.empty()
    full = q.new_zeros((*q.shape[:-1], problem.keys)) if weights else None
    for plane in problem.planes():
        k_plane, v_plane, panels = plane.of_keys(problem.k), plane.of_keys(problem.v), Panels(tally)
        for tile in plane.tiles():
            o, soft, p = _tile(tile, tally, panels, tile.of_queries(), k_plane[:, tile.keys], v_plane[:, tile.keys].mT)
            tile.write_rows(whole.out, o)
            tile.write_rows(whole.statistics[0], soft.maxima)
            tile.write_rows(whole.statistics[1], soft.sums)
            if full is not None:
                full[plane.batch, plane.heads, :, tile.rows, tile.keys] = tile.view(p).to(q.dtype)
    whole.weights = full
    return whole


def _tile(
    tile: Tile, tally: Tally, panels: Panels, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Softmax, Tensor]:
    """(O, softmax, the probabilities that multiplied V) of scaled q (heads, rows, E), k (heads, keys, E), v (heads, D, keys)."""
    scores = products.multiply(tally, "S", q, k)
    hits = products.strikes(tally, "O", (*q.shape[:2], v.shape[1], v.shape[2]), q.dtype, places=("P", "l"))
    soft = softmax.softmax(scores.y, tile, hits, out=tile.plane.problem.scratch("P", scores.y))
    s, _ = products.judge(tally, scores, tile.row_of, panels.of("S", k, tile.keys))
    if s is not scores.y:
        soft = softmax.softmax(s, tile)
    kept = tile.kept() if tile.options.dropout else None
    used = dropped(soft.probabilities, tile, kept)
    clean = dropped(softmax.softmax(s, tile).probabilities, tile, kept) if hits else None
    o = products.multiply(tally, "O", used, v, hits, clean)
    if tally.checks("pv"):
        mended = judgement.settle(tally, s, soft, judgement.total(used, soft, tile, kept), tile)
        if mended is not soft:
            soft, used = mended, dropped(mended.probabilities, tile, kept)
            o = products.anew(tally, o, used)
    y, _ = products.judge(tally, o, tile.row_of, panels.of("O", v, tile.keys))
    return y, soft, used


def dropped(p: Tensor, tile: Tile, kept: Tensor | None) -> Tensor:
    """What multiplies V: the probabilities that dropout keeps, divided by the share that it keeps."""
    if kept is None:
        return p
    share = 1.0 - tile.options.dropout
    return torch.where(kept.view(p.shape), p / share if share else p, 0.0)
