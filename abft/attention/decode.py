"""Attention of few queries over pages, in plain torch: what decides whether the kernels are right.

    S = (scale · q) Kᵀ,  x = logits(S),  m = max x,  p = exp(x - m),  l = Σ p,  P = p / l,  O = P V

    qk  (1) Σ w s = (scale · q) · Σ_pages sums           over all tokens that the pages hold, also those that a query does not see
    pv  (2) l = Σ exp(½x - ½m)²   (3) Σ P = 1   (4) 1 - 2⁻⁹ <= l <= keys (1 + 2⁻⁹)      as softmax.py
        (5) Σ_d w O = Σ_t P_t columns_t                  for the kinds e, hi, lo of w

Nothing of K and V is summed here: sums and columns are those that were stored when the tokens were. So a page that changed since shows as
a residual, as a wrong score does. Rows are those of the queries that share a head of keys: (B, H, G · L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abft import checksum, threshold
from abft.attention import softmax
from abft.attention.pages import COLUMNS, KINDS, SIGNED, SQUARES, Pages, weights
from abft.attention.softmax import KAPPA_SOFTMAX, RANGE, UNIT
from abft.faults import Strike

Strikes = tuple[tuple[str, Strike], ...]
ARITHMETIC = threshold.FMA_32


@dataclass(frozen=True)
class Request:
    """q (B, H, G, L, E) over pages: table (B, W) of their numbers, lengths (B,) of the sequences, the queries' own tokens included.

    The last query stands at the last token; it sees none behind it, and only the last ``window``. x = softcap · tanh(scale · s / softcap).
    """

    q: Tensor
    pages: Pages
    table: Tensor
    lengths: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """Of a head of keys."""
        return self.q.shape[2] * self.q.shape[3]

    @property
    def keys(self) -> int:
        return self.table.shape[1] * self.pages.length


@dataclass(frozen=True)
class Judged:
    """Of every row (B, H, rows): residual and bound of what stands out most, and whether it is explained."""

    residual: Tensor
    bound: Tensor
    fine: Tensor

    @property
    def ratio(self) -> Tensor:
        """|residual| / bound; what is not explained has no ratio of one or less."""
        ratio = (self.residual / self.bound).abs()
        return torch.where(self.fine | (ratio > 1), ratio, torch.inf)


@dataclass(frozen=True)
class Computed:
    """out (B, H, rows, D) in fp32, and what the two products' checks say."""

    out: Tensor
    qk: Judged
    pv: Judged


@dataclass(frozen=True)
class _Gathered:
    """A sequence's pages side by side: k (B, H, N, E), v (B, H, N, D), columns (B, H, N, 4); the sums of all (B, H, 2, E)."""

    k: Tensor
    v: Tensor
    columns: Tensor
    sums: Tensor
    written: Tensor  # (B, 1 or H, N): what the sums are of
    whole: Tensor  # (B, H): no token is missing that the sequence has


def used(request: Request) -> Tensor:
    """bool (B, W): pages that hold anything of their sequence."""
    return torch.arange(request.table.shape[1]) * request.pages.length < request.lengths[:, None]


def _gather(request: Request) -> _Gathered:
    pages, length, live = request.pages, request.pages.length, used(request)
    page = torch.where(live, request.table, 0).long()
    filled = torch.where(live[:, :, None], pages.filled[page], 0).transpose(1, 2)  # (B, H, W)
    begun = torch.arange(page.shape[1]) * length
    needed = (request.lengths[:, None] - begun).clamp(0, length)
    written = (torch.arange(length) < filled[..., None]).flatten(2)
    k, v = (t[page].flatten(1, 2).transpose(1, 2).float().masked_fill(~written[..., None], 0.0) for t in (pages.k, pages.v))
    columns = pages.columns[page].permute(0, 2, 1, 4, 3).flatten(2, 3).masked_fill(~written[..., None], 0.0)
    sums = torch.where(live[:, :, None, None, None], pages.sums[page], 0.0).sum(1)
    return _Gathered(k, v, columns, sums, written, (filled >= needed[:, None]).all(-1))


def attend(request: Request, strikes: Strikes = ()) -> Computed:
    """The attention with the faults of either role."""
    g, q = _gather(request), request.q.flatten(2, 3).float() * request.scale
    s = _struck(q, strikes, "qk", "operand") @ g.k.mT
    _strike(s, strikes, "qk", "S", "accumulator")
    qk = _judge_scores(request, g, q, s, strikes)
    x = s if request.softcap is None else torch.tanh(s / request.softcap) * request.softcap
    x = x.masked_fill(~_seen(request, g), -torch.inf)
    m = x.amax(-1)
    m = torch.where(m == -torch.inf, 0.0, m)
    p = torch.exp(x - m.unsqueeze(-1))
    _strike(p, strikes, "pv", "P")
    l = p.sum(-1)
    _strike(l.unsqueeze(-1), strikes, "pv", "l")
    p = softmax.divided(p, l)
    o = _struck(p, strikes, "pv", "operand") @ g.v
    _strike(o, strikes, "pv", "O", "accumulator")
    return Computed(o, qk, _judge_values(request, g, x, m, l, p, o, strikes))


