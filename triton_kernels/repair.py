"""Repair: compute the tiles that hold suspect rows again, before anyone reads Y.

The same device functions, in the same configuration, on the same operands: without a fault a repetition has the same bits,
so what differs was a fault. The new sums are kept apart from the old, for settle.py to compare. Every tile at most once, and
no more tiles than the budget: the work is bounded by one more product. Where arbitration found that elements of W changed in
memory, W is multiplied as it was remembered. At level detect Y is left as it is, and the repetition only tells what had happened.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arbitration import decide_cases
from .gemm import check_tile, note_unit
from .summary import COUNT, RESTORED, RESTORING, TAKEN, UNQUIET, WHO, case_of
from .tiles import ACCUMULATOR, PATCHED, accumulate, finish, offsets, store_sums, store_tile, strike, tile_of
from .verify import BEYOND, SUSPECT

#: Planes that recomputed sums have beyond those of a product: max |acc| and Σ |acc|.
RANGE = tl.constexpr(2)
#: What ``moved`` says of a row of a recomputed tile: no bit of Y changed, or more than one element; else the column.
NOTHING, SEVERAL = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def recompute(a, w, panel, integrity, sketch, rms, was, bias, y, again, moved, units, patches, flags, summary, shape, batches,
              budget, most_restored, FAULT, FROZEN: tl.constexpr, TRANSPOSED: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
              CORRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
              WN: tl.constexpr, WK: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A few programs arbitrate and then share the tiles of the product's grid; they leave at once when nothing is suspect.

    Operands come by pointers: what a descriptor's copies read must not have been written by the same launch, as a rebuilt panel is.

    budget: data tiles that may be computed again. most_restored: groups in which elements of W may be restored; more of them are
    an edit of a tracked weight.
    """
    if tl.load(summary + UNQUIET) > 0:
        decide_cases(w, panel, integrity, sketch, rms, was, patches, flags, summary, shape, batches, FROZEN, TRANSPOSED,
                     KINDS, PARTS, PRECISION == "tf32", BM, WN, WK)  # fmt: skip
        _recompute_tiles(a, w, panel, was, bias, y, again, moved, units, patches, flags, summary, shape, batches, budget, most_restored,
                         FAULT, KINDS, CORRECT, BM, BN, BK, BC, TALL, PRECISION)  # fmt: skip


@triton.jit
def _recompute_tiles(a, w, panel, was, bias, y, again, moved, units, patches, flags, summary, shape, batches, budget, most_restored,
                     FAULT, KINDS: tl.constexpr, CORRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     BC: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tiles_m, tiles_n, tiles_c = tl.cdiv(shape.m, BM), tl.cdiv(shape.n, BN), tl.cdiv(shape.c, BC)
    data_tiles, per_batch = tiles_m * tiles_n, tiles_m * (tiles_n + tiles_c)
    end = per_batch * batches
    # Hoisted out of this loop, the addresses of both kinds of tile would not fit the registers.
    for index in tl.range(tl.program_id(0), end, tl.num_programs(0), disable_licm=True):
        batch, tile = index // per_batch, index % per_batch
        if tile < data_tiles:
            tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, TALL)
            group = tile_n // shape.tiles_per_group
            at = _flag_at(flags, shape, tiles_m, batch, tile_m, group)
            if tl.load(at) == SUSPECT:
                if tl.atomic_add(summary + TAKEN, tl.cast(1, tl.int64)) >= budget:
                    tl.store(at, tl.cast(BEYOND, tl.int8))
                else:
                    note_unit(units, (batch * tiles_m + tile_m) * tiles_n + tile_n)
                    case = case_of(summary, batch, group, shape.groups)
                    restoring = (tl.load(case + WHO) == RESTORED) & (tl.load(summary + RESTORING) <= most_restored)
                    if patches is not None:
                        if restoring:
                            _data_tile_again(a, w, bias, y, was.weights, again.partials, moved, batch, tile_m, tile_n, shape, FAULT,
                                             KINDS, CORRECT, BM, BN, BK, PRECISION, patches + group * (3 * PATCHED),
                                             tl.load(case + COUNT).to(tl.int32))  # fmt: skip
                    if not restoring:
                        _data_tile_again(a, w, bias, y, was.weights, again.partials, moved, batch, tile_m, tile_n, shape, FAULT,
                                         KINDS, CORRECT, BM, BN, BK, PRECISION, None, 0)  # fmt: skip
        else:
            tile_m, tile_c = tile_of(tile - data_tiles, tiles_m, tiles_c, TALL)
            suspects = tl.cast(0, tl.int32)
            for group in range(shape.groups):
                flag = tl.load(_flag_at(flags, shape, tiles_m, batch, tile_m, group))
                suspects += (flag >= SUSPECT).to(tl.int32)
            if suspects > 0:
                check_tile(a, panel, None, None, True, again.raw, batch, tile_m, tile_c, shape.m, shape.c, shape.k,
                           None, BM, BC, BK, PRECISION)  # fmt: skip


