"""Checked flash attention, forward: O = softmax(Q Kᵀ) V, block of queries by block of queries, and what tells whether it is right.

    for each block of keys     s = q kᵀ;  x₂ (attention_scores.py);  m ← max(m, x₂);  p = exp2(x₂ - m);  P = p rounded to V's dtype
                               α = exp2(m before - m);  ℓ ← α ℓ + Σ P;  acc ← α acc + P V;  C ← α' C + P panel(V)
    O = acc / ℓ                α' = exp2(½(m before - m))²: the same number by another argument

What must hold, per row, before O is rounded:

    qk  (1) Σ w x₂ = scale · q · Σ w k      from the registers that enter exp2 where no key of the block is hidden, and then m Σ w is given
                                            back; else from the scores. Equal errors of neighbours do not cancel (abft.keyweights)
        (1') |m| <= scale ‖q‖ ‖K‖           where x₂ are shifted scores: what shifts a row so far rounds away what (1) compares
    pv  (2) Σ_d w O = C_w / ℓ               kinds e, hi, lo of w: V as it was read, the accumulator, α, the division
        (3) ℓ = C_1                         the column of ones: P as it multiplied, ℓ, α
        (4) 1 - 2⁻⁹ <= ℓ <= keys (1 + 2⁻⁹)  or no key is seen: a maximum that is none
        (5) Π α = exp2(m first - m last)    m and α
        (6) Π p = exp2(Σ x₂) over four keys EXPONENTIALS; both with x₂ clamped at -30, so that a hidden or tiny one does not hide the
                                            others: exp2 and p. Nothing else sees an exponential that is wrong at once for ℓ and for O,
        (7) 0 <= p <= (1 + 2⁻²⁰) 2^(U|m|/2) in one comparison: as whole numbers, the bits of what is negative or no number are larger.
                                            x₂ = s · scale2 - m may be fused: the largest is then off by the rounding of m.

Under dropout P is what it keeps and ℓ sums all: (3) compares what was kept, and ℓ with kept + left out.

Rows are whole in one program, so it judges them itself: no partial sums, no launch that verifies. What is suspect is marked for
attention_settle.py, which computes those blocks again by the same device function.

Bounds: U κ S as everywhere (docs/explanation/thresholds.md), S from the sketches, and computed of numbers divided by the largest of them,
so that squares neither over- nor underflow. The constants of (3) to (7): docs/explanation/attention.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_panel import (
    KINDS,
    PANEL,
    PREFIX_ROWS,
    SIGNED,
    SPREAD,
    SPREADS,
    SQUARES,
    Sums,
    Weights,
    build,
    weight_of_block,
    weights_of_block,
)
from .attention_scores import (
    Scores,
    dropout_base,
    exponents,
    heads,
    heads_of,
    hidden,
    kept,
    natural,
    rectangle,
    visited,
)
from .attention_sequences import (
    first_prefix,
    first_row_of,
    key_block,
    key_blocks,
    own_rows,
    plane_of,
    result_rows,
    sequence_of,
    start_of_keys,
    start_of_queries,
)
from .configs import MAX_REGISTERS, AttentionConfig
from .gemm import fault_argument, note_unit
from .judgement import SKETCHES, TINY, explained, is_finite, ratio_of
from .panel import power_of_two
from .record import DETAILS, count_call, keep, raise_worst
from .summary import UNQUIET
from .summary import words as summary_words
from .tiles import strike

#: Places of faults in these kernels, as abft.backends.triton_attention numbers them.
S, P, L, O, ALPHA, M, CHECKSUM_S, CHECKSUM_O, QUERIES, STATISTICS, PROBABILITIES = (tl.constexpr(i) for i in range(11))
#: Status of a row, a bit for each role.
QK, PV = tl.constexpr(1), tl.constexpr(2)
#: (4) to (7): design of the checks, docs/explanation/attention.md.
RANGE_L, RATIO_ALPHA, RATIO_EXP, FLOOR_EXP, RANGE_P = (tl.constexpr(x) for x in (2.0**-9, 3e-5, 3e-5, -30.0, 2.0**-20))
UNIT = tl.constexpr(2.0**-23)
#: Columns of queries at a time, where they are read once more.
NARROW = tl.constexpr(8)
#: exp2 of less is no number that matters.
VANISHED = tl.constexpr(2.0**-100)


class Limits(NamedTuple):
    """Coefficients of the bounds (abft.backends.triton_attention)."""

    scores: Any  # U κ of (1)
    shift: Any  # of (1): U κ √keys, times |m|
    output: Any  # (3,): U κ w̄ of (2)
    sums: Any  # of (3), relative to ℓ
    output_slope: Any = None  # of packed sequences these are of no key, and this is added for each key of a sequence; shift is of one key
    sums_slope: Any = None


class Finding(NamedTuple):
    """Of every row and one role: whether it is explained, residual and bound of what stands out."""

    fine: Any
    residual: Any
    tau: Any


class Way(NamedTuple):
    """A block of rows: its head, and where its keys and values begin."""

    batch: Any
    head: Any
    member: Any
    plane: Any  # batch × heads of keys
    rows: Any
    dropout: Any
    first_key: Any  # addresses, found before the loops: inside, the strides' upper halves would wait in registers
    first_value: Any


@triton.jit
def checked_attention(q, k, v, out, statistics, sums, weights, scores, limits, words, site, status, details, units, flags, summary,
                      E, D, rows_total, roles, FAULT, CAUSAL: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
                      EXPONENTIALS: tl.constexpr, REPEAT: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                      BE: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A block of queries of one head per program. roles: bits of those that are judged. details: (2, DETAILS, rows) int32."""
    blocks = tl.cdiv(scores.length, BM)
    number, block = tl.program_id(0) // blocks, blocks - 1 - tl.program_id(0) % blocks  # under a causal mask the last takes longest
    if scores.cu_q is not None:
        one = sequence_of(scores, number // (scores.heads * scores.group))
        if CHECKED:
            limits = limits_of(limits, one.keys)
        scores = Scores(one.length, one.keys, scores.heads, scores.group, scores.scale, scores.scale2, one.offset, scores.window,
                        scores.cap, scores.mask, scores.dropped, scores.seed_low, scores.seed_high, scores.undropped, scores.cu_q,
                        scores.cu_k, scores.sequences, scores.tokens, scores.key_tokens, one.begin_q, one.begin_k,
                        one.sequence)  # fmt: skip
        if CHECKED:
            if tl.program_id(0) == 0:
                _count(words, site, tl.load(scores.cu_q + scores.sequences) * (scores.heads * scores.group), roles, REPEAT)
        if block * BM >= scores.length:
            if CHECKED:
                tl.store(flags + number * blocks + block, tl.cast(0, tl.int8))
            return
    y, m, l, qk, pv = attend_block(q, k, v, sums, weights, scores, limits, number, block, E, D, FAULT, CAUSAL, SCALED, CHECKED,
                                   EXPONENTIALS, PARTS, BM, BN, BE, BD, PRECISION)  # fmt: skip
    rows = block * BM + tl.arange(0, BM)
    inside, row = rows < scores.length, first_row_of(scores, number) + rows
    store_rows(out, statistics, y, m, l, scores, number, rows, D, rows_total, inside, FAULT, BD)
    if CHECKED:
        note_unit(units, number * blocks + block)
        code = tl.where(inside, suspects(qk, pv, roles), 0)
        tl.store(status + row, code.to(tl.int8), mask=inside)
        gravest = tl.max(code, 0)
        tl.store(flags + number * blocks + block, gravest.to(tl.int8))
        if scores.cu_q is None:
            if tl.program_id(0) == 0:
                _count(words, site, rows_total, roles, REPEAT)
        worst = tl.maximum(_worst(qk, (roles & QK) > 0), _worst(pv, (roles & PV) > 0))
        raise_worst(words, site, tl.max(tl.where(inside, worst, 0.0), 0))
        if gravest > 0:
            tl.atomic_add(summary + UNQUIET, tl.cast(1, tl.int64))
            _remember(details, qk, row, rows_total, number * blocks + block, (code & QK) > 0)
            _remember(details + DETAILS * tl.cast(rows_total, tl.int64), pv, row, rows_total, number * blocks + block, (code & PV) > 0)


@triton.jit
def _count(words, site, rows, roles, REPEAT: tl.constexpr):
    if (roles & QK) > 0:
        count_call(words, site, rows, REPEAT)
    if (roles & PV) > 0:
        count_call(words, site, rows, REPEAT)


@triton.jit
def limits_of(limits, keys):
    """The coefficients for the keys of one sequence: affine in them, shift in their root; that of the scores is of the longest."""
    n, slope = keys.to(tl.float32), limits.output_slope
    output = (limits.output[0] + slope[0] * n, limits.output[1] + slope[1] * n, limits.output[2] + slope[2] * n)
    return Limits(limits.scores, limits.shift * tl.sqrt(n), output, limits.sums + limits.sums_slope * n, slope, limits.sums_slope)


@triton.jit
def suspects(qk, pv, roles):
    """The status of rows: a bit for each role that is judged and not explained."""
    return tl.where(qk.fine, 0, QK & roles) | tl.where(pv.fine, 0, PV & roles)


@triton.jit
def _worst(finding, judged):
    return tl.where(finding.fine & judged, ratio_of(finding.residual, finding.tau), 0.0)


@triton.jit
def _remember(details, finding, row, rows_total, tile, mask):
    """What a record may say of suspect rows."""
    zero = tl.zeros(row.shape, tl.int32)
    keep(details, row, rows_total, finding.residual, finding.tau, zero - 1, zero, zero, zero + tile, mask)


@triton.jit
def store_rows(out, statistics, y, m, l, scores, number, rows, D, rows_total, mask, FAULT, BD: tl.constexpr):
    """O (contiguous), rounded, and the statistics (2, rows) of some rows of a head."""
    cols, row = tl.arange(0, BD), first_row_of(scores, number) + rows
    at = out + result_rows(scores, number, rows)[:, None] * D + cols[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=mask[:, None] & (cols[None, :] < D))
    m, l = natural(m, l)
    if FAULT is not None:
        m = _strike_rows(m, FAULT, STATISTICS, scores, number, rows, 0)
        l = _strike_rows(l, FAULT, STATISTICS, scores, number, rows, 1)
    tl.store(statistics + row, m, mask=mask)
    tl.store(statistics + rows_total + row, l, mask=mask)


# --- a block of rows ------------------------------------------------------------------------------


@triton.jit
def attend_block(q, k, v, sums, weights, scores, limits, number, block, E, D, FAULT, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
                 CHECKED: tl.constexpr, EXPONENTIALS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BE: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(O before it is rounded, m₂, ℓ, findings of qk, of pv)"""
    batch, head, member = heads_of(scores, number)
    rows = block * BM + tl.arange(0, BM)
    base = dropout_base(scores, batch, head, member) if scores.dropped is not None else None
    way = Way(batch, head, member, plane_of(scores, batch, head), rows, base, start_of_keys(scores, k, batch, head, 0),
              start_of_keys(scores, v, batch, head, 0))
    start = start_of_queries(scores, q, batch, head, member)
    queries = rectangle(start, q, rows, tl.arange(0, BE), scores.length, E)
    read = queries
    if FAULT is not None:
        read = strike(queries, FAULT, QUERIES, way.plane, own_rows(scores, member, rows), tl.arange(0, BE), 0, 1)
    m, first = tl.full((BM,), float("-inf"), tl.float32), tl.full((BM,), float("-inf"), tl.float32)
    l, signed, wrong = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    fall, held, left = tl.full((BM,), 1.0, tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    acc, check = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, PANEL), tl.float32)
    begin, whole, masked, end = visited(scores, block * BM, CAUSAL, BM, BN)
    if scores.mask is not None:
        whole = end  # every block may hide keys
        masked = end
    if (scores.window is not None) | (scores.mask is not None):
        for n in tl.range(begin, whole):
            m, l, acc, check, signed, first, fall, wrong, held, left = _step(
                m, l, acc, check, signed, first, fall, wrong, held, left, read, k, v, sums, weights, scores, way, n, E, D, FAULT, CAUSAL,
                SCALED, CHECKED, EXPONENTIALS, BN, BE, BD, PRECISION, True)  # fmt: skip
    if scores.mask is None:
        for n in tl.range(whole, masked):
            m, l, acc, check, signed, first, fall, wrong, held, left = _step(
                m, l, acc, check, signed, first, fall, wrong, held, left, read, k, v, sums, weights, scores, way, n, E, D, FAULT, CAUSAL,
                SCALED, CHECKED, EXPONENTIALS, BN, BE, BD, PRECISION, False)  # fmt: skip
        for n in tl.range(masked, end):
            m, l, acc, check, signed, first, fall, wrong, held, left = _step(
                m, l, acc, check, signed, first, fall, wrong, held, left, read, k, v, sums, weights, scores, way, n, E, D, FAULT, CAUSAL,
                SCALED, CHECKED, EXPONENTIALS, BN, BE, BD, PRECISION, True)  # fmt: skip
    if FAULT is not None:
        acc = strike(acc, FAULT, O, way.plane, own_rows(scores, member, rows), tl.arange(0, BD), 0, 1)
        l = _strike_rows(l, FAULT, L, scores, number, rows, 0)
    y = acc * (1.0 / tl.where(l == 0, 1.0, l))[:, None]
    if CHECKED:
        qk = _judge_scores(q, queries, signed, m, first, sums, weights, scores, limits, way, begin, end, E, FAULT, SCALED, PARTS, BN, BE,
                           PRECISION)  # fmt: skip
        pv = _judge_values(y, l, m, check, first, fall, wrong, held, left, weights, scores, limits, way, end - begin, D, FAULT, PARTS, BD)
    else:  # nobody asks
        qk = Finding(l == l, l, l)
        pv = qk
    if scores.dropped is not None:
        y = y * scores.undropped
    return y, m, l, qk, pv


@triton.jit
def _step(m, l, acc, check, signed, first, fall, wrong, held, left, queries, k, v, sums, weights, scores, way, block, E, D, FAULT,
          CAUSAL: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr, EXPONENTIALS: tl.constexpr, BN: tl.constexpr,
          BE: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, HIDES: tl.constexpr):  # fmt: skip
    """One block of keys. HIDES: it may hold keys that some rows do not see."""
    cols = block * BN + tl.arange(0, BN)
    own = own_rows(scores, way.member, way.rows)
    s = tl.dot(queries, tl.trans(_tile(way.first_key, k, block, tl.arange(0, BE), scores.keys, E, BN, HIDES)), input_precision=PRECISION)
    if FAULT is not None:
        s = strike(s, FAULT, S, way.plane, own, cols, 0, 1)
        m = _strike_rows(m, FAULT, M, scores, way.plane * scores.group + way.member, way.rows, block * BN)
    if CHECKED:
        own_weights = weights_of_block(weights, block, BN)[None, :]
    if SCALED and not HIDES:
        new = tl.maximum(m, tl.max(s, 1) * scores.scale2)
        shift = tl.where(new == float("-inf"), 0.0, new)
        x = s * scores.scale2 - shift[:, None]
        if CHECKED:
            signed += tl.sum(x * own_weights, 1) + shift * weight_of_block(weights, block, BN)
    else:
        x = exponents(s, scores, way.rows, cols, way.batch, way.head, way.member)
        if CHECKED:
            signed += tl.sum(x * own_weights, 1) if SCALED else scores.scale2 * tl.sum(s * own_weights, 1)
        if HIDES:
            x = tl.where(hidden(scores, way.rows, cols, way.batch, way.head, way.member, CAUSAL), float("-inf"), x)
        new = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        x = x - shift[:, None]
    p = tl.exp2(x)
    nothing = m == float("-inf")
    alpha = tl.where(nothing, 1.0, tl.exp2(m - shift))
    if FAULT is not None:
        p = strike(p, FAULT, P, way.plane, own, cols, 0, 1)
        alpha = _strike_rows(alpha, FAULT, ALPHA, scores, way.plane * scores.group + way.member, way.rows, block * BN)
    used = p.to(v.ptr.dtype.element_ty)
    l = l * alpha + tl.sum(used.to(tl.float32), 1)
    if scores.dropped is not None:
        stays = kept(scores, way.dropout, way.rows, cols)
        if CHECKED:
            held = held * alpha + tl.sum(tl.where(stays, used.to(tl.float32), 0.0), 1)
            left = left * alpha + tl.sum(tl.where(stays, 0.0, used.to(tl.float32)), 1)
        used = tl.where(stays, used, 0.0)
    if FAULT is not None:
        used = strike(used, FAULT, PROBABILITIES, way.plane, own, cols, 0, 1)
    if CHECKED:
        if EXPONENTIALS:
            wrong += _disagreeing(x, p)
        largest = tl.exp2(tl.abs(shift) * (0.5 * UNIT)) * (1.0 + RANGE_P)
        wrong += tl.where(tl.max(p.to(tl.uint32, bitcast=True), 1) <= largest.to(tl.uint32, bitcast=True), 0.0, 1.0)
        half = tl.exp2((m - shift) * 0.5)
        check = check * tl.where(nothing, 1.0, half * half)[:, None]
        at = sums.panel + key_block(scores, way.plane, block, PANEL, BN) * BN + tl.arange(0, BN)[:, None]
        columns = tl.load(at + tl.arange(0, PANEL)[None, :] * (key_blocks(scores, BN) * BN))
        if sums.scales is None:
            check = tl.dot(used, columns, check, input_precision=PRECISION)
        else:
            scale = key_block(scores, way.plane, block, 1, BN) * PANEL + tl.arange(0, PANEL)
            check += tl.dot(used, columns, input_precision=PRECISION) * tl.load(sums.scales + scale)[None, :]
        first = tl.where(first == float("-inf"), new, first)
        fall = fall * alpha
    values = _tile(way.first_value, v, block, tl.arange(0, BD), scores.keys, D, BN, HIDES)
    acc = tl.dot(used, values, acc * alpha[:, None], input_precision=PRECISION)
    return new, l, acc, check, signed, first, fall, wrong, held, left


@triton.jit
def _tile(first, t, block, cols, ROWS, COLS, BN: tl.constexpr, HIDES: tl.constexpr):
    """A block of keys or values, zero beyond the last; 32-bit offsets from a 64-bit start."""
    local = tl.arange(0, BN)
    start = first + tl.cast(block * BN, tl.int64) * t.row
    inside = cols[None, :] < COLS
    if HIDES:
        inside &= local[:, None] < ROWS - block * BN
    else:
        inside &= local[:, None] >= 0
    return tl.load(start + local[:, None] * t.row + cols[None, :] * t.col, mask=inside, other=0.0)


@triton.jit
def _disagreeing(x, p):
    """(6): of every row the number of quads of which the product of p is not exp2 of the sum of x₂. NaN disagrees."""
    x0, x1 = _halves(tl.maximum(x, FLOOR_EXP))
    p0, p1 = _halves(tl.maximum(p, tl.exp2(FLOOR_EXP)))
    x0, x1 = _halves(x0 + x1)
    p0, p1 = _halves(p0 * p1)
    expected = tl.exp2(x0 + x1)
    return tl.sum(tl.where(tl.abs(p0 * p1 - expected) <= RATIO_EXP * expected, 0.0, 1.0), 1)


@triton.jit
def _halves(x):
    """Columns of the left and of the right half: the same thread holds both."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _strike_rows(values, faults, PLACE: tl.constexpr, scores, number, rows, col):
    """Faults in a number per row; its column is the key at which it is computed."""
    own = own_rows(scores, number % scores.group, rows)
    plane = number // scores.group
    if scores.cu_q is not None:
        plane = plane % scores.heads
    return tl.sum(strike(values[:, None], faults, PLACE, plane, own, col + tl.arange(0, 1), 0, 1), 1)


# --- judging --------------------------------------------------------------------------------------


@triton.jit
def _judge_scores(q, queries, signed, m, first, sums, weights, scores, limits, way, begin, end, E, FAULT, SCALED: tl.constexpr,
                  PARTS: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(1) and (1') of every row."""
    columns, undo = _sketches(sums, weights, scores, way, begin, end, E, PARTS, BN, BE, queries.dtype)
    raw = tl.dot(queries, columns, input_precision=PRECISION) * undo[None, :]
    which = tl.arange(0, PANEL)
    if FAULT is not None:
        raw = strike(raw, FAULT, CHECKSUM_S, way.plane, own_rows(scores, way.member, way.rows), which, 0, 1)
    predicted = tl.sum(tl.where((which < PARTS)[None, :], raw, 0.0), 1)
    # h² + Σ s² are means of four and of eight squares; c² is another of Σ s².
    share = tl.where(which < PARTS, 0.0, tl.where(which < PARTS + SKETCHES, 1.0 / SKETCHES, 1.0 / SPREAD))
    share = tl.where(which < PARTS + SKETCHES + SPREAD, share, 0.0)
    largest = tl.max(tl.abs(raw), 1)
    unit = tl.where(largest > 0, largest, 1.0)
    parts, c = raw / unit[:, None], predicted / unit
    size = tl.sqrt(tl.sum(parts * parts * share[None, :], 1) + c * c) * unit
    residual, tau = signed - predicted * scores.scale2, tl.abs(scores.scale2) * limits.scores * size + TINY
    if SCALED:
        # Zero where nothing is shifted: m is then no number.
        shifted = tl.where(m == float("-inf"), 0.0, tl.maximum(tl.abs(m), tl.abs(first)))
        reach = scores.scale2 * _reach(q, size, sums, scores, way, end, E, BN, BE) + 1.0
        tau = tl.where(shifted <= reach, tau + limits.shift * shifted, reach)
        residual = tl.where(shifted <= reach, residual, shifted)
    return Finding(explained(residual, tau), residual, tau)


@triton.jit
def _reach(q, size, sums, scores, way, end, E, BN: tl.constexpr, BE: tl.constexpr):
    """What no score of a row exceeds: ‖q‖ ‖K‖ over the keys before ``end``, with room for rounding; where squares underflow, what the
    sketches know of its size."""
    k = tl.arange(0, BE)
    at = prefix_of(scores, way.plane, end, E, BN) + SQUARES * E + k
    squares = tl.sum(tl.load(sums.prefix + at, mask=k < E, other=0.0), 0)
    start = start_of_queries(scores, q, way.batch, way.head, way.member)
    own = tl.zeros(size.shape, tl.float32)
    for first in tl.range(0, E, NARROW):  # a few columns at a time, read anew: registers of whole queries are not there
        x = rectangle(start, q, way.rows, first + tl.arange(0, NARROW), scores.length, E).to(tl.float32)
        own += tl.sum(x * x, 1)
    return 1.01 * (tl.sqrt(own) * tl.sqrt(squares)) + 4.0 * size


@triton.jit
def prefix_of(scores, plane, block, E, BN: tl.constexpr):
    """Where the sums of a head's keys before a block begin. Ten rows for every block of all heads are fewer than 2³¹."""
    return tl.cast(tl.cast(first_prefix(scores, plane, BN) + block, tl.int32) * PREFIX_ROWS, tl.int64) * E


@triton.jit
def _sketches(sums, weights, scores, way, begin, end, E, PARTS: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, DTYPE: tl.constexpr):
    """((BE, 16) numbers that q multiplies, what undoes their scaling): Σ ε k in parts, ν u, and the ±_i sums, of the visited keys."""
    which, k = tl.arange(0, PANEL), tl.arange(0, BE)
    is_sum, is_sketch = which < PARTS, (which >= PARTS) & (which < PARTS + SKETCHES)
    source = tl.where(is_sum, SIGNED, tl.where(is_sketch, SQUARES, SPREADS + which - PARTS - SKETCHES))
    inside = (k[:, None] < E) & (which < PARTS + SKETCHES + SPREAD)[None, :]
    plane = sums.prefix + prefix_of(scores, way.plane, 0, E, BN)
    value = _between(plane, begin, end, source[None, :] * E + k[:, None], E, inside, scores)
    signed = _between(plane, begin, end, SIGNED * E + k, E, k < E, scores)
    u = tl.load(weights.keys_sketch + (which - PARTS)[None, :] * weights.keys_sketch_row + k[:, None],
                mask=is_sketch[None, :] & (k[:, None] < E), other=0.0)  # fmt: skip
    # The difference of two prefixes of squares may round below zero.
    value = tl.where(is_sketch[None, :], tl.sqrt(tl.maximum(value, 0.0) + (signed * signed)[:, None]) * u, value)
    undo = tl.full((PANEL,), 1.0, tl.float32)
    if tl.float16 == DTYPE:
        undo, inverse = power_of_two(tl.max(tl.where(is_finite(value), tl.abs(value), float("inf")), 0))
        value = value * inverse[None, :]
    piece = value.to(DTYPE)
    out = piece
    for i in tl.static_range(1, PARTS):
        value = tl.where(is_finite(piece.to(tl.float32)), value - piece.to(tl.float32), 0.0)
        piece = value.to(DTYPE)
        out = tl.where((which == i)[None, :], piece, out)
    return out, undo


@triton.jit
def _between(plane, begin, end, at, E, inside, scores):
    """A row of prefix sums at the last visited block, less that at the first."""
    value = tl.load(plane + tl.cast(end * PREFIX_ROWS, tl.int64) * E + at, mask=inside, other=0.0)
    if scores.window is not None:
        value -= tl.load(plane + tl.cast(begin * PREFIX_ROWS, tl.int64) * E + at, mask=inside, other=0.0)
    return value


@triton.jit
def _judge_values(y, l, m, check, first, fall, wrong, held, left, weights, scores, limits, way, blocks, D, FAULT, PARTS: tl.constexpr,
                  BD: tl.constexpr):  # fmt: skip
    """(2) to (7) of every row."""
    which, cols = tl.arange(0, PANEL), tl.arange(0, BD)
    if FAULT is not None:
        check = strike(check, FAULT, CHECKSUM_O, way.plane, own_rows(scores, way.member, way.rows), which, 0, 1)
    divided = check / tl.where(l == 0, 1.0, l)[:, None]
    is_sketch = (which >= KINDS * PARTS) & (which < KINDS * PARTS + SKETCHES)
    ones = tl.sum(tl.where((which == KINDS * PARTS + SKETCHES)[None, :], check, 0.0), 1)
    largest = tl.max(tl.abs(y), 1)
    unit = tl.where(largest > 0, largest, 1.0)
    relative = y / unit[:, None]
    sketched = tl.where(is_sketch[None, :], divided, 0.0) / unit[:, None]
    squares = tl.sum(relative * relative, 1) + tl.sum(sketched * sketched, 1) / SKETCHES
    # (3), (4), (5): relative to ℓ, ℓ and Π α.
    sum_of_used = l if scores.dropped is None else held
    residual, tau = sum_of_used - ones, limits.sums * l + TINY
    fine = _within(residual, tau)
    if scores.dropped is not None:
        fine, residual, tau = _and(fine, residual, tau, l - (held + left), limits.sums * l + TINY)
    nobody = m == float("-inf")
    beyond = tl.where(l < 1.0, 1.0 - l, tl.maximum(l - scores.keys, 0.0) / scores.keys)
    fine, residual, tau = _and(fine, residual, tau, tl.where(nobody, l, beyond), tl.zeros_like(l) + RANGE_L)
    should = tl.where(nobody, 1.0, tl.exp2(first - m))
    fine, residual, tau = _and(fine, residual, tau, fall - should, (blocks * (4.0 * UNIT) + RATIO_ALPHA) * should + VANISHED)
    fine, residual, tau = _and(fine, residual, tau, wrong, tl.zeros_like(l) + 0.5)
    for kind in tl.static_range(KINDS):
        mine = (which >= kind * PARTS) & (which < kind * PARTS + PARTS)
        c = tl.sum(tl.where(mine[None, :], divided, 0.0), 1)
        weight = tl.load(weights.columns + kind * D + cols, mask=cols < D, other=0.0)
        own = tl.sum(y * weight[None, :], 1) - c
        size = tl.sqrt(squares + (c / unit) * (c / unit)) * unit
        fine, residual, tau = _and(fine, residual, tau, own, limits.output[kind] * size + TINY)
    return Finding(fine, residual, tau)


@triton.jit
def _within(residual, tau):
    """As ``explained``, where nothing may be wrong of what is zero."""
    return (tl.abs(residual) <= tau) & is_finite(tau)


@triton.jit
def _and(fine, residual, tau, own, own_tau):
    """One more condition: residual and bound of what stands out most."""
    more = ratio_of(own, own_tau) > ratio_of(residual, tau)
    return fine & _within(own, own_tau), tl.where(more, own, residual), tl.where(more, own_tau, tau)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Everything about one attention that its launches share. q (B, H, G, L, E), k (B, H, S, E), v (B, H, S, D), none of them empty; of
    packed sequences, of which the scores tell, B is one, and L and S are tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores
    scaled: bool  # attention_scores.scores_of
    causal: bool
    weights: Weights
    limits: Limits
    config: AttentionConfig
    parts: int
    exponentials: bool
    numbered: bool = True  # multiprocessors have numbers

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(heads of queries over the batch, blocks of queries of each, rows)"""
        heads_, length = self.q.shape[:3].numel(), self.q.shape[3]
        if self.is_packed:
            return heads_ * self.scores.sequences, -(-self.scores.length // self.config.bm), heads_ * length
        return heads_, -(-length // self.config.bm), heads_ * length

    @property
    def is_packed(self) -> bool:
        return self.scores.cu_q is not None

    def results(self) -> tuple[Tensor, Tensor]:
        """Room for out and statistics. Rows that belong to no sequence are nobody's, and zero."""
        q, (_, heads_, members, length, _) = self.q, self.q.shape
        if self.is_packed:
            out = torch.zeros(length, heads_ * members, self.v.shape[-1], dtype=q.dtype, device=q.device)
            return out, torch.zeros(2, *q.shape[:-1], dtype=torch.float32, device=q.device)
        out = torch.empty(*q.shape[:-1], self.v.shape[-1], dtype=q.dtype, device=q.device)
        return out, torch.empty(2, *q.shape[:-1], dtype=torch.float32, device=q.device)

    def operands(self) -> tuple[Any, ...]:
        return heads(self.q), heads(self.k), heads(self.v)

    def order(self) -> dict[str, Any]:
        """The keyword arguments that decide the bits: launches that agree in them agree in these."""
        c = self.config
        return {
            "CAUSAL": self.causal, "SCALED": self.scaled, "EXPONENTIALS": self.exponentials, "PARTS": self.parts,
            "BM": c.bm, "BN": c.bn, "BE": padded(self.q.shape[-1]), "BD": padded(self.v.shape[-1]), "PRECISION": "ieee",
            "num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS,
        }  # fmt: skip

    def units(self) -> Tensor | None:
        """Uninitialised room for the number of every block's multiprocessor."""
        count = self.sizes[0] * self.sizes[1]
        return torch.empty(count, dtype=torch.int32, device=self.q.device) if self.numbered else None


def padded(columns: int) -> int:
    """Columns of a tile that holds a whole row of a head."""
    return max(16, triton.next_power_of_2(columns))


@dataclass(frozen=True)
class Evidence:
    """An attention, and what is suspect of it."""

    out: Tensor  # (B, H, G, L, D), contiguous; of packed sequences (tokens, heads, D)
    statistics: Tensor  # (2, B, H, G, L): m and l
    sums: Sums
    status: Tensor  # (rows,) int8: a bit for each role
    flags: Tensor  # (blocks,) int8: whether any row is suspect
    details: Tensor  # (2, DETAILS, rows) int32, of suspect rows
    units: Tensor | None
    summary: Tensor  # two summaries, of qk and of pv


def attend(attention: Attention, words: Tensor, site: Tensor, roles: int, repeat: bool = False, faults: Tensor | None = None) -> Evidence:
    """Launch: the sums of K and V, then the attention. roles: bits QK, PV of those that are judged and counted."""
    q, v = attention.q, attention.v
    heads_, blocks, rows = attention.sizes
    summary = torch.empty(2 * summary_words(1, 1), dtype=torch.int64, device=q.device)
    packed = attention.scores if attention.is_packed else None
    sums = build(attention.k, v, attention.weights, attention.parts, attention.config.bn, summary, packed)
    out, statistics = attention.results()
    status = torch.empty(rows, dtype=torch.int8, device=q.device)
    flags = torch.empty(heads_ * blocks, dtype=torch.int8, device=q.device)
    details = torch.empty(2, DETAILS.value, rows, dtype=torch.int32, device=q.device)
    units = attention.units()
    checked_attention[(heads_ * blocks,)](
        *attention.operands(), out, statistics, sums, attention.weights, attention.scores, attention.limits, words, site, status, details,
        units, flags, summary, q.shape[-1], v.shape[-1], rows, roles, fault_argument(faults), CHECKED=True, REPEAT=repeat,
        **attention.order(),
    )  # fmt: skip
    return Evidence(out, statistics, sums, status, flags, details, units, summary)


def unchecked(attention: Attention) -> Tensor:
    """O by the same kernel compiled without checks: what they cost is the difference."""
    q, v = attention.q, attention.v
    heads_, blocks, rows = attention.sizes
    out, statistics = attention.results()
    nothing, order = (None,) * 7, attention.order() | {"EXPONENTIALS": False}
    checked_attention[(heads_ * blocks,)](
        *attention.operands(), out, statistics, Sums(None, None, None), attention.weights, attention.scores, attention.limits, *nothing,
        q.shape[-1], v.shape[-1], rows, 0, fault_argument(None), CHECKED=False, REPEAT=False, **order,
    )  # fmt: skip
    return out
