"""Checked attention of few queries over the pages of a long cache: O = softmax(q Kᵀ) V, split over keys so that one sequence fills a GPU.

    decode_part      per sequence, head of keys and split of its pages: m, ℓ, acc = Σ P v, and what its rows are judged by
    combine_parts    per sequence and head of keys: O = Σ exp2(m_i - m) acc_i / Σ exp2(m_i - m) ℓ_i, judged before it is rounded
    part_again       of suspect heads alone: pages compared with their fingerprints and put back, then the part once more
    conclude_parts   of suspect heads alone: combined once more; what became of them, into the ledger

The rows of a tile are the queries that share a head of keys, so every key is read once. Lengths and the table of pages are read here. What
K and V must sum to lies with the pages (attention_pages.py); nothing is added up over them but what multiplies.

    qk  (1) Σ w x₂ = scale · q · Σ_pages Σ w k        per part, from the registers that enter exp2, over all tokens that its pages hold
            and no token missing that the sequence has
        (1') |m| <= scale ‖q‖ ‖K‖, K of the part's pages: as in attention_forward.py. Soft-caps only lessen |m|
    pv  (2) Σ_d w O = Σ_t p w·v_t / ℓ                 at the end, kinds e, hi, lo, by CUDA cores beside the matrix unit's P V
        (3) ℓ = P · 1, the matrix unit's; (4) 1 - 2⁻⁹ <= ℓ <= keys (1 + 2⁻⁹)          at the end and, (4), per part
        (5) Π α = exp2(m first - m last); (6) Π p = exp2(Σ x₂) over four keys EXPONENTIALS          per part

Each part's m is stored twice; the checks' sums go by the copy, by exp2(½ …)², and by their own maximum. So a maximum, a factor or an
accumulator that changed between the launches leaves O and its checks apart. The same device function computes a part again: the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import (
    ALPHA,
    CHECKSUM_O,
    CHECKSUM_S,
    PROBABILITIES,
    PV,
    QK,
    QUERIES,
    RANGE_L,
    RATIO_ALPHA,
    UNIT,
    VANISHED,
    L,
    M,
    O,
    P,
    S,
    _disagreeing,
    suspects,
)
from .attention_pages import (
    BAD_KEYS,
    BAD_VALUES,
    LOST,
    REBUILT,
    RESTORED,
    Pages,
    Tables,
    Weights,
    columns_at,
    contents,
    mend,
    padded,
    sums_at,
)
from .attention_scores import LOG2E, tanh
from .configs import MAX_REGISTERS
from .gemm import fault_argument
from .judgement import TINY, is_finite, ratio_of
from .record import (
    BY_PANEL,
    BY_WEIGHT,
    CLEAN,
    COUNTERS,
    DETAILS,
    FALSE_ALARM,
    HEADER,
    INPUT,
    OBSERVED,
    RECOMPUTED,
    RECONSTRUCTED,
    TRANSIENT,
    UNCORRECTED,
    WEIGHT_FAULTS,
    Labels,
    Units,
    add_verdicts,
    arrive,
    count_call,
    keep,
    raise_worst,
)
from .summary import CASE, SUMMARY, UNQUIET, clear
from .summary import words as summary_words
from .tiles import ACC_LARGEST, strike

#: Numbers that a part leaves for every row: m twice, ℓ twice, Σ p w·v of three kinds, ‖p ν‖, residual and bound of either role.
FIELDS = tl.constexpr(12)
M_AT, M_COPY, L_AT, ONES, SUMS_E, SUMS_HI, SUMS_LO, NORM, QK_RESIDUAL, QK_TAU, PV_RESIDUAL, PV_TAU = (tl.constexpr(i) for i in range(12))
#: Columns of the matrix unit's smallest product.
NARROW = tl.constexpr(16)
#: Keys whose scores sum within the base of the bound (abft.threshold).
KAPPA_KEYS = tl.constexpr(8192.0)


class Query(NamedTuple):
    """q (B, H, rows, E) contiguous: ``rows`` queries of each head of keys, ``length`` of each head of queries; what happens to a score."""

    ptr: Any
    rows: Any
    length: Any
    scale: Any
    scale2: Any  # scale · log₂e
    window: Any  # None: all keys
    cap: Any  # None: none


class Limits(NamedTuple):
    """abft.threshold.DecodeCoefficients."""

    scores: Any
    slope: Any
    shift: Any
    output: Any  # (3,)
    output_slope: Any  # (3,)
    sums: Any
    sums_slope: Any


class Parts(NamedTuple):
    """acc (units, splits, rows, D) and numbers (units, splits, FIELDS, rows), fp32; a unit is a head of keys of a sequence."""

    acc: Any
    numbers: Any
    splits: Any


class Standing(NamedTuple):
    """Of every row and one role: whether it is explained; residual and bound of what stands out most, and their ratio."""

    fine: Any
    residual: Any
    tau: Any
    ratio: Any


class State(NamedTuple):
    """Of units: whether any row is suspect; what was found of its pages (bits); elements of them that were not known to have changed."""

    flags: Any
    found: Any
    new: Any


# --- a part ---------------------------------------------------------------------------------------


@triton.jit
def decode_part(q, pages, tables, weights, limits, parts, summary, summary_size, FAULT, CHECKED: tl.constexpr, EXPONENTIALS: tl.constexpr,
                LENGTH: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A split of a unit per program; LENGTH: tokens of a page."""
    if CHECKED:
        clear(summary, summary_size)
    unit, split = tl.program_id(0) // parts.splits, tl.program_id(0) % parts.splits
    _part(q, pages, tables, weights, limits, parts, unit, split, FAULT, CHECKED, EXPONENTIALS, LENGTH, BM, BE, BD)