def _seen(request: Request, g: _Gathered) -> Tensor:
    """bool (B, H, rows, N)"""
    length, key = request.q.shape[3], torch.arange(request.keys)
    position = request.lengths[:, None] - length + torch.arange(length)  # (B, L)
    seen = key <= position[..., None]
    if request.window is not None:
        seen = seen & (key > position[..., None] - request.window)
    return seen.repeat(1, request.q.shape[2], 1)[:, None] & g.written[:, :, None]


def _judge_scores(request: Request, g: _Gathered, q: Tensor, s: Tensor, strikes: Strikes) -> Judged:
    own = weights(request.pages.length).repeat(request.table.shape[1])
    actual = (s * own * g.written[:, :, None]).sum(-1)
    predicted = (q @ g.sums[:, :, SIGNED].unsqueeze(-1)).squeeze(-1)
    _strike(predicted.unsqueeze(-1), strikes, "qk", "checksum")
    noise = ((q * q) @ (g.sums[:, :, SQUARES] + g.sums[:, :, SIGNED].square()).unsqueeze(-1)).squeeze(-1)
    c = threshold.decode(ARITHMETIC, q.shape[-1], g.v.shape[-1], KINDS)
    n = request.lengths.float()[:, None, None]
    size = (s.square().sum(-1) + predicted * predicted + noise).sqrt()
    bound = (c.scores * (n / threshold.KAPPA_KEYS).sqrt().clamp(min=1.0) + c.slope) * size + ARITHMETIC.floor_abs
    residual = actual - predicted
    return Judged(residual, bound, _explained(residual, bound) & g.whole[..., None])


def _judge_values(
    request: Request, g: _Gathered, x: Tensor, m: Tensor, l: Tensor, p: Tensor, o: Tensor, strikes: Strikes
) -> Judged:
    n, d = request.lengths.float()[:, None, None], o.shape[-1]
    squares = torch.exp(x * 0.5 - (m * 0.5).unsqueeze(-1)).square().sum(-1)
    nobody = squares == 0
    unit = ((KAPPA_SOFTMAX + n * threshold.KAPPA_PER_KEY) * UNIT[torch.float32]).expand_as(l)
    beyond = torch.where(l < 1.0, 1.0 - l, (l - n).clamp(min=0.0) / n.clamp(min=1.0))
    conditions = [
        (squares - l, unit * torch.maximum(squares, l)),
        (p.sum(-1) - (~nobody).float(), unit),
        (torch.where(nobody, l, beyond), torch.full_like(l, RANGE)),
    ]
    predicted = p @ g.columns[..., : len(KINDS)]
    _strike(predicted, strikes, "pv", "checksum")
    noise = p.square() @ g.columns[..., COLUMNS - 1 :].square()
    c = threshold.decode(ARITHMETIC, request.q.shape[-1], d, KINDS)
    for i, kind in enumerate(KINDS):
        actual = o @ torch.from_numpy(checksum.column_weights(kind, d).copy())
        size = (o.square().sum(-1) + predicted[..., i].square() + noise[..., 0]).sqrt()
        conditions.append((actual - predicted[..., i], (c.output[i] + c.output_slope[i] * n) * size + ARITHMETIC.floor_abs))
    residual, bound = (torch.stack(values, -1) for values in zip(*conditions, strict=True))
    fine = _explained(residual, bound) | (residual == 0)
    judged = Judged(residual, bound, fine)
    worst = judged.ratio.nan_to_num(0.0, posinf=torch.inf).argmax(-1, keepdim=True)
    return Judged(residual.gather(-1, worst)[..., 0], bound.gather(-1, worst)[..., 0], fine.all(-1))


def _explained(residual: Tensor, bound: Tensor) -> Tensor:
    return (residual.abs() <= bound) & (bound < ARITHMETIC.largest)


def _strike(values: Tensor, strikes: Strikes, role: str, *places: str) -> None:
    """Hit (B, H, rows, columns) in place."""
    for where, hit in strikes:
        if where == role and hit.place in places:
            hit.hit(values.flatten(0, 1))


def _struck(values: Tensor, strikes: Strikes, role: str, place: str) -> Tensor:
    """A copy with the faults of a place, if there are any."""
    if any(where == role and hit.place == place for where, hit in strikes):
        values = values.clone()
        _strike(values, strikes, role, place)
    return values
