"""Arbitration: when rows of a group disagree with their checksums, is it the product that is wrong, the panel or the weight?

One program per suspect group, before anything is computed again. It reads the group's part of W once (4 MB at 512 rows of 4096
numbers of 2 bytes) and compares integers with what is remembered. Programs take cases as they come, and wait for those that others
have taken: never for a program that may not be running yet.

    W's bits as remembered    panel's, too                 NOBODY      wrong in the product, or in its check: compute again
                              panel's not                  PANEL       rebuilt here, in place
    W's bits are others       frozen, elements named       RESTORED    repair.py multiplies with the remembered bits
                              frozen, not nameable         LOST
                              tracked, within a fragment   RESTORED    as a fault in memory would be
                              tracked, wider               STALE       an edit: panel and fingerprint are rebuilt here
                              tracked, in several groups   EDITED      an edit, seen too late to rebuild: next time again

Nothing is ever written into W. A panel of an activation has no fingerprint: there the panel is the only suspect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .fingerprint import add_rows, half, moved_by, row_of, store_sums_of_bits, zero_sums
from .panel import intact, rebuild
from .summary import (
    CLAIMED,
    COUNT,
    DECIDED,
    DIGEST,
    ELEMENT,
    LOST,
    NOBODY,
    PANEL,
    RESTORED,
    RESTORING,
    STALE,
    SUSPECTS,
    WHO,
    case_of,
)
from .tiles import PATCHED, offsets
from .verify import CALM, SUSPECT

#: The fragment that a fault in memory may touch at once, in the weight's own coordinates.
FRAGMENT_ROWS, FRAGMENT_COLUMNS = tl.constexpr(16), tl.constexpr(8)
#: Where no element of a weight is to be named.
NO_ELEMENT = tl.constexpr(-1)


class Remembered(NamedTuple):
    """What a panel's weight was, and what rebuilding takes: (C,) scales of the columns or None, their stride over a batch, W's
    fingerprint or None, weights (kinds, N) of W's rows, the width of a group. (Triton has no tuples of tuples with None in them.)"""

    scales: Any
    scales_batch: Any
    fingerprint: Any
    weights: Any
    width: Any


