"""Fingerprints: integers that say whether a bit of a weight or of its panel has changed, and which element of the weight it was.

    plain[g, k]    = Σ_{n in g} h[n, k]                  h: a 16-bit half of the pattern of W[n, k]
    weighted[g, k] = Σ_{n in g} (n - n_g + 1) h[n, k]    n_g: first row of group g
    squared[g, k]  = Σ_{n in g} (n - n_g + 1)² h[n, k]

modulo 2³², for each half of a pattern (one of 16-bit numbers, two of fp32). If one element of a column k of a group changed by
d in a half, plain moved by d and weighted by (n - n_g + 1) d: that names n, and d gives the old bits back, whatever the type and
however wild the new value is. Two equal changes move both as one of their mean row would; squared tells them apart, for then
it moves by Σ (n - mean)² d beyond. Integer sums have no order: a fingerprint is the same whoever computes it.

Of a panel, the sum of the patterns of every column in every block of BK numbers: enough to tell that it changed.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Fingerprint planes of a half: plain, weighted, squared.
PLANES = tl.constexpr(3)
WORD = tl.constexpr(0xFFFFFFFF)
LARGEST_HALF = tl.constexpr(0xFFFF)


@triton.jit
def half(x, WHICH: tl.constexpr):
    """The low (0) or high (1) 16 bits of the patterns of x, 0 … 65535 in int32."""
    if x.dtype.primitive_bitwidth == 32:
        return (x.to(tl.int32, bitcast=True) >> (16 * WHICH)) & LARGEST_HALF
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32) & LARGEST_HALF


@triton.jit
def zero_sums(BK: tl.constexpr):
    """(plain, weighted, squared) of the low and of the high half."""
    zero = tl.zeros((BK,), tl.int32)
    return zero, zero, zero, zero, zero, zero


@triton.jit
def add_rows(sums, x, index):
    """Sums with a tile of W added, whose rows count ``index`` = n - n_g + 1. What lies outside W must hold zero bits."""
    low, low_weighted, low_squared, high, high_weighted, high_squared = sums
    h = half(x, 0)
    low += tl.sum(h, 0)
    low_weighted += tl.sum(h * index[:, None], 0)
    low_squared += tl.sum(h * (index * index)[:, None], 0)
    if x.dtype.primitive_bitwidth == 32:
        h = half(x, 1)
        high += tl.sum(h, 0)
        high_weighted += tl.sum(h * index[:, None], 0)
        high_squared += tl.sum(h * (index * index)[:, None], 0)
    return low, low_weighted, low_squared, high, high_weighted, high_squared


@triton.jit
def planes_at(fingerprint, HALVES: tl.constexpr, group, k, K):
    """Where the planes (groups, 3 · HALVES, K) of a group begin."""
    return fingerprint + tl.cast(group, tl.int64) * (PLANES * HALVES) * K + k


@triton.jit
def store_sums_of_bits(fingerprint, HALVES: tl.constexpr, sums, group, k, K):
    at = planes_at(fingerprint, HALVES, group, k, K)
    for plane in tl.static_range(PLANES * HALVES):
        tl.store(at + plane * K, sums[plane], mask=k < K)


@triton.jit
def moved_by(fingerprint, PLANE: tl.constexpr, HALVES: tl.constexpr, sums, group, k, K):
    """By how much a plane differs from the remembered one: int64, from -2³¹ to 2³¹ - 1."""
    then = tl.load(planes_at(fingerprint, HALVES, group, k, K) + PLANE * K, mask=k < K, other=0)
    return wrapped(tl.where(k < K, sums[PLANE].to(tl.int64) - then.to(tl.int64), 0))


@triton.jit
def wrapped(x):
    """x modulo 2³², as the number nearest zero."""
    return ((x + 0x80000000) & WORD) - 0x80000000


@triton.jit
def row_of(plain, weighted, squared, width):
    """The row n in [0, width) that alone explains how a column's sums moved: (n + 1) · plain = weighted and
    (n + 1)² · plain = squared modulo 2³²; else -1.

    plain = odd · 2ˢ has an inverse of its odd part modulo 2³² and s < 16: unique for up to 2¹⁷ rows.
    """
    low = tl.where(plain == 0, 1, plain & -plain)
    shift = ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127).to(tl.int64)
    odd = (plain >> shift) & WORD
    inverse = odd  # right modulo 2³; every step doubles the bits
    for _ in tl.static_range(4):
        inverse = (inverse * ((2 - odd * inverse) & WORD)) & WORD
    row = (((weighted & WORD) >> shift) * inverse) & (WORD >> shift)
    possible = (row >= 1) & (row <= width) & (plain != 0) & (tl.abs(plain) <= LARGEST_HALF)
    right = possible & (wrapped(row * plain) == weighted) & (wrapped(row * row * plain) == squared)
    return tl.where(right, row - 1, -1)


@triton.jit
def sum_of_bits(values, inside):
    """The sum of the bit patterns of a block of numbers, modulo 2³² - 1: so many equal flips of a high bit do not cancel."""
    if values.dtype.primitive_bitwidth == 32:
        bits = values.to(tl.int32, bitcast=True)
    else:
        bits = half(values, 0)
    total = tl.sum(tl.where(inside, bits, 0).to(tl.int64), 0)
    return (total & WORD) + (total >> 32)
