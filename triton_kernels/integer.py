"""The checked int8 product Y = A Wᵀ in int32: one launch computes the result and, twice over, what its rows must sum to, exactly.

    data tiles     acc = A[rows] · W[cols]ᵀ                    int32 accumulator
                   partials[kind, tile_n, m] = Σ_n w_kind acc  int64: nothing wraps, nothing is rounded
                   Y = acc
    check tiles    raw[m, c] = A[rows] · P[c]ᵀ                  P (C, K) int8 the panel: three base-256 digits of each checksum

Programs, order of tiles and K loop are those of gemm.py. What is compared, and what happens then: integer_check.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import multiprocessors
from .gemm import Product, check_tile, fault_argument, first_check_tile
from .summary import clear, words
from .tiles import ACCUMULATOR, ONE, OUTPUT, accumulate, store_tile, strike, tile_of
from .waves import check_cost, deal


@triton.jit(do_not_specialize=["deal", "summary_words"])
def checked_int_product(a, w, panel, a_tiles, w_tiles, panel_tiles, y, weights, partials, raw, summary, summary_words, deal,
                        M, N, K, C, FAULT, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, KINDS: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
                        TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Every program: its data tiles, then its check tiles."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    clear(summary, summary_words)
    tiles_m, tiles_n, tiles_c = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(C, BC)
    # Hoisted out of their loops, the addresses of both kinds of tile would not fit the registers.
    for index in tl.range(program, tiles_m * tiles_n, programs, disable_licm=True):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, TALL)
        acc = int_data_tile(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, weights, partials, tile_m, tile_n, M, N, K, FAULT, KINDS,
                            BM, BN, BK, PRECISION)  # fmt: skip
        store_tile(y, acc, 0, tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), M, N)
    rank = (program - deal.behind + programs) % programs
    for index in tl.range(first_check_tile(rank, programs, deal), first_check_tile(rank + 1, programs, deal), disable_licm=True):
        tile_m, tile_c = tile_of(index, tiles_m, tiles_c, TALL)
        check_tile(a, panel, a_tiles, panel_tiles, A_ROWS, raw, 0, tile_m, tile_c, M, C, K, FAULT, BM, BC, BK, PRECISION, tl.int32)


@triton.jit
def int_data_tile(a, w, a_tiles, w_tiles, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, weights, partials, tile_m, tile_n,
                  M, N, K, FAULT, KINDS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What a tile of Y becomes; its sums are stored."""
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = accumulate(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, 0, tile_m * BM, tile_n * BN, M, N, K, FAULT,
                     BM, BN, BK, PRECISION, ACC=tl.int32)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, ACCUMULATOR, 0, rows, cols, 0, 1)
    store_exact_sums(acc, weights, partials, KINDS, tile_n, tl.cdiv(N, BN), rows, cols, M, N)
    if FAULT is not None:
        acc = strike(acc, FAULT, OUTPUT, 0, rows, cols, 0, 1)
    return acc


@triton.jit
def store_exact_sums(acc, weights, partials, KINDS: tl.constexpr, tile_n, tiles_n, rows, cols, M, N):
    """partials[kind, tile_n, row] int64; neighbouring rows lie side by side."""
    plane = tl.cast(tiles_n, tl.int64) * M
    at = partials + tl.cast(tile_n, tl.int64) * M + rows
    # int32 multiplies cheapest. ``low`` wraps, but r - 2¹⁶ high, at most 2¹⁶ · 87 · 128 columns, fits: the two know r.
    for kind in tl.static_range(KINDS):
        if kind == ONE:
            low, high = tl.sum(acc, axis=1), tl.sum(acc >> 16, axis=1)
        else:
            weight = tl.load(weights + kind * N + cols, mask=cols < N, other=0)[None, :]
            low, high = tl.sum(acc * weight, axis=1), tl.sum((acc >> 16) * weight, axis=1)
        exact = (high.to(tl.int64) << 16) + (low - (high << 16)).to(tl.int64)
        tl.store(at + kind * plane, exact, mask=rows < M)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactEvidence:
    """A product and the sums that tell whether it is right."""

    y: Tensor  # (M, N) int32
    partials: Tensor  # (kinds, tiles_n, M) int64
    raw: Tensor  # (M, C) int32
    summary: Tensor  # summary.py's words, zero


def workspace(product: Product) -> tuple[Tensor, Tensor]:
    """Uninitialised (partials, raw); per call, for two streams would race."""
    _, m, n, _, c = product.sizes
    partials = torch.empty(product.kinds, -(-n // product.config.bn), m, dtype=torch.int64, device=product.a.device)
    return partials, torch.empty(m, c, dtype=torch.int32, device=product.a.device)


def multiply(product: Product, faults: Tensor | None = None) -> ExactEvidence:
    """Launch. A, W and the panel int8, 2-D; weights (kinds, N) int32. ``faults``: as in gemm.multiply."""
    a, config = product.a, product.config
    _, m, n, k, c = product.sizes
    data_tiles, check_tiles = product.tiles
    programs = max(1, min(data_tiles + check_tiles, config.resident * multiprocessors(a.device)))
    dealt = deal(data_tiles, check_tiles, programs, check_cost(config.bn, config.bc))
    y = torch.empty(m, n, dtype=torch.int32, device=a.device)
    partials, raw = workspace(product)
    summary = torch.empty(words(1, product.groups), dtype=torch.int64, device=a.device)
    operands, order = product.operands()
    checked_int_product[(programs,)](
        *operands, y, product.weights, partials, raw, summary, summary.numel(), dealt, m, n, k, c, fault_argument(faults),
        **order, KINDS=product.kinds, **config.launch(),
    )  # fmt: skip
    return ExactEvidence(y, partials, raw, summary)


