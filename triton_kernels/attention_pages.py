"""Pages of a key/value cache as device code sees them: written with what is remembered of them, and put back when they have changed.

    sums     (P, H, 2, E)            Σ_t w_t k_t,  Σ_t k_t²       over the tokens of a page, in their order
    columns  (P, H, 4, L)            Σ_d w_d v_td for e, hi, lo;  ν_t
    prints   (P, H, 2, planes, L)    of k and of v, over columns: for each half of the patterns plain, weighted, squared (fingerprint.py)
    filled   (P, H)                  tokens that the sums are of
    lost     (P, H)                  whether something changed that was not restored

The layout is abft.attention.pages', which says what each is for. A program has one head of one page, so tokens are added in their order
however many arrive at a time, and a page rebuilt has the sums that it had. Fingerprints are of single tokens: writing one reads no other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .fingerprint import PLANES, half, row_of, wrapped

#: Rows of ``columns``.
COLUMNS = tl.constexpr(4)
#: Sums of a token's numbers in another order differ by less, relative to their size; so much is far below any bound.
ORDER = tl.constexpr(2.0**-18)
#: What was found of the pages of a head of a sequence: bits.
RESTORED, LOST, REBUILT, BAD_KEYS, BAD_VALUES = (tl.constexpr(1 << i) for i in range(5))


class Pages(NamedTuple):
    """k (P, L, H, E), v (P, L, H, D) and what is remembered, all contiguous; H, E, D as numbers."""

    k: Any
    v: Any
    sums: Any
    columns: Any
    prints: Any
    filled: Any
    lost: Any
    heads: Any
    E: Any
    D: Any


class Tables(NamedTuple):
    """table (B, width) of pages, lengths (B,)."""

    table: Any
    lengths: Any
    width: Any


class Weights(NamedTuple):
    """keys (L,): weights of the tokens of a page; columns (3, D) of kinds e, hi, lo, and their w̄."""

    keys: Any
    columns: Any
    rms_e: Any
    rms_hi: Any
    rms_lo: Any


@triton.jit
def contents(t, pages, page, head, WIDTH, L: tl.constexpr):
    """Where the tokens (L,) of a head of a page begin."""
    return t + ((tl.cast(page, tl.int64) * L + tl.arange(0, L)) * pages.heads + head) * WIDTH


@triton.jit
def sums_at(pages, page, head):
    return pages.sums + (tl.cast(page, tl.int64) * pages.heads + head) * 2 * pages.E


@triton.jit
def columns_at(pages, page, head, L: tl.constexpr):
    return pages.columns + (tl.cast(page, tl.int64) * pages.heads + head) * COLUMNS * L + tl.arange(0, L)


@triton.jit
def _prints_at(pages, page, head, OF_V: tl.constexpr, HALVES: tl.constexpr, L: tl.constexpr):
    head_of_page = tl.cast(page, tl.int64) * pages.heads + head
    return pages.prints + (head_of_page * 2 + OF_V) * (PLANES * HALVES) * L + tl.arange(0, L)


# --- what is remembered ---------------------------------------------------------------------------


@triton.jit
def _columns_of(x, weights, D, BD: tl.constexpr):
    """(e, hi, lo, ν) of values (L, BD) in fp32; ν of numbers divided by the largest, so that squares neither over- nor underflow."""
    cols = tl.arange(0, BD)
    e = tl.sum(x * tl.load(weights.columns + cols, mask=cols < D, other=0.0)[None, :], 1)
    hi = tl.sum(x * tl.load(weights.columns + D + cols, mask=cols < D, other=0.0)[None, :], 1)
    lo = tl.sum(x * tl.load(weights.columns + 2 * D + cols, mask=cols < D, other=0.0)[None, :], 1)
    largest = tl.max(tl.abs(x), 1)
    unit = tl.where(largest > 0, largest, 1.0)
    x = x / unit[:, None]
    own_e, own_hi, own_lo = e / (unit * weights.rms_e), hi / (unit * weights.rms_hi), lo / (unit * weights.rms_lo)
    return e, hi, lo, unit * tl.sqrt(tl.sum(x * x, 1) + own_e * own_e + own_hi * own_hi + own_lo * own_lo)


@triton.jit
def _print_of(x, WHICH: tl.constexpr):
    """(plain, weighted, squared) of a half of the patterns of rows (L, columns), int32."""
    h, index = half(x, WHICH), 1 + tl.arange(0, x.shape[1])
    return tl.sum(h, 1), tl.sum(h * index[None, :], 1), tl.sum(h * (index * index)[None, :], 1)


@triton.jit
def _write_prints(pages, x, page, head, OF_V: tl.constexpr, mask, HALVES: tl.constexpr, L: tl.constexpr):
    at = _prints_at(pages, page, head, OF_V, HALVES, L)
    for i in tl.static_range(HALVES):
        plain, weighted, squared = _print_of(x, i)
        tl.store(at + (PLANES * i) * L, plain, mask=mask)
        tl.store(at + (PLANES * i + 1) * L, weighted, mask=mask)
        tl.store(at + (PLANES * i + 2) * L, squared, mask=mask)


@triton.jit
def _write_columns(pages, x, weights, page, head, mask, L: tl.constexpr, BD: tl.constexpr):
    """Store what belongs to values (L, BD); whether any was another number before, by more than another order of additions explains."""
    e, hi, lo, nu = _columns_of(x.to(tl.float32), weights, pages.D, BD)
    at = columns_at(pages, page, head, L)
    other = _apart(at, e, nu * weights.rms_e, mask) | _apart(at + L, hi, nu * weights.rms_hi, mask)
    other |= _apart(at + 2 * L, lo, nu * weights.rms_lo, mask) | _apart(at + 3 * L, nu, nu, mask)
    tl.store(at, e, mask=mask)
    tl.store(at + L, hi, mask=mask)
    tl.store(at + 2 * L, lo, mask=mask)
    tl.store(at + 3 * L, nu, mask=mask)
    return tl.max((other & mask).to(tl.int32), 0)


@triton.jit
def _apart(at, new, size, mask):
    old = tl.load(at, mask=mask, other=0.0)
    return _differ(old, new) & ~(tl.abs(old - new) <= ORDER * size)


@triton.jit
def _differ(a, b):
    return a.to(tl.int32, bitcast=True) != b.to(tl.int32, bitcast=True)


@triton.jit
def _add_tokens(signed, squares, at, stride, weights, begin, end, cols, E):
    """Sums with the keys of slots [begin, end) added one by one; at: the address of that of slot 0."""
    for slot in range(begin, end):
        x = tl.load(at + tl.cast(slot, tl.int64) * stride + cols, mask=cols < E, other=0.0).to(tl.float32)
        signed += x * tl.load(weights.keys + slot)
        squares += x * x
    return signed, squares


# --- appending ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "programs_each"])
def append_tokens(pages, tables, new_k, new_v, k_batch, k_head, k_token, v_batch, v_head, v_token, counts, weights, T, programs_each,
                  HALVES: tl.constexpr, L: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A program for each head and page that a sequence's tokens may touch. new_k (B, H, T, E), new_v (B, H, T, D), columns adjacent."""
    program, which = tl.program_id(0) // programs_each, tl.program_id(0) % programs_each
    batch, head = program // pages.heads, program % pages.heads
    start = tl.load(tables.lengths + batch).to(tl.int32)
    count = tl.cast(T, tl.int32)
    if counts is not None:
        count = tl.minimum(tl.load(counts + batch).to(tl.int32), count)
    place = start // L + which
    first, end = tl.maximum(start - place * L, 0), tl.minimum(start + count - place * L, L)
    if (first < end) & (place < tables.width) & (start >= 0):
        page = tl.load(tables.table + batch * tables.width + place)
        slots, e, d = tl.arange(0, L), tl.arange(0, BE), tl.arange(0, BD)
        mine, token = (slots >= first) & (slots < end), place * L - start
        k_at = new_k + tl.cast(batch, tl.int64) * k_batch + tl.cast(head, tl.int64) * k_head + tl.cast(token, tl.int64) * k_token
        v_at = new_v + tl.cast(batch, tl.int64) * v_batch + tl.cast(head, tl.int64) * v_head + tl.cast(token, tl.int64) * v_token
        inside = mine[:, None] & (e < pages.E)[None, :]
        x = tl.load(k_at + tl.cast(slots, tl.int64)[:, None] * k_token + e[None, :], mask=inside, other=0.0)
        tl.store(contents(pages.k, pages, page, head, pages.E, L)[:, None] + e[None, :], x, mask=inside)
        _write_prints(pages, x, page, head, 0, mine, HALVES, L)
        inside = mine[:, None] & (d < pages.D)[None, :]
        y = tl.load(v_at + tl.cast(slots, tl.int64)[:, None] * v_token + d[None, :], mask=inside, other=0.0)
        tl.store(contents(pages.v, pages, page, head, pages.D, L)[:, None] + d[None, :], y, mask=inside)
        _write_prints(pages, y, page, head, 1, mine, HALVES, L)
        _write_columns(pages, y, weights, page, head, mine, L, BD)
        filled = pages.filled + tl.cast(page, tl.int64) * pages.heads + head
        own, at = e < pages.E, sums_at(pages, page, head) + e
        signed, squares = tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
        if tl.load(filled) == first:
            if first > 0:
                signed, squares = tl.load(at, mask=own, other=0.0), tl.load(at + pages.E, mask=own, other=0.0)
        else:  # rewound: what the page still holds
            old = pages.k + (tl.cast(page, tl.int64) * L * pages.heads + head) * pages.E
            signed, squares = _add_tokens(signed, squares, old, pages.heads * pages.E, weights, 0, first, e, pages.E)
        signed, squares = _add_tokens(signed, squares, k_at, k_token, weights, first, end, e, pages.E)
        tl.debug_barrier()  # everybody has read them
        tl.store(at, signed, mask=own)
        tl.store(at + pages.E, squares, mask=own)
        tl.store(filled, end)
        if first == 0:
            tl.store(pages.lost + tl.cast(page, tl.int64) * pages.heads + head, 0)


