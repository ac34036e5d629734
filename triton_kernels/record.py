"""The ledger as device code sees it: counters per site and a ring of records in int64 words.

The layout is abft.ledger's, which these files may not import; tests/kernels/test_record.py holds them together. Verdicts are
numbered as there, and the counter of verdict v is FIRST_VERDICT + v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

HEADER, HEAD, STEP = tl.constexpr(8), tl.constexpr(0), tl.constexpr(1)
COUNTERS = tl.constexpr(16)
CHECKS, PRODUCTS, EXECUTIONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIRST_VERDICT, REPEATED, WORST = tl.constexpr(3), tl.constexpr(12), tl.constexpr(13)
RING, RECORD = tl.constexpr(1024), tl.constexpr(16)

VERDICTS = tl.constexpr(8)
CLEAN = tl.constexpr(-1)
OBSERVED, RECOMPUTED, UNCORRECTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
INPUT, OVERFLOW = tl.constexpr(6), tl.constexpr(7)
TRANSIENT, PERSISTENT = tl.constexpr(1), tl.constexpr(2)

# Words of the summary of one call, through which its blocks agree: arrivals, then per verdict its rows and worst row.
ARRIVED, ROWS, KEYS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(10)
#: What is kept of a suspect row for the record, (DETAILS, B·M) int32: residual and bound (bits), column, cause.
DETAILS = tl.constexpr(4)
ROW_MASK = tl.constexpr(0xFFFFFFFF)


class Labels(NamedTuple):
    """What a record says of its product, as the ledger numbers it, and for how many sites the ledger has room."""

    role: Any
    dtype: Any
    backend: Any
    m: Any
    n: Any
    k: Any
    sites: Any


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def count_call(words, site, rows, REPEAT: tl.constexpr):
    """One product, executed once, with so many checks; those of activation checkpointing's recomputation are counted apart."""
    counters = words + HEADER + tl.load(site) * COUNTERS
    tl.atomic_add(counters + (REPEATED if REPEAT else CHECKS), tl.cast(rows, tl.int64))
    tl.atomic_add(counters + PRODUCTS, tl.cast(1, tl.int64))
    tl.atomic_add(counters + EXECUTIONS, tl.cast(1, tl.int64))


@triton.jit
def raise_worst(words, site, ratio):
    """The largest ratio that was explained: the bits of non-negative floats order like integers."""
    at = words + HEADER + tl.load(site) * COUNTERS + WORST
    new = bits(ratio).to(tl.int64)
    if new > tl.load(at):
        tl.atomic_max(at, new)


@triton.jit
def keep(details, row, rows_total, residual, tau, column, cause, mask):
    """What the record will say, should a row turn out to be the worst."""
    plane = tl.cast(rows_total, tl.int64)
    tl.store(details + row, bits(residual), mask=mask)
    tl.store(details + plane + row, bits(tau), mask=mask)
    tl.store(details + 2 * plane + row, column, mask=mask)
    tl.store(details + 3 * plane + row, cause, mask=mask)


@triton.jit
def report(words, site, summary, details, verdict, ratio, first_row, rows_total, labels):
    """Add one block's verdicts to the call's; the last block to arrive enters the call into the ledger."""
    if tl.max((verdict != CLEAN).to(tl.int32), 0) > 0:
        for v in range(VERDICTS):
            _add_verdict(summary, v, verdict == v, ratio, first_row)
    tl.debug_barrier()  # the details of every thread, before the arrival that announces them
    arrived = tl.atomic_add(summary + ARRIVED, tl.cast(1, tl.int64), sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        _enter(words, tl.load(site), summary, details, rows_total, labels)


@triton.jit
def _add_verdict(summary, v, mine, ratio, first_row):
    count = tl.sum(mine.to(tl.int64), 0)
    if count > 0:
        # Largest ratio first, then smallest row.
        row = first_row + tl.arange(0, mine.shape[0])
        key = (bits(ratio).to(tl.int64) << 32) | (row ^ ROW_MASK)
        tl.atomic_add(summary + ROWS + v, count)
        tl.atomic_max(summary + KEYS + v, tl.max(tl.where(mine, key, 0), 0))


@triton.jit
def _enter(words, site, summary, details, rows_total, labels):
    counters = words + HEADER + site * COUNTERS
    gravest, repeated = tl.cast(CLEAN, tl.int32), tl.cast(0, tl.int64)
    for v in range(VERDICTS):
        rows = tl.load(summary + ROWS + v, volatile=True)
        if rows > 0:
            tl.atomic_add(counters + FIRST_VERDICT + v, rows)
            gravest = _graver(gravest, v)
            if v <= UNCORRECTED:
                repeated = tl.cast(1, tl.int64)
    tl.atomic_add(counters + EXECUTIONS, repeated)
    if gravest != CLEAN:
        _write_record(words, site, gravest, summary, details, rows_total, labels)


@triton.jit
def _graver(v, other):
    """The graver of two verdicts: faults before what is none, OVERFLOW before INPUT; among faults the numbers ascend."""
    v_rank, other_rank = tl.where(v <= UNCORRECTED, v + 10, v), tl.where(other <= UNCORRECTED, other + 10, other)
    return tl.where((v == CLEAN) | (other_rank > v_rank), other, v)


@triton.jit
def _write_record(words, site, v, summary, details, rows_total, labels):
    """The call's one record: its slot reserved atomically, its sequence number written last, when the rest can be read."""
    rows, key = tl.load(summary + ROWS + v, volatile=True), tl.load(summary + KEYS + v, volatile=True)
    row, plane = (key & ROW_MASK) ^ ROW_MASK, tl.cast(rows_total, tl.int64)
    slot = tl.atomic_add(words + HEAD, tl.cast(1, tl.int64))
    at = words + HEADER + tl.cast(labels.sites, tl.int64) * COUNTERS + (slot % RING) * RECORD
    tl.store(at + 1, site)
    tl.store(at + 2, tl.cast(labels.role, tl.int64))
    tl.store(at + 3, tl.cast(v, tl.int64))
    tl.store(at + 4, tl.load(details + 3 * plane + row, volatile=True).to(tl.int64))
    tl.store(at + 5, rows)
    tl.store(at + 6, row)
    tl.store(at + 7, tl.load(details + 2 * plane + row, volatile=True).to(tl.int64))
    tl.store(at + 8, tl.load(details + row, volatile=True).to(tl.int64))
    tl.store(at + 9, tl.load(details + plane + row, volatile=True).to(tl.int64))
    tl.store(at + 10, tl.cast(labels.m, tl.int64))
    tl.store(at + 11, tl.cast(labels.n, tl.int64))
    tl.store(at + 12, tl.cast(labels.k, tl.int64))
    tl.store(at + 13, tl.cast(labels.dtype, tl.int64))
    tl.store(at + 14, tl.cast(labels.backend, tl.int64))
    tl.store(at + 15, tl.load(words + STEP))
    tl.debug_barrier()
    tl.atomic_xchg(at, slot + 1, sem="release")
