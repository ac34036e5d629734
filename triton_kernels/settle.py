"""Settle: what became of each row that was not calm, and its record.

    suspect at first; after the repetition
        explained, and something changed          RECOMPUTED     a transient fault
        explained, nothing changed                clean          only the squares in its bound had overflowed
        not explained                             UNCORRECTED
        actual and predicted both not finite      INPUT          an operand held NaN or Inf
        finite operands that can exceed fp32,
        and a panel that agrees                   OVERFLOW       what torch delivers, too
    calm, but delivered numbers beyond the type   OVERFLOW

At level detect, RECOMPUTED and UNCORRECTED are OBSERVED.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .judgement import actual, bound_of, explained, is_finite, judge, noise, predicted, range_safe_bound, ratio_of
from .record import CLEAN, INPUT, OBSERVED, OVERFLOW, PERSISTENT, RECOMPUTED, TRANSIENT, UNCORRECTED, bits, keep, report
from .repair import NOTHING, RANGE, SEVERAL
from .tiles import ACC_LARGEST, offsets, split_program
from .verify import CALM, HUGE, POISONED, SUSPECT, UNQUIET

# How grave a finding is; the gravest group decides about its row.
S_CLEAN, S_INPUT, S_OVERFLOW, S_RECOMPUTED, S_UNCORRECTED = (tl.constexpr(i) for i in range(5))
#: Step of the scans over operands and results that explain rows beyond range.
SCAN = tl.constexpr(32)


@triton.jit(do_not_specialize=["shape", "labels", "batches"], do_not_specialize_on_alignment=["site"])
def settle(a, w, y, first, again, moved, status, bound, shape, words, site, summary, details, labels, batches,
           CORRECT: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, OUT_LARGEST: tl.constexpr):  # fmt: skip
    """One block of rows per program; all leave at once when nothing was found."""
    if tl.load(summary + UNQUIET) > 0:
        batch, block = split_program(tl.cdiv(shape.m, BM))
        rows = block * BM + tl.arange(0, BM)
        severity, worst = _settle_rows(a, w, y, first, again, moved, status, bound, shape, details, batch, rows, batches,
                                       KINDS, PARTS, BM, BN, OUT_LARGEST)  # fmt: skip
        fault = OBSERVED if not CORRECT else UNCORRECTED
        verdict = tl.where(severity == S_UNCORRECTED, fault, tl.where(severity == S_INPUT, INPUT, CLEAN))
        verdict = tl.where(severity == S_RECOMPUTED, RECOMPUTED if CORRECT else OBSERVED, verdict)
        verdict = tl.where(severity == S_OVERFLOW, OVERFLOW, verdict)
        report(words, site, summary, details, verdict, worst, tl.cast(batch, tl.int64) * shape.m + block * BM,
               batches * shape.m, labels)  # fmt: skip


@triton.jit
def _settle_rows(a, w, y, first, again, moved, status, bound, shape, details, batch, rows, batches,
                 KINDS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 OUT_LARGEST: tl.constexpr):  # fmt: skip
    """(severity, largest |residual|/τ) per row; keeps what a record will say of it."""
    tiles_n, inside = tl.cdiv(shape.n, BN), rows < shape.m
    severity, column, cause = tl.zeros((BM,), tl.int32), tl.full((BM,), -1, tl.int32), tl.zeros((BM,), tl.int32)
    worst, residual, tau = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    huge = rows < 0
    for group in tl.range(shape.groups, disable_licm=True):
        at = (tl.cast(batch, tl.int64) * shape.groups + group) * shape.m + rows
        code = tl.load(status + at, mask=inside, other=CALM).to(tl.int32)
        huge |= code == HUGE
        if tl.max(code, 0) >= POISONED:
            _, _, d, t, _ = judge(first, bound, KINDS + 1, KINDS, PARTS, shape, tiles_n, batch, group, rows)
            s, col, why = _second_opinion(a, w, first, again, moved, bound, shape, code, batch, group, rows, KINDS, PARTS, BN)
            severity = tl.maximum(severity, s)
            more = (ratio_of(d, t) > worst) & (s != S_CLEAN)
            worst, residual, tau = tl.where(more, ratio_of(d, t), worst), tl.where(more, d, residual), tl.where(more, t, tau)
            column, cause = tl.where(more, col, column), tl.where(more, why, cause)
    huge &= severity == S_CLEAN
    if tl.max(huge.to(tl.int32), 0) > 0:
        severity = tl.where(huge & _overflowed(y, shape, batch, rows, OUT_LARGEST), S_OVERFLOW, severity)
    row = tl.cast(batch, tl.int64) * shape.m + rows
    keep(details, row, batches * shape.m, residual, tau, column, cause, inside & (severity != S_CLEAN))
    return severity, worst


@triton.jit
def _second_opinion(a, w, first, again, moved, bound, shape, code, batch, group, rows,
                    KINDS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """(severity, column or -1, cause) of the rows of one group, after its tiles were computed again."""
    tiles_n, suspect, poisoned = tl.cdiv(shape.n, BN), code == SUSPECT, code == POISONED
    col, changed = _moved_column(moved, shape, tiles_n, batch, group, rows)
    ok, judged = rows >= 0, rows >= 0
    for kind in tl.static_range(KINDS):
        own, own_judged = _explained_again(kind, bound, again, shape, tiles_n, batch, group, rows, KINDS, PARTS)
        changed |= _differs(kind, first, again, shape, tiles_n, batch, group, rows, KINDS, PARTS)
        ok, judged = ok & own, judged & own_judged
    severity = tl.where(suspect, tl.where(ok, tl.where(changed, S_RECOMPUTED, S_CLEAN), S_UNCORRECTED), S_CLEAN)
    severity = tl.where(poisoned, S_UNCORRECTED, severity)
    puzzling = poisoned | (suspect & ~ok & ~judged)
    if tl.max(puzzling.to(tl.int32), 0) > 0:
        finite, possible = _operands(a, w, bound, shape, batch, group, rows, BN)
        # The panel remembers what W was: where its sketches say that no sum came near the range, W's present size is the fault.
        # (Poisoned rows alone are not computed again.)
        _, at_first = noise(first, KINDS, PARTS, shape, batch, group, rows)
        _, repeated = noise(again, KINDS, PARTS, shape, batch, group, rows)
        possible &= ~(tl.where(poisoned, at_first, repeated) * bound.spread < ACC_LARGEST)
        severity = tl.where(poisoned & ~finite, S_INPUT, severity)
        severity = tl.where(puzzling & finite & possible & (poisoned | ~changed), S_OVERFLOW, severity)
    cause = tl.where(suspect & (severity == S_UNCORRECTED) & ~changed, PERSISTENT, 0)
    cause = tl.where(severity == S_RECOMPUTED, TRANSIENT, cause)
    return severity, tl.where(suspect & (severity >= S_RECOMPUTED), col, -1), cause


@triton.jit
def _explained_again(KIND: tl.constexpr, bound, again, shape, tiles_n, batch, group, rows,
                     KINDS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """(explained, judged): by the usual bound or, where its squares overflowed, by the range-safe one; judged: τ, r, c finite."""
    planes: tl.constexpr = KINDS + 1 + RANGE
    r = actual(again, KIND, planes, False, shape, tiles_n, batch, group, rows)
    c = predicted(again, KIND, KINDS, PARTS, shape, batch, group, rows)
    squares = actual(again, KINDS, planes, False, shape, tiles_n, batch, group, rows)
    noise2, magnitudes = noise(again, KINDS, PARTS, shape, batch, group, rows)
    tau = bound_of(bound.accumulate[KIND], squares, c, noise2, bound.absolute[KIND])
    largest = actual(again, KINDS + 1, planes, True, shape, tiles_n, batch, group, rows)
    total = actual(again, KINDS + 2, planes, False, shape, tiles_n, batch, group, rows)
    tau = tl.where(tau < ACC_LARGEST, tau, range_safe_bound(bound.accumulate[KIND], largest, total, c, magnitudes))
    return explained(r - c, tau), is_finite(r) & is_finite(c) & (tau < ACC_LARGEST)


@triton.jit
def _differs(KIND: tl.constexpr, first, again, shape, tiles_n, batch, group, rows,
             KINDS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Whether actual or predicted sum have other bits than at first."""
    r = actual(first, KIND, KINDS + 1, False, shape, tiles_n, batch, group, rows)
    r_again = actual(again, KIND, KINDS + 1 + RANGE, False, shape, tiles_n, batch, group, rows)
    c = predicted(first, KIND, KINDS, PARTS, shape, batch, group, rows)
    c_again = predicted(again, KIND, KINDS, PARTS, shape, batch, group, rows)
    return (bits(r) != bits(r_again)) | (bits(c) != bits(c_again))


