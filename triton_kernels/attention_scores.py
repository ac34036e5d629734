"""The scores of attention, as all its kernels read them: which keys a query sees, and what stands in a probability's exponent.

    x₂ = log₂e · (cap · tanh(scale · s / cap) + mask)        p = exp2(x₂ - m₂)        hidden keys: -inf

Query i stands at position i + offset among the keys: it sees none behind it if CAUSAL, and of the others only the last ``window``. A mask
of booleans hides, one of floats is added. Dropout is abft.attention.dropout's hash of (seed, head, query, key), in 32-bit integers: whoever
computes a probability again keeps or drops it again.

Exponents are powers of two, for that is what the unit computes; statistics are kept as abft::attention has them, of base e. Between them
lies log₂e, whose rounding the sums take over (``natural``, ``binary``): m is rounded once, and no probability changes by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: log₂e as a sum of two fp32 numbers.
LOG2E_HIGH, LOG2E_LOW = tl.constexpr(1.4426950216293335), tl.constexpr(1.92596298909109e-08)
#: Below this |z|, tanh z from its series: 1 - 2 / (1 + exp(2z)) would lose the digits of a small z.
SERIES = tl.constexpr(0.3)
_GOLDEN = tl.constexpr(0x9E3779B9)


class Heads(NamedTuple):
    """(B, H, G, rows, columns) of any strides; of keys and values G heads of queries share one: group is 0."""

    ptr: Any
    batch: Any
    head: Any
    group: Any
    row: Any
    col: Any


class Scores(NamedTuple):
    """What happens to a score on its way to the exponent. Sizes, the numbers of ``attention.problem.Options``, and the dropout."""

    length: Any  # queries of a head
    keys: Any
    heads: Any  # of keys
    group: Any  # heads of queries to each
    scale: Any
    scale2: Any  # scale · log₂e
    offset: Any
    window: Any  # keys; None: all
    cap: Any  # None: none
    mask: Any  # Heads of twice the strides, 0 where a dimension broadcasts; int8 (0: hidden) or floats to be added; None
    dropped: Any  # of 2³² values of the hash, those that drop; None: no dropout
    seed_low: Any
    seed_high: Any
    undropped: Any  # 1 / (1 - dropout)
    # Packed sequences (attention_sequences.py); else None. At launch length and keys are the longest's, and the offset is beyond the
    # alignment of a sequence's last query with its last key.
    cu_q: Any = None  # cumulative lengths, (sequences + 1,) int32
    cu_k: Any = None
    sequences: Any = None
    tokens: Any = None  # of all sequences
    key_tokens: Any = None
    begin_q: Any = None  # in a program: of its sequence
    begin_k: Any = None
    sequence: Any = None


# --- where ----------------------------------------------------------------------------------------


@triton.jit
def heads_of(scores, program):
    """(batch, head of keys, its group's member) of the program-th head of queries."""
    return program // (scores.heads * scores.group), program // scores.group % scores.heads, program % scores.group


@triton.jit
def start_of(t, batch, head, member):
    """The address of a head's first number."""
    return t.ptr + tl.cast(batch, tl.int64) * t.batch + tl.cast(head, tl.int64) * t.head + tl.cast(member, tl.int64) * t.group


@triton.jit
def rectangle(start, t, rows, cols, ROWS, COLS):
    """A (rows, cols) part of a head; zero beyond its ROWS and COLS."""
    at = start + tl.cast(rows, tl.int64)[:, None] * t.row + tl.cast(cols, tl.int64)[None, :] * t.col
    return tl.load(at, mask=(rows[:, None] < ROWS) & (cols[None, :] < COLS), other=0.0)


@triton.jit
def visited(scores, first_row, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Key blocks that any of BM queries may see, and among them those that all of these see whole: (first, whole, masked, end).

    Blocks [first, whole) and [masked, end) hold hidden keys, [whole, masked) none, unless a mask hides them.
    """
    low = first_row + scores.offset
    high = tl.minimum(first_row + BM, scores.length) - 1 + scores.offset
    end = tl.cdiv(scores.keys, BN)
    masked = scores.keys // BN
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(high + BN, 0) // BN)
        masked = tl.minimum(masked, tl.maximum(low + 1, 0) // BN)
    first, whole = end * 0, end * 0
    if scores.window is not None:
        first = tl.minimum(tl.maximum(low - scores.window + 1, 0) // BN, end)
        whole = tl.maximum(high - scores.window + BN, 0) // BN
    whole = tl.minimum(tl.maximum(whole, first), end)
    return first, whole, tl.minimum(tl.maximum(masked, whole), end), end


@triton.jit
def hidden(scores, rows, cols, batch, head, member, CAUSAL: tl.constexpr):
    """True where a query does not see a key; keys beyond the last are seen by none."""
    unseen = (cols[None, :] >= scores.keys) & (rows[:, None] >= 0)
    if CAUSAL:
        unseen |= cols[None, :] > rows[:, None] + scores.offset
    if scores.window is not None:
        unseen |= cols[None, :] <= rows[:, None] + (scores.offset - scores.window)
    if scores.mask is not None:
        if scores.mask.ptr.dtype.element_ty == tl.int8:
            unseen |= mask_of(scores, rows, cols, batch, head, member) == 0
    return unseen


@triton.jit
def mask_of(scores, rows, cols, batch, head, member):
    """A tile of the mask, zero beyond it."""
    t = scores.mask
    start = tl.cast(batch, tl.int64) * (t.batch // 2) + tl.cast(head, tl.int64) * (t.head // 2) + tl.cast(member, tl.int64) * (t.group // 2)
    at = t.ptr + start + tl.cast(rows, tl.int64)[:, None] * (t.row // 2) + tl.cast(cols, tl.int64)[None, :] * (t.col // 2)
    return tl.load(at, mask=(rows[:, None] < scores.length) & (cols[None, :] < scores.keys), other=0.0)


# --- exponents ------------------------------------------------------------------------------------


@triton.jit
def exponents(s, scores, rows, cols, batch, head, member):
    """x₂ of a tile of scores, before anything is hidden."""
    if scores.cap is None:
        x = s * scores.scale2
    else:
        x = tanh(s * (scores.scale / scores.cap)) * (scores.cap * LOG2E)
    if scores.mask is not None:
        if scores.mask.ptr.dtype.element_ty != tl.int8:
            x += mask_of(scores, rows, cols, batch, head, member).to(tl.float32) * LOG2E
    return x


@triton.jit
def tanh(z):
    """tanh, to 2 units in the last place of 1, and of a small z to those of z."""
    z2 = z * z
    series = z * (1.0 + z2 * (-1.0 / 3.0 + z2 * (2.0 / 15.0 + z2 * (-17.0 / 315.0 + z2 * (62.0 / 2835.0 - z2 * (1382.0 / 155925.0))))))
    return tl.where(tl.abs(z) < SERIES, series, 1.0 - 2.0 / (1.0 + tl.exp2(z * (2.0 * LOG2E))))


@triton.jit
def natural(m2, l2):
    """(m, l) of base e from those of base 2: m rounded, and l = l₂ · 2^(m₂ - m log₂e), so that exp(x - m) / l stays what it was.

    Where no key was seen, m₂ is -inf and m is zero, as l is.
    """
    m2 = tl.where(m2 == float("-inf"), 0.0, m2)
    m = m2 * LN2
    return m, l2 * tl.exp2(_excess(m2, m))


@triton.jit
def binary(m, l):
    """(m₂, l₂) of base 2, by which exp2(x₂ - m₂) / l₂ is exp(x - m) / l."""
    m2 = m * LOG2E
    return m2, l * tl.exp2(-_excess(m2, m))


@triton.jit
def _excess(m2, m):
    """m₂ - m log₂e, of a size of rounding errors; the first product is nearly m₂, and fused it is exact."""
    return -tl.fma(m, LOG2E_HIGH, -m2) - m * LOG2E_LOW


# --- dropout --------------------------------------------------------------------------------------


@triton.jit
def dropout_base(scores, batch, head, member):
    """What all probabilities of a head of queries share."""
    number = ((batch * scores.heads + head) * scores.group + member).to(tl.uint32)
    return _mix(_mix(number + scores.seed_low.to(tl.uint32)) ^ scores.seed_high.to(tl.uint32))


@triton.jit
def kept(scores, base, rows, cols):
    """bool (rows, cols): what dropout keeps; as abft.attention.dropout.keep."""
    row = _mix(base ^ (rows.to(tl.uint32) * tl.cast(_GOLDEN, tl.uint32)))
    mixed = _mix(row[:, None] ^ (cols.to(tl.uint32) * tl.cast(_GOLDEN, tl.uint32))[None, :])
    return mixed.to(tl.int64) >= scores.dropped


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.cast(0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.cast(0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


# --- signs ----------------------------------------------------------------------------------------


@triton.jit
def sign_of_key(cols, BIT: tl.constexpr):
    """±1 of every key, one of 24 independent patterns: coefficients of the sketches that estimate Σ s²."""
    return 1.0 - 2.0 * ((_mix(cols.to(tl.uint32)) >> BIT) & 1).to(tl.float32)


# --- launching ------------------------------------------------------------------------------------


def heads(t: Any) -> Heads:
    """The argument of a tensor (B, H, G, n, d), or (B, H, n, d) of keys or values."""
    batch, head, *group, row, col = t.stride()
    return Heads(t, batch, head, group[0] if group else 0, row, col)


def mask(t: Any) -> Heads | None:
    """The argument of a mask of five dimensions, of which any may be one; bool or floats. Strides are doubled: Triton makes a constant of
    a one, and fails to compile a tuple within a tuple that holds one and is passed on inside a loop."""
    if t is None:
        return None
    t = t.view(torch.int8) if t.dtype == torch.bool else t
    return Heads(t, *(0 if size == 1 else 2 * stride for size, stride in zip(t.shape, t.stride(), strict=True)))


def scores_of(
    q: Any, k: Any, mask_: Any, scale: float, offset: int, window: int | None, cap: float | None, dropout: float, seed: int
) -> tuple[Scores, bool]:
    """(the argument, SCALED) of q (B, H, G, L, E), k (B, H, S, E). SCALED: an exponent is its score times a positive number, or hidden.

    The largest score then has the largest exponent, and multiplication and shift are one instruction.
    """
    _, heads_, group, length, _ = q.shape
    scaled = scale > 0 and cap is None and (mask_ is None or mask_.dtype == torch.bool)
    drops: tuple[Any, ...] = (None,) * 4
    if dropout:
        share = 1.0 - dropout
        drops = round(dropout * 2.0**32), as_int32(seed & 0xFFFFFFFF), as_int32(seed >> 32 & 0xFFFFFFFF), 1.0 / share if share else 0.0
    scores = Scores(length, k.shape[2], heads_, group, scale, scale * LOG2E.value, offset, window, cap, mask(mask_), *drops)
    return scores, scaled


def as_int32(x: int) -> int:
    """The int32 with the bits of a number below 2³²: one kind of argument, whatever its size."""
    return (x + 2**31) % 2**32 - 2**31
