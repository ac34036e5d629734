"""Attention as a module without weights, so that whoever computes it can be exchanged."""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import attention
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import abft

#: torch's own kernels, by the names that providers have here.
KERNELS = {
    "flash": attention.SDPBackend.FLASH_ATTENTION, "efficient": attention.SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": attention.SDPBackend.CUDNN_ATTENTION, "math": attention.SDPBackend.MATH,
}  # fmt: skip

#: Tokens of a page.
PAGE = 64
#: That are held at a time in fp64: half a gigabyte.
SCORES = 1 << 26


class Attention(nn.Module):
    """query (..., heads, L, E), key and value (..., key heads, S, E) → (..., heads, L, E).

    policy: None leaves it to torch. kernel: the one of torch's to insist on; torch raises where it cannot. paged: over a cache that is
    written when keys are seen for the first time, and read from then on; torch's answer is that of such a step if queries are one.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.policy: abft.Policy | None = None
        self.kernel: str | None = None
        self.paged = False
        self._caches: dict[int, tuple[weakref.ref[Tensor], abft.PagedCache, Tensor, Tensor]] = {}
        #: (L, S, E) of the last call: what its checks are made of
        self.shape: tuple[int, int, int] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[-3] != key.shape[-3]
        if query.dtype == torch.float64:
            return exactly(query, key, value, self.causal)
        if self.paged and self.policy is not None:
            return self._over_pages(query, key, value, self.policy)
        if self.policy is not None:
            self.shape = (query.shape[-2], key.shape[-2], query.shape[-1])
            return abft.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=grouped, policy=self.policy)
        with self._insisting():
            return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=grouped)

    def _over_pages(self, query: Tensor, key: Tensor, value: Tensor, policy: abft.Policy) -> Tensor:
        if query.shape[-2] != 1 and not self.causal:
            raise ValueError("over pages queries see none behind them: time a decoding step, or causal attention")
        self.shape = (query.shape[-2], key.shape[-2], query.shape[-1])
        known = self._caches.get(key.data_ptr())
        if known is None or known[0]() is not key:  # others may lie where these lay
            cache = abft.PagedCache.of(key, value, PAGE)
            lengths = torch.full((len(key),), key.shape[-2], dtype=torch.int32, device=key.device)
            known = self._caches[key.data_ptr()] = weakref.ref(key), cache, cache.table(len(key)), lengths
        _, cache, table, lengths = known
        return abft.paged_attention(query, cache, table, lengths, policy=policy)

    def _insisting(self) -> AbstractContextManager[None]:
        if self.kernel is None or torch.compiler.is_compiling():
            return nullcontext()
        return attention.sdpa_kernel(KERNELS[self.kernel])

    def extra_repr(self) -> str:
        return f"causal={self.causal}"


def exactly(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """The same by definition, what the others are compared with: a few queries at a time, of 32,768 in fp64 the scores fit nowhere."""
    shared = query.shape[-3] // key.shape[-3]
    key, value = (t.repeat_interleave(shared, -3) for t in (key, value))
    each = max(1, SCORES // (key.shape[:-1].numel()))
    blocks = [
        checkpoint(_block, query[..., i : i + each, :], key, value, i if causal else None, use_reentrant=False)
        for i in range(0, query.shape[-2], each)
    ]
    return torch.cat(blocks, -2)


def _block(query: Tensor, key: Tensor, value: Tensor, first: int | None) -> Tensor:
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if first is not None:
        position = torch.arange(first, first + query.shape[-2], device=query.device)
        scores = scores.masked_fill(torch.arange(key.shape[-2], device=query.device) > position[:, None], -torch.inf)
    return scores.softmax(-1) @ value


def given(model: nn.Module, policy: abft.Policy | None, kernel: str | None = None, paged: bool = False) -> nn.Module:
    """Every attention of a model in the hands of a policy, or of one of torch's kernels; in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.policy, module.kernel, module.paged = policy, kernel, paged
    return model
