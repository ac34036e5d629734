"""An independent product: single rows of a group once more, in fp64 on the vector units, to decide what a repetition cannot.

    y'[n] = Σ_k a[k] W[n, k]        r'_j = Σ_n w_j[n] y'[n]        τ'_j = κ_j U sqrt(Σ y'² + r'_j² + h²) + τ_abs

    the data agree     |r_j - r'_j| <= τ'_j for every kind j of sum     r, c: of the repetition
    the check agrees   |c_j - r'_j| <= τ'_j for every kind

A unit that is always wrong repeats its bits; so do clean data whose rounding exceeds their bound. This path shares no unit with
either: no tensor core, and for fp32 operands, whose product is made of fp32 multiply-adds, not these.

The bound is the check's, κ and all, as on the host: made for the difference of two roundings, it has room for the one that is left
(fp64's own is 2⁻²⁹ of U) and for the truncation of tensor cores, which a check shares and an exact product does not, but which
random signs tie to r, and r is under the root. tests/test_campaigns.py holds emulated tensor cores to it. Operands are read as the
product reads them: tf32 truncated.

Rows are taken one at a time: work of the few, W read once for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .judgement import SKETCHES, is_finite, raw_column
from .panel import as_tf32
from .repair import RANGE
from .tiles import offsets

#: Columns of W and numbers of each at a time; partial sums of so many stay apart until the end.
COLUMNS, STEP = tl.constexpr(32), tl.constexpr(64)


@triton.jit
def compare(a, w, bias, y, weights, again, bound, shape, batch, group, rows, undecided, most,
            KINDS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, CORRECT: tl.constexpr):  # fmt: skip
    """(asked, data, check, tile) of the first ``most`` undecided rows of a group.

    asked: which they are. data, check: which of these the independent product agrees with. tile: of a row whose data it does
    not agree with, the tile that differs most; else -1. If CORRECT, Y receives the independent product where it disagrees
    with the data and agrees with the check; ``check`` then holds for what was delivered.
    """
    order = tl.cumsum(undecided.to(tl.int32), 0)
    asked = undecided & (order <= most)
    data, check, tile = rows < 0, rows < 0, tl.full(rows.shape, -1, tl.int32)
    for i in tl.range(1, tl.minimum(tl.max(order, 0), most) + 1, disable_licm=True):
        mine = asked & (order == i)
        row = tl.sum(tl.where(mine, rows, 0), 0)
        agrees, agreed, where = _judge_row(a, w, bias, y, weights, again, bound, shape, batch, group, row, KINDS, PARTS, BN, False)
        data, check = data | (mine & agrees), check | (mine & agreed)
        tile = tl.where(mine & ~agrees, where, tile)
    if CORRECT:
        wanted = (asked & ~data & check).to(tl.int32)
        order = tl.cumsum(wanted, 0)
        for i in tl.range(1, tl.max(order, 0) + 1, disable_licm=True):
            mine = (wanted > 0) & (order == i)
            row = tl.sum(tl.where(mine, rows, 0), 0)
            _, agreed, _ = _judge_row(a, w, bias, y, weights, again, bound, shape, batch, group, row, KINDS, PARTS, BN, True)
            check = tl.where(mine, agreed, check)
    return asked, data, check, tile


@triton.jit
def _judge_row(a, w, bias, y, weights, again, bound, shape, batch, group, row,
               KINDS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, DELIVER: tl.constexpr):  # fmt: skip
    """(the data agree, the check agrees, the tile that differs most from the data) for one row of one group."""
    kinds = tl.arange(0, KINDS)
    coefficients, absolute = _of_kinds(bound.accumulate, KINDS), _of_kinds(bound.absolute, KINDS)
    r, sums, squares, tile = _multiply(a, w, bias, y, weights, again, coefficients, shape, batch, group, row, KINDS, PARTS, BN, DELIVER)
    column = (group * KINDS + kinds) * PARTS + PARTS - 1
    rows = row + tl.zeros_like(kinds)  # newer interpreters take no mask of one number for several
    c = raw_column(again, shape, batch, rows, column)
    for i in tl.static_range(1, PARTS):
        c = raw_column(again, shape, batch, rows, column - i) + c
    sketch = tl.arange(0, SKETCHES)
    sketched = raw_column(again, shape, batch, row + tl.zeros_like(sketch), shape.groups * KINDS * PARTS + group * SKETCHES + sketch)
    squares += tl.sum(sketched.to(tl.float64) * sketched, 0) / SKETCHES
    limits = (squares + sums * sums) * coefficients * coefficients
    return _explained(r - sums, limits, absolute), _explained(c - sums, limits, absolute), tile


@triton.jit
def _of_kinds(values, KINDS: tl.constexpr):
    """A tuple's numbers as a tensor (KINDS,)."""
    kinds = tl.arange(0, KINDS)
    out = tl.zeros((KINDS,), tl.float32)
    for kind in tl.static_range(KINDS):
        out = tl.where(kinds == kind, values[kind], out)
    return out


