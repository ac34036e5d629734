"""The architecture of the sentence encoder all-MiniLM-L6-v2 (a BERT of 6 layers), in plain torch, with random weights.

Time does not depend on the values, so nothing is downloaded. Sizes: the model's config.json (hidden_size 384, num_hidden_layers 6,
num_attention_heads 12, intermediate_size 1536, vocab_size 30522, max_position_embeddings 512).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attention_layer import Attention

WIDTH, LAYERS, HEADS, FEED_FORWARD, VOCABULARY, POSITIONS = 384, 6, 12, 1536, 30522, 512
EPSILON = 1e-12  # layer_norm_eps


class Layer(nn.Module):
    """One BERT layer: attention, then feed-forward, each followed by its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, FEED_FORWARD), nn.Linear(FEED_FORWARD, WIDTH)
        self.norm_attention, self.norm_feed_forward = (nn.LayerNorm(WIDTH, EPSILON) for _ in range(2))
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = self.attention(q, k, v).transpose(1, 2).flatten(-2)
        x = self.norm_attention(x + self.out(attended))
        return self.norm_feed_forward(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Token numbers (batch, time) in, hidden states (batch, time, 384) out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.layers(self.norm(self.words(tokens) + self.positions(positions)))
