"""Weigh: whether the one suspect row of a product is to be left as it is, before anything is computed again (detector="statistical").

    S2   one row, in one group; one element explains all sums; |d| + τ/5 <= 10⁻³ ‖y‖ of e and one      TOLERATED, within a budget
    S3   … and it is larger                                                                            repaired
    S4   anything else                                                                                 repaired

as abft/backends/tolerance.py has it for hosts. There the element is computed once more; here the whole group of the row, in fp64 on the
vector units (independent.py), for the accumulators are gone, and an error of less than half an ulp of a 16-bit result left no trace in Y:

    the check is right          |c_j - r'_j| <= τ_j / 2    so W, and the panel, are what they were as far as this row can tell: |d| > τ
    one element n               |d_j - w_j[n] δ| <= τ_j/8 + |w_j[n]| τ/8 for all kinds j of sum, δ = w_e[n] d_e, and
                                |y[n] - y'[n] - δ| is within rounding and noise
    and no other                |y[i] - y'[i]| is, of all others

Several large errors whose sums are those of a small one therefore show. One program; it leaves at once when nothing is suspect. What it
lets be is no longer unquiet: the launches that follow leave at once, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .independent import COLUMNS, elements
from .judgement import actual, bound_of, noise, predicted
from .record import enter_tolerated
from .residuals import ALL_KINDS, FIELDS
from .summary import SUSPECTS, UNQUIET, case_of
from .verify import POISONED, SUSPECT

#: Words (int64) of a site's gate: checks that the budget has counted, what is left of it in millionths of a row, rows of each severity.
GATE, SEEN, LEFT, SEVERITIES = (tl.constexpr(i) for i in (8, 0, 1, 2))
S2, S3, S4 = (tl.constexpr(i) for i in (2, 3, 4))
#: The budget, abft.statistics.severity.Budget: rows, at most, and one more for every million checks.
BURST, ROW = tl.constexpr(8), tl.constexpr(1_000_000)
#: As abft.statistics.severity has them: harm, and a residual's own noise of its bound.
HARMFUL, NOISE = tl.constexpr(1e-3), tl.constexpr(0.2)
#: How far sums may be from what one element makes of them, of their bounds: as checksum.locate.
PLACE = tl.constexpr(0.125)


@triton.jit(do_not_specialize=["shape", "labels", "batches"], do_not_specialize_on_alignment=["site"])
def weigh(a, w, bias, y, weights, first, bound, shape, status, units, checked, gate, apart, summary, words, site, labels, batches,
          KINDS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUND: tl.constexpr,
          TINY: tl.constexpr):  # fmt: skip
    """checked: the site's sums by group (residuals.Kept.groups), of which the budget is refilled; apart: (columns of a group) fp32, to be
    written; ROUND, TINY: of the output type, what rounding changes relatively and where numbers are subnormal."""
    if tl.load(summary + UNQUIET) > 0:
        suspects, case = _suspects(summary, batches * shape.groups)
        if suspects > 0:
            severity, row = tl.cast(S4, tl.int32), tl.cast(0, tl.int32)
            batch, group = case // shape.groups, case % shape.groups
            if (suspects == 1) & (tl.load(summary + UNQUIET) == 1):
                at = status + (tl.cast(batch, tl.int64) * shape.groups + group) * shape.m
                row, poisoned = _row_of(at, shape.m, BM)
                if poisoned == 0:
                    severity, column, d, tau = _severity(a, w, bias, y, weights, first, bound, shape, apart, batch, group, row,
                                                         KINDS, PARTS, BN, ROUND, TINY)  # fmt: skip
                    if severity == S2:
                        if _may_be_left(gate, checked, shape.groups):
                            tile = (batch * tl.cdiv(shape.m, BM) + row // BM) * tl.cdiv(shape.n, BN) + column // BN
                            enter_tolerated(words, tl.load(site), batch * shape.m + row, column, d, tau, tile, units, labels)
                            tl.store(summary + UNQUIET, tl.cast(0, tl.int64))
            tl.atomic_add(gate + SEVERITIES + severity - S2, suspects)


@triton.jit
def _suspects(summary, cases):
    """(suspect rows of all groups, the last group that has any)"""
    total, where = tl.cast(0, tl.int64), tl.cast(0, tl.int32)
    for case in range(cases):
        here = tl.load(case_of(summary, 0, case, 0) + SUSPECTS)
        where = tl.where(here > 0, case, where)
        total += here
    return total, where


@triton.jit
def _row_of(status, M, BM: tl.constexpr):
    """(the suspect row of a group, how many poisoned ones there are)"""
    found, poisoned = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    for start in range(0, M, BM):
        rows = start + tl.arange(0, BM)
        code = tl.load(status + rows, mask=rows < M, other=0)
        found = tl.maximum(found, tl.max(tl.where(code == SUSPECT, rows, 0), 0))
        poisoned += tl.sum((code == POISONED).to(tl.int32), 0)
    return found, poisoned


@triton.jit
def _severity(a, w, bias, y, weights, first, bound, shape, apart, batch, group, row, KINDS: tl.constexpr, PARTS: tl.constexpr,
              BN: tl.constexpr, ROUND: tl.constexpr, TINY: tl.constexpr):  # fmt: skip
    """(severity, column, d and τ of e) of one row of one group."""
    exact, own = _multiply(a, w, bias, y, weights, shape, apart, batch, group, row, KINDS, PARTS, BN)
    d, taus, right = _residuals(first, bound, exact, shape, batch, group, row, KINDS, PARTS, BN)
    one = tl.arange(0, KINDS)
    size, tau = tl.sum(tl.where(one == 0, d, 0.0), 0), tl.sum(tl.where(one == 0, taus, 0.0), 0)
    tl.debug_barrier()  # ``apart`` is written
    column, wrong, explained = _element(y, weights, shape, apart, batch, group, row, d, taus, size, tau, KINDS, BN, ROUND, TINY)
    single = (right > 0) & (column >= 0) & (wrong == explained)
    worst = tl.max(tl.where(one < 2, tl.abs(d) + NOISE * taus, 0.0), 0)  # of e and one, in which a single error weighs 1
    small = worst.to(tl.float64) * worst <= HARMFUL * HARMFUL * own  # fp64: squares of fp32 numbers do not overflow
    return tl.where(single & (worst < float("inf")), tl.where(small, S2, S3), S4).to(tl.int32), column, size, tau


@triton.jit
def _multiply(a, w, bias, y, weights, shape, apart, batch, group, row, KINDS: tl.constexpr, PARTS: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """(Σ w_j y' of the group, (KINDS,); Σ y² of the whole row), fp64; apart: y - y' of the group's columns."""
    kinds, out = tl.arange(0, KINDS), y + (tl.cast(batch, tl.int64) * shape.m + row) * shape.n
    sums, squares = tl.zeros((KINDS,), tl.float64), tl.cast(0.0, tl.float64)
    begin = group * shape.tiles_per_group * BN
    end = tl.minimum(begin + shape.tiles_per_group * BN, shape.n)
    for start in tl.range(begin, end, COLUMNS, disable_licm=True):
        cols = start + tl.arange(0, COLUMNS)
        value = elements(a, w, shape, batch, row, cols, end, PARTS)
        weight = tl.load(weights + kinds[:, None] * shape.n + cols[None, :], mask=cols[None, :] < end, other=0.0)
        sums += tl.sum(value[None, :] * weight, 1)
        if bias is not None:
            value += tl.load(bias + cols, mask=cols < end, other=0.0).to(tl.float64)
        there = tl.load(out + cols, mask=cols < end, other=0.0).to(tl.float64)
        tl.store(apart + cols - begin, (there - value).to(tl.float32), mask=cols < end)
    for start in tl.range(0, shape.n, COLUMNS, disable_licm=True):
        cols = start + tl.arange(0, COLUMNS)
        there = tl.load(out + cols, mask=cols < shape.n, other=0.0).to(tl.float64)
        squares += tl.sum(there * there, 0)
    return sums, squares


@triton.jit
def _residuals(first, bound, exact, shape, batch, group, row, KINDS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr):
    """(r - c, τ) of the row, (KINDS,) each; 1 if the independent sums side with the check."""
    kinds, tiles_n = tl.arange(0, KINDS), tl.cdiv(shape.n, BN)
    rows = row + tl.zeros_like(kinds)
    squares = actual(first, KINDS, KINDS + 1, False, shape, tiles_n, batch, group, rows)
    noise2, _ = noise(first, KINDS, PARTS, shape, batch, group, rows)
    d, taus, right = tl.zeros((KINDS,), tl.float32), tl.zeros((KINDS,), tl.float32), tl.cast(1, tl.int32)
    for kind in tl.static_range(KINDS):
        c = predicted(first, kind, KINDS, PARTS, shape, batch, group, rows)
        tau = bound_of(bound.accumulate[kind], squares, c, noise2, bound.absolute[kind])
        r = actual(first, kind, KINDS + 1, False, shape, tiles_n, batch, group, rows)
        d, taus = tl.where(kinds == kind, r - c, d), tl.where(kinds == kind, tau, taus)
        agrees = (kinds != kind) | (tl.abs(c.to(tl.float64) - exact) <= tau * 0.5)
        right &= tl.min(agrees.to(tl.int32), 0)
    return d, taus, right


@triton.jit
def _element(y, weights, shape, apart, batch, group, row, d, taus, size, tau, KINDS: tl.constexpr, BN: tl.constexpr,
             ROUND: tl.constexpr, TINY: tl.constexpr):  # fmt: skip
    """(a column in which one error of Y explains all sums, or -1; how many columns are wrong; how many of those explain all sums)"""
    out = y + (tl.cast(batch, tl.int64) * shape.m + row) * shape.n
    best, wrong, explained = tl.cast(-1, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    begin = group * shape.tiles_per_group * BN
    end = tl.minimum(begin + shape.tiles_per_group * BN, shape.n)
    for start in tl.range(begin, end, COLUMNS, disable_licm=True):
        cols = start + tl.arange(0, COLUMNS)
        off = tl.load(apart + cols - begin, mask=cols < end, other=0.0)
        there = tl.load(out + cols, mask=cols < end, other=0.0).to(tl.float32)
        limit = tl.abs(there) * ROUND + TINY + NOISE * tau
        error = size * tl.load(weights + cols, mask=cols < end, other=0.0)
        fits = (cols < end) & (tl.abs(off - error) <= limit)
        for kind in tl.static_range(1, KINDS):
            own_d = tl.sum(tl.where(tl.arange(0, KINDS) == kind, d, 0.0), 0)
            own_tau = tl.sum(tl.where(tl.arange(0, KINDS) == kind, taus, 0.0), 0)
            weight = tl.load(weights + kind * shape.n + cols, mask=cols < end, other=0.0)
            fits &= tl.abs(own_d - weight * error) <= PLACE * (own_tau + tl.abs(weight) * tau)
        bad = (cols < end) & ~(tl.abs(off) <= limit)
        wrong += tl.sum(bad.to(tl.int32), 0)
        explained += tl.sum((bad & fits).to(tl.int32), 0)
        # Of several that would do, the one that is wrong; else the last.
        here = tl.max(tl.where(bad & fits, cols + shape.n, tl.where(fits, cols, -1)), 0)
        best = tl.maximum(best, here)
    column = tl.where(best >= shape.n, best - shape.n, best)
    return tl.where(wrong > 1, -1, column), wrong, explained


@triton.jit
def _may_be_left(gate, checked, groups):
    """Take a row from the site's budget, which is refilled by checks. Products of several streams may ask at once."""
    checks = tl.cast(0.0, tl.float64)
    for group in range(groups):
        checks += tl.load(checked + group * (ALL_KINDS * FIELDS))
    now = checks.to(tl.int64)
    more = now - tl.atomic_max(gate + SEEN, now)
    tl.atomic_add(gate + LEFT, tl.maximum(more, 0))
    tl.atomic_min(gate + LEFT, tl.cast(BURST * ROW, tl.int64))
    left = tl.atomic_add(gate + LEFT, tl.cast(-ROW, tl.int64)) >= ROW
    if not left:
        tl.atomic_add(gate + LEFT, tl.cast(ROW, tl.int64))
    return left
