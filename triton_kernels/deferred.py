"""The product whose check is deferred: it leaves its evidence in a workspace, for one launch that judges many products.

    Y = A Wᵀ + b      and, in the workspace: partials (B, KINDS + 3, tiles_n, M)   Σ_n w_j acc, Σ acc², max |acc|, Σ |acc|
                                             raw (B, M, C)                         the check tiles, undone of the panel's scales
                                             beyond (B, tiles_n, M)                1 where a delivered number is Inf or NaN
                                             units (B, row blocks, tiles_n)        if NOTED, each tile's multiprocessor, as fp32
                      and in its slot: what a judge has to know of it

No operand, panel or result is read again, so all of them may have changed or gone by then. The tiles, their arithmetic and
therefore their bits are those of gemm.py. The two last planes and ``beyond`` stand in for what an immediate check would look
up: a repetition for rows whose squares overflow, and Y for results beyond their type. Whether an operand was finite, the check
tiles tell: it makes all columns of the panel infinite or NaN, on another program than the one that computed the row.

The slot is written by the product itself: a captured graph rewrites it at every replay, and nothing is copied from the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import Product, fault_argument, first_check_tile, note_unit
from .judgement import is_finite
from .tiles import ACCUMULATOR, CHECKSUM, OUTPUT, accumulate, finish, store_sums, store_tile, strike, tile_of

#: Words of a slot, int64. The first sixteen are a record of the ledger in the making (record.py): site, role, shape, dtype, backend.
SLOT = tl.constexpr(64)
RECORD_WORDS = tl.constexpr(16)
SITE, VERDICT, ROWS, ROW, COLUMN, RESIDUAL, BOUND, ALL_ROWS, N_WORD, K_WORD, STEP_WORD = (
    tl.constexpr(i) for i in (1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 15)
)
#: … then: FRESH until judged; how many programs have judged their share, and how many of them found something; flags;
STATE, ARRIVED, UNQUIET, REPEAT, CORRECT = (tl.constexpr(i) for i in range(16, 21))
#: … sizes; where the evidence begins, in floats;
M_WORD, BATCHES, CHECKS_WORD, GROUPS, TILES_PER_GROUP, TILES, BEGIN = (tl.constexpr(i) for i in range(21, 28))
#: … and, as the bits of fp32, the largest number of the output type and the bound's coefficients, four each.
LARGEST, ACCUMULATE, ABSOLUTE = tl.constexpr(28), tl.constexpr(32), tl.constexpr(36)
#: Where statistics of residuals are kept: the addresses of residuals.Kept; rows of a data tile; multiprocessors.
KEPT, HEIGHT, MULTIPROCESSORS = tl.constexpr(40), tl.constexpr(45), tl.constexpr(46)
#: A number that uninitialised memory does not hold by chance: slots need no clearing, which a graph would repeat.
FRESH = tl.constexpr(0x5EED_FAC7_0DEF_E44D)
#: Planes of partial sums beyond the kinds': Σ acc², max |acc|, Σ |acc|.
MORE = tl.constexpr(3)
#: Word of the ledger's header: products whose evidence the next one in the slot took the place of before it was judged.
LOST = tl.constexpr(2)


@triton.jit(do_not_specialize=["deal", "batches", "begin"], do_not_specialize_on_alignment=["site"])
def deferred_product(a, w, panel, a_tiles, w_tiles, panel_tiles, bias, y, weights, scales, evidence, slot, template, words, site,
                     deal, begin, scales_batch, M, N, K, C, batches, FAULT, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr,
                     KINDS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
                     TALL: tl.constexpr, PRECISION: tl.constexpr, NOTED: tl.constexpr = False):  # fmt: skip
    """As gemm.checked_product: every program its data tiles, then its check tiles."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if program == 0:
        _open(slot, template, words, site, begin, M, batches)
    tiles_m, tiles_n, tiles_c = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(C, BC)
    partials = evidence + begin
    raw = partials + partials_of(batches, KINDS, tiles_n, M)
    beyond = raw + tl.cast(batches, tl.int64) * M * C
    for index in tl.range(program, batches * tiles_m * tiles_n, programs, disable_licm=True):
        tile_m, tile_n = tile_of(index % (tiles_m * tiles_n), tiles_m, tiles_n, TALL)
        if NOTED:
            note_unit(units_of(beyond, batches, tiles_n, M), (index // (tiles_m * tiles_n) * tiles_m + tile_m) * tiles_n + tile_n)
        _data_tile_and_more(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, bias, y, weights, partials, beyond, index // (tiles_m * tiles_n),
                            tile_m, tile_n, M, N, K, FAULT, KINDS, BM, BN, BK, PRECISION)  # fmt: skip
    rank = (program - deal.behind + programs) % programs
    for index in tl.range(first_check_tile(rank, programs, deal), first_check_tile(rank + 1, programs, deal), disable_licm=True):
        tile_m, tile_c = tile_of(index % (tiles_m * tiles_c), tiles_m, tiles_c, TALL)
        batch = index // (tiles_m * tiles_c)
        rows, cols = tile_m * BM + tl.arange(0, BM), tile_c * BC + tl.arange(0, BC)
        acc = accumulate(a, panel, a_tiles, panel_tiles, A_ROWS, True, batch, tile_m * BM, tile_c * BC, M, C, K, None,
                         BM, BC, BK, PRECISION)  # fmt: skip
        if FAULT is not None:
            acc = strike(acc, FAULT, CHECKSUM, batch, rows, cols, 0, 1)
        if scales is not None:
            # Here and not when it is judged: a panel of an activation is gone by then.
            acc = acc * tl.load(scales + batch * scales_batch + cols, mask=cols < C, other=1.0)[None, :]
        store_tile(raw, acc, batch, rows, cols, M, C)


@triton.jit
def partials_of(batches, KINDS: tl.constexpr, tiles_n, M):
    """How many partial sums there are."""
    return tl.cast(batches, tl.int64) * (KINDS + MORE) * tiles_n * M


@triton.jit
def units_of(beyond, batches, tiles_n, M):
    """Where the multiprocessors of the data tiles are noted."""
    return beyond + tl.cast(batches, tl.int64) * tiles_n * M


@triton.jit
def _open(slot, template, words, site, begin, M, batches):
    """Write the slot: all that is known beforehand comes from the template. The end of the launch publishes it."""
    i = tl.arange(0, SLOT)
    values = tl.load(template + i)
    values = tl.where(i == SITE, tl.load(site), values)
    values = tl.where(i == ALL_ROWS, tl.cast(M, tl.int64) * batches, values)
    values = tl.where(i == M_WORD, tl.cast(M, tl.int64), values)
    values = tl.where(i == BATCHES, tl.cast(batches, tl.int64), values)
    values = tl.where(i == BEGIN, tl.cast(begin, tl.int64), values)
    values = tl.where(i == STATE, FRESH, values)
    if tl.load(slot + STATE) == FRESH:
        tl.atomic_add(words + LOST, tl.cast(1, tl.int64))
    tl.debug_barrier()  # everyone has read the old state
    tl.store(slot + i, values)


@triton.jit
def _data_tile_and_more(a, w, a_tiles, w_tiles, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, bias, y, weights, partials, beyond,
                        batch, tile_m, tile_n, M, N, K, FAULT, KINDS: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows, cols, tiles_n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.cdiv(N, BN)
    acc = accumulate(a, w, a_tiles, w_tiles, A_ROWS, W_ROWS, batch, tile_m * BM, tile_n * BN, M, N, K, FAULT,
                     BM, BN, BK, PRECISION)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, ACCUMULATOR, batch, rows, cols, 0, 1)
    store_sums(acc, weights, partials, KINDS + MORE, KINDS, batch, tile_n, tiles_n, rows, cols, M, N,
               a.ptr.dtype.element_ty, PRECISION)  # fmt: skip
    plane = tl.cast(tiles_n, tl.int64) * M
    at = (tl.cast(batch, tl.int64) * (KINDS + MORE) + KINDS + 1) * plane + tl.cast(tile_n, tl.int64) * M + rows
    magnitudes = tl.abs(acc)
    tl.store(partials + at, tl.max(magnitudes, axis=1), mask=rows < M)
    tl.store(partials + at + plane, tl.sum(magnitudes, axis=1), mask=rows < M)
    out = finish(acc, bias, cols, N, y.dtype.element_ty)
    if FAULT is not None:
        out = strike(out, FAULT, OUTPUT, batch, rows, cols, 0, 1)
    infinite = tl.where((cols < N)[None, :] & ~is_finite(out.to(tl.float32)), 1.0, 0.0)
    tl.store(beyond + (tl.cast(batch, tl.int64) * tiles_n + tile_n) * M + rows, tl.max(infinite, axis=1), mask=rows < M)
    store_tile(y, out, batch, rows, cols, M, N)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a product leaves its evidence."""

    evidence: Tensor  # fp32, of a whole workspace
    begin: int  # first float of this product's
    slot: Tensor  # (SLOT,) int64
    words: Tensor  # the ledger that will be told


def floats(product: Product, noted: bool = False) -> int:
    """Room that the evidence of a product takes. noted: with the multiprocessors of its tiles."""
    batch, m, n, _, c = product.sizes
    return batch * m * ((product.kinds + MORE.value + 1) * -(-n // product.config.bn) + c) + noted * product.tiles[0]


def multiply_deferred(product: Product, scales: Tensor | None, template: Tensor, place: Place, site: Tensor,
                      faults: Tensor | None = None, noted: bool = False) -> Tensor:  # fmt: skip
    """Launch, and return Y. ``template``: (SLOT,) int64 on the device, the words of the slot that do not change from call to call.
    noted: the multiprocessors of its tiles belong to its evidence."""
    a, config = product.a, product.config
    batch, m, n, k, c = product.sizes
    programs, dealt = product.dealt()
    y = torch.empty(*a.shape[:-1], n, dtype=a.dtype, device=a.device)
    scales_batch = scales.stride(0) if scales is not None and scales.dim() == 2 else 0
    operands, order = product.operands()
    deferred_product[(programs,)](
        *operands, product.bias, y, product.weights, scales, place.evidence, place.slot, template, place.words, site,
        dealt, place.begin, scales_batch, m, n, k, c, batch, fault_argument(faults), **order, KINDS=product.kinds, **config.launch(),
        **({"NOTED": True} if noted else {}),
    )  # fmt: skip
    return y