@triton.jit
def _moved_column(moved, shape, tiles_n, batch, group, rows):
    """(the only column that changed in a group, or -1; whether any did)"""
    count, column = tl.zeros(rows.shape, tl.int32), tl.full(rows.shape, -1, tl.int32)
    first = group * shape.tiles_per_group
    for tile in range(first, tl.minimum(first + shape.tiles_per_group, tiles_n)):
        at = moved + (tl.cast(batch, tl.int64) * tiles_n + tile) * shape.m + rows
        here = tl.load(at, mask=rows < shape.m, other=NOTHING)
        count += tl.where(here == NOTHING, 0, tl.where(here == SEVERAL, 2, 1))
        column = tl.where(here >= 0, here, column)
    return tl.where(count == 1, column, -1), count > 0


@triton.jit
def _operands(a, w, bound, shape, batch, group, rows, BN: tl.constexpr):
    """(finite, possible): whether A's rows and W's group are finite, and whether numbers of their size can overflow fp32."""
    begin = group * shape.tiles_per_group * BN
    end = tl.minimum(begin + shape.tiles_per_group * BN, shape.n)
    step = tl.arange(0, SCAN)
    peak_a, bad_a = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.int32)
    peak_w, bad_w = tl.zeros((SCAN,), tl.float32), tl.zeros((SCAN,), tl.int32)
    for k in tl.range(0, shape.k, SCAN, disable_licm=True):
        peak, bad = _peak(a, batch, rows, shape.m, k + step, shape.k)
        peak_a, bad_a = tl.maximum(peak_a, peak), tl.maximum(bad_a, bad)
        for n in tl.range(begin, end, SCAN, disable_licm=True):
            peak_n, bad_n = _peak(w, batch, n + step, end, k + step, shape.k)
            peak_w, bad_w = tl.maximum(peak_w, peak_n), tl.maximum(bad_w, bad_n)
    finite = (bad_a == 0) & (tl.max(bad_w, 0) == 0)
    return finite, peak_a * tl.max(peak_w, 0) * bound.reach >= ACC_LARGEST


@triton.jit
def _peak(matrix, batch, rows, M, cols, N):
    """(max |x|, 1 if any x is not finite) of every row of a tile."""
    at = matrix.ptr + offsets(batch, matrix.batch, rows, matrix.row, cols, matrix.col)
    x = tl.load(at, mask=(rows[:, None] < M) & (cols[None, :] < N), other=0.0).to(tl.float32)
    finite = is_finite(x)
    return tl.max(tl.where(finite, tl.abs(x), 0.0), 1), tl.max((~finite).to(tl.int32), 1)


@triton.jit
def _overflowed(y, shape, batch, rows, OUT_LARGEST: tl.constexpr):
    """Whether a row of Y holds a number beyond its type."""
    found = tl.zeros(rows.shape, tl.int32)
    for n in tl.range(0, shape.n, SCAN, disable_licm=True):
        cols = n + tl.arange(0, SCAN)
        at = offsets(batch, tl.cast(shape.m, tl.int64) * shape.n, rows, shape.n, cols, 1)
        x = tl.load(y + at, mask=(rows[:, None] < shape.m) & (cols[None, :] < shape.n), other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.max((~(tl.abs(x) <= OUT_LARGEST)).to(tl.int32), 1))
    return found > 0
