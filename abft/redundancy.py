"""Redundancy: the same product executed again, compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from abft import bits

Execute = Callable[[int], Tensor]  # replica number → result; every call is a real execution


def vote(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The bitwise majority of three results, element by element; where all three differ, the third."""
    xy = bits.same(x, y)
    return torch.where(xy, x, z)


def agreeing_rows(x: Tensor, y: Tensor) -> Tensor:
    """bool (..., M): rows of two results that are equal bit for bit."""
    return bits.same(x, y).all(-1)


def undecided_rows(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """bool (..., M): rows with an element on which no two of three results agree."""
    return ~(bits.same(x, y) | bits.same(y, z) | bits.same(x, z)).all(-1)
