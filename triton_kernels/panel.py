"""The panel of W (N, K): weighted sums of its rows, which the check tiles multiply with, built in one pass over W.

    s_j[g, k]  = Σ_{n in g} w_j[n] W[n, k]                          fp32, kinds e, one, hi, lo (or e alone)
    ν²[g, k]   = Σ_{n in g} W[n, k]² + Σ_j (s_j[g, k] / w̄_j)²
    sketch_i   = ν · u_i[k]                                         u fixed random ± numbers

Columns: (groups × kinds × parts), then (groups × 4) sketches, then, in the lean form, one of ±1. Each s is written as a sum
of ``parts`` numbers of W's type. fp16 columns are divided by a power of two of their own, which needs their largest
number first: there a second launch does the writing. tf32: s is summed from W as the tensor core sees it, truncated.

The same pass remembers the bits: fingerprints of W, if it is a weight, and sums of the panel's own (fingerprint.py). The panel
of one group can be rebuilt by one program, in place (``rebuild``, arbitration.py).

The same numbers as abft.checksum.encode, up to the order of summation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import PanelConfig
from .fingerprint import PLANES, add_rows, store_sums_of_bits, sum_of_bits, wrapped, zero_sums
from .judgement import SKETCHES, is_finite
from .tiles import matrix, offsets

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
def sum_rows(w, weights, sketch, columns, integrity, fingerprint, wide, peaks, rms, N, K, groups, width,
             KINDS: tl.constexpr, PARTS: tl.constexpr, INGRESS: tl.constexpr, SCALED: tl.constexpr, TF32: tl.constexpr,
             BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One group and BK of its columns per program. Writes ``columns``, or if SCALED ``wide`` (fp32) and their ``peaks``."""
    group, blocks = tl.program_id(0) % groups, tl.cdiv(K, BK)
    block, batch = (tl.program_id(0) // groups) % blocks, tl.program_id(0) // groups // blocks
    k = block * BK + tl.arange(0, BK)
    s, nu, seen = _sums(w, weights, rms, batch, group, width, k, N, K, KINDS, TF32, fingerprint is not None, BN, BK)
    if fingerprint is not None:
        store_sums_of_bits(fingerprint, w.ptr.dtype.element_ty.primitive_bitwidth // 16, seen, group, k, K)
    for kind in tl.static_range(KINDS):
        if SCALED:
            _write_wide(wide, peaks, batch, group * KINDS + kind, s[kind], k, K, block)
        else:
            _write(columns, integrity, batch, (group * KINDS + kind) * PARTS, PARTS, PARTS, s[kind], 0, k, K, block, TF32)
    for i in tl.static_range(SKETCHES):
        u = tl.load(sketch.ptr + i * sketch.row + k, mask=k < K, other=0.0)
        if SCALED:
            _write_wide(wide, peaks, batch, groups * KINDS + group * SKETCHES + i, nu * u, k, K, block)
        else:
            _write(columns, integrity, batch, groups * KINDS * PARTS + group * SKETCHES + i, 1, 1, nu * u, 0, k, K, block, False)
        if INGRESS and i == 0 and group == 0:
            at = columns.ptr + batch.to(tl.int64) * columns.batch + (groups * (KINDS * PARTS + SKETCHES)).to(tl.int64) * columns.row
            tl.store(at + k, tl.where(u < 0, -1.0, 1.0).to(columns.ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _sums(w, weights, rms, batch, group, width, k, N, K, KINDS: tl.constexpr, TF32: tl.constexpr, REMEMBER: tl.constexpr,
          BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """((s_e, s_one, s_hi, s_lo), ν, sums of bits) of BK columns of a group; what is not asked for is zero."""
    s_e, s_one, squares = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    s_hi, s_lo, seen = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32), zero_sums(BK)
    end = tl.minimum((group + 1) * width, N)
    for start in range(group * width, end, BN):
        rows = start + tl.arange(0, BN)
        at = w.ptr + offsets(batch, w.batch, rows, w.row, k, w.col)
        stored = tl.load(at, mask=(rows[:, None] < end) & (k[None, :] < K), other=0.0)
        if REMEMBER:
            seen = add_rows(seen, stored, rows - group * width + 1)
        x = stored.to(tl.float32)
        if TF32:
            x = as_tf32(x)
        squares += tl.sum(x * x, 0)
        s_e += tl.sum(x * tl.load(weights + rows, mask=rows < end, other=0.0)[:, None], 0)
        if KINDS > 1:
            s_one += tl.sum(x, 0)
            s_hi += tl.sum(x * tl.load(weights + 2 * N + rows, mask=rows < end, other=0.0)[:, None], 0)
            s_lo += tl.sum(x * tl.load(weights + 3 * N + rows, mask=rows < end, other=0.0)[:, None], 0)
    nu2 = tl.fma(s_e / rms.e, s_e / rms.e, squares)
    if KINDS > 1:
        nu2 = tl.fma(s_one / rms.one, s_one / rms.one, nu2)
        nu2 = tl.fma(s_hi / rms.hi, s_hi / rms.hi, nu2)
        nu2 = tl.fma(s_lo / rms.lo, s_lo / rms.lo, nu2)
    return (s_e, s_one, s_hi, s_lo), tl.sqrt(nu2), seen


@triton.jit
def as_tf32(x):
    """x as the tensor core reads it: the low 13 bits of the mantissa do not exist."""
    return (x.to(tl.int32, bitcast=True) & TF32_MASK).to(tl.float32, bitcast=True)


@triton.jit
def _write(columns, integrity, batch, first, pieces, PIECES: tl.constexpr, values, scale_bits, k, K, block, TF32: tl.constexpr):
    """Numbers as a sum of ``pieces`` (at most PIECES) of the panel's type, each the rounding of what the earlier ones left over.

    scale_bits: of the power of two that was divided by, remembered with the block.
    """
    for i in tl.static_range(PIECES):
        if i < pieces:
            piece = as_tf32(values) if TF32 else values.to(columns.ptr.dtype.element_ty)
            tl.store(columns.ptr + offset_of(columns, batch, first + i) + k, piece, mask=k < K)
            remembered = wrapped(sum_of_bits(piece, k < K) + scale_bits).to(tl.int32)
            tl.store(integrity.ptr + offset_of(integrity, batch, first + i) + block, remembered)
            # A piece that is not finite stays alone: Inf - Inf would turn the rest into NaN.
            values = tl.where(is_finite(piece.to(tl.float32)), values - piece.to(tl.float32), 0.0)


@triton.jit
def offset_of(matrix, batch, row):
    return tl.cast(batch, tl.int64) * matrix.batch + tl.cast(row, tl.int64) * matrix.row


@triton.jit
def _write_wide(wide, peaks, batch, column, values, k, K, block):
    """fp32 numbers of a column, and the largest magnitude of the block; Inf if any is not finite."""
    tl.store(wide.ptr + offset_of(wide, batch, column) + k, values, mask=k < K)
    tl.store(peaks.ptr + offset_of(peaks, batch, column) + block, _peak(values, k < K))


@triton.jit
def _peak(values, inside):
    return tl.max(tl.where(inside, tl.where(is_finite(values), tl.abs(values), float("inf")), 0.0), 0)


@triton.jit
def pack_scaled(wide, peaks, columns, integrity, scales, scales_batch, K, checksums, sketches,
                PARTS: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """One fp32 column and BK of its numbers per program: divide by its power of two, split, write."""
    blocks = tl.cdiv(K, BK)
    source, block = tl.program_id(0) % (checksums + sketches), (tl.program_id(0) // (checksums + sketches)) % blocks
    batch = tl.program_id(0) // (checksums + sketches) // blocks
    k, b = block * BK + tl.arange(0, BK), tl.arange(0, BLOCKS)
    peak = tl.max(tl.load(peaks.ptr + offset_of(peaks, batch, source) + b, mask=b < blocks, other=0.0), 0)
    values = tl.load(wide.ptr + offset_of(wide, batch, source) + k, mask=k < K, other=0.0)
    first = tl.where(source < checksums, source * PARTS, checksums * PARTS + source - checksums)
    pieces = tl.where(source < checksums, PARTS, 1)
    _write_scaled(columns, integrity, scales, scales_batch, batch, first, pieces, PARTS, values, peak, k, K, block)


@triton.jit
def _write_scaled(columns, integrity, scales, scales_batch, batch, first, pieces, PIECES: tl.constexpr, values, peak, k, K, block):
    scale, inverse = power_of_two(peak)
    for i in tl.static_range(PIECES):
        if i < pieces:
            tl.store(scales + tl.cast(batch, tl.int64) * scales_batch + first + i, scale)
    bits = scale.to(tl.int32, bitcast=True)
    _write(columns, integrity, batch, first, pieces, PIECES, values * inverse, bits, k, K, block, False)


@triton.jit
def power_of_two(peak):
    """(2^(e - 12), its inverse) for a peak in [2^(e-1), 2^e); (1, 1) if the peak is zero or not finite.

    The peaks of fp16 sums lie between 2⁻²⁵ and 2³⁶: both powers are normal numbers.
    """
    exponent = ((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126 - TARGET_EXPONENT
    usable = is_finite(peak) & (peak > 0)
    exponent = tl.where(usable, exponent, 0)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True), ((127 - exponent) << 23).to(tl.float32, bitcast=True)


# --- one group, by one program ----------------------------------------------------------------------


@triton.jit
def intact(columns, integrity, scales, scales_batch, batch, group, groups, K, KINDS: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr):
    """Whether the columns of a group, and their scales, have the bits that were written."""
    wrong = tl.cast(0, tl.int32)
    for j in range(KINDS * PARTS + SKETCHES):
        column = tl.where(j < KINDS * PARTS, group * (KINDS * PARTS) + j, groups * (KINDS * PARTS) + group * SKETCHES + j - KINDS * PARTS)
        scale_bits = tl.cast(0, tl.int32)
        if scales is not None:
            at = scales + tl.cast(batch, tl.int64) * scales_batch + column
            scale_bits += tl.load(at).to(tl.int32, bitcast=True)
        for block in range(tl.cdiv(K, BK)):
            k = block * BK + tl.arange(0, BK)
            values = tl.load(columns.ptr + offset_of(columns, batch, column) + k, mask=k < K, other=0.0)
            then = tl.load(integrity.ptr + offset_of(integrity, batch, column) + block).to(tl.int64)
            wrong += (wrapped(sum_of_bits(values, k < K) + scale_bits) != then).to(tl.int32)
    return wrong == 0


@triton.jit
def rebuild(w, weights, sketch, columns, integrity, scales, scales_batch, rms, batch, group, groups, width, N, K,
            KINDS: tl.constexpr, PARTS: tl.constexpr, TF32: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """What sum_rows and pack_scaled write of a group's panel, in the same places."""
    SWEEPS: tl.constexpr = 1 if scales is None else 2  # what fp16 columns are divided by depends on all of their numbers
    blocks, slots = tl.cdiv(K, BK), tl.arange(0, 8)
    peaks = tl.zeros((8,), tl.float32)
    for step in tl.range(0, SWEEPS * blocks, disable_licm=True):
        block = step % blocks
        k = block * BK + tl.arange(0, BK)
        s, nu, _ = _sums(w, weights, rms, batch, group, width, k, N, K, KINDS, TF32, False, BN, BK)
        for j in tl.range(0, KINDS + SKETCHES, disable_licm=True):  # not unrolled, for that would take too many registers
            u = tl.load(sketch.ptr + tl.maximum(j - KINDS, 0) * sketch.row + k, mask=k < K, other=0.0)
            values = tl.where(j == 0, s[0], tl.where(j == 1, s[1], tl.where(j == 2, s[2], s[3])))
            values = tl.where(j < KINDS, values, nu * u)
            first = tl.where(j < KINDS, (group * KINDS + j) * PARTS, groups * KINDS * PARTS + group * SKETCHES + j - KINDS)
            pieces = tl.where(j < KINDS, PARTS, 1)
            if scales is None:
                _write(columns, integrity, batch, first, pieces, PARTS, values, 0, k, K, block, TF32)
            elif step < blocks:
                peaks = tl.where(slots == j, tl.maximum(peaks, _peak(values, k < K)), peaks)
            else:
                peak = tl.max(tl.where(slots == j, peaks, 0.0), 0)
                _write_scaled(columns, integrity, scales, scales_batch, batch, first, pieces, PARTS, values, peak, k, K, block)


# --- launcher -------------------------------------------------------------------------------------


class Built(NamedTuple):
    """A panel's columns (C, K) of W's dtype, their scales (C,) fp32 or None, the bit sums of their blocks (C, ⌈K / bk⌉) int32,
    and W's fingerprint (groups, 3 · halves, K) int32 or None. A batch lies in front of each but the last."""

    columns: Tensor
    scales: Tensor | None
    integrity: Tensor
    fingerprint: Tensor | None


def build(w: Tensor, weights: Tensor, sketch: Tensor, rms: Rms, width: int, parts: int, scaled: bool,
          ingress: bool, config: PanelConfig, *, remember: bool = False) -> Built:  # fmt: skip
    """The panel of W (N, K), or with a batch in front.

    weights (kinds, N) and sketch (4, K) fp32; ``width`` of a group. fp32 with parts > 1 is tf32. remember: W (N, K) is a weight,
    whose bits are to be compared later.
    """
    n, k = w.shape[-2:]
    lead = w.shape[:-2]
    kinds, groups, batch = weights.shape[0], -(-n // width) if n else 0, w.shape[0] if w.dim() == 3 else 1
    checksums, sketches = groups * kinds, groups * SKETCHES.value
    count, blocks = checksums * parts + sketches + int(ingress), -(-k // config.bk)
    columns = torch.empty(*lead, count, k, dtype=w.dtype, device=w.device)
    scales = torch.ones(*lead, count, dtype=torch.float32, device=w.device) if scaled else None
    integrity = torch.empty(*lead, count, blocks, dtype=torch.int32, device=w.device)
    planes = PLANES.value * w.element_size() // 2
    fingerprint = torch.empty(groups, planes, k, dtype=torch.int32, device=w.device) if remember else None
    if 0 in (n, k, batch):
        # At most the column of ±1, of which nothing is asked.
        return Built(columns.fill_(1.0), scales, integrity.zero_(), fingerprint)
    wide = torch.empty(batch, checksums + sketches if scaled else 0, k, dtype=torch.float32, device=w.device)
    peaks = torch.empty(batch, wide.shape[1], blocks, dtype=torch.float32, device=w.device)
    flags = {"KINDS": kinds, "PARTS": parts, "INGRESS": ingress, "SCALED": scaled, "TF32": w.dtype == torch.float32 and parts > 1}
    sum_rows[(batch * groups * blocks,)](
        matrix(w), weights, matrix(sketch), matrix(columns), matrix(integrity), fingerprint, matrix(wide), matrix(peaks), rms,
        n, k, groups, width, **flags, BN=config.bn, BK=config.bk, num_warps=config.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if scales is not None:
        pack_scaled[(batch * (checksums + sketches) * blocks,)](
            matrix(wide), matrix(peaks), matrix(columns), matrix(integrity), scales, batch_stride(scales),
            k, checksums, sketches, PARTS=parts, BK=config.bk, BLOCKS=triton.next_power_of_2(blocks),
            num_warps=config.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return Built(columns, scales, integrity, fingerprint)


def rms_of(values: tuple[float, ...]) -> Rms:
    """w̄ of one or of all four kinds."""
    return Rms(*values, *(1.0,) * (4 - len(values)))


def batch_stride(scales: Tensor | None) -> int:
    """Of a (batch, C) tensor; 0 of a (C,) one."""
    return scales.stride(0) if scales is not None and scales.dim() == 2 else 0
