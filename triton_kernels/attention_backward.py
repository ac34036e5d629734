"""The backward of attention: one program per block of queries for dQ, one per block of keys for dK and dV; nothing is added atomically.

    P = exp2(x₂ - m₂) / l₂        dP = dO Vᵀ        δ_i = Σ_d dO_id O_id        dX = P ∘ (dP - δ)        dS = dX ∘ (1 - tanh²)
    dQ = scale · dS K             dK = scale · dSᵀ Q                            dV = Pᵀ dO

Both kinds of program compute S, P, dP and dX of their own, a tile at a time, and judge each tile's rows before they use them for anything
that lasts. w are the random weights of attention_panels.py, over the keys of a block for a query, over its queries for a key:

    Σ w s  = q_i · hat            |…| <= U κ ‖q_i‖ ‖K_block‖                      the accumulators of S; of dP likewise
    Σ w P  = Σ w exp2(½y)² / l    48 U Σ P                                        the exponentials, once more from other arguments
    Σ w dX = Σ w P' dP - Σ w P' δ 48 U (Σ|dX| + max|δ| Σ P)   P' = exp2(½y)² / l   product and difference; a row that became zero, too
    Σ P    = 1                    of a query: the forward's m and l; as exact as it rounded the P that l sums
    Σ dX   = 0                    of a query: δ, which is as exact as O was rounded
    rows of dQ, dK, dV            two sums of their accumulators, and four sketches of their noise: columns beside K, Q and dO

Everything is judged before it is rounded, in the kernel that computes it; ``status`` says of every block what the worst of its rows is,
and rows are written down where one is not calm. Blocks that are suspect are computed again by the same device functions
(queries before keys, which read their δ), with the same bits if nothing was wrong; attention_verdicts.py compares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_panels import SIDE, SKETCHES, SUMS, hat_of, side_of
from .attention_scores import (
    LOG2E,
    Scores,
    binary,
    dropout_base,
    exponents,
    heads_of,
    hidden,
    kept,
    mask_of,
    rectangle,
    tanh,
    visited,
)
from .attention_sequences import (
    first_key_of,
    first_row_of,
    key_panel,
    own_keys,
    own_rows,
    plane_of,
    query_panel,
    result_keys,
    result_rows,
    sequence_of,
    start_of_keys,
    start_of_queries,
)
from .judgement import is_finite, ratio_of
from .record import raise_worst
from .tiles import FAULT_WORDS
from .verify import CALM, POISONED, SUSPECT

UNIT = tl.constexpr(2.0**-23)
#: Below these a sum of scores, or of probabilities, has nothing to say.
TINY = tl.constexpr(1e-30)
#: By as much an fp16 number may be rounded that is below the normal ones (half of the smallest); of other types it is below TINY.
BELOW_NORMAL = tl.constexpr(2.0**-25)
NORMS_AT_ONCE = tl.constexpr(256)
#: Places of faults, and the kernel they strike (a fault's eighth word): S, P, dP and dX exist in both.
S_PLACE, P_PLACE, DP_PLACE, DS_PLACE, DQ_PLACE, DK_PLACE, DV_PLACE = (tl.constexpr(i) for i in range(16, 23))
BY_QUERIES, BY_KEYS = tl.constexpr(0), tl.constexpr(1)
#: Roles of what is found: of the scores and their gradients, and of what the softmax makes of them.
QK, PV = tl.constexpr(0), tl.constexpr(1)


class Rows(NamedTuple):
    """Of every query: maxima and sums of the forward, δ, contiguous (B, H, G, L) fp32."""

    maxima: Any
    sums: Any
    delta: Any


class Bounds(NamedTuple):
    """In units of what they are relative to: U κ of S and dP; of dQ, of dK, of dV; 48 U; of Σ P = 1; of δ; of one score, ‖q‖ ‖k‖."""

    s: Any
    dp: Any
    dq: Any
    dk: Any
    dv: Any
    vanishing: Any
    total: Any
    delta: Any
    score: Any
    absolute: Any
    dq_slope: Any = None  # of packed sequences dq is of no key, dk and dv of no query; these are added for each that a sequence has
    dk_slope: Any = None
    dv_slope: Any = None


class Status(NamedTuple):
    """Of every block its gravest code (verify.py), int8; of the rows of blocks that are not calm, codes, residuals and bounds,
    (2 roles, rows); how many blocks are not calm."""

    blocks: Any
    codes: Any
    residuals: Any
    bounds: Any
    rows: Any
    unquiet: Any


# --- judging --------------------------------------------------------------------------------------


@triton.jit
def _compare(seen, poisoned, actual, predicted, bound, may):
    """The worse of what was seen of some rows, (residual, bound), and of a new check; which rows are poisoned.

    may: where both sides may be not finite without a fault. What is not finite on one side alone is one.
    """
    poison = ~is_finite(actual) & ~is_finite(predicted) & may
    own, limit = tl.where(poison, 0.0, actual - predicted), tl.where(poison, 1.0, bound)
    more = ratio_of(own, limit) > ratio_of(seen[0], seen[1])
    return (tl.where(more, own, seen[0]), tl.where(more, limit, seen[1])), poisoned | poison


@triton.jit
def _judge_product(seen, poisoned, acc, w, operand, hats, index, width, reach, coefficient, WIDTH: tl.constexpr,
                   PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compare the sums over a tile's columns with what the block's hat predicts. reach: norms of the rows of ``operand``."""
    found = tl.dot(operand, tl.trans(hat_of(hats, index, width, WIDTH, PARTS)), input_precision=PRECISION)
    predicted = tl.sum(found, 1)
    if SCALED:
        predicted *= tl.load(hats.scales + index)
    bound = tl.fma(reach * tl.load(hats.norms + index), coefficient, TINY)
    return _compare(seen, poisoned, tl.sum(acc * w[None, :], 1), predicted, bound, True)


