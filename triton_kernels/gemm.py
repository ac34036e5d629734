"""The checked product Y = A Wᵀ + b: one launch computes the result and, twice over, what its rows must sum to.

    data tiles     acc = A[rows] · W[cols]ᵀ                    fp32 accumulator
                   partials[:, tile_n, m] = Σ_n w_j acc for every kind j of sum, Σ_n acc²
                   Y = cast(acc + b)
    check tiles    raw[m, c] = A[rows] · P[c]ᵀ                  P (C, K) the panel: weighted sums of W's rows

Persistent programs, as many as run at once: each computes its data tiles, then its check tiles (waves.py). Two loops with
one kind of tile each, for only then are both K loops pipelined on warpgroup MMA.

P was built from W beforehand, so Σ_n w_n acc[m, n] and A[m] · (Σ_n w_n W[n]) are the same number computed along two
paths, and differ by rounding or by a fault. Two choices make the comparison sharp:

  * sums are taken from the accumulator, before bias and cast: rounding Y would hide errors a thousand times larger;
  * check tiles run the data tiles' K loop on the same units, so that the truncation of tensor cores, which is a bias and
    not a noise, is common to both and cancels.

Who compares them, and what happens then: verify.py, repair.py, settle.py. The bias lies outside the check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import smid

from .configs import Config, multiprocessors
from .summary import clear, words
from .tiles import (
    ACCUMULATOR,
    CHECKSUM,
    OUTPUT,
    Faults,
    accumulate,
    descriptor,
    finish,
    matrix,
    store_sums,
    store_tile,
    strike,
    tile_of,
)
from .waves import Deal, deal


@triton.jit(do_not_specialize=["deal", "batches", "summary_words"])
def checked_product(a, w, panel, a_tiles, w_tiles, panel_tiles, bias, y, weights, partials, raw, units, summary, summary_words,
                    deal, M, N, K, C, batches, FAULT, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, KINDS: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
                    TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Every program: its data tiles, then its check tiles."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    clear(summary, summary_words)
    tiles_m, tiles_n, tiles_c = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(C, BC)
    # Hoisted out of their loops, the addresses of both kinds of tile would not fit the registers.
    for index in tl.range(program, batches * tiles_m * tiles_n, programs, disable_licm=True):
        tile_m, tile_n = tile_of(index % (tiles_m * tiles_n), tiles_m, tiles_n, TALL)
        note_unit(units, (index // (tiles_m * tiles_n) * tiles_m + tile_m) * tiles_n + tile_n)
        _data_tile(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, bias, y, weights, partials, index // (tiles_m * tiles_n),
                   tile_m, tile_n, M, N, K, FAULT, KINDS, BM, BN, BK, PRECISION)  # fmt: skip
    rank = (program - deal.behind + programs) % programs
    for index in tl.range(first_check_tile(rank, programs, deal), first_check_tile(rank + 1, programs, deal), disable_licm=True):
        tile_m, tile_c = tile_of(index % (tiles_m * tiles_c), tiles_m, tiles_c, TALL)
        check_tile(a, panel, a_tiles, panel_tiles, A_ROWS, raw, index // (tiles_m * tiles_c), tile_m, tile_c, M, C, K,
                   FAULT, BM, BC, BK, PRECISION)  # fmt: skip


@triton.jit
def note_unit(units, tile):
    """Remember which multiprocessor computes a data tile; units: (B, row blocks, tiles_n) int32, or None where they have no numbers."""
    if units is not None:
        tl.store(units + tile, smid())


@triton.jit
def first_check_tile(rank, programs, deal):
    """As waves.first_of."""
    evenly = deal.share * rank + tl.minimum(rank, deal.share_more)
    return evenly + deal.early * tl.minimum(rank, programs - deal.behind) + tl.minimum(rank, deal.early_more)


@triton.jit
def _data_tile(a, w, a_tiles, w_tiles, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, bias, y, weights, partials,
               batch, tile_m, tile_n, M, N, K, FAULT, KINDS: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = accumulate(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, batch, tile_m * BM, tile_n * BN, M, N, K, FAULT,
                     BM, BN, BK, PRECISION)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, ACCUMULATOR, batch, rows, cols, 0, 1)
    store_sums(acc, weights, partials, KINDS + 1, KINDS, batch, tile_n, tl.cdiv(N, BN), rows, cols, M, N,
               a.ptr.dtype.element_ty, PRECISION)  # fmt: skip
    out = finish(acc, bias, cols, N, y.dtype.element_ty)
    if FAULT is not None:
        out = strike(out, FAULT, OUTPUT, batch, rows, cols, 0, 1)
    store_tile(y, out, batch, rows, cols, M, N)


@triton.jit
def check_tile(a, panel, a_tiles, panel_tiles, A_ROWS: tl.constexpr, raw, batch, tile_m, tile_c, M, C, K, FAULT,
               BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
               ACC: tl.constexpr = tl.float32):  # fmt: skip
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_c * BC + tl.arange(0, BC)
    acc = accumulate(a, panel, a_tiles, panel_tiles, A_ROWS, True, batch, tile_m * BM, tile_c * BC, M, C, K, None,
                     BM, BC, BK, PRECISION, ACC=ACC)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, CHECKSUM, batch, rows, cols, 0, 1)
    store_tile(raw, acc, batch, rows, cols, M, C)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Everything about one product that its launches share. A (M, K) or (B, M, K); W and the panel likewise or 2-D."""

    a: Tensor
    w: Tensor
    bias: Tensor | None  # (N,), contiguous
    panel: Tensor  # (C, K), checksums of W's rows
    weights: Tensor  # (kinds, N) fp32, contiguous: what every column counts in every sum
    groups: int  # of the result's columns, checked apart
    config: Config
    numbered: bool = True  # multiprocessors have numbers

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(batch, M, N, K, C)"""
        batch = self.a.shape[0] if self.a.dim() == 3 else 1
        return batch, self.a.shape[-2], self.w.shape[-2], self.a.shape[-1], self.panel.shape[-2]

    @property
    def kinds(self) -> int:
        """Sums of every row that are judged: e, one, hi, lo, or e alone."""
        return self.weights.shape[0]

    def operands(self) -> tuple[tuple[Any, ...], dict[str, bool]]:
        """A, W and the panel as kernel arguments: their pointers and strides, then descriptors of their tiles or None; flags."""
        c = self.config
        left = descriptor(self.a, c.bm, c.bk) if c.descriptors else None
        right = descriptor(self.w, c.bn, c.bk) if left else None
        checks = descriptor(self.panel, c.bc, c.bk) if right else None
        found = (left, right, checks) if left and right and checks else ((None, True),) * 3
        (a, a_rows), (w, w_rows), (panel, _) = found  # type: ignore[misc]
        matrices = matrix(self.a), matrix(self.w), matrix(self.panel)
        return (*matrices, a, w, panel), {"A_ROWS": a_rows, "W_ROWS": w_rows}

    @property
    def tiles(self) -> tuple[int, int]:
        """(data tiles, check tiles), over the batch."""
        batch, m, n, _, c = self.sizes
        rows = batch * -(-m // self.config.bm)
        return rows * -(-n // self.config.bn), rows * -(-c // self.config.bc)

    def dealt(self) -> tuple[int, Deal]:
        """(programs, what each of them computes): as many as run at once, and no more than there are tiles."""
        data, checks = self.tiles
        programs = max(1, min(data + checks, self.config.resident * multiprocessors(self.a.device)))
        return programs, deal(data, checks, programs, self.config.check_cost)

    def workspace(self, planes: int) -> tuple[Tensor, Tensor]:
        """Uninitialised (partials (B, planes, tiles_n, M), raw (B, M, C)), fp32; per call, for two streams would race."""
        batch, m, n, _, c = self.sizes
        partials = torch.empty(batch, planes, -(-n // self.config.bn), m, dtype=torch.float32, device=self.a.device)
        return partials, torch.empty(batch, m, c, dtype=torch.float32, device=self.a.device)

    def units(self) -> Tensor | None:
        """Uninitialised room for the number of every data tile's multiprocessor; None in the interpreter and on AMD."""
        if not self.numbered:
            return None
        return torch.empty(self.tiles[0], dtype=torch.int32, device=self.a.device)


