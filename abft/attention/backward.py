"""The backward pass: the scores again, four products more, and sums that must vanish or agree.

    P  = exp(x - m) / l                rows sum to 1: the forward's exp, m and l once more
    dP = dO Vᵀ,   dX = P ∘ (dP - δ)    Σ_t dX = 0, and a weighted sum (scoregrad)
    dV = Pᵀ dO                         1ᵀ dV = Σ_i (Σ_t P_it) dO_i
    dQ = dS K · scale
    dK = dSᵀ (scale · Q)               1ᵀ dK = Σ_i (Σ_t dS_it) scale · Q_i

dK and dV are added up over the tiles of a plane (keysums); where their sums are wrong the plane is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abft.attention import fused_gradients, judgement, keysums, products, scoregrad, softmax
from abft.attention.forward import dropped
from abft.attention.gradients import Given, Gradients
from abft.attention.keysums import KeySum
from abft.attention.problem import Plane, Problem, Tile
from abft.attention.products import Panels, Strikes
from abft.attention.softmax import Softmax
from abft.attention.tally import Tally


def gradients(problem: Problem, given: Given, tally: Tally, of_mask: bool = False) -> Gradients:
    """The gradients of an attention."""
    q, k, v = problem.q, problem.k, problem.v
    heads, depth = k.shape[:3].numel(), q.shape[2] * q.shape[3]
    tally.expect("S", problem.rows, problem.keys, q.shape[-1])
    tally.expect("dP", problem.rows, problem.keys, v.shape[-1])
    tally.expect("dQ", problem.rows, q.shape[-1], problem.keys)
    tally.expect("dV", heads, v.shape[-1], depth)
    tally.expect("dK", heads, q.shape[-1], depth)
    if fused_gradients.covers(problem, given, tally, of_mask):
        return fused_gradients.gradients(problem, given, tally, lambda books: _by_steps(problem, given, books, False))
    return _by_steps(problem, given, tally, of_mask)


def _by_steps(problem: Problem, given: Given, tally: Tally, of_mask: bool) -> Gradients:
    q, k, v = problem.q, problem.k, problem.v
    out = Gradients(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None)
    mask = problem.mask if of_mask else None
    d_mask = None if mask is None else torch.zeros_like(mask, dtype=problem.wide)
    for plane in problem.planes():
        sums = _plane(plane, given, tally, out, of_mask)
        if any(s.is_wrong for s in sums.of_products):
            again = tally.aside()
            fresh = _plane(plane, given, again, out, of_mask) if tally.repairs else sums
            for first, second in zip(sums.of_products, fresh.of_products, strict=True):
                keysums.decide(tally, first, second)
            sums = fresh
        part = out.k[plane.batch, plane.heads]
        part.copy_(sums.k.total.view(part.shape))
        part = out.v[plane.batch, plane.heads]
        part.copy_(sums.v.total.view(part.shape))
        if d_mask is not None and sums.mask is not None:
            _mask_part(d_mask, plane).add_(sums.mask)
    if d_mask is not None and mask is not None:
        out.mask = d_mask.to(mask.dtype)
    return out


@dataclass
class _Sums:
    """What is added up over the tiles of a plane."""

    k: KeySum
    v: KeySum
    mask: Tensor | None

    @property
    def of_products(self) -> tuple[KeySum, KeySum]:
        return self.k, self.v


def _plane(plane: Plane, given: Given, tally: Tally, out: Gradients, of_mask: bool) -> _Sums:
    problem = plane.problem
    k, v = plane.of_keys(problem.k), plane.of_keys(problem.v)
    like = _mask_part(problem.mask, plane) if of_mask and problem.mask is not None else None
    sums = _Sums(
        KeySum("dK", plane, k.shape, k.dtype), KeySum("dV", plane, v.shape, v.dtype),
        None if like is None else torch.zeros_like(like, dtype=problem.wide),
    )  # fmt: skip
    panels = Panels(tally)
    for tile in plane.tiles():
        _tile(tile, tally, panels, given, k[:, tile.keys], v[:, tile.keys], sums, out)
    return sums


def _tile(tile: Tile, tally: Tally, panels: Panels, given: Given, k: Tensor, v: Tensor, sums: _Sums, out: Gradients) -> None:
    q, d_out = tile.of_queries(), tile.of_rows(given.d_out)
    kept = tile.kept() if tile.options.dropout else None
    s, p = _probabilities(tile, tally, panels, given.statistics, kept, (q, k, d_out), sums.v)
    dp, hits = _above(tile, tally, panels, given, kept, d_out, v)
    g = scoregrad.of_softmax(p, dp, hits)
    if any(hit.place == "dS" for hit in hits):
        tally.struck_by(hits, scoregrad.of_softmax(p, dp).dx, g.dx)
    ds = scoregrad.through_scores(g.dx, s, tile)
    dq = products.multiply(tally, "dQ", ds, k.mT)
    if tally.checks("pv"):
        mended = scoregrad.settle(tally, g, p, dp, tile)
        if mended is not g:
            g = mended
            ds = scoregrad.through_scores(g.dx, s, tile)
            dq = products.anew(tally, dq, ds)
    y, _ = products.judge(tally, dq, tile.row_of, panels.of("dQ", k.mT, tile.keys))
    tile.write_rows(out.q, y * tile.options.scale)
    # Of |dS| that of dX: a soft-cap only shrinks.
    sums.k.add(tally, products.multiply(tally, "dK", ds.mT, q.mT), tile, row_sums=ds.sum(-1), sizes=g.size, right=q)
    if sums.mask is not None:
        whole = tile.masked_part_of(sums.mask)
        whole.add_(tile.view(g.dx).sum_to_size(whole.shape))


def _probabilities(
    tile: Tile, tally: Tally, panels: Panels, statistics: Tensor, kept: Tensor | None, operands: tuple[Tensor, Tensor, Tensor], dv: KeySum
) -> tuple[Tensor, Tensor]:
    """(S, P before dropout); their share of dV is added, as the product whose operand P is."""
    q, k, d_out = operands
    maxima, l = (tile.of_rows(t.unsqueeze(-1)).squeeze(-1) for t in statistics)

    def remembered(scores: Tensor, hits: Strikes = (), out: Tensor | None = None) -> Softmax:
        return softmax.remembered(scores, tile, maxima, l, hits, out)

    scores = products.multiply(tally, "S", q, k)
    hits = products.strikes(tally, "dV", (k.shape[0], k.shape[1], d_out.shape[2], q.shape[1]), q.dtype, places=("P",))
    soft = remembered(scores.y, hits, out=tile.plane.problem.scratch("P", scores.y))
    s, _ = products.judge(tally, scores, tile.row_of, panels.of("S", k, tile.keys))
    if s is not scores.y:
        soft = remembered(s)

    def again() -> Softmax:
        # The forward's sums are finer than the check of the scores: these may be wrong by less than it sees.
        nonlocal s
        s = products.anew(tally, scores, q).y
        return remembered(s)

    used = dropped(soft.probabilities, tile, kept)
    clean = dropped(remembered(s).probabilities, tile, kept).mT if hits else None
    part = products.multiply(tally, "dV", used.mT, d_out.mT, hits, clean)
    if tally.checks("pv"):
        sums = judgement.total(used, soft, tile, kept)
        mended = judgement.settle(tally, s, soft, sums, tile, product="dP", again=again, anew=False)
        if mended is not soft:
            soft, used = mended, dropped(mended.probabilities, tile, kept)
            part = products.anew(tally, part, used.mT)
    row_sums = used.sum(-1)
    dv.add(tally, part, tile, row_sums=row_sums, sizes=row_sums, right=d_out)
    return s, soft.probabilities


def _above(
    tile: Tile, tally: Tally, panels: Panels, given: Given, kept: Tensor | None, d_out: Tensor, v: Tensor
) -> tuple[Tensor, Strikes]:
    """(dP before dropout, faults that strike what is made of it)."""
    hits = products.strikes(tally, "dP", (*d_out.shape[:2], v.shape[1], v.shape[2]), d_out.dtype, places=("dS",))
    dp, _ = products.judge(tally, products.multiply(tally, "dP", d_out, v, hits), tile.row_of, panels.of("dP", v, tile.keys))
    if given.d_weights is not None:
        plane = tile.plane
        above = given.d_weights[plane.batch, plane.heads, :, tile.rows, tile.keys]
        dp = dp + above.reshape(dp.shape).to(dp.dtype)
    return dropped(dp, tile, kept), hits


def _mask_part(mask: Tensor, plane: Plane) -> Tensor:
    """The part of a mask's first two dimensions that belongs to a plane; dimensions of size one stay."""
    return mask[
        slice(None) if mask.shape[0] == 1 else plane.batch,
        slice(None) if mask.shape[1] == 1 else plane.heads,
    ]
