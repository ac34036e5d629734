"""Judging a row: reduce its partial sums, form the prediction and the bound, compare.

    S = sqrt( Σ acc² + c² + h² )        τ = κU·S + τ_abs        suspect = ~(|r - c| <= τ) | ~(τ < largest)

per group of columns and kind of sum: e (random signs), one, hi, lo; or e alone. Constants and evidence: docs/explanation/thresholds.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import ACC_LARGEST

SKETCHES = tl.constexpr(4)
#: E|x| of a standard normal is 0.798: 1/0.798 turns a mean magnitude into a standard deviation.
SQRT_HALF_PI = tl.constexpr(1.2533)
#: τ_abs of the range-safe form, near the smallest number whose square root is still useful.
TINY = tl.constexpr(2.0**-120)


class Bound(NamedTuple):
    """Coefficients of τ (abft.threshold.coefficients) and what decides whether finite operands can overflow a check."""

    accumulate: Any  # (kinds,)
    absolute: Any  # (kinds,)
    reach: Any  # 4 · K · group width: |c| <= reach · max|a| · max|w|
    spread: Any  # 16 · √K: every |acc| <= √K h, and Σ|x·g| over four sketches falls below h/16 once in a million rows


class Shape(NamedTuple):
    """Sizes of a product and of its checks."""

    m: Any
    n: Any
    k: Any
    c: Any
    groups: Any
    tiles_per_group: Any


class Sums(NamedTuple):
    """Where the sums of a product lie: partials (B, planes, tiles_n, M), a plane per kind and one of squares, more after a repair;
    raw (B, M, C), scales (C,) of the panel's columns or None."""

    partials: Any
    raw: Any
    scales: Any
    scales_batch: Any


@triton.jit
def is_finite(x):
    return tl.abs(x) <= ACC_LARGEST


@triton.jit
def actual(sums, PLANE: tl.constexpr, PLANES: tl.constexpr, MAXIMUM: tl.constexpr, shape, tiles_n, batch, group, rows):
    """One plane of the partial sums, reduced over the tiles of a group; in fixed order, so it repeats exactly."""
    plane = tl.cast(tiles_n, tl.int64) * shape.m
    at = sums.partials + (tl.cast(batch, tl.int64) * PLANES + PLANE) * plane + rows
    total = tl.zeros(rows.shape, tl.float32)
    first = group * shape.tiles_per_group
    for tile in range(first, tl.minimum(first + shape.tiles_per_group, tiles_n)):
        part = tl.load(at + tl.cast(tile, tl.int64) * shape.m, mask=rows < shape.m, other=0.0)
        total = tl.maximum(total, part) if MAXIMUM else total + part
    return total


@triton.jit
def raw_column(sums, shape, batch, rows, column):
    """raw[batch, rows, column], undone of the power of two that an fp16 panel column was divided by."""
    row = tl.cast(batch, tl.int64) * shape.m + rows
    value = tl.load(sums.raw + row * shape.c + column, mask=rows < shape.m, other=0.0)
    if sums.scales is not None:
        value = value * tl.load(sums.scales + batch * sums.scales_batch + column)
    return value


@triton.jit
def predicted(sums, KIND: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr, shape, batch, group, rows):
    """c of one kind: its parts summed smallest first, which keeps what the split kept."""
    column = (group * KINDS + KIND) * PARTS
    total = raw_column(sums, shape, batch, rows, column + PARTS - 1)
    for i in tl.static_range(1, PARTS):
        total = raw_column(sums, shape, batch, rows, column + PARTS - 1 - i) + total
    return total


@triton.jit
def noise(sums, KINDS: tl.constexpr, PARTS: tl.constexpr, shape, batch, group, rows):
    """(Σ_j (x·g_j)², Σ_j |x·g_j|) over the sketches: four times h², and what the range-safe form takes instead."""
    column = shape.groups * KINDS * PARTS + group * SKETCHES
    squares, magnitudes = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32)
    for j in tl.static_range(SKETCHES):
        x = raw_column(sums, shape, batch, rows, column + j)
        squares = tl.fma(x, x, squares)
        magnitudes += tl.abs(x)
    return squares, magnitudes


@triton.jit
def bound_of(coefficient, squares, c, noise2, absolute):
    """τ from Σ acc², c and 4 h²."""
    seen = tl.fma(c, c, squares)
    return tl.fma(tl.sqrt(tl.fma(noise2, 0.25, seen)), coefficient, absolute)


@triton.jit
def range_safe_bound(coefficient, largest, total, c, magnitudes):
    """τ where squares over- or underflow: S_L = sqrt(max|acc| · Σ|acc|) + |c| + sqrt(π/2) · mean|x·g|, with κ/2."""
    scale = tl.sqrt(largest) * tl.sqrt(total) + tl.abs(c) + magnitudes * (SQRT_HALF_PI / SKETCHES)
    return scale * (coefficient * 0.5) + TINY


@triton.jit
def explained(residual, tau):
    """Whether rounding explains a residual. NaN and a bound that is not finite fail closed."""
    return (tl.abs(residual) <= tau) & (tau < ACC_LARGEST)


@triton.jit
def judge(sums, bound, PLANES: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr, shape, tiles_n, batch, group, rows):
    """(suspect, poisoned, residual, τ, Σ acc²) of one group; residual and τ of the kind that stands out most.

    poisoned: actual and predicted are both not finite, as when an operand held NaN or Inf.
    """
    squares = actual(sums, KINDS, PLANES, False, shape, tiles_n, batch, group, rows)
    noise2, _ = noise(sums, KINDS, PARTS, shape, batch, group, rows)
    suspect, poisoned = rows < 0, rows < 0
    residual, tau = tl.zeros(rows.shape, tl.float32), tl.full(rows.shape, 1.0, tl.float32)
    for kind in tl.static_range(KINDS):
        r = actual(sums, kind, PLANES, False, shape, tiles_n, batch, group, rows)
        c = predicted(sums, kind, KINDS, PARTS, shape, batch, group, rows)
        own_tau, own = bound_of(bound.accumulate[kind], squares, c, noise2, bound.absolute[kind]), r - c
        suspect |= ~explained(own, own_tau)
        poisoned |= ~is_finite(r) & ~is_finite(c)
        more = ratio_of(own, own_tau) > ratio_of(residual, tau)
        residual, tau = tl.where(more, own, residual), tl.where(more, own_tau, tau)
    return suspect, poisoned & suspect, residual, tau, squares


@triton.jit
def ratio_of(residual, tau):
    """|residual| / τ, at most Inf: what is not explained and has no ratio above one has an infinite one."""
    ratio = tl.abs(residual) / tau
    return tl.where(explained(residual, tau) | (ratio > 1.0), ratio, float("inf"))