@dataclass(frozen=True)
class Evidence:
    """A product and the sums that tell whether it is right."""

    y: Tensor  # (M, N) or (B, M, N)
    partials: Tensor  # (B, kinds + 1, tiles_n, M) fp32
    raw: Tensor  # (B, M, C) fp32
    units: Tensor | None  # (B, row blocks, tiles_n) int32: the multiprocessor of each data tile; None where they have no numbers
    summary: Tensor  # summary.words(…) int64, zero


def multiply(product: Product, faults: Tensor | None = None) -> Evidence:
    """Launch. ``faults``: (count, 12) int32 descriptors (tiles.strike), or None."""
    a, config = product.a, product.config
    batch, m, n, k, c = product.sizes
    programs, dealt = product.dealt()
    y = torch.empty(*a.shape[:-1], n, dtype=a.dtype, device=a.device)
    partials, raw = product.workspace(product.kinds + 1)
    summary = torch.empty(words(batch, product.groups), dtype=torch.int64, device=a.device)
    units = product.units()
    operands, order = product.operands()
    checked_product[(programs,)](
        *operands, product.bias, y, product.weights,
        partials, raw, units, summary, summary.numel(), dealt, m, n, k, c, batch, fault_argument(faults), **order, KINDS=product.kinds,
        **config.launch(),
    )  # fmt: skip
    return Evidence(y, partials, raw, units, summary)


def fault_argument(faults: Tensor | None) -> Any:
    """Faults, or None: then no instruction of the kernel knows of them."""
    return None if faults is None else Faults(faults, faults.shape[0])