# --- mending --------------------------------------------------------------------------------------


@triton.jit
def mend(pages, weights, page, head, WRITE: tl.constexpr, HALVES: tl.constexpr, L: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):
    """(bits of what was found of a head of a page, elements that changed and that nobody has counted). WRITE: and put back what was."""
    filled = tl.load(pages.filled + tl.cast(page, tl.int64) * pages.heads + head)
    was_lost = pages.lost + tl.cast(page, tl.int64) * pages.heads + head
    known = tl.load(was_lost)
    restored_k, lost_k = _mend(pages, pages.k, pages.E, page, head, filled, 0, WRITE, HALVES, L, BE)
    restored_v, lost_v = _mend(pages, pages.v, pages.D, page, head, filled, 1, WRITE, HALVES, L, BD)
    restored, lost = restored_k + restored_v, lost_k + lost_v
    found = tl.where(restored > 0, RESTORED, 0) | tl.where(lost > 0, LOST, 0)
    new = tl.where(known > 0, 0, restored + lost)
    if lost > 0:
        # Whoever says so first counts it: sequences may share a page.
        new = tl.where(tl.atomic_xchg(was_lost, 1) > 0, 0, new)
    if WRITE:
        tl.debug_barrier()  # what was put back is there
        if lost == 0:
            found |= tl.where(_rebuild(pages, weights, page, head, filled, L, BE, BD) > 0, REBUILT, 0)
            tl.debug_barrier()
    return found, new


