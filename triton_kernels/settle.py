"""Settle: what became of each row that was not calm, and its record.

    suspect at first; after the repetition (who: arbitration.py)
        explained, and something changed          RECOMPUTED     a transient fault
        explained, nothing changed                clean          only the squares in its bound had overflowed
            against a panel that was rebuilt      FALSE_ALARM    who = PANEL
                                                  STALE          who = STALE
            by a weight as it was                 RECONSTRUCTED  who = RESTORED
        not explained, or beyond the budget       UNCORRECTED, but W being what it should be (who = NOBODY, PANEL, STALE), an
                                                  independent product decides (independent.py):
            it agrees with the data               FALSE_ALARM, or what the row would have been had it been explained
            with the check, not with the data     RECONSTRUCTED  a persistent unit; Y receives the independent product
            with neither; with the data, but not  UNCORRECTED
            the check, W not being remembered
        actual and predicted both not finite      INPUT          an operand held NaN or Inf
        finite operands that can exceed fp32,
        and a panel that agrees                   OVERFLOW       what torch delivers, too
    the weight is lost                            UNCORRECTED    nothing was computed again
    several groups of a tracked one changed       STALE          likewise
    calm, but delivered numbers beyond the type   OVERFLOW

At level detect, RECOMPUTED, RECONSTRUCTED and UNCORRECTED are OBSERVED.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .independent import compare
from .judgement import actual, bound_of, explained, is_finite, judge, noise, predicted, range_safe_bound, ratio_of
from .record import (
    BY_PANEL,
    BY_WEIGHT,
    CLEAN,
    FALSE_ALARM,
    INPUT,
    OBSERVED,
    OVERFLOW,
    PERSISTENT,
    RECOMPUTED,
    RECONSTRUCTED,
    STALE_WEIGHT,
    TRANSIENT,
    UNCORRECTED,
    bits,
    count_changes,
    keep,
    report,
)
from .repair import NOTHING, RANGE, SEVERAL
from .summary import EDITED, LOST, NOBODY, PANEL, RESTORED, RESTORING, STALE, UNQUIET, WHO, case_of
from .tiles import ACC_LARGEST, offsets, split_program
from .verify import BEYOND, CALM, HUGE, POISONED, SUSPECT

# How grave a finding is; the gravest group decides about its row.
S_CLEAN, S_INPUT, S_OVERFLOW, S_FALSE_ALARM, S_STALE, S_RECOMPUTED, S_RECONSTRUCTED, S_UNCORRECTED = (tl.constexpr(i) for i in range(8))
#: Step of the scans over operands and results that explain rows beyond range.
SCAN = tl.constexpr(32)


@triton.jit(
    do_not_specialize=["shape", "labels", "batches", "most_restored", "most_compared"], do_not_specialize_on_alignment=["site"]
)
def settle(a, w, bias, y, weights, first, again, moved, units, status, flags, known, bound, shape, words, site, summary, details,
           labels, batches, most_restored, most_compared, CORRECT: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, OUT_LARGEST: tl.constexpr):  # fmt: skip
    """One block of rows per program; all leave at once when nothing was found.

    known: of a weight, which is remembered; None: of an activation. most_compared: rows of a block and group that an independent
    product is made of.
    """
    if tl.load(summary + UNQUIET) > 0:
        batch, block = split_program(tl.cdiv(shape.m, BM))
        rows = block * BM + tl.arange(0, BM)
        if known is not None:
            if tl.program_id(0) == 0:
                count_changes(words, site, summary, known, shape.groups, tl.load(summary + RESTORING) <= most_restored)
        severity, worst = _settle_rows(a, w, bias, y, weights, first, again, moved, status, flags, summary, bound, shape, details, batch,
                                       block, rows, batches, most_restored, most_compared, CORRECT, known is not None,
                                       KINDS, PARTS, BM, BN, OUT_LARGEST)  # fmt: skip
        report(words, site, summary, details, units, _verdict(severity, CORRECT), worst,
               tl.cast(batch, tl.int64) * shape.m + block * BM, batches * shape.m, labels)  # fmt: skip


@triton.jit
def _verdict(severity, CORRECT: tl.constexpr):
    """What the ledger calls a severity."""
    verdict = tl.where(severity == S_INPUT, INPUT, CLEAN)
    verdict = tl.where(severity == S_OVERFLOW, OVERFLOW, verdict)
    verdict = tl.where(severity == S_FALSE_ALARM, FALSE_ALARM, verdict)
    verdict = tl.where(severity == S_STALE, STALE_WEIGHT, verdict)
    verdict = tl.where(severity == S_RECOMPUTED, RECOMPUTED if CORRECT else OBSERVED, verdict)
    verdict = tl.where(severity == S_RECONSTRUCTED, RECONSTRUCTED if CORRECT else OBSERVED, verdict)
    return tl.where(severity == S_UNCORRECTED, UNCORRECTED if CORRECT else OBSERVED, verdict)


@triton.jit
def _settle_rows(a, w, bias, y, weights, first, again, moved, status, flags, summary, bound, shape, details, batch, block, rows, batches,
                 most_restored, most_compared, CORRECT: tl.constexpr, REMEMBERED: tl.constexpr, KINDS: tl.constexpr,
                 PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OUT_LARGEST: tl.constexpr):  # fmt: skip
    """(severity, largest |residual|/τ) per row; keeps what a record will say of it."""
    tiles_n, inside, blocks = tl.cdiv(shape.n, BN), rows < shape.m, tl.cdiv(shape.m, BM)
    severity, column, cause = tl.zeros((BM,), tl.int32), tl.full((BM,), -1, tl.int32), tl.zeros((BM,), tl.int32)
    worst, residual, tau = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    own_case, tile, huge = tl.zeros((BM,), tl.int32), tl.full((BM,), -1, tl.int32), rows < 0
    for group in tl.range(shape.groups, disable_licm=True):
        at = (tl.cast(batch, tl.int64) * shape.groups + group) * shape.m + rows
        code = tl.load(status + at, mask=inside, other=CALM).to(tl.int32)
        huge |= code == HUGE
        who = tl.load(case_of(summary, batch, group, shape.groups) + WHO).to(tl.int32)
        # Of a group whose weight was restored, rows that were calm were computed anew, too: they must be explained as well.
        if (tl.max(code, 0) >= POISONED) | (who == RESTORED):
            _, _, d, t, _ = judge(first, bound, KINDS + 1, KINDS, PARTS, shape, tiles_n, batch, group, rows)
            who = tl.where((who == RESTORED) & (tl.load(summary + RESTORING) > most_restored), EDITED, who)
            flag = tl.load(flags + (tl.cast(batch, tl.int64) * blocks + block) * shape.groups + group)
            s, col, own_tile, why = _second_opinion(a, w, bias, y, weights, first, again, moved, bound, shape, code, who, flag == BEYOND,
                                                    batch, group, rows, most_compared, CORRECT, REMEMBERED, KINDS, PARTS, BN)  # fmt: skip
            severity = tl.maximum(severity, s)
            more = (ratio_of(d, t) > worst) & (s != S_CLEAN)
            worst, residual, tau = tl.where(more, ratio_of(d, t), worst), tl.where(more, d, residual), tl.where(more, t, tau)
            column, cause = tl.where(more, col, column), tl.where(more, why, cause)
            own_case = tl.where(more, batch * shape.groups + group, own_case)
            tile = tl.where(more & (own_tile >= 0), (batch * blocks + block) * tiles_n + own_tile, tile)
    huge &= severity == S_CLEAN
    if tl.max(huge.to(tl.int32), 0) > 0:
        severity = tl.where(huge & _overflowed(y, shape, batch, rows, OUT_LARGEST), S_OVERFLOW, severity)
    row = tl.cast(batch, tl.int64) * shape.m + rows
    keep(details, row, batches * shape.m, residual, tau, column, cause, own_case, tile, inside & (severity != S_CLEAN))
    return severity, worst


@triton.jit
def _second_opinion(a, w, bias, y, weights, first, again, moved, bound, shape, code, who, beyond, batch, group, rows, most_compared,
                    CORRECT: tl.constexpr, REMEMBERED: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
                    BN: tl.constexpr):  # fmt: skip
    """(severity, column or -1, tile or -1, cause) of the rows of one group, after its tiles were computed again."""
    tiles_n, poisoned, calm = tl.cdiv(shape.n, BN), code == POISONED, (code < POISONED) & (rows < shape.m)
    suspect = (code == SUSPECT) | (calm & (who == RESTORED))
    col, tile, changed = _moved_column(moved, shape, tiles_n, batch, group, rows)
    ok, judged = rows >= 0, rows >= 0
    for kind in tl.static_range(KINDS):
        own, own_judged = _explained_again(kind, bound, again, shape, tiles_n, batch, group, rows, KINDS, PARTS)
        r_differs, c_differs = _differs(kind, first, again, shape, tiles_n, batch, group, rows, KINDS, PARTS)
        # Of a panel that was rebuilt the predictions differ, and tell nothing of the product.
        changed |= r_differs | (c_differs & (who == NOBODY))
        ok, judged = ok & own, judged & own_judged
    settled = tl.where(changed, S_RECOMPUTED, S_CLEAN)
    if who != NOBODY:
        settled = tl.where(changed, S_RECOMPUTED, tl.where(who == PANEL, S_FALSE_ALARM, S_STALE))
        settled = tl.where(who == RESTORED, tl.where(calm, S_CLEAN, S_RECONSTRUCTED), settled)
    severity = tl.where(suspect, tl.where(ok, settled, S_UNCORRECTED), S_CLEAN)
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
        severity = tl.where(suspect & ~ok & (who == STALE) & ~finite, S_STALE, severity)  # an edit that brought NaN or Inf
        severity = tl.where(puzzling & finite & possible & (poisoned | ~changed), S_OVERFLOW, severity)
    again_computed = (who != LOST) & (who != EDITED) & ~beyond
    severity = tl.where(suspect & ~again_computed, tl.where(who == EDITED, S_STALE, S_UNCORRECTED), severity)
    undecided = suspect & (severity == S_UNCORRECTED) & again_computed & ((who == NOBODY) | (who == PANEL) | (who == STALE))
    cause = tl.zeros(rows.shape, tl.int32)
    if tl.max(undecided.to(tl.int32), 0) > 0:
        asked, data, check, where = compare(a, w, bias, y, weights, again, bound, shape, batch, group, rows, undecided, most_compared,
                                            KINDS, PARTS, BN, CORRECT)  # fmt: skip
        # Of an activation nobody knows whether it changed since its panel was built: its present product may be a wrong one.
        right, wrong = asked & data & (check | REMEMBERED), asked & ~data
        severity = tl.where(right, tl.where(settled == S_CLEAN, S_FALSE_ALARM, settled), severity)
        severity = tl.where(wrong & check, S_RECONSTRUCTED, severity)
        # Rows beyond the few, of the same tiles: if any of those few is wrong, it speaks for them, too.
        silent = undecided & ~asked & (tl.max(wrong.to(tl.int32), 0) > 0)
        cause = tl.where((wrong | silent) & ~changed, PERSISTENT, cause)
        tile = tl.where(wrong, where, tl.where(silent & ~changed, tl.max(where, 0), tile))
    cause = tl.where(severity == S_RECOMPUTED, TRANSIENT, cause)
    cause = tl.where((severity == S_FALSE_ALARM) & (who == PANEL), BY_PANEL, cause)
    blamed = suspect & ((who == RESTORED) | (who == LOST)) & (severity != S_CLEAN)
    cause = tl.where((severity == S_STALE) | blamed, BY_WEIGHT, cause)
    told = suspect & (severity >= S_RECOMPUTED) & again_computed
    return severity, tl.where(told, col, -1), tl.where(told, tile, -1), cause


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
    """Whether the actual and whether the predicted sum have other bits than at first."""
    r = actual(first, KIND, KINDS + 1, False, shape, tiles_n, batch, group, rows)
    r_again = actual(again, KIND, KINDS + 1 + RANGE, False, shape, tiles_n, batch, group, rows)
    c = predicted(first, KIND, KINDS, PARTS, shape, batch, group, rows)
    c_again = predicted(again, KIND, KINDS, PARTS, shape, batch, group, rows)
    return bits(r) != bits(r_again), bits(c) != bits(c_again)


@triton.jit
def _moved_column(moved, shape, tiles_n, batch, group, rows):
    """(the only column that changed in a group, or -1; the last tile in which one did, or -1; whether any did)"""
    count, column, where = tl.zeros(rows.shape, tl.int32), tl.full(rows.shape, -1, tl.int32), tl.full(rows.shape, -1, tl.int32)
    first = group * shape.tiles_per_group
    for tile in range(first, tl.minimum(first + shape.tiles_per_group, tiles_n)):
        at = moved + (tl.cast(batch, tl.int64) * tiles_n + tile) * shape.m + rows
        here = tl.load(at, mask=rows < shape.m, other=NOTHING)
        count += tl.where(here == NOTHING, 0, tl.where(here == SEVERAL, 2, 1))
        column = tl.where(here >= 0, here, column)
        where = tl.where(here != NOTHING, tile, where)
    return tl.where(count == 1, column, -1), where, count > 0


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
