"""Which probabilities dropout keeps: a function of (seed, head, query, key) alone, so that whoever computes again drops the same.

A 32-bit hash of the counters (C. Wellons, "lowbias32", public domain), a few integer operations that every device has. It is not the stream
of torch's generator; the seed is drawn from that, so ``torch.manual_seed`` repeats a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2³² / golden ratio: spreads neighbouring counters


def keep(seed: int, head: Tensor, query: Tensor, key: Tensor, p: float) -> Tensor:
    """bool (*head, query, key): True with probability 1 - p. head: any shape; query, key: (n,); int64, all counters below 2³²."""
    base = _mix(_mix(head + (seed & _LOW)) ^ (seed >> 32 & _LOW))
    row = _mix(base.unsqueeze(-1) ^ (query * _GOLDEN & _LOW))
    return _mix(row.unsqueeze(-1) ^ (key * _GOLDEN & _LOW)) >= round(p * 2.0**32)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, held in int64; products wrap modulo 2⁶⁴, whose low half is the one modulo 2³²."""
    x = x & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of a CPU: 0-d int64."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)
