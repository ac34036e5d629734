"""FLOP formula of the checked product, so that users' MFU counts what it counted before."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


@register_flop_formula(torch.ops.abft.product)
def product_flops(a_shape: Any, ta: bool, b_shape: Any, tb: bool, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 M N K per batch: the product's own work, without the checks (reported by ``bench``)."""
    rows, depth = (a_shape[-1], a_shape[-2]) if ta else (a_shape[-2], a_shape[-1])
    columns = b_shape[-1] if tb else b_shape[-2]
    batch = 1
    for size in a_shape[:-2]:
        batch *= size
    return 2 * batch * rows * columns * depth
