"""What follows a checked int8 product, in stream order: verify, recompute, settle. Bounds are zero, so every question is one of equality.

    d_kind = Σ_tiles partials - (raw₀ + 2⁸ raw₁ + 2¹⁶ raw₂)     suspect = any d_kind ≠ 0

Suspect tiles are computed again, at most once each, before anyone reads Y:

    suspect at first, and all d zero now        RECOMPUTED     a transient fault
    suspect at first, and still                 UNCORRECTED    persistent if nothing changed

At level detect Y is left as it is, and both are OBSERVED.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MAX_REGISTERS, REPAIR_PROGRAMS
from .gemm import Product, check_tile, fault_argument
from .integer import ExactEvidence, int_data_tile, workspace
from .judgement import Shape
from .record import (
    CLEAN,
    DETAILS,
    OBSERVED,
    PERSISTENT,
    RECOMPUTED,
    TRANSIENT,
    UNCORRECTED,
    Labels,
    Units,
    count_call,
    keep,
    report,
)
from .summary import UNQUIET
from .tiles import store_tile, tile_of

DIGITS = tl.constexpr(3)
#: Columns of one radix digit of the location, as abft.checksum's.
FRAGMENT = tl.constexpr(16)


class ExactSums(NamedTuple):
    """Where the sums of a product lie: partials (kinds, tiles_n, M) int64, raw (M, C) int32."""

    partials: Any
    raw: Any


@triton.jit
def actual_sum(sums, KIND: tl.constexpr, shape, tiles_n, group, rows):
    """r of one kind: the partial sums of a group's tiles."""
    at = sums.partials + KIND * tl.cast(tiles_n, tl.int64) * shape.m + rows
    total = tl.zeros(rows.shape, tl.int64)
    first = group * shape.tiles_per_group
    for tile in range(first, tl.minimum(first + shape.tiles_per_group, tiles_n)):
        total += tl.load(at + tl.cast(tile, tl.int64) * shape.m, mask=rows < shape.m, other=0)
    return total


@triton.jit
def predicted_sum(sums, KIND: tl.constexpr, KINDS: tl.constexpr, shape, group, rows):
    """c of one kind: its three digits put together."""
    at = sums.raw + tl.cast(rows, tl.int64) * shape.c + (group * KINDS + KIND) * DIGITS
    total = tl.load(at, mask=rows < shape.m, other=0).to(tl.int64)
    for digit in tl.static_range(1, DIGITS):
        total += tl.load(at + digit, mask=rows < shape.m, other=0).to(tl.int64) << (8 * digit)
    return total


@triton.jit
def residual_of(sums, KIND: tl.constexpr, KINDS: tl.constexpr, shape, tiles_n, group, rows):
    return actual_sum(sums, KIND, shape, tiles_n, group, rows) - predicted_sum(sums, KIND, KINDS, shape, group, rows)


@triton.jit
def judge_exactly(sums, KINDS: tl.constexpr, shape, tiles_n, group, rows):
    """(suspect, the first residual that is not zero) of one group."""
    residual = residual_of(sums, 0, KINDS, shape, tiles_n, group, rows)
    for kind in tl.static_range(1, KINDS):
        d = residual_of(sums, kind, KINDS, shape, tiles_n, group, rows)
        residual = tl.where(residual == 0, d, residual)
    return residual != 0, residual


