"""What a checked attention knows of its keys and values beforehand: sums of K over keys, and of V over columns, in one launch.

    prefix[j]  = Σ_{t < j BN} of  w_t k_t,   k_t²,   ±_i k_t (i < 8)             fp32, (rows of E numbers)
    panel[t]   = Σ_d w_d v_td for the kinds e, hi, lo of w, in parts;   ν_t u_t (four);   1      16 columns of V's dtype

A row of scores must sum to Σ_t w_t s_it = q_i · Σ_t w_t k_t over the blocks of keys that a query visits, which are consecutive: two
prefixes tell. In w (abft.keyweights) equal errors of neighbours do not cancel. The ±_i sums give Σ s² without an operation per score:
(q_i · Σ_t ±_i k_t)² has that mean. Scores that add up coherently are larger than the sketches of k² alone would allow.

The panel of V rides in the product P V as 16 more columns. Of V alone, ν_t² = Σ_d v² + Σ_w (Σ_d w v / w̄)² as in panel.py; the column of
ones sums the very probabilities that multiply. fp16 columns are divided by a power of two for each block of keys, undone when the
block's product is added: no second pass over V.

K's sums run along the keys, one program for every 32 of its columns; V's blocks are independent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import Scores, heads, rectangle, sign_of_key, start_of
from .attention_sequences import first_prefix, key_block, key_blocks, sequence_of, start_of_keys
from .judgement import SKETCHES, is_finite
from .panel import power_of_two
from .summary import clear

#: Rows of a prefix: the signed sum, the squares, and the sketches of Σ s².
SIGNED, SQUARES, SPREADS, SPREAD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(8)
PREFIX_ROWS = tl.constexpr(10)
#: Keys after which their weights repeat; a multiple of every block.
PERIOD = tl.constexpr(256)
#: Columns of V's panel: kinds × parts checksums, then sketches, then ones, then nothing.
PANEL = tl.constexpr(16)
KINDS = tl.constexpr(3)
#: Columns of K that a program sums.
SLICE = tl.constexpr(32)


class Weights(NamedTuple):
    """What is counted how: keys, the weights (PERIOD,) of as many keys, which then repeat, and blocks (PERIOD / BN,) their sums over blocks
    of BN; columns (3, D) of kinds e, hi, lo; coefficients of V's sketches (4, S) and
    of K's (4, E), with their row strides; w̄ of the kinds."""

    keys: Any
    blocks: Any
    columns: Any
    sketch: Any
    sketch_row: Any
    keys_sketch: Any
    keys_sketch_row: Any
    rms_e: Any
    rms_hi: Any
    rms_lo: Any