@triton.jit
def _flag_at(flags, shape, tiles_m, batch, tile_m, group):
    """Where the gravest status in a row block of one group lies."""
    return flags + (tl.cast(batch, tl.int64) * tiles_m + tile_m) * shape.groups + group


@triton.jit
def _data_tile_again(a, w, bias, y, weights, partials, moved, batch, tile_m, tile_n, shape, FAULT, KINDS: tl.constexpr,
                     CORRECT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
                     patches, count):  # fmt: skip
    rows, cols = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    acc = accumulate(a, w, None, None, True, True, batch, tile_m * BM, tile_n * BN, shape.m, shape.n, shape.k, FAULT,
                     BM, BN, BK, PRECISION, patches, count)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, ACCUMULATOR, batch, rows, cols, 0, 1)
    tiles_n = tl.cdiv(shape.n, BN)
    planes: tl.constexpr = KINDS + 1 + RANGE
    store_sums(acc, weights, partials, planes, KINDS, batch, tile_n, tiles_n, rows, cols, shape.m, shape.n,
               a.ptr.dtype.element_ty, PRECISION)  # fmt: skip
    _store_range(acc, partials, planes, batch, tile_n, tiles_n, rows, shape.m)
    out = finish(acc, bias, cols, shape.n, y.dtype.element_ty)
    tl.store(moved + (tl.cast(batch, tl.int64) * tiles_n + tile_n) * shape.m + rows,
             _what_moved(y, out, batch, rows, cols, shape), mask=rows < shape.m)  # fmt: skip
    if CORRECT:
        store_tile(y, out, batch, rows, cols, shape.m, shape.n)


@triton.jit
def _store_range(acc, partials, PLANES: tl.constexpr, batch, tile_n, tiles_n, rows, M):
    """The last two planes, max |acc| and Σ |acc|: for the bound that survives numbers whose squares overflow."""
    plane = tl.cast(tiles_n, tl.int64) * M
    at = partials + ((tl.cast(batch, tl.int64) + 1) * PLANES - RANGE) * plane + tl.cast(tile_n, tl.int64) * M + rows
    tl.store(at, tl.max(tl.abs(acc), axis=1), mask=rows < M)
    tl.store(at + plane, tl.sum(tl.abs(acc), axis=1), mask=rows < M)


@triton.jit
def _what_moved(y, out, batch, rows, cols, shape):
    """Per row: the column whose bits the repetition changed, or NOTHING, or SEVERAL."""
    BITS: tl.constexpr = tl.int32 if out.dtype.primitive_bitwidth == 32 else tl.int16
    inside = (rows[:, None] < shape.m) & (cols[None, :] < shape.n)
    at = offsets(batch, tl.cast(shape.m, tl.int64) * shape.n, rows, shape.n, cols, 1)
    old = tl.load(y + at, mask=inside, other=0.0)
    # Outside the matrix both are zero (rows beyond it are not asked for).
    differs = old.to(BITS, bitcast=True) != out.to(BITS, bitcast=True)
    # Count and sum of the columns in one number: at most 2⁸ of either's terms, each below 2⁸.
    local = tl.arange(0, differs.shape[1])
    packed = tl.sum(tl.where(differs, (local + 65536)[None, :], 0), 1)
    only = tl.where(packed < 2 * 65536, tl.min(cols, 0) + packed % 65536, SEVERAL)
    return tl.where(packed == 0, NOTHING, only)