@triton.jit
def decide_cases(w, panel, integrity, sketch, rms, was, patches, flags, summary, shape, batches, FROZEN: tl.constexpr,
                 TRANSPOSED: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr, TF32: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Decide about every group with suspect rows; when a program leaves this, all are decided."""
    one = tl.cast(1, tl.int64)
    cases, blocks = batches * shape.groups, tl.cdiv(shape.m, BM)
    index = tl.atomic_add(summary + CLAIMED, one)
    while index < cases:
        batch, group = (index // shape.groups).to(tl.int32), (index % shape.groups).to(tl.int32)
        case = case_of(summary, batch, group, shape.groups)
        if tl.load(case + SUSPECTS) > 0:
            who = _decide(
                w, panel, integrity, sketch, rms, was, patches, case, batch, group, shape, FROZEN, TRANSPOSED, KINDS, PARTS, TF32, BN, BK
            )
            # A restored weight concerns rows that were calm, too; of a lost one a repetition would tell nothing.
            if who == RESTORED:
                tl.atomic_add(summary + RESTORING, one)
            if who == STALE:  # an edit: what can be named in other groups is a part of it
                tl.atomic_add(summary + RESTORING, one + one)
            if (who == RESTORED) | (who == LOST):
                for block in range(blocks):
                    at = flags + (tl.cast(batch, tl.int64) * blocks + block) * shape.groups + group
                    tl.store(at, tl.where(who == RESTORED, SUSPECT, CALM).to(tl.int8))
        tl.debug_barrier()  # what every thread wrote, before the word that announces it
        tl.atomic_add(summary + DECIDED, one, sem="acq_rel")
        index = tl.atomic_add(summary + CLAIMED, one)
    while tl.atomic_add(summary + DECIDED, tl.cast(0, tl.int64), sem="acq_rel") < cases:
        pass


@triton.jit
def _decide(w, panel, integrity, sketch, rms, was, patches, case, batch, group, shape, FROZEN: tl.constexpr, TRANSPOSED: tl.constexpr,
            KINDS: tl.constexpr, PARTS: tl.constexpr, TF32: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Who is wrong in one group, entered into its case; rebuilds what is to be rebuilt."""
    who = tl.cast(NOBODY, tl.int32)
    if was.fingerprint is not None:
        changed, named, small, element, digest = _compare(w, was, patches, group, shape, TRANSPOSED, BN, BK)
        located = (named == changed) & (named <= PATCHED)
        if FROZEN:
            verdict = tl.where(located, RESTORED, LOST)
        else:
            verdict = tl.where(located & small, RESTORED, STALE)
        who = tl.where(changed > 0, verdict, NOBODY)
        tl.store(case + COUNT, named)
        tl.store(case + ELEMENT, tl.where((who == RESTORED) & (named == 1), element, NO_ELEMENT))
        tl.store(case + DIGEST, digest)
    if who == NOBODY:
        if not intact(panel, integrity, was.scales, was.scales_batch, batch, group, shape.groups, shape.k, KINDS, PARTS, BK):
            who = tl.cast(PANEL, tl.int32)
    if was.fingerprint is not None:
        if who == STALE:
            _remember(w, was, group, shape, BN, BK)
    if (who == PANEL) | (who == STALE):
        rebuild(w, was.weights, sketch, panel, integrity, was.scales, was.scales_batch, rms,
                batch, group, shape.groups, was.width, shape.n, shape.k, KINDS, PARTS, TF32, BN, BK)  # fmt: skip
    tl.store(case + WHO, who.to(tl.int64))
    return who


@triton.jit
def _remember(w, was, group, shape, BN: tl.constexpr, BK: tl.constexpr):
    """Take W's group as it is now for the right one."""
    HALVES: tl.constexpr = w.ptr.dtype.element_ty.primitive_bitwidth // 16
    begin, end = group * was.width, tl.minimum((group + 1) * was.width, shape.n)
    for block in tl.range(0, tl.cdiv(shape.k, BK), disable_licm=True):
        k = block * BK + tl.arange(0, BK)
        store_sums_of_bits(was.fingerprint, HALVES, _sums_of_bits(w, begin, end, k, shape.k, BN, BK), group, k, shape.k)


@triton.jit
def _sums_of_bits(w, begin, end, k, K, BN: tl.constexpr, BK: tl.constexpr):
    """The fingerprint of columns k of W's rows [begin, end)."""
    seen = zero_sums(BK)
    for start in range(begin, end, BN):
        rows = start + tl.arange(0, BN)
        x = tl.load(w.ptr + offsets(0, 0, rows, w.row, k, w.col), mask=(rows[:, None] < end) & (k[None, :] < K), other=0.0)
        seen = add_rows(seen, x, rows - begin + 1)
    return seen


@triton.jit
def _compare(w, was, patches, group, shape, TRANSPOSED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(columns of the group that changed, those whose one element could be named, whether all of them lie in one fragment,
    the last of them, a number that tells this state of W from others). The named ones are listed in ``patches``."""
    HALVES: tl.constexpr = w.ptr.dtype.element_ty.primitive_bitwidth // 16
    FRAG_N: tl.constexpr = FRAGMENT_COLUMNS if TRANSPOSED else FRAGMENT_ROWS
    FRAG_K: tl.constexpr = FRAGMENT_ROWS if TRANSPOSED else FRAGMENT_COLUMNS
    begin, end = group * was.width, tl.minimum((group + 1) * was.width, shape.n)
    changed, named, digest = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    element, outside = tl.cast(NO_ELEMENT, tl.int64), tl.cast(0, tl.int64)
    fragment = tl.cast(-1, tl.int64)
    for block in tl.range(0, tl.cdiv(shape.k, BK), disable_licm=True):
        k = block * BK + tl.arange(0, BK)
        seen = _sums_of_bits(w, begin, end, k, shape.k, BN, BK)
        plain = moved_by(was.fingerprint, 0, HALVES, seen, group, k, shape.k)
        weighted = moved_by(was.fingerprint, 1, HALVES, seen, group, k, shape.k)
        squared = moved_by(was.fingerprint, 2, HALVES, seen, group, k, shape.k)
        moved, row = (plain != 0) | (weighted != 0) | (squared != 0), row_of(plain, weighted, squared, end - begin)
        state = plain * 31 + weighted
        high = plain
        if HALVES == 2:
            high = moved_by(was.fingerprint, 3, HALVES, seen, group, k, shape.k)
            high_weighted = moved_by(was.fingerprint, 4, HALVES, seen, group, k, shape.k)
            high_squared = moved_by(was.fingerprint, 5, HALVES, seen, group, k, shape.k)
            high_moved = (high != 0) | (high_weighted != 0) | (high_squared != 0)
            high_row = row_of(high, high_weighted, high_squared, end - begin)
            row = tl.where(moved & high_moved, tl.where(row == high_row, row, -1), tl.where(moved, row, high_row))
            moved |= high_moved
            state += high * 61 + high_weighted * 7
        if tl.max(moved.to(tl.int32), 0) > 0:
            n = tl.where(row >= 0, begin + row, begin).to(tl.int64)
            now = tl.load(w.ptr + n * w.row + tl.cast(k, tl.int64) * w.col, mask=moved, other=0.0)
            low = half(now, 0) - plain
            there, bits = moved & (row >= 0) & (low >= 0) & (low <= 65535), low
            if HALVES == 2:
                top = half(now, 1) - high
                there &= (top >= 0) & (top <= 65535)
                bits |= top << 16
            slot = named + tl.cumsum(there.to(tl.int64), 0) - 1
            at = patches + group * (3 * PATCHED) + slot
            listed = there & (slot < PATCHED)
            tl.store(at, n.to(tl.int32), mask=listed)
            tl.store(at + PATCHED, k, mask=listed)
            tl.store(at + 2 * PATCHED, bits.to(tl.int32), mask=listed)
            changed += tl.sum(moved.to(tl.int64), 0)
            named += tl.sum(there.to(tl.int64), 0)
            own = ((n // FRAG_N) << 32) | (k // FRAG_K)
            fragment = tl.where(fragment < 0, tl.max(tl.where(there, own, -1), 0), fragment)
            outside += tl.sum((there & (own != fragment)).to(tl.int64), 0)
            digest += tl.sum(tl.where(moved, (state * 0x9E3779B1 + k) ^ (k.to(tl.int64) * 0x85EBCA6B), 0), 0)
            place = (k.to(tl.int64) << 32) | n if TRANSPOSED else (n << 32) | k
            element = tl.maximum(element, tl.max(tl.where(there, place, NO_ELEMENT), 0))
    # A memory fault leaves more of a matrix than it changes.
    small = (outside == 0) & (2 * named <= tl.cast(shape.n, tl.int64) * shape.k)
    return changed, named, small, element, digest