@triton.jit(do_not_specialize=["summary_words"])
def sum_keys_and_values(k, v, weights, prefix, panel, scales, summary, summary_words, heads_each, S, E, D, planes,
                        PARTS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr = False, SCORES=None):  # fmt: skip
    """planes × ⌈E/32⌉ programs sum K, planes × ⌈S/BN⌉ build V's panel. prefix (planes, ⌈S/BN⌉ + 1, 10, E), panel (planes, 16, ⌈S/BN⌉ BN),
    scales (planes, ⌈S/BN⌉, 16) or None; a plane is a head of one batch. PACKED: SCORES are of packed sequences, S keys the longest;
    a plane is a head of one sequence, and where its sums lie is attention_sequences.py's."""
    clear(summary, summary_words)
    slices, program = tl.cdiv(E, SLICE), tl.program_id(0)
    if program < planes * slices:
        _keys_of_head(k, weights, prefix, program // slices, heads_each, program % slices * SLICE, S, E, PACKED, SCORES, BN)
    else:
        blocks = tl.cdiv(S, BN)
        plane, block = (program - planes * slices) // blocks, (program - planes * slices) % blocks
        _values_of_head(v, weights, panel, scales, plane, heads_each, block, blocks, S, D, PACKED, SCORES, PARTS, BN, BD)


@triton.jit
def _keys_of_head(k, weights, prefix, plane, heads_each, first, S, E, PACKED: tl.constexpr, SCORES, BN: tl.constexpr):
    if not PACKED:
        at = prefix + tl.cast(plane, tl.int64) * (tl.cdiv(S, BN) + 1) * PREFIX_ROWS * E
        _sum_keys(start_of(k, plane // heads_each, plane % heads_each, 0), k, weights, at, first, S, E, BN)
    else:
        one, head = sequence_of(SCORES, plane // heads_each), plane % heads_each
        at = prefix + first_prefix(one, head, BN) * PREFIX_ROWS * E
        _sum_keys(start_of_keys(one, k, 0, head, 0), k, weights, at, first, one.keys, E, BN)


@triton.jit
def _values_of_head(v, weights, panel, scales, plane, heads_each, block, blocks, S, D, PACKED: tl.constexpr, SCORES, PARTS: tl.constexpr,
                    BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    if not PACKED:
        start = start_of(v, plane // heads_each, plane % heads_each, 0)
        at = panel + tl.cast(plane, tl.int64) * PANEL * blocks * BN
        if scales is not None:
            scales += (tl.cast(plane, tl.int64) * blocks + block) * PANEL
        _sum_values(start, v, weights, at, scales, block, blocks * BN, S, D, PARTS, BN, BD)
    else:
        one, head = sequence_of(SCORES, plane // heads_each), plane % heads_each
        at = panel + key_block(one, head, 0, PANEL, BN) * BN
        if scales is not None:
            scales += key_block(one, head, block, 1, BN) * PANEL
        if block * BN < one.keys:
            start = start_of_keys(one, v, 0, head, 0)
            _sum_values(start, v, weights, at, scales, block, key_blocks(one, BN) * BN, one.keys, D, PARTS, BN, BD)


@triton.jit
def _sum_keys(start, k, weights, prefix, first, S, E, BN: tl.constexpr):
    cols, blocks = first + tl.arange(0, SLICE), tl.cdiv(S, BN)
    inside = cols < E
    which, sums = tl.arange(0, 16), tl.zeros((16, SLICE), tl.float32)
    at = prefix + which[:, None] * E + cols[None, :]
    for block in range(0, blocks):
        tl.store(at, sums, mask=(which[:, None] < PREFIX_ROWS) & inside[None, :])
        at += PREFIX_ROWS * E
        keys = block * BN + tl.arange(0, BN)
        x = rectangle(start, k, keys, cols, S, E).to(tl.float32)
        own = weights_of_block(weights, block, BN)
        sums += tl.where(which[:, None] == SIGNED, tl.sum(x * own[:, None], 0)[None, :], 0.0)
        sums += tl.where(which[:, None] == SQUARES, tl.sum(x * x, 0)[None, :], 0.0)
        for i in tl.static_range(SPREAD):
            part = tl.sum(x * sign_of_key(keys, i)[:, None], 0)
            sums += tl.where(which[:, None] == SPREADS + i, part[None, :], 0.0)
    tl.store(at, sums, mask=(which[:, None] < PREFIX_ROWS) & inside[None, :])


@triton.jit
def weights_of_block(weights, block, BN: tl.constexpr):
    """w of a block's keys."""
    return tl.load(weights.keys + tl.cast(block, tl.int32) % (PERIOD // BN) * BN + tl.arange(0, BN))


@triton.jit
def weight_of_block(weights, block, BN: tl.constexpr):
    """Their sum."""
    return tl.load(weights.blocks + tl.cast(block, tl.int32) % (PERIOD // BN))


@triton.jit
def _sum_values(start, v, weights, panel, scales, block, column_stride, S, D, PARTS: tl.constexpr, BN: tl.constexpr,
                BD: tl.constexpr):  # fmt: skip
    keys, cols = block * BN + tl.arange(0, BN), tl.arange(0, BD)
    x = rectangle(start, v, keys, cols, S, D).to(tl.float32)
    at = panel + keys
    e, hi, lo = _weighted(x, weights, 0, cols, D), _weighted(x, weights, 1, cols, D), _weighted(x, weights, 2, cols, D)
    largest = tl.max(tl.abs(x), 1)  # numbers are divided by it: squares neither over- nor underflow
    unit = tl.where(largest > 0, largest, 1.0)
    relative, w_e, w_hi, w_lo = x / unit[:, None], e / (unit * weights.rms_e), hi / (unit * weights.rms_hi), lo / (unit * weights.rms_lo)
    nu = unit * tl.sqrt(tl.sum(relative * relative, 1) + w_e * w_e + w_hi * w_hi + w_lo * w_lo)
    _write(at, scales, column_stride, 0, PARTS, e)
    _write(at, scales, column_stride, PARTS, PARTS, hi)
    _write(at, scales, column_stride, 2 * PARTS, PARTS, lo)
    for i in tl.static_range(SKETCHES):
        u = tl.load(weights.sketch + i * weights.sketch_row + keys, mask=keys < S, other=0.0)
        _write(at, scales, column_stride, KINDS * PARTS + i, 1, nu * u)
    ones: tl.constexpr = KINDS * PARTS + SKETCHES
    _write(at, scales, column_stride, ones, 1, tl.full((BN,), 1.0, tl.float32))
    for i in tl.static_range(ones + 1, PANEL):
        _write(at, scales, column_stride, i, 1, tl.zeros((BN,), tl.float32))


@triton.jit
def _weighted(x, weights, KIND: tl.constexpr, cols, D):
    return tl.sum(x * tl.load(weights.columns + KIND * D + cols, mask=cols < D, other=0.0)[None, :], 1)


@triton.jit
def _write(at, scales, column_stride, FIRST: tl.constexpr, PIECES: tl.constexpr, values):
    """Numbers as a sum of PIECES of the panel's type, each the rounding of what the earlier ones left over."""
    if scales is not None:
        scale, inverse = power_of_two(tl.max(tl.where(is_finite(values), tl.abs(values), float("inf")), 0))
        values = values * inverse
    for i in tl.static_range(PIECES):
        piece = values.to(at.dtype.element_ty)
        tl.store(at + tl.cast(FIRST + i, tl.int64) * column_stride, piece)
        # A piece that is not finite stays alone: Inf - Inf would turn the rest into NaN.
        values = tl.where(is_finite(piece.to(tl.float32)), values - piece.to(tl.float32), 0.0)
        if scales is not None:
            tl.store(scales + FIRST + i, scale)


# --- launcher -------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """prefix, panel, scales as ``sum_keys_and_values`` writes them; None where nothing is checked."""

    prefix: Tensor | None
    panel: Tensor | None
    scales: Tensor | None


def build(k: Tensor, v: Tensor, weights: Weights, parts: int, bn: int, summary: Tensor, packed: Scores | None = None) -> Sums:
    """Launch, of k (B, H, S, E), v (B, H, S, D), or (1, H, tokens, ·) of packed sequences; zeroes the summary."""
    batch, heads_each, keys, e = k.shape
    planes, blocks, d = batch * heads_each, -(-keys // bn), v.shape[-1]
    rooms, prefixes = blocks, blocks + 1
    if packed is not None:
        planes, blocks = heads_each * packed.sequences, -(-packed.keys // bn)
        rooms, prefixes = keys // bn + packed.sequences, keys // bn + 2 * packed.sequences
    prefix = torch.empty(batch * heads_each, prefixes, PREFIX_ROWS.value, e, dtype=torch.float32, device=k.device)
    panel = torch.empty(batch * heads_each, PANEL.value, rooms * bn, dtype=v.dtype, device=v.device)
    scales = None
    if v.dtype == torch.float16:
        scales = torch.empty(batch * heads_each, rooms, PANEL.value, dtype=torch.float32, device=v.device)
    programs = planes * (-(-e // SLICE.value) + blocks)
    sum_keys_and_values[(programs,)](
        heads(k), heads(v), weights, prefix, panel, scales, summary, summary.numel(), heads_each,
        keys if packed is None else packed.keys, e, d, planes,
        PARTS=parts, BN=bn, BD=max(16, triton.next_power_of_2(d)), PACKED=packed is not None, SCORES=packed, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return Sums(prefix, panel, scales)
