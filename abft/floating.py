"""Rounding facts of the floating types, and splitting a float into parts a narrower type can hold."""

from __future__ import annotations

import torch
from torch import Tensor

#: Half the spacing at 1: no rounding to the type moves a normal number by more than this, relatively.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

#: The type in which products of a type are accumulated.
ACCUMULATOR = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

#: How many parts of the operand type carry an fp32 checksum without loss that matters
#: (docs/explanation/thresholds, "the checksum vector needs fp32 accuracy").
PARTS = {torch.float64: 1, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

#: Where the widest fp16 part is placed by its power-of-two scale: far from both ends of the type.
FP16_TARGET_EXPONENT = 12


def is_checked(dtype: torch.dtype) -> bool:
    """Whether products of this dtype can be checked at all."""
    return dtype in UNIT_ROUNDOFF


def smallest_normal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny


def split(values: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """Write ``values`` (..., K), fp32 or fp64, as a sum of ``parts`` numbers of ``dtype``: (..., parts, K).

    Each part is the rounding of what the parts before it left over, so an fp32 number splits
    exactly into three bf16 numbers.
    """
    left = values
    pieces = []
    for _ in range(parts):
        piece = left.to(dtype)
        pieces.append(piece)
        # A non-finite piece stays alone: Inf - Inf would turn the remainder into NaN.
        left = torch.where(torch.isfinite(piece), left - piece.to(values.dtype), torch.zeros_like(left))
    return torch.stack(pieces, dim=-2)


def power_of_two_scale(values: Tensor, target_exponent: int = FP16_TARGET_EXPONENT) -> Tensor:
    """The power of two, per last-dimension vector, that ``values`` are divided by to peak near 2**target.

    Returns fp32 of shape (..., 1). Exact to apply and to undo; 1 for an all-zero or non-finite vector.
    """
    peak = values.abs().amax(dim=-1, keepdim=True) if values.shape[-1] else values.new_zeros((*values.shape[:-1], 1))
    _, exponent = torch.frexp(peak.float())
    usable = torch.isfinite(peak) & (peak > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(peak, dtype=torch.float32), exponent - target_exponent), 1.0)