@triton.jit
def _explained(residuals, limits, absolute):
    """Whether |residual| <= √limit + absolute for all kinds; squared, for in fp64 a root is a call. NaN and Inf fail closed."""
    beyond = tl.abs(residuals) - absolute
    fits = ((beyond <= 0) | (beyond * beyond <= limits)) & (limits < float("inf"))
    return tl.min(fits.to(tl.int32), 0) > 0


@triton.jit
def _multiply(a, w, bias, y, weights, again, coefficients, shape, batch, group, row,
              KINDS: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr, DELIVER: tl.constexpr):  # fmt: skip
    """(r (KINDS,) of the repetition, r' (KINDS,), Σ y'², the tile whose sums differ most), fp64. If DELIVER, y' goes to Y, plus bias,
    rounded."""
    kinds, planes = tl.arange(0, KINDS), KINDS + 1 + RANGE
    r, sums, squares = tl.zeros((KINDS,), tl.float64), tl.zeros((KINDS,), tl.float64), tl.cast(0.0, tl.float64)
    worst, where = tl.cast(0.0, tl.float32), tl.cast(-1, tl.int32)
    tiles_n = tl.cdiv(shape.n, BN)
    first = group * shape.tiles_per_group
    for tile in tl.range(first, tl.minimum(first + shape.tiles_per_group, tiles_n), disable_licm=True):
        own = tl.zeros((KINDS,), tl.float64)
        end = tl.minimum((tile + 1) * BN, shape.n)
        for start in tl.range(tile * BN, end, COLUMNS, disable_licm=True):
            cols = start + tl.arange(0, COLUMNS)
            value = elements(a, w, shape, batch, row, cols, end, PARTS)
            weight = tl.load(weights + kinds[:, None] * shape.n + cols[None, :], mask=cols[None, :] < end, other=0.0)
            own += tl.sum(value[None, :] * weight, 1)
            squares += tl.sum(value * value, 0)
            if DELIVER:
                if bias is not None:
                    value += tl.load(bias + cols, mask=cols < end, other=0.0).to(tl.float64)
                at = (tl.cast(batch, tl.int64) * shape.m + row) * shape.n + cols
                tl.store(y + at, value.to(tl.float32).to(y.dtype.element_ty), mask=cols < end)
        plane = (tl.cast(batch, tl.int64) * planes + kinds) * tiles_n + tile
        theirs = tl.load(again.partials + plane * shape.m + row).to(tl.float64)
        off = tl.abs(theirs - own).to(tl.float32) / coefficients
        off = tl.max(tl.where(is_finite(off), off, float("inf")), 0)
        where, worst = tl.where(off > worst, tile, where), tl.maximum(off, worst)
        r, sums = r + theirs, sums + own
    return r, sums, squares, where


@triton.jit
def elements(a, w, shape, batch, row, cols, end, PARTS: tl.constexpr):
    """y'[cols] of one row, fp64."""
    TF32: tl.constexpr = w.ptr.dtype.element_ty == tl.float32 and PARTS > 1  # as panel.build has it
    k = tl.arange(0, STEP)
    a_at = a.ptr + tl.cast(batch, tl.int64) * a.batch + tl.cast(row, tl.int64) * a.row + tl.cast(k, tl.int64) * a.col
    w_at = w.ptr + offsets(batch, w.batch, cols, w.row, k, w.col)
    acc = tl.zeros((COLUMNS, STEP), tl.float64)
    for start in tl.range(0, shape.k, STEP, disable_licm=True):
        x = tl.load(a_at, mask=k < shape.k - start, other=0.0)
        v = tl.load(w_at, mask=(cols[:, None] < end) & (k[None, :] < shape.k - start), other=0.0)
        if TF32:
            x, v = as_tf32(x), as_tf32(v)
        acc += x.to(tl.float64)[None, :] * v.to(tl.float64)
        a_at += tl.cast(a.col, tl.int64) * STEP
        w_at += tl.cast(w.col, tl.int64) * STEP
    return tl.sum(acc, 1)
