"""Tiles: the device functions that every kernel here shares, so that the same tile computed twice has the same bits.

acc[m, n] = Σ_k a[m, k] b[n, k]        one tile, fp32 (of int8: int32), k in steps of BK
Σ w_j acc, Σ acc²                      the row sums of a tile, taken before anything is rounded
bits' = ((bits & keep) ^ flip) + add   an injected fault; absent from the compiled code when FAULT is None
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Words of one fault descriptor (int32), and the places that exist inside a kernel.
FAULT_WORDS = tl.constexpr(12)
ACCUMULATOR = tl.constexpr(0)
OPERAND = tl.constexpr(1)
OUTPUT = tl.constexpr(2)
CHECKSUM = tl.constexpr(3)
#: Kinds of sums beside e, which is the first: all weights 1; e times the two digits of a column's number in its group.
ONE, HI, LO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
#: Columns that the lower digit counts.
FRAGMENT = tl.constexpr(16)
#: Elements of one group of W that can be restored, as many as a 16×8 fragment has.
PATCHED = tl.constexpr(128)
#: The largest finite fp32 number.
ACC_LARGEST = tl.constexpr(3.4028234663852886e38)


class Matrix(NamedTuple):
    """A matrix (rows, cols), or a batch of them, of any strides; a stride of 1 is a compile-time constant."""

    ptr: Any
    batch: Any
    row: Any
    col: Any


class Faults(NamedTuple):
    """``count`` descriptors: place, batch, row0, row1, col0, col1, stride, tile0, tile1, keep, flip, add."""

    ptr: Any
    count: Any


@triton.jit
def split_program(per_batch):
    """(batch, tile) of this program; an empty product has one program and no tile."""
    per_batch = tl.maximum(per_batch, 1)
    return tl.program_id(0) // per_batch, tl.program_id(0) % per_batch


@triton.jit
def tile_of(index, tiles_m, tiles_n, TALL: tl.constexpr):
    """The (tile_m, tile_n) of a program: columns of TALL row blocks, so that neighbours share operands in the L2."""
    group = index // (TALL * tiles_n)
    first = group * TALL
    height = min(tiles_m - first, TALL)
    inside = index % (TALL * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def offsets(batch, batch_stride, rows, row_stride, cols, col_stride):
    """Element offsets of rows × cols. int64 before the multiplication: matrices may hold more than 2³¹ elements."""
    row = tl.cast(rows, tl.int64)[:, None] * row_stride
    col = tl.cast(cols, tl.int64)[None, :] * col_stride
    return tl.cast(batch, tl.int64) * batch_stride + row + col


@triton.jit
def accumulate(a, b, a_tiles, b_tiles, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, batch, row, col, M, N, K, FAULT,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PATCHES=None, count=0,
               ACC: tl.constexpr = tl.float32):  # fmt: skip
    """acc[m, n] = Σ_k a[m, k] b[n, k] for BM rows from ``row`` and BN from ``col``. What lies outside the matrices counts as zero.

    Through descriptors (a_tiles, b_tiles; *_ROWS: of the matrix itself, not of its transpose) or, if they are None, pointers.
    With PATCHES, ``count`` elements of b are replaced by what they were (arbitration.py); pointers only.
    """
    rows, cols, k = row + tl.arange(0, BM), col + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    if a_tiles is not None:
        for start in range(0, K, BK):
            left = a_tiles.load([row, start]) if A_ROWS else a_tiles.load([start, row]).T
            right = b_tiles.load([col, start]).T if B_ROWS else b_tiles.load([start, col])
            if FAULT is not None:
                left = strike(left, FAULT, OPERAND, batch, rows, start + k, col, BN)
            acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        a_at = a.ptr + offsets(batch, a.batch, rows, a.row, k, a.col)
        b_at = b.ptr + offsets(batch, b.batch, k, b.col, cols, b.row)
        a_step = tl.cast(a.col, tl.int64) * BK
        b_step = tl.cast(b.col, tl.int64) * BK
        for start in range(0, K, BK):
            left = tl.load(a_at, mask=(rows[:, None] < M) & (k[None, :] < K - start), other=0.0)
            right = tl.load(b_at, mask=(k[:, None] < K - start) & (cols[None, :] < N), other=0.0)
            if PATCHES is not None:
                right = restore(right, PATCHES, count, start + k, cols)
            if FAULT is not None:
                left = strike(left, FAULT, OPERAND, batch, rows, start + k, col, BN)
            acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
            a_at += a_step
            b_at += b_step
    return acc


@triton.jit
def finish(acc, bias, cols, N, OUT: tl.constexpr):
    """What is delivered: the accumulator plus bias, rounded once to the output type."""
    if bias is not None:
        acc = acc + tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc.to(OUT)


@triton.jit
def strike(values, faults, PLACE: tl.constexpr, batch, rows, cols, tile_start, tile_width):
    """Apply the faults that lie at PLACE to a tile of values; an operand's are seen by the result columns of its tiles only."""
    WIDTH: tl.constexpr = values.dtype.primitive_bitwidth
    BITS: tl.constexpr = tl.int32 if WIDTH == 32 else tl.int16 if WIDTH == 16 else tl.int8
    for i in range(faults.count):
        f = faults.ptr + i * FAULT_WORDS
        col0 = tl.load(f + 4)
        hit = (tl.load(f) == PLACE) & (tl.load(f + 1) == batch)
        hit &= (tl.load(f + 7) < tile_start + tile_width) & (tile_start < tl.load(f + 8))
        in_row = (rows >= tl.load(f + 2)) & (rows < tl.load(f + 3))
        in_col = (cols >= col0) & (cols < tl.load(f + 5)) & ((cols - col0) % tl.load(f + 6) == 0)
        bits = values.to(BITS, bitcast=True)
        bits = (bits & tl.load(f + 9).to(BITS)) ^ tl.load(f + 10).to(BITS)
        wrong = (bits + tl.load(f + 11).to(BITS)).to(values.dtype, bitcast=True)
        values = tl.where(hit & in_row[:, None] & in_col[None, :], wrong, values)
    return values