@triton.jit
def _mend(pages, t, WIDTH, page, head, filled, OF_V: tl.constexpr, WRITE: tl.constexpr, HALVES: tl.constexpr, L: tl.constexpr,
          BW: tl.constexpr):  # fmt: skip
    """(tokens restored, tokens lost) of K or V."""
    at, cols, written = contents(t, pages, page, head, WIDTH, L), tl.arange(0, BW), tl.arange(0, L) < filled
    x = tl.load(at[:, None] + cols[None, :], mask=written[:, None] & (cols < WIDTH)[None, :], other=0.0)
    prints = _prints_at(pages, page, head, OF_V, HALVES, L)
    changed, good = tl.zeros((L,), tl.int32), tl.full((L,), 1, tl.int32)
    column, change = tl.full((L,), -1, tl.int64), tl.zeros((L,), tl.int64)
    for i in tl.static_range(HALVES):
        plain, weighted, squared = _print_of(x, i)
        plain = _moved(plain, prints + (PLANES * i) * L, written)
        weighted = _moved(weighted, prints + (PLANES * i + 1) * L, written)
        squared = _moved(squared, prints + (PLANES * i + 2) * L, written)
        own = (plain != 0) | (weighted != 0) | (squared != 0)
        name = row_of(plain, weighted, squared, WIDTH)
        agree = (name >= 0) & ((column < 0) | (column == name))
        good = tl.where(own & ~agree, 0, good)
        column = tl.where(own, name, column)
        change += tl.where(own, plain << (16 * i), 0)
        changed = tl.where(own, 1, changed)
    named = (changed > 0) & (good > 0)
    if WRITE:
        BITS: tl.constexpr = tl.int32 if HALVES == 2 else tl.int16
        element = at + tl.where(named, column, 0)
        now = tl.load(element, mask=named, other=0.0).to(BITS, bitcast=True).to(tl.int64)
        then = (now - change).to(BITS).to(t.dtype.element_ty, bitcast=True)
        tl.store(element, then, mask=named)
        restored = tl.sum(named.to(tl.int32), 0)
    else:
        restored = tl.sum(changed, 0) * 0
    return restored, tl.sum(changed, 0) - restored


