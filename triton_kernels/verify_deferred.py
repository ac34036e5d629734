"""Judge the products whose check was deferred: one launch for all slots of a workspace, whatever the products' shapes.

A few programs share the row blocks and groups of each slot; the last of them to finish counts the product and, if any of them
was not content, goes through the product once more and enters what it finds into the ledger:

    explained by the bound, or where its squares overflowed by the range-safe one     clean
    actual, predicted and sketches all not finite                                     INPUT
    explained, but delivered numbers beyond the type                                  OVERFLOW
    anything else                                                                     UNCORRECTED (OBSERVED at level detect)

Where KEPT, what is within its bound is added to the statistics of residuals (residuals.py), to whom the product's slot says:
products of many sites are judged by one launch.

Nothing is repaired: whoever was to read Y has read it. A slot that is not FRESH is passed over: it has been judged already, or
its product has not run (a captured one, before its graph is replayed). So a launch too many does no harm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED_PROGRAMS, MAX_REGISTERS
from .deferred import (
    ABSOLUTE,
    ACCUMULATE,
    ALL_ROWS,
    ARRIVED,
    BATCHES,
    BEGIN,
    BOUND,
    CHECKS_WORD,
    CORRECT,
    FRESH,
    GROUPS,
    HEIGHT,
    K_WORD,
    KEPT,
    LARGEST,
    M_WORD,
    MORE,
    MULTIPROCESSORS,
    N_WORD,
    RECORD_WORDS,
    REPEAT,
    RESIDUAL,
    ROW,
    ROWS,
    SITE,
    SLOT,
    STATE,
    STEP_WORD,
    TILES,
    TILES_PER_GROUP,
    UNQUIET,
    VERDICT,
    partials_of,
    units_of,
)
from .judgement import Bound, Shape, Sums, actual, bound_of, explained, is_finite, judge, noise, predicted, range_safe_bound, ratio_of
from .record import (
    CHECKS,
    COUNTERS,
    EXECUTIONS,
    FIRST_VERDICT,
    HEAD,
    HEADER,
    INPUT,
    OBSERVED,
    OVERFLOW,
    PRODUCTS,
    RECORD,
    REPEATED,
    RING,
    STEP,
    UNCORRECTED,
    bits,
    raise_worst,
)
from .residuals import Kept, add_residuals
from .tiles import ACC_LARGEST

#: Rows judged at a time; programs that share a slot, at least, and programs at least, for a page may hold few, large products. Any
#: numbers are right.
BLOCK = 64
SHARES = 8
PROGRAMS = 4 * 132
#: Of the products of a page: no statistics are kept, or by groups of columns alone, or by multiprocessors, too.
NONE, OF_GROUPS, OF_UNITS = (tl.constexpr(i) for i in range(3))
#: How grave a finding is; the gravest group decides about its row.
F_CLEAN, F_INPUT, F_OVERFLOW, F_FAULT = (tl.constexpr(i) for i in range(4))
#: A finding as one number, the graver the larger: severity, then |residual|/τ as the bits of fp32, then the first row.
ROW_BITS, SEVERITY_AT = tl.constexpr(29), tl.constexpr(60)
ROW_LARGEST = tl.constexpr(2**29 - 1)


@triton.jit
def verify_deferred(slots, evidence, words, KINDS: tl.constexpr, PARTS: tl.constexpr, SITES: tl.constexpr, BM: tl.constexpr,
                    STATISTICS: tl.constexpr = NONE):  # fmt: skip
    """Programs: (slots, shares)."""
    slot = slots + tl.program_id(0) * SLOT
    if tl.load(slot + STATE) == FRESH:
        bound, shape, batches, tiles_n = _product_of(slot, KINDS)
        partials = evidence + tl.load(slot + BEGIN)
        sums = Sums(partials, partials + partials_of(batches, KINDS, tiles_n, shape.m), None, 0)
        blocks = tl.cdiv(shape.m, BM)
        largest = _number(slot, LARGEST)
        loud, worst = tl.cast(0, tl.int32), tl.cast(0.0, tl.float32)
        for item in range(tl.program_id(1), batches * blocks * shape.groups, tl.num_programs(1)):
            group, block = item % shape.groups, item // shape.groups
            rows = block % blocks * BM + tl.arange(0, BM)
            suspect, _, d, tau, squares = judge(sums, bound, KINDS + MORE, KINDS, PARTS, shape, tiles_n, block // blocks, group, rows)
            # A factor of two before the type's end leaves room for the bias.
            unquiet = (rows < shape.m) & (suspect | (tl.sqrt(squares) >= largest / 2))
            loud += tl.sum(unquiet.to(tl.int32), 0)
            worst = tl.maximum(worst, tl.max(tl.where((rows < shape.m) & ~suspect, ratio_of(d, tau), 0.0), 0))
            if STATISTICS > NONE:
                _keep_residuals(slot, sums, bound, (rows < shape.m) & ~suspect, shape, batches, tiles_n, block // blocks, group, rows,
                                block % blocks * BM, KINDS, PARTS, STATISTICS == OF_UNITS)  # fmt: skip
        raise_worst(words, slot + SITE, worst)
        if loud > 0:
            tl.atomic_add(slot + UNQUIET, tl.cast(1, tl.int64))
        tl.debug_barrier()
        arrived = tl.atomic_add(slot + ARRIVED, tl.cast(1, tl.int64), sem="acq_rel")
        if arrived == tl.num_programs(1) - 1:
            _count(slot, words)
            if tl.load(slot + UNQUIET, volatile=True) > 0:
                _settle(slot, sums, bound, shape, batches, tiles_n, words, KINDS, PARTS, SITES, BM)
            tl.debug_barrier()
            tl.store(slot + STATE, tl.cast(0, tl.int64))


@triton.jit
def _number(slot, WORD: tl.constexpr):
    """An fp32 number that is kept as its bits."""
    return tl.load(slot + WORD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _product_of(slot, KINDS: tl.constexpr):
    """(bound, shape, batches, tiles_n) of the product that a slot describes."""
    m, n, k = tl.load(slot + M_WORD).to(tl.int32), tl.load(slot + N_WORD).to(tl.int32), tl.load(slot + K_WORD).to(tl.int32)
    c, batches, tiles_n = tl.load(slot + CHECKS_WORD).to(tl.int32), tl.load(slot + BATCHES).to(tl.int32), tl.load(slot + TILES).to(tl.int32)
    shape = Shape(m, n, k, c, tl.load(slot + GROUPS).to(tl.int32), tl.load(slot + TILES_PER_GROUP).to(tl.int32))
    nothing = tl.cast(0.0, tl.float32)  # what is asked of operands only
    if KINDS == 1:
        bound = Bound((_number(slot, ACCUMULATE),), (_number(slot, ABSOLUTE),), nothing, nothing)
    else:
        bound = Bound(
            (_number(slot, ACCUMULATE), _number(slot, ACCUMULATE + 1), _number(slot, ACCUMULATE + 2), _number(slot, ACCUMULATE + 3)),
            (_number(slot, ABSOLUTE), _number(slot, ABSOLUTE + 1), _number(slot, ABSOLUTE + 2), _number(slot, ABSOLUTE + 3)),
            nothing, nothing,
        )  # fmt: skip
    return bound, shape, batches, tiles_n


@triton.jit
def _keep_residuals(slot, sums, bound, calm, shape, batches, tiles_n, batch, group, rows, first_row, KINDS: tl.constexpr,
                    PARTS: tl.constexpr, NUMBERED: tl.constexpr):  # fmt: skip
    """Add the calm rows of a block in one group to where the slot says."""
    groups, levels = _address(slot, 0, tl.float64), _address(slot, 4, tl.float32)
    height = tl.load(slot + HEIGHT).to(tl.int32)
    # A block of rows lies in one row of tiles: these are as high, or several times, or all rows are in one.
    tile_row = batch * tl.cdiv(shape.m, height) + first_row // height
    if NUMBERED:
        kept = Kept(groups, _address(slot, 1, tl.float64), _address(slot, 2, tl.int32), _address(slot, 3, tl.int32), levels)
        tile_units = units_of(sums.raw + tl.cast(batches, tl.int64) * shape.m * shape.c, batches, tiles_n, shape.m)
        multiprocessors = tl.load(slot + MULTIPROCESSORS).to(tl.int32)
        add_residuals(kept, tile_units, multiprocessors, sums, bound, calm, KINDS + MORE, KINDS, PARTS, shape, tiles_n, batch, tile_row,
                      group, rows)  # fmt: skip
    else:
        kept = Kept(groups, None, None, None, levels)
        add_residuals(kept, None, None, sums, bound, calm, KINDS + MORE, KINDS, PARTS, shape, tiles_n, batch, tile_row, group, rows)


@triton.jit
def _address(slot, WHICH: tl.constexpr, OF: tl.constexpr):
    """Where one of the sums of residuals.Kept lies."""
    return tl.load(slot + KEPT + WHICH).to(tl.pointer_type(OF))


@triton.jit
def _count(slot, words):
    """One product, executed once, and its checks; those of activation checkpointing's recomputation are counted apart."""
    counters = words + HEADER + tl.load(slot + SITE) * COUNTERS
    tl.atomic_add(counters + tl.where(tl.load(slot + REPEAT) != 0, REPEATED, CHECKS), tl.load(slot + ALL_ROWS))
    tl.atomic_add(counters + PRODUCTS, tl.cast(1, tl.int64))
    tl.atomic_add(counters + EXECUTIONS, tl.cast(1, tl.int64))