@triton.jit
def _judge_sums(seen, poisoned, acc, side, weights, columns, coefficient, absolute, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Compare two weighted sums of every row of an accumulator with what stood beside its operand; thresholds.md."""
    cols, part = tl.arange(0, WIDTH), tl.arange(0, SIDE)
    squares = tl.sum(acc * acc, 1)
    sketches = (part >= SUMS * PARTS) & (part < SUMS * PARTS + SKETCHES)
    noise = tl.sum(tl.where(sketches[None, :], side * side, 0.0), 1) / SKETCHES
    for j in tl.static_range(SUMS):
        w = tl.load(weights + j * columns + cols, mask=cols < columns, other=0.0)
        mine = (part >= j * PARTS) & (part < (j + 1) * PARTS)
        predicted = tl.sum(tl.where(mine[None, :], side, 0.0), 1)
        scale = tl.sqrt(squares + tl.fma(predicted, predicted, noise))
        seen, poisoned = _compare(seen, poisoned, tl.sum(acc * w[None, :], 1), predicted, tl.fma(scale, coefficient, absolute), True)
    return seen, poisoned


@triton.jit
def _write_down(status, words, site, index, rows, ROWS, qk, pv, poisoned, inside):
    """The codes of a block's rows, and the ledger's largest ratio that passed. rows: among those of all heads."""
    first, second = ratio_of(qk[0], qk[1]), ratio_of(pv[0], pv[1])
    # What is not finite because of a fault is so on both sides of the checks behind it.
    poisoned = poisoned & (first <= 1.0) & (second <= 1.0)
    gravest = tl.maximum(_code(first, poisoned, inside), _code(second, poisoned, inside))
    worst = tl.max(gravest, 0)
    tl.store(status.blocks + index, worst.to(tl.int8))
    calm = tl.where(inside & (gravest == CALM), tl.maximum(first, second), 0.0)
    raise_worst(words, site, tl.max(calm, 0))
    if worst != CALM:
        tl.atomic_add(status.unquiet, 1)
        plane = tl.cast(status.rows, tl.int64)
        tl.store(status.codes + rows, _code(first, poisoned, inside).to(tl.int8), mask=inside)
        tl.store(status.codes + plane + rows, _code(second, poisoned, inside).to(tl.int8), mask=inside)
        tl.store(status.residuals + rows, qk[0], mask=inside)
        tl.store(status.residuals + plane + rows, pv[0], mask=inside)
        tl.store(status.bounds + rows, qk[1], mask=inside)
        tl.store(status.bounds + plane + rows, pv[1], mask=inside)


@triton.jit
def _code(ratio, poisoned, inside):
    code = tl.where(ratio <= 1.0, tl.where(poisoned, POISONED, CALM), SUSPECT)
    return tl.where(inside, code, CALM)


# --- a tile ---------------------------------------------------------------------------------------


@triton.jit
def _strike(values, faults, PLACE: tl.constexpr, KERNEL: tl.constexpr, plane, rows, cols):
    """Apply the faults that lie at PLACE of a kernel; rows and cols broadcast to the tile, whichever way round it lies."""
    for i in range(faults.count):
        f = faults.ptr + i * FAULT_WORDS
        col0 = tl.load(f + 4)
        hit = (tl.load(f) == PLACE) & (tl.load(f + 1) == plane) & (tl.load(f + 7) == KERNEL)
        in_row = (rows >= tl.load(f + 2)) & (rows < tl.load(f + 3))
        in_col = (cols >= col0) & (cols < tl.load(f + 5)) & ((cols - col0) % tl.load(f + 6) == 0)
        bits = (values.to(tl.int32, bitcast=True) & tl.load(f + 9)) ^ tl.load(f + 10)
        wrong = (bits + tl.load(f + 11)).to(tl.float32, bitcast=True)
        values = tl.where(hit & in_row & in_col, wrong, values)
    return values


@triton.jit
def bounds_of(bounds, one):
    """The bounds of one of packed sequences."""
    keys, depth = one.keys.to(tl.float32), (one.group * one.length).to(tl.float32)
    return Bounds(bounds.s, bounds.dp, bounds.dq + bounds.dq_slope * keys, bounds.dk + bounds.dk_slope * depth,
                  bounds.dv + bounds.dv_slope * depth, bounds.vanishing, bounds.total, bounds.delta, bounds.score, bounds.absolute,
                  bounds.dq_slope, bounds.dk_slope, bounds.dv_slope)  # fmt: skip


@triton.jit
def _slope(s, scores):
    """1 - tanh² of a soft-cap."""
    t = tanh(s * (scores.scale / scores.cap))
    return 1.0 - t * t


# --- a block of queries: dQ -----------------------------------------------------------------------


@triton.jit
def of_queries(at_q, at_k, at_v, at_do, at_o, x, scores, k_panel, v_panel, w_keys, w_e, bounds, dq, status, words, site, index,
               FAULT, CAUSAL: tl.constexpr, CHECK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
               BE: tl.constexpr, BD: tl.constexpr,
               PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """δ and dQ of one block of queries, and what is to be said of its rows."""
    blocks = tl.cdiv(scores.length, BM)
    plane, first_row = index // blocks, index % blocks * BM
    batch, head, member = heads_of(scores, plane)
    if scores.cu_q is not None:
        one = sequence_of(scores, batch)
        if CHECK:
            bounds = bounds_of(bounds, one)
        scores = Scores(one.length, one.keys, scores.heads, scores.group, scores.scale, scores.scale2, one.offset, scores.window,
                        scores.cap, scores.mask, scores.dropped, scores.seed_low, scores.seed_high, scores.undropped, scores.cu_q,
                        scores.cu_k, scores.sequences, scores.tokens, scores.key_tokens, one.begin_q, one.begin_k,
                        one.sequence)  # fmt: skip
    rows, e, d = first_row + tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BD)
    inside = rows < scores.length
    at = first_row_of(scores, plane) + rows
    q = rectangle(start_of_queries(scores, at_q, batch, head, member), at_q, rows, e, scores.length, E)
    d_out = rectangle(start_of_queries(scores, at_do, batch, head, member), at_do, rows, d, scores.length, D)
    delta, reach = _delta(at_o, d_out, scores, batch, head, member, rows, d, D)
    tl.store(x.delta + at, delta, mask=inside)
    m2, l2 = binary(tl.load(x.maxima + at, mask=inside, other=0.0), tl.load(x.sums + at, mask=inside, other=0.0))
    inverse = tl.where(l2 > 0, 1.0 / l2, 0.0)
    base = 0
    if scores.dropped is not None:
        base = dropout_base(scores, batch, head, member)
    zero = tl.zeros((BM,), tl.float32)
    q_norm, o_norm = zero, zero
    if CHECK:
        q_norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
        o_norm = tl.sqrt(tl.sum(d_out.to(tl.float32) * d_out.to(tl.float32), 1))
    row = (plane, batch, head, member, rows, m2, inverse, delta, q_norm, o_norm, base)
    acc, side = tl.zeros((BM, BE), tl.float32), tl.zeros((BM, SIDE), tl.float32)
    qk, pv, poisoned, sums = (zero, zero + 1.0), (zero, zero + 1.0), rows < 0, (zero, zero, zero, zero)
    first, whole, masked, end = visited(scores, first_row, CAUSAL, BM, BN)
    if scores.window is not None:
        for block in tl.range(first, whole, disable_licm=True):
            acc, side, qk, pv, poisoned, sums = _query_tile(
                acc, side, qk, pv, poisoned, sums, q, d_out, row, block, at_k, at_v, x, scores, k_panel, v_panel, w_keys, bounds, FAULT,
                True, CAUSAL, CHECK,
                BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip
    for block in tl.range(whole, masked, disable_licm=True):
        acc, side, qk, pv, poisoned, sums = _query_tile(
            acc, side, qk, pv, poisoned, sums, q, d_out, row, block, at_k, at_v, x, scores, k_panel, v_panel, w_keys, bounds, FAULT,
            scores.mask is not None, CAUSAL,
            CHECK, BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip
    for block in tl.range(masked, end, disable_licm=True):
        acc, side, qk, pv, poisoned, sums = _query_tile(
            acc, side, qk, pv, poisoned, sums, q, d_out, row, block, at_k, at_v, x, scores, k_panel, v_panel, w_keys, bounds, FAULT,
                True, CAUSAL, CHECK,
            BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip
    if FAULT is not None:
        acc = _strike(acc, FAULT, DQ_PLACE, BY_QUERIES, plane_of(scores, batch, head), own_rows(scores, member, rows)[:, None], e[None, :])
    if CHECK:
        total, vanishing, size, longest = sums
        may = ~is_finite(m2) | ~is_finite(inverse) | ~is_finite(delta)
        # Two evaluations of a score, the forward's and today's, differ by its rounding: an exponent of 3,600 by more than Σ P is known to.
        of_exponents = tl.fma(longest, tl.abs(scores.scale) * bounds.score, tl.abs(m2) * (2.0 * UNIT))
        of_total, of_delta = of_exponents + bounds.total, zero + TINY
        if SCALED:
            # fp16: a P beside a much larger one, or an O, below the normal numbers is rounded to a multiple of the smallest. That moves
            # l by up to Σ_t 2⁻²⁵, and δ by 2⁻²⁵ (Σ_d |dO_d| + Σ_t |dP_t| / l), both by Cauchy and Schwarz.
            keys = scores.keys.to(tl.float32)
            values = _squared(v_panel, key_panel(scores, plane_of(scores, batch, head), first, BN), end - first)
            if scores.dropped is not None:
                values *= scores.undropped * scores.undropped
            of_total += keys * BELOW_NORMAL * inverse
            of_delta += o_norm * BELOW_NORMAL * tl.fma(tl.sqrt(values * keys), inverse, D**0.5)
        pv, poisoned = _compare(pv, poisoned, total, tl.where(may, total, tl.where(l2 > 0, 1.0, 0.0)), of_total, may)
        # δ is wrong by as much as the rounding of O and of the P that multiplied V explains.
        known = reach + 2.0 * tl.abs(delta) + size
        limit = tl.fma(known, bounds.delta + of_exponents, of_delta)
        pv, poisoned = _compare(pv, poisoned, vanishing, tl.where(may, vanishing, 0.0), limit, may)
        qk, poisoned = _judge_sums(qk, poisoned, acc, side, w_e, E, bounds.dq, bounds.absolute, BE, PARTS)
        _write_down(status, words, site, index, at, status.rows, qk, pv, poisoned, inside)
    if scores.cu_q is None:
        start = dq + tl.cast(plane, tl.int64) * scores.length * E
        out = tl.cast(rows, tl.int64)[:, None] * E + e[None, :]
    else:
        start = dq
        out = result_rows(scores, plane, rows)[:, None] * E + e[None, :]
    tl.store(start + out, (acc * scores.scale).to(dq.dtype.element_ty), mask=inside[:, None] & (e[None, :] < E))


@triton.jit
def _squared(panel, first, blocks):
    """‖X‖² of some blocks of rows."""
    found = tl.zeros((NORMS_AT_ONCE,), tl.float32)
    for start in tl.range(0, blocks, NORMS_AT_ONCE, num_stages=1):
        at = start + tl.arange(0, NORMS_AT_ONCE)
        norms = tl.load(panel.norms + first + at, mask=at < blocks, other=0.0)
        found = tl.fma(norms, norms, found)
    return tl.sum(found, 0)


@triton.jit
def _delta(at_o, d_out, scores, batch, head, member, rows, d, D):
    """(Σ dO O, Σ |dO O|)"""
    out = rectangle(start_of_queries(scores, at_o, batch, head, member), at_o, rows, d, scores.length, D)
    product = d_out.to(tl.float32) * out.to(tl.float32)
    return tl.sum(product, 1), tl.sum(tl.abs(product), 1)


@triton.jit
def _query_tile(acc, side, qk, pv, poisoned, sums, q, d_out, row, block, at_k, at_v, x, scores, k_panel, v_panel, w_keys, bounds,
                FAULT, MASKED: tl.constexpr,
                CAUSAL: tl.constexpr, CHECK: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr,
               BD: tl.constexpr,
               PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add a block of keys to dQ; (acc, side, what is seen of the rows: qk, pv, poisoned, (Σ P, Σ dX, Σ |dX|, ‖q‖ max ‖k‖))."""
    plane, batch, head, member, rows, m2, inverse, delta, q_norm, o_norm, base = row
    of_keys = plane_of(scores, batch, head)
    cols, e, d = block * BN + tl.arange(0, BN), tl.arange(0, BE), tl.arange(0, BD)
    index = key_panel(scores, of_keys, block, BN)
    k = rectangle(start_of_keys(scores, at_k, batch, head, 0), at_k, cols, e, scores.keys, E)
    v = rectangle(start_of_keys(scores, at_v, batch, head, 0), at_v, cols, d, scores.keys, D)
    place = own_rows(scores, member, rows)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if FAULT is not None:
        s = _strike(s, FAULT, S_PLACE, BY_QUERIES, of_keys, place[:, None], cols[None, :])
    if CHECK:
        w = tl.load(w_keys + tl.arange(0, BN))
        qk, poisoned = _judge_product(qk, poisoned, s, w, q, k_panel, index, E, q_norm, bounds.s, BE, PARTS, SCALED, PRECISION)
    y = exponents(s, scores, rows, cols, batch, head, member) - m2[:, None]
    if MASKED:
        y = tl.where(hidden(scores, rows, cols, batch, head, member, CAUSAL), float("-inf"), y)
    p = tl.exp2(y) * inverse[:, None]
    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    if FAULT is not None:
        dp = _strike(dp, FAULT, DP_PLACE, BY_QUERIES, of_keys, place[:, None], cols[None, :])
    if CHECK:
        pv, poisoned = _judge_product(pv, poisoned, dp, w, d_out, v_panel, index, D, o_norm, bounds.dp, BD, PARTS, SCALED, PRECISION)
    if scores.dropped is not None:
        dp = tl.where(kept(scores, base, rows, cols), dp * scores.undropped, 0.0)
    if FAULT is not None:
        p = _strike(p, FAULT, P_PLACE, BY_QUERIES, of_keys, place[:, None], cols[None, :])
    dx = p * (dp - delta[:, None])
    if FAULT is not None:
        dx = _strike(dx, FAULT, DS_PLACE, BY_QUERIES, of_keys, place[:, None], cols[None, :])
    if CHECK:
        half = tl.exp2(0.5 * y)
        again = half * half * w[None, :]
        total, size = tl.sum(p, 1), tl.sum(tl.abs(dx), 1)
        weighted, of_dp = tl.sum(again, 1) * inverse, tl.sum(again * dp, 1) * inverse
        may = ~is_finite(m2) | ~is_finite(inverse) | ~is_finite(delta)
        pv, poisoned = _compare(pv, poisoned, tl.sum(p * w[None, :], 1), weighted, tl.fma(total, bounds.vanishing, TINY), may)
        scale = size + tl.abs(delta) * total
        pv, poisoned = _compare(pv, poisoned, tl.sum(dx * w[None, :], 1), of_dp - delta * weighted, tl.fma(scale, bounds.vanishing,
        TINY), may)
        longest = tl.maximum(sums[3], q_norm * tl.load(k_panel.norms + index))
        sums = (sums[0] + total, sums[1] + tl.sum(dx, 1), sums[2] + size, longest)
    if scores.cap is not None:
        dx *= _slope(s, scores)
    ds = dx.to(q.dtype)
    acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    if CHECK:
        beside = side_of(k_panel, first_key_of(scores, of_keys), cols, scores.keys, PARTS)
        side = _add_beside(side, ds, beside, k_panel, index, SCALED, PRECISION)
    return acc, side, qk, pv, poisoned, sums


@triton.jit
def _add_beside(side, left, beside, panel, index, SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """side + left · beside, undone of the power of two that the block's columns were divided by."""
    if SCALED:
        return side + tl.dot(left, beside, input_precision=PRECISION) * tl.load(panel.side_scales + index)
    else:
        return tl.dot(left, beside, side, input_precision=PRECISION)


# --- a block of keys: dK and dV -------------------------------------------------------------------


@triton.jit
def of_keys(at_q, at_k, at_v, at_do, x, scores, q_panel, d_panel, w_queries, w_e, w_d, bounds, dk, dv, status, words, site, index,
            FAULT, CAUSAL: tl.constexpr, CHECK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
            BE: tl.constexpr, BD: tl.constexpr,
               PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dK and dV of one block of keys, summed over the heads of queries that share it. Tiles lie the other way round: keys × queries."""
    blocks = tl.cdiv(scores.keys, BN)
    plane, first_key = index // blocks, index % blocks * BN
    batch, head = plane // scores.heads, plane % scores.heads
    if scores.cu_q is not None:
        one = sequence_of(scores, batch)
        if CHECK:
            bounds = bounds_of(bounds, one)
        scores = Scores(one.length, one.keys, scores.heads, scores.group, scores.scale, scores.scale2, one.offset, scores.window,
                        scores.cap, scores.mask, scores.dropped, scores.seed_low, scores.seed_high, scores.undropped, scores.cu_q,
                        scores.cu_k, scores.sequences, scores.tokens, scores.key_tokens, one.begin_q, one.begin_k,
                        one.sequence)  # fmt: skip
    cols, e, d = first_key + tl.arange(0, BN), tl.arange(0, BE), tl.arange(0, BD)
    inside = cols < scores.keys
    k = rectangle(start_of_keys(scores, at_k, batch, head, 0), at_k, cols, e, scores.keys, E)
    v = rectangle(start_of_keys(scores, at_v, batch, head, 0), at_v, cols, d, scores.keys, D)
    zero = tl.zeros((BN,), tl.float32)
    k_norm, v_norm = zero, zero
    if CHECK:
        k_norm = tl.sqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1))
        v_norm = tl.sqrt(tl.sum(v.to(tl.float32) * v.to(tl.float32), 1))
    row = (plane, batch, head, cols, k_norm, v_norm)
    acc_k, acc_v = tl.zeros((BN, BE), tl.float32), tl.zeros((BN, BD), tl.float32)
    beside = (tl.zeros((BN, SIDE), tl.float32), tl.zeros((BN, SIDE), tl.float32))
    qk, pv, poisoned = (zero, zero + 1.0), (zero, zero + 1.0), cols < 0
    first, end = _seeing(scores, first_key, CAUSAL, BM, BN)
    for step in tl.range(0, scores.group * (end - first), disable_licm=True):
        member, block = step // (end - first), first + step % (end - first)
        acc_k, acc_v, beside, qk, pv, poisoned = _key_tile(
            acc_k, acc_v, beside, qk, pv, poisoned, k, v, row, member, block, at_q, at_do, x, scores, q_panel, d_panel, w_queries,
            bounds, FAULT, CAUSAL, CHECK,
            BM, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip
    if FAULT is not None:
        acc_k = _strike(acc_k, FAULT, DK_PLACE, BY_KEYS, plane_of(scores, batch, head), own_keys(scores, cols)[:, None], e[None, :])
        acc_v = _strike(acc_v, FAULT, DV_PLACE, BY_KEYS, plane_of(scores, batch, head), own_keys(scores, cols)[:, None], d[None, :])
    at = first_key_of(scores, plane) + cols
    if CHECK:
        qk, poisoned = _judge_sums(qk, poisoned, acc_k, beside[0], w_e, E, bounds.dk, bounds.absolute, BE, PARTS)
        pv, poisoned = _judge_sums(pv, poisoned, acc_v, beside[1], w_d, D, bounds.dv, bounds.absolute, BD, PARTS)
        _write_down(status, words, site, index, at, status.rows, qk, pv, poisoned, inside)
    at = result_keys(scores, plane, cols)
    tl.store(dk + at[:, None] * E + e[None, :], (acc_k * scores.scale).to(dk.dtype.element_ty), mask=inside[:, None] & (e[None, :] < E))
    tl.store(dv + at[:, None] * D + d[None, :], acc_v.to(dv.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))


@triton.jit
def _seeing(scores, first_key, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Blocks of queries [first, end) of which any may see any of BN keys."""
    first, end = first_key * 0, tl.cdiv(scores.length, BM)
    if CAUSAL:
        first = tl.minimum(tl.maximum(first_key - scores.offset, 0) // BM, end)
    if scores.window is not None:
        last = tl.minimum(first_key + BN, scores.keys) - 1
        end = tl.minimum(end, tl.maximum(last + scores.window - scores.offset + BM - 1, 0) // BM)
        end = tl.maximum(end, first)
    return first, end


@triton.jit
def _key_tile(acc_k, acc_v, beside, qk, pv, poisoned, k, v, row, member, block, at_q, at_do, x, scores, q_panel, d_panel, w_queries,
              bounds, FAULT, CAUSAL: tl.constexpr,
              CHECK: tl.constexpr, BM: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
               BE: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
              SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add a block of queries to dK and dV; (acc_k, acc_v, beside, what is seen of the keys: qk, pv, poisoned)."""
    plane, batch, head, cols, k_norm, v_norm = row
    of_rows = plane * scores.group + member
    rows, e, d = block * BM + tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BD)
    inside = rows < scores.length
    index = query_panel(scores, of_rows, block, BM)
    at = first_row_of(scores, of_rows) + rows
    q = rectangle(start_of_queries(scores, at_q, batch, head, member), at_q, rows, e, scores.length, E)
    d_out = rectangle(start_of_queries(scores, at_do, batch, head, member), at_do, rows, d, scores.length, D)
    m2, l2 = binary(tl.load(x.maxima + at, mask=inside, other=0.0), tl.load(x.sums + at, mask=inside, other=0.0))
    inverse = tl.where(l2 > 0, 1.0 / l2, 0.0)
    delta = tl.load(x.delta + at, mask=inside, other=0.0)
    place = own_rows(scores, member, rows)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if FAULT is not None:
        s = _strike(s, FAULT, S_PLACE, BY_KEYS, plane_of(scores, batch, head), place[None, :], cols[:, None])
    if CHECK:
        w = tl.load(w_queries + tl.arange(0, BM))
        qk, poisoned = _judge_product(qk, poisoned, s, w, k, q_panel, index, E, k_norm, bounds.s, BE, PARTS, SCALED, PRECISION)
    unseen = tl.trans(hidden(scores, rows, cols, batch, head, member, CAUSAL))
    y = _exponents_of_keys(s, scores, rows, cols, batch, head, member) - m2[None, :]
    y = tl.where(unseen, float("-inf"), y)
    p = tl.exp2(y) * inverse[None, :]
    if FAULT is not None:
        p = _strike(p, FAULT, P_PLACE, BY_KEYS, plane_of(scores, batch, head), place[None, :], cols[:, None])
    dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    if FAULT is not None:
        dp = _strike(dp, FAULT, DP_PLACE, BY_KEYS, plane_of(scores, batch, head), place[None, :], cols[:, None])
    if CHECK:
        pv, poisoned = _judge_product(pv, poisoned, dp, w, v, d_panel, index, D, v_norm, bounds.dp, BD, PARTS, SCALED, PRECISION)
    used = p
    if scores.dropped is not None:
        keep = tl.trans(kept(scores, dropout_base(scores, batch, head, member), rows, cols))
        dp, used = tl.where(keep, dp * scores.undropped, 0.0), tl.where(keep, p * scores.undropped, 0.0)
    dx = p * (dp - delta[None, :])
    if FAULT is not None:
        dx = _strike(dx, FAULT, DS_PLACE, BY_KEYS, plane_of(scores, batch, head), place[None, :], cols[:, None])
    if CHECK:
        half = tl.exp2(0.5 * y)
        again = half * half * (w * inverse)[None, :]
        total, size = tl.sum(p, 1), tl.sum(tl.abs(dx), 1)
        may = tl.max((~is_finite(m2) | ~is_finite(inverse) | ~is_finite(delta)).to(tl.int32), 0) > 0
        pv, poisoned = _compare(pv, poisoned, tl.sum(p * w[None, :], 1), tl.sum(again, 1), tl.fma(total, bounds.vanishing, TINY), may)
        scale = size + tl.max(tl.abs(delta), 0) * total
        expected = tl.sum(again * dp, 1) - tl.sum(again * delta[None, :], 1)
        pv, poisoned = _compare(pv, poisoned, tl.sum(dx * w[None, :], 1), expected, tl.fma(scale, bounds.vanishing, TINY), may)
    if scores.cap is not None:
        dx *= _slope(s, scores)
    p_used, ds = used.to(q.dtype), dx.to(q.dtype)
    acc_v = tl.dot(p_used, d_out, acc_v, input_precision=PRECISION)
    acc_k = tl.dot(ds, q, acc_k, input_precision=PRECISION)
    if CHECK:
        side_k = _add_beside(beside[0], ds, side_of(q_panel, first_row_of(scores, of_rows), rows, scores.length, PARTS), q_panel, index,
                             SCALED, PRECISION)  # fmt: skip
        side_v = _add_beside(beside[1], p_used, side_of(d_panel, first_row_of(scores, of_rows), rows, scores.length, PARTS), d_panel, index,
                             SCALED, PRECISION)  # fmt: skip
        beside = (side_k, side_v)
    return acc_k, acc_v, beside, qk, pv, poisoned


@triton.jit
def _exponents_of_keys(s, scores, rows, cols, batch, head, member):
    """x₂ of a tile that lies the other way round."""
    if scores.cap is None:
        y = s * scores.scale2
    else:
        y = tanh(s * (scores.scale / scores.cap)) * (scores.cap * LOG2E)
    if scores.mask is not None:
        if scores.mask.ptr.dtype.element_ty != tl.int8:
            added = mask_of(scores, rows, cols, batch, head, member)
            y += tl.trans(added).to(tl.float32) * LOG2E
    return y


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def attention_dq(at_q, at_k, at_v, at_do, at_o, x, scores, k_panel, v_panel, w_keys, w_e, bounds,
                 dq, status, words, site, FAULT, CAUSAL: tl.constexpr, CHECK: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
               BE: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    if scores.cu_q is not None:
        each = tl.cdiv(scores.length, BM)
        if tl.program_id(0) % each * BM >= sequence_of(scores, tl.program_id(0) // each // (scores.heads * scores.group)).length:
            if CHECK:
                tl.store(status.blocks + tl.program_id(0), tl.cast(CALM, tl.int8))
            return
    of_queries(at_q, at_k, at_v, at_do, at_o, x, scores, k_panel, v_panel, w_keys, w_e, bounds, dq, status, words, site,
               tl.program_id(0), FAULT, CAUSAL, CHECK,
               BM, BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip


@triton.jit
def attention_dkv(at_q, at_k, at_v, at_do, x, scores, q_panel, d_panel, w_queries, w_e, w_d, bounds,
                 dk, dv, status, words, site, FAULT, CAUSAL: tl.constexpr, CHECK: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
               BE: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    if scores.cu_q is not None:
        each = tl.cdiv(scores.keys, BN)
        if tl.program_id(0) % each * BN >= sequence_of(scores, tl.program_id(0) // each // scores.heads).keys:
            if CHECK:
                tl.store(status.blocks + tl.program_id(0), tl.cast(CALM, tl.int8))
            return
    of_keys(at_q, at_k, at_v, at_do, x, scores, q_panel, d_panel, w_queries, w_e, w_d, bounds, dk, dv, status, words, site,
               tl.program_id(0), FAULT, CAUSAL, CHECK,
            BM, BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip


@triton.jit
def attention_dq_again(at_q, at_k, at_v, at_do, at_o, x, scores, k_panel, v_panel, w_keys, w_e, bounds,
                       dq, first, status, words, site, blocks, FAULT, CAUSAL: tl.constexpr,
                       CHECK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr,
               BD: tl.constexpr,
               PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The blocks of queries that are suspect, once more; leaves at once if there are none."""
    if tl.load(first.unquiet) > 0:
        for index in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
            if tl.load(first.blocks + index) == SUSPECT:
                of_queries(at_q, at_k, at_v, at_do, at_o, x, scores, k_panel, v_panel, w_keys, w_e, bounds, dq, status,
                           words, site, index, FAULT, CAUSAL, CHECK,
                           BM, BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip


@triton.jit
def attention_dkv_again(at_q, at_k, at_v, at_do, x, scores, q_panel, d_panel, w_queries, w_e, w_d, bounds,
                       dk, dv, first, status, words, site, blocks, FAULT, CAUSAL: tl.constexpr,
                        CHECK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr, D: tl.constexpr, BE: tl.constexpr,
               BD: tl.constexpr,
               PARTS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The same of keys."""
    if tl.load(first.unquiet) > 0:
        for index in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
            if tl.load(first.blocks + index) == SUSPECT:
                of_keys(at_q, at_k, at_v, at_do, x, scores, q_panel, d_panel, w_queries, w_e, w_d, bounds, dk, dv, status,
                           words, site, index, FAULT, CAUSAL, CHECK,
                        BM, BN, E, D, BE, BD, PARTS, SCALED, PRECISION)  # fmt: skip
