"""A small character-level GPT in plain torch: ``nn.Linear`` and ``nn.MultiheadAttention``, so ``abft.protect`` finds every product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """0.6 M parameters: large enough to learn indentation, keywords and names in a minute on two cores."""

    symbols: int
    context: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 3


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        y, length = self.norm_attention(x), x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)  # True: not seen
        x = x + self.attention(y, y, y, attn_mask=later, is_causal=True, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Characters in, mean cross entropy of the next character out (nats per character)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.characters = nn.Embedding(shape.symbols, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.symbols)
        self.apply(_initialise)

    def forward(self, characters: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.blocks(self.characters(characters) + self.positions(positions))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    # Unit variance in, unit variance out; embeddings start quiet (torch's default of 1 drowns the first layers).
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=module.embed_dim**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