# One build for all shapes and sites, as in verify.py.
@triton.jit(do_not_specialize=["shape"], do_not_specialize_on_alignment=["site"])
def verify_exactly(sums, shape, status, flags, summary, words, site, REPEAT: tl.constexpr, KINDS: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One program per (row block, group): status (groups, M) int8, 1 where suspect, and per block flags (row blocks, groups)."""
    if tl.program_id(0) == 0:
        count_call(words, site, shape.m, REPEAT)
    block, group = tl.program_id(0) // shape.groups, tl.program_id(0) % shape.groups
    rows = block * BM + tl.arange(0, BM)
    suspect, _ = judge_exactly(sums, KINDS, shape, tl.cdiv(shape.n, BN), group, rows)
    suspect = suspect & (rows < shape.m)
    tl.store(status + tl.cast(group, tl.int64) * shape.m + rows, suspect.to(tl.int8), mask=rows < shape.m)
    found = tl.max(suspect.to(tl.int32), 0)
    tl.store(flags + block * shape.groups + group, found.to(tl.int8))
    if found > 0:
        tl.atomic_add(summary + UNQUIET, tl.cast(1, tl.int64))


@triton.jit
def recompute_exactly(a, w, panel, a_tiles, w_tiles, panel_tiles, y, weights, again, flags, summary, shape, FAULT,
                      A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, KINDS: tl.constexpr, CORRECT: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
                      TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A few programs share the tiles of the product's grid; they leave at once when nothing is suspect."""
    tiles_m, tiles_n, tiles_c = tl.cdiv(shape.m, BM), tl.cdiv(shape.n, BN), tl.cdiv(shape.c, BC)
    data_tiles = tiles_m * tiles_n
    end = tl.where(tl.load(summary + UNQUIET) > 0, data_tiles + tiles_m * tiles_c, 0)
    # Hoisted out of this loop, the addresses of both kinds of tile would not fit the registers.
    for index in tl.range(tl.program_id(0), end, tl.num_programs(0), disable_licm=True):
        if index < data_tiles:
            tile_m, tile_n = tile_of(index, tiles_m, tiles_n, TALL)
            if tl.load(flags + tile_m * shape.groups + tile_n // shape.tiles_per_group) > 0:
                acc = int_data_tile(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, weights, again.partials, tile_m, tile_n,
                                    shape.m, shape.n, shape.k, FAULT, KINDS, BM, BN, BK, PRECISION)  # fmt: skip
                if CORRECT:
                    store_tile(y, acc, 0, tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), shape.m, shape.n)
        else:
            tile_m, tile_c = tile_of(index - data_tiles, tiles_m, tiles_c, TALL)
            found = tl.cast(0, tl.int32)
            for group in range(shape.groups):
                found = tl.maximum(found, tl.load(flags + tile_m * shape.groups + group).to(tl.int32))
            if found > 0:
                check_tile(a, panel, a_tiles, panel_tiles, A_ROWS, again.raw, 0, tile_m, tile_c, shape.m, shape.c, shape.k,
                           None, BM, BC, BK, PRECISION, tl.int32)  # fmt: skip


@triton.jit(do_not_specialize=["shape", "labels"], do_not_specialize_on_alignment=["site"])
def settle_exactly(first, again, weights, status, shape, words, site, summary, details, units, labels, CORRECT: tl.constexpr,
                   KINDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One block of rows per program; all leave at once when nothing was found."""
    if tl.load(summary + UNQUIET) > 0:
        rows, tiles_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.cdiv(shape.n, BN)
        suspect, wrong, changed = rows < 0, rows < 0, rows < 0
        worst, column = tl.zeros((BM,), tl.float32), tl.full((BM,), -1, tl.int32)
        for group in tl.range(shape.groups, disable_licm=True):
            mine = tl.load(status + tl.cast(group, tl.int64) * shape.m + rows, mask=rows < shape.m, other=0) > 0
            if tl.max(mine.to(tl.int32), 0) > 0:
                _, d = judge_exactly(first, KINDS, shape, tiles_n, group, rows)
                still, now = judge_exactly(again, KINDS, shape, tiles_n, group, rows)
                col = locate_exactly(first, weights, KINDS, shape, tiles_n, BN, group, rows)
                more = mine & (tl.abs(d.to(tl.float32)) > tl.abs(worst))
                worst, column = tl.where(more, d.to(tl.float32), worst), tl.where(more, col, column)
                suspect, wrong = suspect | mine, wrong | (mine & still)
                changed |= mine & (d != now)
        fault = UNCORRECTED if CORRECT else OBSERVED
        verdict = tl.where(suspect, tl.where(wrong, fault, RECOMPUTED if CORRECT else OBSERVED), CLEAN)
        cause = tl.where(suspect, tl.where(~wrong, TRANSIENT, tl.where(changed, 0, PERSISTENT)), 0)
        keep(details, rows, shape.m, worst, tl.zeros((BM,), tl.float32), column, cause, 0, -1, suspect & (rows < shape.m))
        report(words, site, summary, details, units, verdict, tl.abs(worst), tl.cast(tl.program_id(0) * BM, tl.int64), shape.m, labels)


@triton.jit
def locate_exactly(sums, weights, KINDS: tl.constexpr, shape, tiles_n, BN: tl.constexpr, group, rows):
    """The column whose change alone explains all residuals of a group, or -1, per row. One element changed by δ leaves
    d = δ (ε, 1, ε hi, ε lo): exact quotients, so there is no doubt about any bit of any column."""
    if KINDS == 1:
        return tl.full(rows.shape, -1, tl.int32)
    d_e, d_one = residual_of(sums, 0, KINDS, shape, tiles_n, group, rows), residual_of(sums, 1, KINDS, shape, tiles_n, group, rows)
    start = group * shape.tiles_per_group * BN
    width = tl.minimum(shape.tiles_per_group * BN, shape.n - start)
    fragments = tl.cdiv(width, FRAGMENT)
    hi, hi_fits = _digit(residual_of(sums, 2, KINDS, shape, tiles_n, group, rows), d_e, fragments - 1)
    lo, lo_fits = _digit(residual_of(sums, 3, KINDS, shape, tiles_n, group, rows), d_e, FRAGMENT - 1)
    column = hi * FRAGMENT + lo
    fits = hi_fits & lo_fits & (d_e != 0) & (lo < FRAGMENT) & (column < width)
    sign = tl.load(weights + start + column, mask=fits, other=0)
    return tl.where(fits & (sign * d_one == d_e), (start + column).to(tl.int32), -1)


@triton.jit
def _digit(d, d_e, largest):
    """(j, whether d = (2j - largest) d_e with j from 0 to ``largest``). fp64 holds both numbers, and so their quotient if it is whole."""
    quotient = (d.to(tl.float64) / tl.where(d_e == 0, 1, d_e).to(tl.float64)).to(tl.int64)
    twice = quotient + largest
    return twice // 2, (quotient * d_e == d) & (twice >= 0) & (twice % 2 == 0) & (twice <= 2 * largest)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactJudge:
    """The order of the panel, and what to do about a suspect row."""

    groups: int
    tiles_per_group: int
    correct: bool
    repeat: bool = False  # recomputation under activation checkpointing


def check(product: Product, evidence: ExactEvidence, judge: ExactJudge, words: Tensor, site: Tensor, labels: Labels,
          faults: Tensor | None = None) -> Tensor:  # fmt: skip
    """Verify, repair, settle. Y is repaired in place; returns which rows were suspect at first, (groups, M) int8.

    words, site: abft.ledger, abft.sites. ``faults`` hit the repetition.
    """
    _, m, n, k, c = product.sizes
    y, config, device = evidence.y, product.config, product.a.device
    blocks = -(-m // config.bm)
    partials, raw = workspace(product)
    status = torch.empty(judge.groups, m, dtype=torch.int8, device=device)
    flags = torch.empty(blocks * judge.groups, dtype=torch.int8, device=device)
    details = torch.empty(DETAILS.value, m, dtype=torch.int32, device=device)
    first, again = ExactSums(evidence.partials, evidence.raw), ExactSums(partials, raw)
    shape = Shape(m, n, k, c, judge.groups, judge.tiles_per_group)
    order = {"KINDS": product.kinds, "BM": config.bm, "BN": config.bn}
    order |= {"num_warps": 4, "maxnreg": MAX_REGISTERS}
    verify_exactly[(blocks * judge.groups,)](
        first, shape, status, flags, evidence.summary, words, site, REPEAT=judge.repeat, **order
    )  # fmt: skip
    operands, layout = product.operands()
    recompute_exactly[(max(1, min(sum(product.tiles), REPAIR_PROGRAMS)),)](
        *operands, y, product.weights, again, flags, evidence.summary, shape, fault_argument(faults),
        **layout, KINDS=product.kinds, CORRECT=judge.correct, **(config.launch() | {"maxnreg": MAX_REGISTERS}),
    )  # fmt: skip
    settle_exactly[(blocks,)](
        first, again, product.weights, status, shape, words, site, evidence.summary, details, Units(None, None), labels,
        CORRECT=judge.correct, **order,
    )  # fmt: skip
    return status
