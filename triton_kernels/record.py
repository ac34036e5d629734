"""The ledger as device code sees it: counters per site and a ring of records in int64 words.

The layout is abft.ledger's, which these files may not import; tests/kernels/test_record.py holds them together. Verdicts are
numbered as there, and the counter of verdict v is FIRST_VERDICT + v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .summary import COUNT, DIGEST, ELEMENT, KEYS, LOST, RESTORED, ROWS, SETTLED, WHO, case_of

HEADER, HEAD, STEP = tl.constexpr(8), tl.constexpr(0), tl.constexpr(1)
COUNTERS = tl.constexpr(16)
CHECKS, PRODUCTS, EXECUTIONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIRST_VERDICT, REPEATED, WORST = tl.constexpr(3), tl.constexpr(12), tl.constexpr(13)
RING, RECORD = tl.constexpr(1024), tl.constexpr(20)

VERDICTS = tl.constexpr(8)
#: Given before those: a row that is left as it is (weigh.py). Its number, and its counter.
TOLERATED, TOLERATED_ROWS = tl.constexpr(8), tl.constexpr(14)
CLEAN = tl.constexpr(-1)
OBSERVED, RECOMPUTED, RECONSTRUCTED, UNCORRECTED, FALSE_ALARM, STALE_WEIGHT, INPUT, OVERFLOW = (tl.constexpr(i) for i in range(8))
WEIGHT_FAULTS = tl.constexpr(11)
TRANSIENT, PERSISTENT, BY_WEIGHT, BY_PANEL = (tl.constexpr(i) for i in range(1, 5))

#: What is kept of a suspect row for the record, (DETAILS, B·M) int32: residual and bound (bits), column, cause, its case
#: (batch × groups), and the place of its tile among the units.
DETAILS = tl.constexpr(6)
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


class Units(NamedTuple):
    """Multiprocessors that computed the data tiles (B, row blocks, tiles_n), at first and again; None where they have no numbers."""

    first: Any
    again: Any


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
def count_changes(words, site, summary, known, groups, restored):
    """Add the elements of a weight that changed in memory, each state of a group once; ``known`` (groups,) remembers the last.

    restored: what could be named was restored (else it is an edit, and no fault).
    """
    for group in range(groups):
        case = case_of(summary, 0, group, groups)
        who, digest = tl.load(case + WHO), tl.load(case + DIGEST)
        faults = tl.where(who == LOST, 1, tl.where((who == RESTORED) & restored, tl.load(case + COUNT), 0))
        if (faults > 0) & (digest != tl.load(known + group)):
            tl.store(known + group, digest)
            tl.atomic_add(words + HEADER + tl.load(site) * COUNTERS + WEIGHT_FAULTS, faults)


@triton.jit
def raise_worst(words, site, ratio):
    """The largest ratio that was explained: the bits of non-negative floats order like integers."""
    at = words + HEADER + tl.load(site) * COUNTERS + WORST
    new = bits(ratio).to(tl.int64)
    if new > tl.load(at):
        tl.atomic_max(at, new)


@triton.jit
def keep(details, row, rows_total, residual, tau, column, cause, case, tile, mask):
    """What the record will say, should a row turn out to be the worst."""
    plane = tl.cast(rows_total, tl.int64)
    tl.store(details + row, bits(residual), mask=mask)
    tl.store(details + plane + row, bits(tau), mask=mask)
    tl.store(details + 2 * plane + row, column, mask=mask)
    tl.store(details + 3 * plane + row, cause, mask=mask)
    tl.store(details + 4 * plane + row, case, mask=mask)
    tl.store(details + 5 * plane + row, tile, mask=mask)


@triton.jit
def report(words, site, summary, details, units, verdict, ratio, first_row, rows_total, labels):
    """Add one block's verdicts to the call's; the last block to arrive enters the call into the ledger."""
    add_verdicts(summary, verdict, ratio, first_row)
    arrive(words, site, summary, details, units, rows_total, labels)


@triton.jit
def add_verdicts(summary, verdict, ratio, first_row):
    """Add one block's verdicts to the call's."""
    if tl.max((verdict != CLEAN).to(tl.int32), 0) > 0:
        for v in range(VERDICTS):
            _add_verdict(summary, v, verdict == v, ratio, first_row)


@triton.jit
def arrive(words, site, summary, details, units, rows_total, labels):
    """Say that this program has no more verdicts; the last one to say so enters the call into the ledger."""
    tl.debug_barrier()  # the details of every thread, before the arrival that announces them
    arrived = tl.atomic_add(summary + SETTLED, tl.cast(1, tl.int64), sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        _enter(words, tl.load(site), summary, details, units, rows_total, labels)


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
def _enter(words, site, summary, details, units, rows_total, labels):
    counters = words + HEADER + site * COUNTERS
    gravest, repeated = tl.cast(CLEAN, tl.int32), tl.cast(0, tl.int64)
    for v in range(VERDICTS):
        rows = tl.load(summary + ROWS + v, volatile=True)
        if rows > 0:
            tl.atomic_add(counters + FIRST_VERDICT + v, tl.where(v == STALE_WEIGHT, 1, rows))  # an edit is one, whatever its rows
            gravest = _graver(gravest, v)
            if v <= UNCORRECTED:
                repeated = tl.cast(1, tl.int64)
    tl.atomic_add(counters + EXECUTIONS, repeated)
    if gravest != CLEAN:
        _write_record(words, site, gravest, summary, details, units, rows_total, labels)


@triton.jit
def _graver(v, other):
    """The graver of two verdicts: INPUT, OVERFLOW, FALSE_ALARM, STALE, then faults in the order of their numbers."""
    return tl.where((v == CLEAN) | (_rank(other) > _rank(v)), other, v)


@triton.jit
def _rank(v):
    return tl.where(v <= UNCORRECTED, v + 10, tl.where(v <= STALE_WEIGHT, v + 4, v))


@triton.jit
def _unit(units, tile):
    """The multiprocessor of a tile, or -1."""
    found = tl.cast(-1, tl.int64)
    if units is not None:
        if tile >= 0:
            found = tl.load(units + tile).to(tl.int64)
    return found


@triton.jit
def enter_tolerated(words, site, row, column, residual, tau, tile, units, labels):
    """Count and record one row of a product that is left as it is; units: who computed each data tile, or None."""
    tl.atomic_add(words + HEADER + site * COUNTERS + TOLERATED_ROWS, tl.cast(1, tl.int64))
    slot = tl.atomic_add(words + HEAD, tl.cast(1, tl.int64))
    at = words + HEADER + tl.cast(labels.sites, tl.int64) * COUNTERS + (slot % RING) * RECORD
    tl.store(at + 1, site)
    tl.store(at + 2, tl.cast(labels.role, tl.int64))
    tl.store(at + 3, tl.cast(TOLERATED, tl.int64))
    tl.store(at + 4, tl.cast(0, tl.int64))
    tl.store(at + 5, tl.cast(1, tl.int64))
    tl.store(at + 6, tl.cast(row, tl.int64))
    tl.store(at + 7, tl.cast(column, tl.int64))
    tl.store(at + 8, bits(residual).to(tl.int64))
    tl.store(at + 9, bits(tau).to(tl.int64))
    tl.store(at + 10, tl.cast(labels.m, tl.int64))
    tl.store(at + 11, tl.cast(labels.n, tl.int64))
    tl.store(at + 12, tl.cast(labels.k, tl.int64))
    tl.store(at + 13, tl.cast(labels.dtype, tl.int64))
    tl.store(at + 14, tl.cast(labels.backend, tl.int64))
    tl.store(at + 15, tl.load(words + STEP))
    for beyond in tl.static_range(16, 18):
        tl.store(at + beyond, tl.cast(-1, tl.int64))  # no element of a weight changed
    tl.store(at + 18, _unit(units, tile))
    tl.store(at + 19, tl.cast(-1, tl.int64))
    tl.debug_barrier()
    tl.atomic_xchg(at, slot + 1, sem="release")


@triton.jit
def _write_record(words, site, v, summary, details, units, rows_total, labels):
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
    cause = tl.load(details + 3 * plane + row, volatile=True)
    element = tl.load(case_of(summary, 0, tl.load(details + 4 * plane + row, volatile=True), 0) + ELEMENT)
    element = tl.where(cause == BY_WEIGHT, element, -1)
    tl.store(at + 16, tl.where(element < 0, -1, element >> 32))
    tl.store(at + 17, tl.where(element < 0, -1, element & ROW_MASK))
    tile = tl.load(details + 5 * plane + row, volatile=True)
    tl.store(at + 18, _unit(units.first, tile))
    tl.store(at + 19, _unit(units.again, tile))
    tl.debug_barrier()
    tl.atomic_xchg(at, slot + 1, sem="release")
