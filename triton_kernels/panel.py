"""The panel of W (N, K): weighted sums of its rows, which the check tiles multiply with, built in one pass over W.

    s_j[g, k]  = Σ_{n in g} w_j[n] W[n, k]                          fp32, kinds e, one, hi, lo (or e alone)
    ν²[g, k]   = Σ_{n in g} W[n, k]² + Σ_j (s_j[g, k] / w̄_j)²
    sketch_i   = ν · u_i[k]                                         u fixed random ± numbers

Columns: (groups × kinds × parts), then (groups × 4) sketches, then, in the lean form, one of ±1. Each s is written as a sum
of ``parts`` numbers of W's type. fp16 columns are divided by a power of two of their own, which needs their largest
number first: there a second launch does the writing. tf32: s is summed from W as the tensor core sees it, truncated.

The same numbers as abft.checksum.encode, up to the order of summation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import PanelConfig
from .judgement import SKETCHES, is_finite
from .tiles import Matrix, matrix, offsets

#: Where the widest number of an fp16 column is put: 2¹², far from both ends of the type.
TARGET_EXPONENT = tl.constexpr(12)
TF32_MASK = tl.constexpr(-0x2000)  # 13 mantissa bits that the tf32 unit does not read


class Rms(NamedTuple):
    """w̄ of the kinds."""

    e: Any
    one: Any
    hi: Any
    lo: Any


@triton.jit
def sum_rows(w, weights, sketch, columns, wide, peaks, rms, N, K, groups, width,
             KINDS: tl.constexpr, PARTS: tl.constexpr, INGRESS: tl.constexpr, SCALED: tl.constexpr, TF32: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One group and BK of its columns per program. Writes ``columns``, or if SCALED ``wide`` (fp32) and their ``peaks``."""
    group, blocks = tl.program_id(0) % groups, tl.cdiv(K, BK)
    block, batch = (tl.program_id(0) // groups) % blocks, tl.program_id(0) // groups // blocks
    k = block * BK + tl.arange(0, BK)
    s_e, s_one, s_hi, s_lo, squares = _sums(w, weights, batch, group, width, k, N, K, KINDS, TF32, BN, BK)
    nu2 = tl.fma(s_e / rms.e, s_e / rms.e, squares)
    out = columns if not SCALED else wide
    PIECES: tl.constexpr = 1 if SCALED else PARTS
    first = group * KINDS
    _write(out, peaks, batch, first, PIECES, s_e, k, K, block, SCALED, TF32)
    if KINDS > 1:
        nu2 = tl.fma(s_one / rms.one, s_one / rms.one, nu2)
        nu2 = tl.fma(s_hi / rms.hi, s_hi / rms.hi, nu2)
        nu2 = tl.fma(s_lo / rms.lo, s_lo / rms.lo, nu2)
        _write(out, peaks, batch, first + 1, PIECES, s_one, k, K, block, SCALED, TF32)
        _write(out, peaks, batch, first + 2, PIECES, s_hi, k, K, block, SCALED, TF32)
        _write(out, peaks, batch, first + 3, PIECES, s_lo, k, K, block, SCALED, TF32)
    for i in tl.static_range(SKETCHES):
        u = tl.load(sketch.ptr + i * sketch.row + k, mask=k < K, other=0.0)
        _write_sketch(out, peaks, batch, groups * KINDS, PIECES, group * SKETCHES + i, tl.sqrt(nu2) * u, k, K, block, SCALED)
        if INGRESS and i == 0 and group == 0:
            at = columns.ptr + batch.to(tl.int64) * columns.batch + (groups * (KINDS * PARTS + SKETCHES)).to(tl.int64) * columns.row
            tl.store(at + k, tl.where(u < 0, -1.0, 1.0).to(columns.ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _sums(w, weights, batch, group, width, k, N, K, KINDS: tl.constexpr, TF32: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(s_e, s_one, s_hi, s_lo, Σ W²) of a group; what a lean panel does not hold is zero."""
    s_e, s_one, squares = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    s_hi, s_lo = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    end = tl.minimum((group + 1) * width, N)
    for start in range(group * width, end, BN):
        rows = start + tl.arange(0, BN)
        at = w.ptr + offsets(batch, w.batch, rows, w.row, k, w.col)
        x = tl.load(at, mask=(rows[:, None] < end) & (k[None, :] < K), other=0.0).to(tl.float32)
        if TF32:
            x = _as_tf32(x)
        squares += tl.sum(x * x, 0)
        s_e += tl.sum(x * tl.load(weights + rows, mask=rows < end, other=0.0)[:, None], 0)
        if KINDS > 1:
            s_one += tl.sum(x, 0)
            s_hi += tl.sum(x * tl.load(weights + 2 * N + rows, mask=rows < end, other=0.0)[:, None], 0)
            s_lo += tl.sum(x * tl.load(weights + 3 * N + rows, mask=rows < end, other=0.0)[:, None], 0)
    return s_e, s_one, s_hi, s_lo, squares


@triton.jit
def _as_tf32(x):
    """x as the tensor core reads it: the low 13 bits of the mantissa do not exist."""
    return (x.to(tl.int32, bitcast=True) & TF32_MASK).to(tl.float32, bitcast=True)


@triton.jit
def _write(out, peaks, batch, checksum, PIECES: tl.constexpr, s, k, K, block, SCALED: tl.constexpr, TF32: tl.constexpr):
    """One checksum as a sum of PIECES numbers of the output type, each the rounding of what the earlier ones left over."""
    if SCALED:
        _store_peak(peaks, batch, checksum, s, k, K, block)
    at = out.ptr + batch.to(tl.int64) * out.batch + k
    for i in tl.static_range(PIECES):
        piece = _as_tf32(s) if TF32 else s.to(out.ptr.dtype.element_ty)
        tl.store(at + (checksum * PIECES + i).to(tl.int64) * out.row, piece, mask=k < K)
        # A piece that is not finite stays alone: Inf - Inf would turn the rest into NaN.
        s = tl.where(is_finite(piece.to(tl.float32)), s - piece.to(tl.float32), 0.0)


@triton.jit
def _write_sketch(out, peaks, batch, checksums, PIECES: tl.constexpr, index, values, k, K, block, SCALED: tl.constexpr):
    column = checksums * PIECES + index
    at = out.ptr + batch.to(tl.int64) * out.batch + column.to(tl.int64) * out.row + k
    tl.store(at, values.to(out.ptr.dtype.element_ty), mask=k < K)
    if SCALED:
        _store_peak(peaks, batch, column, values, k, K, block)


@triton.jit
def _store_peak(peaks, batch, column, values, k, K, block):
    """The largest magnitude of a block of a column; Inf if any number is not finite."""
    peak = tl.max(tl.where(k < K, tl.where(is_finite(values), tl.abs(values), float("inf")), 0.0), 0)
    tl.store(peaks.ptr + batch.to(tl.int64) * peaks.batch + column.to(tl.int64) * peaks.row + block, peak)


@triton.jit
def pack_scaled(wide, peaks, columns, scales, K, checksums, sketches,
                PARTS: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """One fp32 column and BK of its numbers per program: divide by its power of two, split, write."""
    blocks = tl.cdiv(K, BK)
    source, block = tl.program_id(0) % (checksums + sketches), (tl.program_id(0) // (checksums + sketches)) % blocks
    batch = (tl.program_id(0) // (checksums + sketches) // blocks).to(tl.int64)
    k, b = block * BK + tl.arange(0, BK), tl.arange(0, BLOCKS)
    peak = tl.max(tl.load(peaks.ptr + batch * peaks.batch + source.to(tl.int64) * peaks.row + b, mask=b < blocks, other=0.0), 0)
    scale, inverse = _power_of_two(peak)
    left = tl.load(wide.ptr + batch * wide.batch + source.to(tl.int64) * wide.row + k, mask=k < K, other=0.0) * inverse
    is_sum = source < checksums
    column = tl.where(is_sum, source * PARTS, checksums * PARTS + source - checksums)
    at = columns.ptr + batch * columns.batch + column.to(tl.int64) * columns.row + k
    for i in tl.static_range(PARTS):
        piece = left.to(columns.ptr.dtype.element_ty)
        if i == 0 or is_sum:
            tl.store(at + i * columns.row, piece, mask=k < K)
            tl.store(scales.ptr + batch * scales.batch + column + i, scale)
        left = tl.where(is_finite(piece.to(tl.float32)), left - piece.to(tl.float32), 0.0)


@triton.jit
def _power_of_two(peak):
    """(2^(e - 12), its inverse) for a peak in [2^(e-1), 2^e); (1, 1) if the peak is zero or not finite.

    The peaks of fp16 sums lie between 2⁻²⁵ and 2³⁶: both powers are normal numbers.
    """
    exponent = ((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126 - TARGET_EXPONENT
    usable = is_finite(peak) & (peak > 0)
    exponent = tl.where(usable, exponent, 0)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True), ((127 - exponent) << 23).to(tl.float32, bitcast=True)


# --- launcher -------------------------------------------------------------------------------------


def build(w: Tensor, weights: Tensor, sketch: Tensor, rms: tuple[float, ...], width: int, parts: int, scaled: bool,
          ingress: bool, config: PanelConfig) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(columns (C, K) of W's dtype, scales (C,) or None) of W (N, K), or with a batch in front of each.

    weights (kinds, N) and sketch (4, K) fp32; ``width`` of a group. fp32 with parts > 1 is tf32.
    """
    n, k = w.shape[-2:]
    kinds, groups, batch = weights.shape[0], -(-n // width) if n else 0, w.shape[0] if w.dim() == 3 else 1
    checksums, sketches = groups * kinds, groups * SKETCHES.value
    count = checksums * parts + sketches + int(ingress)
    columns = torch.empty(*w.shape[:-2], count, k, dtype=w.dtype, device=w.device)
    scales = torch.ones(*w.shape[:-2], count, dtype=torch.float32, device=w.device) if scaled else None
    if 0 in (n, k, batch):
        return columns.fill_(1.0), scales  # at most the column of ±1, of which nothing is asked
    blocks = -(-k // config.bk)
    wide = torch.empty(batch, checksums + sketches if scaled else 0, k, dtype=torch.float32, device=w.device)
    peaks = torch.empty(batch, wide.shape[1], blocks, dtype=torch.float32, device=w.device)
    flags = {"KINDS": kinds, "PARTS": parts, "INGRESS": ingress, "SCALED": scaled, "TF32": w.dtype == torch.float32 and parts > 1}
    sum_rows[(batch * groups * blocks,)](
        matrix(w), weights, matrix(sketch), matrix(columns), matrix(wide), matrix(peaks), Rms(*rms, *(1.0,) * (4 - kinds)),
        n, k, groups, width, **flags, BN=config.bn, BK=config.bk, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if scales is not None:
        pack_scaled[(batch * (checksums + sketches) * blocks,)](
            matrix(wide), matrix(peaks), matrix(columns), Matrix(scales, scales.stride(0) if scales.dim() == 2 else 0, 0, 1),
            k, checksums, sketches, PARTS=parts, BK=config.bk, BLOCKS=triton.next_power_of_2(blocks),
            num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return columns, scales
