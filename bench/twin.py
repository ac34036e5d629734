"""Unchecked twins: the kernels without their checks, and nothing else different.

    Y = A Wᵀ + b        persistent programs over the same tiles, through the same device functions, in the same configuration

What a check costs is the checked product's time over its twin's; what the kernel itself costs is the twin's over the vendor's. That of
attention is the same kernel, compiled without checks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from abft.triton_kernels.attention_forward import Attention, unchecked
from abft.triton_kernels.configs import multiprocessors
from abft.triton_kernels.gemm import Product
from abft.triton_kernels.tiles import accumulate, finish, store_tile, tile_of
from torch import Tensor


@triton.jit(do_not_specialize=["batches"])
def unchecked_product(a, w, a_tiles, w_tiles, bias, y, M, N, K, batches,
                      A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Every program: its data tiles, as in gemm.checked_product."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), batches * tiles_m * tiles_n, tl.num_programs(0), disable_licm=True):
        batch = index // (tiles_m * tiles_n)
        tile_m, tile_n = tile_of(index % (tiles_m * tiles_n), tiles_m, tiles_n, TALL)
        rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
        acc = accumulate(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, batch, tile_m * BM, tile_n * BN, M, N, K, None,
                         BM, BN, BK, PRECISION)  # fmt: skip
        store_tile(y, finish(acc, bias, cols, N, y.dtype.element_ty), batch, rows, cols, M, N)


def multiply(product: Product) -> Tensor:
    """Y of a product, unchecked; its panel is not looked at."""
    a, config = product.a, product.config
    batch, m, n, k, _ = product.sizes
    programs = max(1, min(product.tiles[0], config.resident * multiprocessors(a.device)))
    y = torch.empty(*a.shape[:-1], n, dtype=a.dtype, device=a.device)
    (a_at, w_at, _, a_tiles, w_tiles, _), order = product.operands()
    options = {key: value for key, value in config.launch().items() if key != "BC"}
    unchecked_product[(programs,)](a_at, w_at, a_tiles, w_tiles, product.bias, y, m, n, k, batch, **order, **options)
    return y


def attend(attention: Attention) -> Tensor:
    """O of an attention, unchecked; its weights are not looked at."""
    return unchecked(attention)