@triton.jit
def _settle(slot, sums, bound, shape, batches, tiles_n, words, KINDS: tl.constexpr, PARTS: tl.constexpr,
            SITES: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Decide about every row of a product in which something was not calm; count the rows and write one record."""
    blocks, largest = tl.cdiv(shape.m, BM), _number(slot, LARGEST)
    faults, inputs, overflows, best = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    residual, tau = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for index in tl.range(batches * blocks, disable_licm=True):
        batch, rows = index // blocks, index % blocks * BM + tl.arange(0, BM)
        severity, worst, d, t = _settle_rows(sums, bound, shape, batches, tiles_n, largest, batch, rows, KINDS, PARTS)
        faults += tl.sum((severity == F_FAULT).to(tl.int64), 0)
        inputs += tl.sum((severity == F_INPUT).to(tl.int64), 0)
        overflows += tl.sum((severity == F_OVERFLOW).to(tl.int64), 0)
        row = batch * shape.m + rows
        key = (severity.to(tl.int64) << SEVERITY_AT) | (bits(worst).to(tl.int64) << ROW_BITS) | (ROW_LARGEST - row)
        key = tl.where(severity > F_CLEAN, key, 0)
        here = tl.max(key, 0)
        if here > best:
            best = here
            residual, tau = tl.sum(tl.where(key == here, d, 0.0), 0), tl.sum(tl.where(key == here, t, 0.0), 0)
    if best > 0:
        fault = tl.where(tl.load(slot + CORRECT) != 0, UNCORRECTED, OBSERVED)
        counters = words + HEADER + tl.load(slot + SITE) * COUNTERS + FIRST_VERDICT
        tl.atomic_add(counters + fault, faults)
        tl.atomic_add(counters + INPUT, inputs)
        tl.atomic_add(counters + OVERFLOW, overflows)
        severity = best >> SEVERITY_AT
        verdict = tl.where(severity == F_FAULT, fault, tl.where(severity == F_INPUT, INPUT, OVERFLOW))
        count = tl.where(severity == F_FAULT, faults, tl.where(severity == F_INPUT, inputs, overflows))
        _write_record(slot, words, verdict, count, ROW_LARGEST - (best & ROW_LARGEST), residual, tau, SITES)


@triton.jit
def _settle_rows(sums, bound, shape, batches, tiles_n, largest, batch, rows, KINDS: tl.constexpr, PARTS: tl.constexpr):
    """(severity, largest |residual|/τ, that residual, that τ) per row."""
    severity, worst = tl.zeros(rows.shape, tl.int32), tl.zeros(rows.shape, tl.float32)
    residual, tau, huge = tl.zeros(rows.shape, tl.float32), tl.zeros(rows.shape, tl.float32), rows < 0
    for group in tl.range(shape.groups, disable_licm=True):
        suspect, poisoned, d, t, squares = judge(sums, bound, KINDS + MORE, KINDS, PARTS, shape, tiles_n, batch, group, rows)
        huge |= tl.sqrt(squares) >= largest / 2
        _, magnitudes = noise(sums, KINDS, PARTS, shape, batch, group, rows)
        s = tl.where(suspect & ~_explained_safely(sums, bound, shape, tiles_n, batch, group, rows, KINDS, PARTS), F_FAULT, F_CLEAN)
        s = tl.where(poisoned, tl.where(is_finite(magnitudes), F_FAULT, F_INPUT), s)
        s = tl.where(rows < shape.m, s, F_CLEAN)
        severity = tl.maximum(severity, s)
        more = (ratio_of(d, t) > worst) & (s != F_CLEAN)
        worst, residual, tau = tl.where(more, ratio_of(d, t), worst), tl.where(more, d, residual), tl.where(more, t, tau)
    at = sums.raw + tl.cast(batches, tl.int64) * shape.m * shape.c + tl.cast(batch, tl.int64) * tiles_n * shape.m + rows
    found = tl.zeros(rows.shape, tl.float32)
    for tile in tl.range(tiles_n, disable_licm=True):
        found = tl.maximum(found, tl.load(at + tl.cast(tile, tl.int64) * shape.m, mask=rows < shape.m, other=0.0))
    return tl.where(huge & (severity == F_CLEAN) & (found > 0), F_OVERFLOW, severity), worst, residual, tau


@triton.jit
def _explained_safely(sums, bound, shape, tiles_n, batch, group, rows, KINDS: tl.constexpr, PARTS: tl.constexpr):
    """By the usual bound or, where its squares overflowed, by the range-safe one."""
    planes: tl.constexpr = KINDS + MORE
    squares = actual(sums, KINDS, planes, False, shape, tiles_n, batch, group, rows)
    largest = actual(sums, KINDS + 1, planes, True, shape, tiles_n, batch, group, rows)
    total = actual(sums, KINDS + 2, planes, False, shape, tiles_n, batch, group, rows)
    noise2, magnitudes = noise(sums, KINDS, PARTS, shape, batch, group, rows)
    ok = rows >= 0
    for kind in tl.static_range(KINDS):
        r = actual(sums, kind, planes, False, shape, tiles_n, batch, group, rows)
        c = predicted(sums, kind, KINDS, PARTS, shape, batch, group, rows)
        tau = bound_of(bound.accumulate[kind], squares, c, noise2, bound.absolute[kind])
        safe = range_safe_bound(bound.accumulate[kind], largest, total, c, magnitudes)
        ok &= explained(r - c, tl.where(tau < ACC_LARGEST, tau, safe))
    return ok


@triton.jit
def _write_record(slot, words, verdict, count, row, residual, tau, SITES: tl.constexpr):
    """The product's one record: its place reserved atomically, its sequence number written last, when the rest can be read."""
    place = tl.atomic_add(words + HEAD, tl.cast(1, tl.int64))
    at = words + HEADER + SITES * COUNTERS + (place % RING) * RECORD
    i = tl.arange(0, RECORD_WORDS)
    values = tl.load(slot + i)
    values = tl.where(i == VERDICT, verdict.to(tl.int64), values)
    values = tl.where(i == ROWS, count, values)
    values = tl.where(i == ROW, row, values)
    values = tl.where(i == RESIDUAL, bits(residual).to(tl.int64), values)
    values = tl.where(i == BOUND, bits(tau).to(tl.int64), values)
    values = tl.where(i == STEP_WORD, tl.load(words + STEP), values)
    tl.store(at + i, values, mask=i > 0)
    for beyond in tl.static_range(RECORD_WORDS, RECORD):
        tl.store(at + beyond, tl.cast(-1, tl.int64))  # no changed element, no multiprocessor is known
    tl.debug_barrier()
    tl.atomic_xchg(at, place + 1, sem="release")


# --- launcher -------------------------------------------------------------------------------------


def judge_slots(slots: Tensor, evidence: Tensor, words: Tensor, kinds: int, parts: int, sites: int, statistics: int = 0) -> None:
    """Launch. slots (count, SLOT) int64, evidence fp32, words: the ledger. All products have panels of so many kinds and parts.
    statistics: NONE, OF_GROUPS or OF_UNITS, of all of them."""
    interpreted = words.device.type != "cuda"
    shares = INTERPRETED_PROGRAMS if interpreted else max(SHARES, PROGRAMS // slots.shape[0])
    verify_deferred[(slots.shape[0], shares)](
        slots, evidence, words, KINDS=kinds, PARTS=parts, SITES=sites, BM=BLOCK,
        **({"STATISTICS": statistics} if statistics else {}), num_warps=4, enable_fp_fusion=True, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
