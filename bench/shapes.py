"""Named products, as data: Y (M, N) = X (M, K) Wᵀ, where they come from, and how many tokens (rows) each is timed with.

llama8b, llama70b   Llama 3's linear layers (arXiv 2407.21783, table 3: d_model 4096 and 8192, 32 and 64 query heads and 8 key heads of
                    128, feed-forward 14336 and 28672; gate and up are timed one at a time), 1 to 8192 tokens
square              M = N = K, as everybody times matrix products
wide                N = K, 512 tokens
minilm              all-MiniLM-L6-v2 (6 layers, 384 wide, feed-forward 1536), a batch of 16 × 128 tokens, and one text of 16
gpt                 the demo's GPT (demo/gpt.py: 128 wide), a batch of 16 × 64 characters
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: model → layer → (N, K)
LLAMA = {
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3-70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
}
LLAMA_TOKENS = (1, 4, 16, 64, 512, 8192)
MINILM = {"qkvo": (384, 384), "up": (1536, 384), "down": (384, 1536)}
MINILM_TOKENS = (16, 16 * 128)
GPT = {"qkv": (384, 128), "out": (128, 128), "up": (512, 128), "down": (128, 512)}
GPT_TOKENS = (16 * 64,)


@dataclass(frozen=True)
class Shape:
    name: str
    m: int
    n: int
    k: int
    bias: bool = False

    @property
    def multiplications(self) -> int:
        return self.m * self.n * self.k


def every() -> Iterator[Shape]:
    for size in (1024, 4096, 8192):
        yield Shape(f"square-{size}", size, size, size)
    for size in (1024, 2048, 4096):
        yield Shape(f"wide-{size}", 512, size, size)
    for model, layers in LLAMA.items():
        for layer, (n, k) in layers.items():
            for m in LLAMA_TOKENS:
                yield Shape(f"{_short(model)}-{layer.replace(', ', '')}-{m}", m, n, k)
    for model, layers, tokens in (("minilm", MINILM, MINILM_TOKENS), ("gpt", GPT, GPT_TOKENS)):
        for layer, (n, k) in layers.items():
            for m in tokens:
                yield Shape(f"{model}-{layer}-{m}", m, n, k, bias=True)


def _short(model: str) -> str:
    return model.lower().replace("-3-", "").replace("-", "")


#: Without a GPU: what takes seconds, not minutes. llama8b-qo-1 is one token at 4096².
ON_CPU = ("square-1024", "wide-1024", "wide-2048", "llama8b-qo-1", "llama8b-qo-16", "minilm-*", "gpt-*")
ON_GPU = ("*",)


def named(patterns: Iterable[str]) -> list[Shape]:
    """The shapes whose names match any of the patterns (``llama8b-*-1``), in their own order. A pattern without a match: ValueError."""
    found, all_of_them = [], list(every())
    for pattern in patterns:
        matching = [shape for shape in all_of_them if fnmatch.fnmatchcase(shape.name, pattern)]
        if not matching:
            raise ValueError(f"no shape is called {pattern!r}; `python -m bench linear --list` names them")
        found += matching
    return sorted(set(found), key=all_of_them.index)
