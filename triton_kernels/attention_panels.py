"""What attention's products must sum to: of a matrix X (n, width) of each head, cut into blocks of rows, in one pass over it.

    hat[b]  = Σ_r w_r X[r]            a vector per block: the scores of a block of keys sum to Σ_t w_t s_it = q_i · hat
    norm[b] = ‖X[block]‖_F            with ‖q_i‖ it bounds the scores' norm (Cauchy and Schwarz), whatever they cancel to
    side[r] = (X[r] · w_1, X[r] · w_2, ν_r u_1 … u_4)      16 columns beside X: a product with X has these sums of its rows, and noise

w are fixed random numbers of balanced sign, ±U(0.5, 1.5)/1.041; ν_r² = ‖X[r]‖² + Σ_j (X[r] · w_j)²: the sketches of thresholds.md.
Each sum is written as ``parts`` numbers of X's type; fp16 is divided by a power of two per block, which is multiplied again after the
product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import Heads, heads, heads_of, rectangle
from .attention_sequences import first_key_of, first_row_of, key_panel, query_panel, sequence_of, start_of_keys, start_of_queries
from .panel import power_of_two

#: Columns beside a matrix: as many as the narrowest matrix instruction has.
SIDE = tl.constexpr(16)
SUMS, SKETCHES = tl.constexpr(2), tl.constexpr(4)
#: The largest |u|: 1.5 / 1.041.
WIDEST = tl.constexpr(1.441)
#: Parts of a sum that carry fp32 through the operand's type.
PARTS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}


class Weights(NamedTuple):
    """w of the rows of a block (rows,); w_1, w_2 of the columns, (2, columns); u of every row, (4, n); fp32."""

    of_rows: Any
    of_columns: Any
    columns: Any
    sketch: Any
    sketched: Any  # the n of ``sketch``


class Panel(NamedTuple):
    """Of one operand. hats (heads, blocks, parts, width), side (heads, n, SIDE) or None in its type; the rest (heads, blocks) fp32."""

    hats: Any
    norms: Any
    scales: Any
    side: Any
    side_scales: Any


@triton.jit
def encode(q, k, v, d_out, of_q, of_k, of_v, of_d_out, queries, keys, values, gradients, scores, E, D, summary, planes,
           BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """The panels of all four operands. queries, …: their Weights. ``planes``: heads of queries. Clears the summary."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(summary + tl.arange(0, 4), tl.zeros((4,), tl.int32))
    of_queries, of_keys = tl.cdiv(scores.length, BM) * planes, tl.cdiv(scores.keys, BN) * (planes // scores.group)
    if program < of_queries:
        blocks = tl.cdiv(scores.length, BM)
        plane, block = program // blocks, program % blocks
        _encode_queries(q, d_out, of_q, of_d_out, queries, gradients, scores, plane, block, E, D, BM, BE, BD, PARTS, SCALED)
    elif program < of_queries + of_keys:
        index, blocks = program - of_queries, tl.cdiv(scores.keys, BN)
        _encode_keys(k, v, of_k, of_v, keys, values, scores, index // blocks, index % blocks, E, D, BN, BE, BD, PARTS, SCALED)


@triton.jit
def _encode_queries(q, d_out, of_q, of_d_out, queries, gradients, scores, plane, block, E, D, BM: tl.constexpr, BE: tl.constexpr,
                    BD: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    batch, head, member = heads_of(scores, plane)
    if scores.cu_q is None:
        one = scores
    else:
        one = sequence_of(scores, batch)
    index, first, n = query_panel(one, plane, block, BM), first_row_of(one, plane), one.length
    of_head, above = start_of_queries(one, q, batch, head, member), start_of_queries(one, d_out, batch, head, member)
    if (scores.cu_q is None) or (block * BM < n):
        _encode(of_head, q, of_q, queries, index, block, first, n, E, BM, BE, PARTS, SCALED)
        _encode(above, d_out, of_d_out, gradients, index, block, first, n, D, BM, BD, PARTS, SCALED)


@triton.jit
def _encode_keys(k, v, of_k, of_v, keys, values, scores, plane, block, E, D, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
                 PARTS: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    batch, head = plane // scores.heads, plane % scores.heads
    if scores.cu_q is None:
        one = scores
    else:
        one = sequence_of(scores, batch)
    index, first, n = key_panel(one, plane, block, BN), first_key_of(one, plane), one.keys
    if (scores.cu_q is None) or (block * BN < n):
        _encode(start_of_keys(one, k, batch, head, 0), k, of_k, keys, index, block, first, n, E, BN, BE, PARTS, SCALED)
        _encode(start_of_keys(one, v, batch, head, 0), v, of_v, values, index, block, first, n, D, BN, BD, PARTS, SCALED)


@triton.jit
def _encode(start, t, panel, weights, index, block, first, n, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
            SCALED: tl.constexpr):  # fmt: skip
    """The panel of one block; ``index`` of it among those of all heads, ``first`` the place of its head's first row among all rows."""
    rows, cols = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    x = rectangle(start, t, rows, cols, n, width).to(tl.float32)
    tl.store(panel.norms + index, tl.sqrt(tl.sum(tl.sum(x * x, 1), 0)))
    hat = tl.sum(x * tl.load(weights.of_rows + tl.arange(0, ROWS))[:, None], 0)
    inverse = tl.cast(1.0, tl.float32)
    if SCALED:
        scale, inverse = power_of_two(tl.max(tl.abs(hat), 0))
        tl.store(panel.scales + index, scale)
    hat = hat * inverse
    for part in tl.static_range(PARTS):
        piece = hat.to(panel.hats.dtype.element_ty)
        tl.store(panel.hats + (tl.cast(index, tl.int64) * PARTS + part) * width + cols, piece, mask=cols < width)
        hat -= piece.to(tl.float32)
    if panel.side is not None:
        at = panel.side + (first + rows) * SIDE
        inside = cols < width
        s1 = tl.sum(x * tl.load(weights.of_columns + cols, mask=inside, other=0.0)[None, :], 1)
        s2 = tl.sum(x * tl.load(weights.of_columns + weights.columns + cols, mask=inside, other=0.0)[None, :], 1)
        noise = tl.sqrt(tl.fma(s1, s1, tl.fma(s2, s2, tl.sum(x * x, 1))))
        if SCALED:
            scale, inverse = power_of_two(tl.max(tl.maximum(tl.maximum(tl.abs(s1), tl.abs(s2)), noise * WIDEST), 0))
            tl.store(panel.side_scales + index, scale)
        _store_parts(at, s1 * inverse, rows < n, PARTS)
        _store_parts(at + PARTS, s2 * inverse, rows < n, PARTS)
        for i in tl.static_range(SKETCHES):
            u = tl.load(weights.sketch + i * weights.sketched + rows, mask=rows < n, other=0.0)
            tl.store(at + SUMS * PARTS + i, (noise * inverse * u).to(at.dtype.element_ty), mask=rows < n)


@triton.jit
def _store_parts(at, values, inside, PARTS: tl.constexpr):
    for part in tl.static_range(PARTS):
        piece = values.to(at.dtype.element_ty)
        tl.store(at + part, piece, mask=inside)
        values -= piece.to(tl.float32)


# --- what kernels read ----------------------------------------------------------------------------


@triton.jit
def hat_of(panel, index, width, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """(SIDE, WIDTH): the parts of a block's hat, the other rows zero."""
    cols, part = tl.arange(0, WIDTH), tl.arange(0, SIDE)
    at = panel.hats + tl.cast(index, tl.int64) * (PARTS * width) + part[:, None] * width + cols[None, :]
    return tl.load(at, mask=(part[:, None] < PARTS) & (cols[None, :] < width), other=0.0)


@triton.jit
def side_of(panel, first, rows, n, PARTS: tl.constexpr):
    """(rows, SIDE): what stands beside some rows of n, the first of which is ``first``; columns that do not exist are zero."""
    cols = tl.arange(0, SIDE)
    at = panel.side + first * SIDE + rows[:, None] * SIDE + cols[None, :]
    return tl.load(at, mask=(rows[:, None] < n) & (cols[None, :] < SUMS * PARTS + SKETCHES), other=0.0)


# --- launching ------------------------------------------------------------------------------------


def empty(t: Tensor, rows: int, side: bool, sequences: int | None = None) -> Panel:
    """Memory for the panel of an operand (B, H, …, n, width) in blocks of so many rows; sequences: as many are packed in n."""
    planes, n, width = t.shape[:-2].numel(), t.shape[-2], t.shape[-1]
    blocks = -(-n // rows) if sequences is None else n // rows + sequences
    numbers = torch.empty(3, planes * blocks, dtype=torch.float32, device=t.device)
    hats = torch.empty(planes * blocks * PARTS[t.dtype] * width, dtype=t.dtype, device=t.device)
    beside = torch.empty(planes * n * SIDE.value, dtype=t.dtype, device=t.device) if side else None
    return Panel(hats, numbers[0], numbers[1], beside, numbers[2])


def argument(t: Tensor) -> Heads:
    return heads(t)