@triton.jit
def restore(values, patches, count, k, cols):
    """A tile of bᵀ with remembered elements put back; PATCHED numbers each: columns of the result, then k, then bits."""
    BITS: tl.constexpr = tl.int32 if values.dtype.primitive_bitwidth == 32 else tl.int16
    for i in range(count):
        col, own_k = tl.load(patches + i), tl.load(patches + PATCHED + i)
        old = tl.load(patches + 2 * PATCHED + i).to(BITS).to(values.dtype, bitcast=True)
        values = tl.where((k[:, None] == own_k) & (cols[None, :] == col), old, values)
    return values


@triton.jit
def store_sums(acc, weights, partials, PLANES: tl.constexpr, KINDS: tl.constexpr, batch, tile_n, tiles_n, rows, cols, M, N,
               OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """partials[batch, plane, tile_n, row]: a plane for each kind of sum, then Σ acc²; neighbouring rows lie side by side.

    From the accumulator, before bias and cast, whose rounding would hide a fault a thousand times larger.
    """
    plane = tl.cast(tiles_n, tl.int64) * M
    at = partials + batch * PLANES * plane + tl.cast(tile_n, tl.int64) * M + rows
    if (tl.float32 == OPERAND) & (PRECISION == "ieee"):
        # On the CUDA cores columns of a slice lie in several threads: cut up, a tile would be exchanged, and need registers it has not.
        _store_sums_one_by_one(acc, weights, at, plane, KINDS, rows, cols, M, N)
    else:
        _store_sums_of_slices(acc, weights, at, plane, KINDS, tile_n, rows, M, N)


@triton.jit
def _store_sums_one_by_one(acc, weights, at, plane, KINDS: tl.constexpr, rows, cols, M, N):
    for kind in tl.static_range(KINDS):
        if kind == ONE:
            tl.store(at + kind * plane, tl.sum(acc, axis=1), mask=rows < M)
        else:
            weight = tl.load(weights + kind * N + cols, mask=cols < N, other=0.0)
            tl.store(at + kind * plane, tl.sum(acc * weight[None, :], axis=1), mask=rows < M)
    tl.store(at + KINDS * plane, tl.sum(acc * acc, axis=1), mask=rows < M)


@triton.jit
def _store_sums_of_slices(acc, weights, at, plane, KINDS: tl.constexpr, tile_n, rows, M, N):
    first, digit = tile_n * acc.shape[1], tl.arange(0, FRAGMENT)
    zero = tl.zeros((acc.shape[0], FRAGMENT), tl.float32)
    signed, climbing, plain, squares = _sums_of_slices(acc, weights + first + digit, 0, zero, zero, zero, zero, KINDS)
    e = tl.sum(signed, 1)
    tl.store(at, e, mask=rows < M)
    if KINDS > 1:
        tl.store(at + ONE * plane, tl.sum(plain, 1), mask=rows < M)
        # hi of the first column, and the lo of any sixteen: weights of e times what they count (abft.checksum.column_weights).
        begin = tl.load(weights + HI * N + first) * tl.load(weights + first)
        tl.store(at + HI * plane, begin * e + 2 * tl.sum(climbing - signed, 1), mask=rows < M)
        tl.store(at + LO * plane, tl.sum(signed * (2 * digit - (FRAGMENT - 1)).to(tl.float32)[None, :], 1), mask=rows < M)
    tl.store(at + KINDS * plane, tl.sum(squares, 1), mask=rows < M)


@triton.jit
def _sums_of_slices(x, signs, OFFSET: tl.constexpr, signed, climbing, plain, squares, KINDS: tl.constexpr):
    """Over slices of 16 columns, the last one first: Σ ± x, Σ (1 + slices before it) (± x), Σ x and Σ x², (rows, 16) each.

    signs: where those of the tile's first slice lie; behind the last column of W there are any numbers, which x makes zero.
    In chains, for then every multiplication is fused: newer compilers reduce a whole tile as a tree, whose pairs are not.
    """
    if x.shape[1] > FRAGMENT:
        half: tl.constexpr = x.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)))
        signed, climbing, plain, squares = _sums_of_slices(right, signs, OFFSET + half, signed, climbing, plain, squares, KINDS)
        signed, climbing, plain, squares = _sums_of_slices(left, signs, OFFSET, signed, climbing, plain, squares, KINDS)
    else:
        signed = tl.fma(x, tl.broadcast_to(tl.load(signs + OFFSET)[None, :], x.shape), signed)
        if KINDS > 1:
            climbing += signed
            plain += x
        squares = tl.fma(x, x, squares)
    return signed, climbing, plain, squares