@triton.jit
def _range(q, tables, unit, split, splits, heads, LENGTH: tl.constexpr):
    """(tokens of the unit's sequence, first page of a split, behind its last one): the pages that any query sees, shared evenly."""
    n = tl.load(tables.lengths + unit // heads).to(tl.int32)
    end = tl.minimum(tl.cdiv(n, LENGTH), tables.width)
    first = end * 0
    if q.window is not None:
        first = tl.minimum(tl.maximum(n - q.length + 1 - q.window, 0) // LENGTH, end)
    each = tl.cdiv(end - first, splits)
    begin = tl.minimum(first + split * each, end)
    return n, begin, tl.minimum(begin + each, end)


@triton.jit
def _part(q, pages, tables, weights, limits, parts, unit, split, FAULT, CHECKED: tl.constexpr, EXPONENTIALS: tl.constexpr,
          LENGTH: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    head, rows, e, d = unit % pages.heads, tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BD)
    inside, tokens = rows < q.rows, tl.arange(0, LENGTH)
    n, begin, end = _range(q, tables, unit, split, parts.splits, pages.heads, LENGTH)
    position = n - q.length + rows % q.length
    at = q.ptr + (tl.cast(unit, tl.int64) * q.rows + rows)[:, None] * pages.E + e[None, :]
    queries = tl.load(at, mask=inside[:, None] & (e < pages.E)[None, :], other=0.0)
    read = queries
    if FAULT is not None:
        read = strike(queries, FAULT, QUERIES, unit, rows, e, 0, 1)
    zero = tl.zeros((BM,), tl.float32)
    m, first, fall = zero + float("-inf"), zero + float("-inf"), zero + 1.0
    l, signed, squares, wrong, unit_of_norm, norm = zero, zero, zero, zero, zero, zero
    sum_e, sum_hi, sum_lo, missing = zero, zero, zero, tl.zeros((1,), tl.int32)
    acc, ones = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, NARROW), tl.float32)
    known, known_squares = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    for place in tl.range(begin, end):
        page = tl.load(tables.table + (unit // pages.heads) * tables.width + place)
        filled = tl.load(pages.filled + tl.cast(page, tl.int64) * pages.heads + head)
        written, key = tokens < filled, place * LENGTH + tokens
        k = tl.load(contents(pages.k, pages, page, head, pages.E, LENGTH)[:, None] + e[None, :],
                    mask=written[:, None] & (e < pages.E)[None, :], other=0.0)  # fmt: skip
        s = tl.dot(read, tl.trans(k), input_precision="ieee")
        if FAULT is not None:
            s = strike(s, FAULT, S, unit, rows, key, 0, 1)
            m = _strike_rows(m, FAULT, M, unit, rows, place * LENGTH)
        seen = written[None, :] & (key[None, :] <= position[:, None])
        if q.window is not None:
            seen &= key[None, :] > (position - q.window)[:, None]
        if q.cap is None:
            x = s * q.scale2
        else:
            x = tanh(s * (q.scale / q.cap)) * (q.cap * LOG2E)
        new = tl.maximum(m, tl.max(tl.where(seen, x, float("-inf")), 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        if CHECKED:
            own_weights = tl.where(written, tl.load(weights.keys + tokens), 0.0)
            squares += tl.sum(s * s, 1)
            missing += (filled < tl.minimum(n - place * LENGTH, LENGTH)).to(tl.int32)
        if q.cap is None:
            x -= shift[:, None]
            if CHECKED:  # what the shift has taken is given back
                signed += tl.sum(x * own_weights[None, :], 1) + shift * tl.sum(own_weights, 0)
        else:
            if CHECKED:
                signed += tl.sum(s * own_weights[None, :], 1) * q.scale2
            x -= shift[:, None]
        x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)
        nothing = m == float("-inf")
        alpha = tl.where(nothing, 1.0, tl.exp2(m - shift))
        if FAULT is not None:
            p = strike(p, FAULT, P, unit, rows, key, 0, 1)
            alpha = _strike_rows(alpha, FAULT, ALPHA, unit, rows, place * LENGTH)
        used = p.to(pages.v.dtype.element_ty)
        l = l * alpha + tl.sum(used.to(tl.float32), 1)
        if FAULT is not None:
            used = strike(used, FAULT, PROBABILITIES, unit, rows, key, 0, 1)
        if CHECKED:
            if EXPONENTIALS:
                wrong += _disagreeing(x, p)
            half = tl.exp2((m - shift) * 0.5)
            other, plain, stored = tl.where(nothing, 1.0, half * half), p.to(pages.v.dtype.element_ty).to(tl.float32), columns_at(
                pages, page, head, LENGTH)
            sum_e = sum_e * other + tl.sum(plain * tl.load(stored, mask=written, other=0.0)[None, :], 1)
            sum_hi = sum_hi * other + tl.sum(plain * tl.load(stored + LENGTH, mask=written, other=0.0)[None, :], 1)
            sum_lo = sum_lo * other + tl.sum(plain * tl.load(stored + 2 * LENGTH, mask=written, other=0.0)[None, :], 1)
            # A norm as a unit and a sum of squares of numbers of at most one: nothing over- or underflows.
            noise = plain * tl.load(stored + 3 * LENGTH, mask=written, other=0.0)[None, :]
            unit_of_norm *= other
            larger = tl.maximum(unit_of_norm, tl.max(noise, 1))
            by = 1.0 / tl.where(larger > 0, larger, 1.0)
            norm = norm * (unit_of_norm * by) * (unit_of_norm * by) + tl.sum((noise * by[:, None]) * (noise * by[:, None]), 1)
            unit_of_norm = larger
            one = tl.broadcast_to(tl.where(tl.arange(0, NARROW) == 0, 1.0, 0.0)[None, :], (LENGTH, NARROW)).to(used.dtype)
            ones = tl.dot(used, one, ones * other[:, None], input_precision="ieee")
            remembered = sums_at(pages, page, head) + e
            known += tl.load(remembered, mask=e < pages.E, other=0.0)
            known_squares += tl.load(remembered + pages.E, mask=e < pages.E, other=0.0)
            first = tl.where(first == float("-inf"), new, first)
            fall = fall * alpha
        v = tl.load(contents(pages.v, pages, page, head, pages.D, LENGTH)[:, None] + d[None, :],
                    mask=written[:, None] & (d < pages.D)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(used, v, acc * alpha[:, None], input_precision="ieee")
        m = new
    number = tl.cast(unit, tl.int64) * parts.splits + split
    tl.store(parts.acc + (number * q.rows + rows)[:, None] * pages.D + d[None, :], acc, mask=inside[:, None] & (d < pages.D)[None, :])
    to = parts.numbers + number * FIELDS * q.rows + rows
    tl.store(to + M_AT * q.rows, m, mask=inside)
    tl.store(to + L_AT * q.rows, l, mask=inside)
    if CHECKED:
        qk = _judge_sums_of_scores(
            queries, signed, squares, m, first, known, known_squares, tl.max(missing, 0), q, limits, n, unit, rows, FAULT
        )
        pv = _judge_part(l, m, first, fall, wrong, n, end - begin)
        tl.store(to + M_COPY * q.rows, m, mask=inside)
        tl.store(to + ONES * q.rows, tl.sum(ones, 1), mask=inside)
        tl.store(to + SUMS_E * q.rows, sum_e, mask=inside)
        tl.store(to + SUMS_HI * q.rows, sum_hi, mask=inside)
        tl.store(to + SUMS_LO * q.rows, sum_lo, mask=inside)
        tl.store(to + NORM * q.rows, unit_of_norm * tl.sqrt(norm), mask=inside)
        tl.store(to + QK_RESIDUAL * q.rows, qk.residual, mask=inside)
        tl.store(to + QK_TAU * q.rows, qk.tau, mask=inside)
        tl.store(to + PV_RESIDUAL * q.rows, pv.residual, mask=inside)
        tl.store(to + PV_TAU * q.rows, pv.tau, mask=inside)


@triton.jit
def _strike_rows(values, faults, PLACE: tl.constexpr, unit, rows, col):
    """Faults in a number per row; its column is the key at which it is computed."""
    return tl.sum(strike(values[:, None], faults, PLACE, unit, rows, col + tl.arange(0, 1), 0, 1), 1)


@triton.jit
def _judge_sums_of_scores(queries, signed, squares, m, first, known, known_squares, missing, q, limits, n, unit, rows, FAULT):
    """(1) and (1') of every row of a part."""
    wide = queries.to(tl.float32)
    predicted = tl.sum(wide * known[None, :], 1)
    if FAULT is not None:
        predicted = _strike_rows(predicted, FAULT, CHECKSUM_S, unit, rows, 0)
    noise = tl.sum(wide * wide * (known_squares + known * known)[None, :], 1)
    size = tl.sqrt(squares + predicted * predicted + noise)
    count = tl.cast(n, tl.float32)
    shifted = tl.where(m == float("-inf"), 0.0, tl.maximum(tl.abs(m), tl.abs(first)))
    own = limits.scores * tl.sqrt(tl.maximum(count / KAPPA_KEYS, 1.0)) + limits.slope
    tau = tl.abs(q.scale2) * own * size + limits.shift * tl.sqrt(count) * shifted + TINY
    # Squares that underflow are of scores below one, as long as those that make ``noise`` do not overflow.
    reach = tl.abs(q.scale2) * 1.01 * (tl.sqrt(tl.sum(wide * wide, 1)) * tl.sqrt(tl.sum(known_squares, 0))) + 1.0
    residual = tl.where(shifted <= reach, signed - predicted * q.scale2, shifted)
    tau = tl.where(shifted <= reach, tau, reach)
    residual = tl.where(missing > 0, float("inf"), residual)
    return _also(_nothing(tl.zeros_like(tau)), residual, tau)


@triton.jit
def _judge_part(l, m, first, fall, wrong, n, pages_read):
    """(4), (5), (6) of every row of a part."""
    nobody = m == float("-inf")
    beyond = tl.where(l < 1.0, 1.0 - l, tl.maximum(l - n, 0.0) / n)
    finding = _also(_nothing(tl.zeros_like(l)), tl.where(nobody, l, beyond), tl.zeros_like(l) + RANGE_L)
    should = tl.where(nobody, 1.0, tl.exp2(first - m))
    finding = _also(finding, fall - should, (pages_read * (4.0 * UNIT) + RATIO_ALPHA) * should + VANISHED)
    return _also(finding, wrong, tl.zeros_like(l) + 0.5)


@triton.jit
def _also(finding, residual, tau):
    """One more condition."""
    fine, ratio = (tl.abs(residual) <= tau) & (tau < ACC_LARGEST), tl.abs(residual) / tau
    ratio = tl.where(fine | (ratio > 1.0), ratio, float("inf"))
    more = ratio > finding.ratio
    residual, tau = tl.where(more, residual, finding.residual), tl.where(more, tau, finding.tau)
    return Standing(finding.fine & fine, residual, tau, tl.maximum(ratio, finding.ratio))


@triton.jit
def _nothing(zero):
    """Before any condition."""
    return Standing(zero == 0.0, zero, zero + 1.0, zero)


# --- the parts together ---------------------------------------------------------------------------


@triton.jit
def _combine(q, pages, tables, weights, limits, parts, unit, FAULT, CHECKED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """(O before it is rounded, findings of qk, of pv)"""
    rows, d = tl.arange(0, BM), tl.arange(0, BD)
    inside, zero = rows < q.rows, tl.zeros((BM,), tl.float32)
    number = tl.cast(unit, tl.int64) * parts.splits
    start = parts.numbers + number * FIELDS * q.rows + rows
    m, copy = zero + float("-inf"), zero + float("-inf")
    for split in tl.range(0, parts.splits):
        at = start + split * (FIELDS * q.rows)
        m = tl.maximum(m, tl.load(at + M_AT * q.rows, mask=inside, other=float("-inf")))
        if CHECKED:
            copy = tl.maximum(copy, tl.load(at + M_COPY * q.rows, mask=inside, other=float("-inf")))
    shift, other_shift = tl.where(m == float("-inf"), 0.0, m), tl.where(copy == float("-inf"), 0.0, copy)
    l, ones, sum_e, sum_hi, sum_lo, norm = zero, zero, zero, zero, zero, zero
    acc = tl.zeros((BM, BD), tl.float32)
    qk, pv = _nothing(zero), _nothing(zero)
    for split in tl.range(0, parts.splits):
        at = start + split * (FIELDS * q.rows)
        alpha = tl.exp2(tl.load(at + M_AT * q.rows, mask=inside, other=float("-inf")) - shift)
        l += alpha * tl.load(at + L_AT * q.rows, mask=inside, other=0.0)
        part = parts.acc + ((number + split) * q.rows + rows)[:, None] * pages.D + d[None, :]
        acc += alpha[:, None] * tl.load(part, mask=inside[:, None] & (d < pages.D)[None, :], other=0.0)
        if CHECKED:
            half = tl.exp2((tl.load(at + M_COPY * q.rows, mask=inside, other=float("-inf")) - other_shift) * 0.5)
            other = half * half
            ones += other * tl.load(at + ONES * q.rows, mask=inside, other=0.0)
            sum_e += other * tl.load(at + SUMS_E * q.rows, mask=inside, other=0.0)
            sum_hi += other * tl.load(at + SUMS_HI * q.rows, mask=inside, other=0.0)
            sum_lo += other * tl.load(at + SUMS_LO * q.rows, mask=inside, other=0.0)
            own_norm = other * tl.load(at + NORM * q.rows, mask=inside, other=0.0)
            larger = tl.maximum(norm, own_norm)
            by = 1.0 / tl.where(larger > 0, larger, 1.0)
            norm = larger * tl.sqrt((norm * by) * (norm * by) + (own_norm * by) * (own_norm * by))
            residual = tl.load(at + QK_RESIDUAL * q.rows, mask=inside, other=0.0)
            qk = _also(qk, residual, tl.load(at + QK_TAU * q.rows, mask=inside, other=1.0))
            residual = tl.load(at + PV_RESIDUAL * q.rows, mask=inside, other=0.0)
            pv = _also(pv, residual, tl.load(at + PV_TAU * q.rows, mask=inside, other=1.0))
    if FAULT is not None:
        acc = strike(acc, FAULT, O, unit, rows, d, 0, 1)
        l = _strike_rows(l, FAULT, L, unit, rows, 0)
    y = acc * (1.0 / tl.where(l == 0, 1.0, l))[:, None]
    if CHECKED:
        n = tl.load(tables.lengths + unit // pages.heads).to(tl.float32)
        if FAULT is not None:
            sum_e = _strike_rows(sum_e, FAULT, CHECKSUM_O, unit, rows, 0)
            sum_hi = _strike_rows(sum_hi, FAULT, CHECKSUM_O, unit, rows, 1)
            sum_lo = _strike_rows(sum_lo, FAULT, CHECKSUM_O, unit, rows, 2)
        pv = _also(pv, l - ones, (limits.sums + n * limits.sums_slope) * l + TINY)
        beyond = tl.where(l < 1.0, 1.0 - l, tl.maximum(l - n, 0.0) / n)
        pv = _also(pv, tl.where(m == float("-inf"), l, beyond), zero + RANGE_L)
        by = tl.where(l == 0, 1.0, l)
        largest = tl.maximum(tl.max(tl.abs(y), 1), norm / by)
        scale = tl.where(largest > 0, largest, 1.0)
        relative, noise = y / scale[:, None], norm / by / scale
        size = tl.sum(relative * relative, 1) + noise * noise
        pv = _also_sum(pv, y, sum_e / by, size, scale, weights, limits, n, pages.D, 0, BD)
        pv = _also_sum(pv, y, sum_hi / by, size, scale, weights, limits, n, pages.D, 1, BD)
        pv = _also_sum(pv, y, sum_lo / by, size, scale, weights, limits, n, pages.D, 2, BD)
    return y, qk, pv


@triton.jit
def _also_sum(pv, y, c, size, scale, weights, limits, n, D, KIND: tl.constexpr, BD: tl.constexpr):
    """(2) of one kind."""
    d = tl.arange(0, BD)
    residual = tl.sum(y * tl.load(weights.columns + KIND * D + d, mask=d < D, other=0.0)[None, :], 1) - c
    whole = tl.sqrt(size + (c / scale) * (c / scale)) * scale
    return _also(pv, residual, (limits.output[KIND] + n * limits.output_slope[KIND]) * whole + TINY)


@triton.jit
def combine_parts(q, pages, tables, weights, limits, parts, out, words, site, status, details, state, summary, rows_total, roles, FAULT,
                  CHECKED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A unit per program. status (rows,) int8: a bit for each role; details (2, DETAILS, rows) int32: what a record may say of a row."""
    unit, rows, d = tl.program_id(0), tl.arange(0, BM), tl.arange(0, BD)
    y, qk, pv = _combine(q, pages, tables, weights, limits, parts, unit, FAULT, CHECKED, BM, BD)
    inside, row = rows < q.rows, tl.cast(unit, tl.int64) * q.rows + rows
    tl.store(out + row[:, None] * pages.D + d[None, :], y.to(out.dtype.element_ty), mask=inside[:, None] & (d < pages.D)[None, :])
    if CHECKED:
        code = tl.where(inside, suspects(qk, pv, roles), 0)
        tl.store(status + row, code.to(tl.int8), mask=inside)
        gravest = tl.max(code, 0)
        tl.store(state.flags + unit, gravest)
        tl.store(state.found + unit, 0)
        tl.store(state.new + unit, 0)
        if unit == 0:
            if (roles & QK) > 0:
                count_call(words, site, rows_total, False)
            if (roles & PV) > 0:
                count_call(words, site, rows_total, False)
        worst = tl.maximum(_calm(qk, (roles & QK) > 0), _calm(pv, (roles & PV) > 0))
        raise_worst(words, site, tl.max(tl.where(inside, worst, 0.0), 0))
        if gravest > 0:
            tl.atomic_add(summary + UNQUIET, tl.cast(1, tl.int64))
            _remember(details, qk, row, rows_total, TRANSIENT, (code & QK) > 0)
            _remember(details + DETAILS * tl.cast(rows_total, tl.int64), pv, row, rows_total, TRANSIENT, (code & PV) > 0)


@triton.jit
def _calm(finding, judged):
    return tl.where(finding.fine & judged, finding.ratio, 0.0)


@triton.jit
def _remember(details, finding, row, rows_total, cause, mask):
    zero = tl.zeros(row.shape, tl.int32)
    keep(details, row, rows_total, finding.residual, finding.tau, zero - 1, zero + cause, zero, zero - 1, mask)


# --- suspect units --------------------------------------------------------------------------------


@triton.jit
def part_again(q, pages, tables, weights, limits, parts, state, summary, FAULT, CORRECT: tl.constexpr, EXPONENTIALS: tl.constexpr,
               HALVES: tl.constexpr, LENGTH: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """As ``decode_part``, of units that are suspect, behind pages that hold again what was written. Leaves at once when nothing is."""
    if tl.load(summary + UNQUIET) > 0:
        unit, split = tl.program_id(0) // parts.splits, tl.program_id(0) % parts.splits
        if tl.load(state.flags + unit) > 0:
            found, new = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
            _, begin, end = _range(q, tables, unit, split, parts.splits, pages.heads, LENGTH)
            for place in tl.range(begin, end):
                page = tl.load(tables.table + (unit // pages.heads) * tables.width + place)
                own, more = mend(pages, weights, page, unit % pages.heads, CORRECT, HALVES, LENGTH, BE, BD)
                found |= own | _not_finite(pages, page, unit % pages.heads, LENGTH, BE)
                new += more
            tl.atomic_or(state.found + unit, found)
            tl.atomic_add(state.new + unit, new)
            if CORRECT:
                tl.debug_barrier()
                _part(q, pages, tables, weights, limits, parts, unit, split, FAULT, True, EXPONENTIALS, LENGTH, BM, BE, BD)


@triton.jit
def _not_finite(pages, page, head, LENGTH: tl.constexpr, BE: tl.constexpr):
    """Whether keys or values were not finite when they were written: no unit that multiplied is asked."""
    e, written = tl.arange(0, BE), tl.arange(0, LENGTH) < tl.load(pages.filled + tl.cast(page, tl.int64) * pages.heads + head)
    sums = tl.load(sums_at(pages, page, head) + pages.E + e, mask=e < pages.E, other=0.0, volatile=True)
    norms = tl.load(columns_at(pages, page, head, LENGTH) + 3 * LENGTH, mask=written, other=0.0, volatile=True)
    keys = tl.where(tl.max((~is_finite(sums)).to(tl.int32), 0) > 0, BAD_KEYS, 0)
    return keys | tl.where(tl.max((~is_finite(norms)).to(tl.int32), 0) > 0, BAD_VALUES, 0)


@triton.jit(do_not_specialize_on_alignment=["site"])
def conclude_parts(q, pages, tables, weights, limits, parts, out, words, site, status, details, state, summary, rows_total, roles,
                   labels_qk, labels_pv, FAULT, CORRECT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The verdicts of suspect units, and under CORRECT their rows of O once more. A unit per program."""
    if tl.load(summary + UNQUIET) > 0:
        unit = tl.program_id(0)
        of_pv, details_pv = summary + SUMMARY + CASE, details + DETAILS * tl.cast(rows_total, tl.int64)
        if tl.load(state.flags + unit) > 0:
            rows, d, e = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
            inside, row = rows < q.rows, tl.cast(unit, tl.int64) * q.rows + rows
            found, was = tl.load(state.found + unit), tl.load(status + row, mask=inside, other=0).to(tl.int32)
            tl.atomic_add(words + HEADER + tl.load(site) * COUNTERS + WEIGHT_FAULTS, tl.load(state.new + unit).to(tl.int64))
            y, qk, pv = _combine(q, pages, tables, weights, limits, parts, unit, FAULT, True, BM, BD)
            to = out + row[:, None] * pages.D + d[None, :]
            # An element that was put back changed every row of the unit, those within their bounds, too.
            reached = tl.where((found & RESTORED) > 0, 1, was)
            mine = (inside & (reached > 0))[:, None] & (d < pages.D)[None, :]
            again = y.to(out.dtype.element_ty)
            apart = again.to(tl.float32) != tl.load(to, mask=mine, other=0.0).to(tl.float32)
            same = tl.max((apart & mine).to(tl.int32), 1) == 0
            if CORRECT:
                tl.store(to, again, mask=mine)
            still = suspects(qk, pv, roles) & tl.where(was > 0, QK | PV, 0)
            # With right scores a row of O is right; alone it was wrong only if its scores were not.
            own = tl.where((was & QK) > 0, still & PV, (was | still) & PV)
            at = q.ptr + row[:, None] * pages.E + e[None, :]
            queries = tl.load(at, mask=inside[:, None] & (e < pages.E)[None, :], other=0.0, volatile=True).to(tl.float32)
            bad = (tl.max((~is_finite(queries)).to(tl.int32), 1) > 0) | ((found & BAD_KEYS) > 0)
            first = tl.cast(unit, tl.int64) * q.rows
            _settle(details, qk, row, rows_total, summary, first, (was | still) & QK, still & QK, bad, same, found, CORRECT)
            bad = bad | ((found & BAD_VALUES) > 0)
            _settle(details_pv, pv, row, rows_total, of_pv, first, own, still & PV, bad, same, found, CORRECT)
        arrive(words, site, summary, details, Units(None, None), rows_total, labels_qk)
        arrive(words, site, of_pv, details_pv, Units(None, None), rows_total, labels_pv)


@triton.jit
def _settle(details, finding, row, rows_total, summary, first_row, found_rows, still, bad, same, found, CORRECT: tl.constexpr):
    """The verdicts of one role of a unit. found_rows: that are its concern; still: those that the repetition does not explain either."""
    by_weight = (found & (RESTORED | LOST)) > 0
    if CORRECT:
        # Sums that were wrong, and rows that came out the same with right ones: the data never were.
        by_panel = ((found & REBUILT) > 0) & same
        mended = tl.where(by_panel, FALSE_ALARM, tl.where((found & RESTORED) > 0, RECONSTRUCTED, RECOMPUTED))
        cause = tl.where(by_panel, BY_PANEL, tl.where((found & RESTORED) > 0, BY_WEIGHT, TRANSIENT))
        verdict = tl.where(still > 0, tl.where(bad, INPUT, UNCORRECTED), mended)
        cause = tl.where(still > 0, tl.where(by_weight & ~bad, BY_WEIGHT, 0), cause)
    else:
        verdict = tl.where((still > 0) & bad, INPUT, tl.where(same, OBSERVED, OBSERVED))
        cause = tl.where(by_weight & (same | ~same), BY_WEIGHT, 0)
    verdict = tl.where(found_rows > 0, verdict, CLEAN)
    zero, plane = tl.zeros(row.shape, tl.int32), tl.cast(rows_total, tl.int64)
    calm = (found_rows > 0) & (still == 0)
    residual = tl.load(details + row, mask=calm, other=0).to(tl.float32, bitcast=True)
    tau = tl.load(details + plane + row, mask=calm, other=0).to(tl.float32, bitcast=True)
    residual, tau = tl.where(calm, residual, finding.residual), tl.where(calm, tau, finding.tau)
    keep(details, row, rows_total, residual, tau, zero - 1, zero + cause, zero, zero - 1, found_rows > 0)
    add_verdicts(summary, verdict, tl.where(found_rows > 0, ratio_of(residual, tau), 0.0), first_row)


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """Everything about one attention over pages that its launches share; q (B, H, rows, E) contiguous."""

    q: Tensor
    query: Query
    pages: Pages
    tables: Tables
    weights: Weights
    limits: Limits
    splits: int
    exponentials: bool
    warps: int
    stages: int

    @property
    def units(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    @property
    def rows(self) -> int:
        return self.units * self.q.shape[2]

    def operands(self) -> tuple[Any, ...]:
        return self.query, self.pages, self.tables, self.weights, self.limits

    def blocks(self, *names: str) -> dict[str, Any]:
        """The keyword arguments that decide the bits: launches that agree in them agree in these."""
        values = {
            "BM": max(16, triton.next_power_of_2(self.q.shape[2])), "BE": padded(self.q.shape[-1]), "BD": padded(self.pages.v.shape[-1]),
            "LENGTH": self.pages.k.shape[1], "EXPONENTIALS": self.exponentials,
        }  # fmt: skip
        return {name: values[name] for name in names} | {"num_warps": self.warps, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}


@dataclass(frozen=True)
class Evidence:
    """An attention over pages, and what is suspect of it."""

    out: Tensor  # (B, H, rows, D)
    parts: Parts
    status: Tensor
    details: Tensor
    state: State
    summary: Tensor


OF_A_PART = "BM", "BE", "BD", "LENGTH", "EXPONENTIALS"


def attend(decoding: Decoding, words: Tensor, site: Tensor, roles: int, faults: Tensor | None = None) -> Evidence:
    """Launch the parts, and what puts them together. roles: bits QK, PV of those that are judged and counted."""
    device, rows, parts = decoding.q.device, decoding.rows, parts_of(decoding)
    summary = torch.empty(2 * summary_words(1, 1), dtype=torch.int64, device=device)
    out = torch.empty(*decoding.q.shape[:3], decoding.pages.v.shape[-1], dtype=decoding.q.dtype, device=device)
    status = torch.empty(rows, dtype=torch.int8, device=device)
    details = torch.empty(2, DETAILS.value, rows, dtype=torch.int32, device=device)
    state = State(*torch.empty(3, decoding.units, dtype=torch.int32, device=device).unbind())
    decode_part[(decoding.units * parts.splits,)](
        *decoding.operands(), parts, summary, summary.numel(), fault_argument(faults), CHECKED=True,
        **decoding.blocks(*OF_A_PART), num_stages=decoding.stages,
    )  # fmt: skip
    combine_parts[(decoding.units,)](
        *decoding.operands(), parts, out, words, site, status, details, state, summary, rows, roles, fault_argument(faults), CHECKED=True,
        **decoding.blocks("BM", "BD"),
    )  # fmt: skip
    return Evidence(out, parts, status, details, state, summary)


def settle(decoding: Decoding, evidence: Evidence, words: Tensor, site: Tensor, labels: tuple[Labels, Labels], roles: int, correct: bool,
           faults: Tensor | None = None) -> None:  # fmt: skip
    """Launch what suspect units need. labels: of qk and of pv. ``faults`` hit the repetition."""
    e = evidence
    part_again[(decoding.units * e.parts.splits,)](
        *decoding.operands(), e.parts, e.state, e.summary, fault_argument(faults), CORRECT=correct,
        HALVES=decoding.q.element_size() // 2, **decoding.blocks(*OF_A_PART), num_stages=1,
    )  # fmt: skip
    conclude_parts[(decoding.units,)](
        *decoding.operands(), e.parts, e.out, words, site, e.status, e.details, e.state, e.summary, decoding.rows, roles, *labels,
        fault_argument(faults), CORRECT=correct, **decoding.blocks("BM", "BE", "BD"),
    )  # fmt: skip


def unchecked(decoding: Decoding) -> Tensor:
    """O by the same kernels compiled without checks: what they cost is the difference."""
    parts, nothing = parts_of(decoding), (None,) * 4
    out = torch.empty(*decoding.q.shape[:3], decoding.pages.v.shape[-1], dtype=decoding.q.dtype, device=decoding.q.device)
    blocks = decoding.blocks(*OF_A_PART) | {"EXPONENTIALS": False}
    decode_part[(decoding.units * parts.splits,)](
        *decoding.operands(), parts, None, 0, fault_argument(None), CHECKED=False, **blocks, num_stages=decoding.stages
    )
    combine_parts[(decoding.units,)](
        *decoding.operands(), parts, out, *nothing, State(None, None, None), None, decoding.rows, 0, fault_argument(None), CHECKED=False,
        **decoding.blocks("BM", "BD"),
    )  # fmt: skip
    return out


def parts_of(decoding: Decoding) -> Parts:
    units, splits, rows, device = decoding.units, decoding.splits, decoding.q.shape[2], decoding.q.device
    acc = torch.empty(units, splits, rows, decoding.pages.v.shape[-1], dtype=torch.float32, device=device)
    return Parts(acc, torch.empty(units, splits, FIELDS.value, rows, dtype=torch.float32, device=device), splits)