@triton.jit
def _moved(now, then, written):
    before = tl.load(then, mask=written, other=0)
    return wrapped(tl.where(written, now.to(tl.int64) - before.to(tl.int64), 0))


@triton.jit
def _rebuild(pages, weights, page, head, filled, L: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr):
    """Sums and columns from what the page holds; how many of them were other numbers."""
    e, d, written = tl.arange(0, BE), tl.arange(0, BD), tl.arange(0, L) < filled
    zero, own, at = tl.zeros((BE,), tl.float32), e < pages.E, sums_at(pages, page, head) + e
    start = pages.k + (tl.cast(page, tl.int64) * L * pages.heads + head) * pages.E
    signed, squares = _add_tokens(zero, zero, start, pages.heads * pages.E, weights, 0, filled, e, pages.E)
    other = _differ(signed, tl.load(at, mask=own, other=0.0)) | _differ(squares, tl.load(at + pages.E, mask=own, other=0.0))
    tl.debug_barrier()
    tl.store(at, signed, mask=own)
    tl.store(at + pages.E, squares, mask=own)
    values = contents(pages.v, pages, page, head, pages.D, L)
    x = tl.load(values[:, None] + d[None, :], mask=written[:, None] & (d < pages.D)[None, :], other=0.0)
    return tl.max((other & own).to(tl.int32), 0) + _write_columns(pages, x, weights, page, head, written, L, BD)


# --- launcher -------------------------------------------------------------------------------------


def padded(columns: int) -> int:
    """Columns of a tile that holds a whole row of a head."""
    return max(16, triton.next_power_of_2(columns))


def append(pages: Pages, tables: Tables, new_k: Tensor, new_v: Tensor, counts: Tensor | None, weights: Weights) -> None:
    """Launch. new_k (B, H, T, E), new_v (B, H, T, D)."""
    batch, heads, tokens, e = new_k.shape
    length, d = pages.k.shape[1], new_v.shape[-1]
    new_k, new_v = (t if t.stride(-1) == 1 else t.contiguous() for t in (new_k, new_v))
    each = (tokens + length - 2) // length + 1
    append_tokens[(batch * heads * each,)](
        pages, tables, new_k, new_v, *new_k.stride()[:3], *new_v.stride()[:3], counts, weights, tokens, each,
        HALVES=new_k.element_size() // 2, L=length, BE=padded(e), BD=padded(d), num_warps=4,
    )  # fmt: skip