@triton.jit
def store_tile(ptr, values, batch, rows, cols, M, N):
    """Into a contiguous (batch, M, N)."""
    at = offsets(batch, tl.cast(M, tl.int64) * N, rows, N, cols, 1)
    tl.store(ptr + at, values, mask=(rows[:, None] < M) & (cols[None, :] < N))


def matrix(tensor: Any) -> Matrix:
    """The kernel argument of a (rows, cols) or (batch, rows, cols) tensor."""
    return Matrix(tensor, tensor.stride(0) if tensor.dim() == 3 else 0, tensor.stride(-2), tensor.stride(-1))


def descriptor(tensor: Any, rows: int, cols: int) -> tuple[Any, bool] | None:
    """A descriptor of (rows, cols) tiles of a matrix, and whether of it or (False) of its transpose; None where it cannot be had.

    The copy engine wants one dimension contiguous, the other's stride and the base in multiples of 16 bytes, no batch.
    """
    if tensor.dim() != 2 or tensor.numel() == 0 or tensor.data_ptr() % 16:
        return None
    for view, block, straight in ((tensor, [rows, cols], True), (tensor.mT, [cols, rows], False)):
        if view.stride(1) == 1 and view.stride(0) * tensor.element_size() % 16 == 0 and view.stride(0) > 0:
            return TensorDescriptor.from_tensor(view, block), straight
    return None
