"""The same attention in torch's own differentiable operators, whole and unchecked: for gradients of gradients only."""

from __future__ import annotations

import torch
from torch import Tensor

from abft.attention.problem import Plane, Problem, Tile


def plain(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out (B, H, G, L, D), probabilities as dropped (B, H, G, L, S)), in q's dtype."""
    o, wide = problem.options, problem.wide
    batch, heads, _, length, _ = problem.q.shape
    tile = Tile(Plane(problem, slice(0, batch), slice(0, heads), length), slice(0, length), slice(0, problem.keys))
    q, k, v = (t.to(wide) for t in (problem.q, problem.k.unsqueeze(2), problem.v.unsqueeze(2)))
    x = q @ k.mT * o.scale
    if o.softcap is not None:
        x = torch.tanh(x / o.softcap) * o.softcap
    added, hidden = tile.added(), tile.hidden()
    x = x if added is None else x + added
    x = x if hidden is None else x.masked_fill(hidden, -torch.inf)
    none = (x == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(x.masked_fill(none, 0.0), -1).masked_fill(none, 0.0)
    if o.dropout:
        share = 1.0 - o.dropout
        p = torch.where(tile.kept(), p / share if share else p, 0.0)
    return (p @ v).to(problem.q.dtype), p.to(problem.q.dtype)
