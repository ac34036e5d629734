"""Decoder layers with the sizes of Llama 3 (arXiv 2407.21783, table 3), and a small model of them, in plain torch, with random weights.

RMS normalisation, rotary positions, grouped-query attention over a cache of earlier tokens, and a gated feed-forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attention_layer import Attention
from bench.shapes import LLAMA

HEAD = 128
BASE = 500_000.0  # of rotary positions, ibid.
#: (width, of all keys' heads, feed-forward): of the models, and of a small one with the same proportions.
SIZES = {name: tuple(layers[x][0] for x in ("q, o", "k, v", "gate, up")) for name, layers in LLAMA.items()}
SIZES["small"] = (1024, 256, 3584)
SMALL_LAYERS, SMALL_VOCABULARY = 4, 4096


class Layer(nn.Module):
    """(batch, time, width) in and out; ``past``: tokens already in the cache, whose keys and values are random."""

    def __init__(self, model: str, past: int = 0, batch: int = 1) -> None:
        super().__init__()
        width, narrow, wide = SIZES[model]
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)
        self.norm_attention, self.norm_feed_forward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.past = past
        # Without a cache every token sees those before it; with one, the new tokens are few and see it all.
        self.attention = Attention(causal=not past)
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
        return self.attention(q, k, v).transpose(1, 2).flatten(-2)


class Llama(nn.Module):
    """A small model end to end: token numbers (batch, time) in, logits out; with targets, their loss."""

    def __init__(self, past: int = 0, batch: int = 1) -> None:
        super().__init__()
        width, _, _ = SIZES["small"]
        self.words, self.norm = nn.Embedding(SMALL_VOCABULARY, width), nn.RMSNorm(width)
        self.layers = nn.Sequential(*(Layer("small", past, batch) for _ in range(SMALL_LAYERS)))
        self.head = nn.Linear(width, SMALL_VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.head(self.norm(self.layers(self.words(tokens))))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _rotate(x: Tensor, first: int) -> Tensor:
    frequencies = BASE ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    angles = torch.outer(torch.arange(first, first + x.shape[2], device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
