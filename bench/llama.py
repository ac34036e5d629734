"""One decoder layer with the sizes of Llama 3 (arXiv 2407.21783, table 3), in plain torch, with random weights.

RMS normalisation, rotary positions, grouped-query attention over a cache of earlier tokens, and a gated feed-forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import LLAMA

HEAD = 128
BASE = 500_000.0  # of rotary positions, ibid.


class Layer(nn.Module):
    """(batch, time, width) in and out; ``past``: tokens already in the cache, whose keys and values are random."""

    def __init__(self, model: str, past: int = 0, batch: int = 1) -> None:
        super().__init__()
        (width, _), (narrow, _), (wide, _) = (LLAMA[model][layer] for layer in ("q, o", "k, v", "gate, up"))
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)
        self.norm_attention, self.norm_feed_forward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.past = past
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(batch, narrow // HEAD, past, HEAD))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self._attend(self.norm_attention(x)))
        h = self.norm_feed_forward(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = _rotate(q, self.past), _rotate(k, self.past)
        if self.past:
            k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        # Without a cache every token sees those before it; with one, the new tokens are few and see it all.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not self.past, enable_gqa=True)
        return y.transpose(1, 2).flatten(-2)


def _rotate(x: Tensor, first: int) -> Tensor:
    frequencies = BASE ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angles = torch.outer(torch.arange(first, first + x.shape[2], device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
