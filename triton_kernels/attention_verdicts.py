"""What became of the blocks of an attention's gradient that were suspect: counted and recorded, by one program, in stream order.

A row that was suspect and is calm after its block was computed again is RECOMPUTED. One that stays suspect is UNCORRECTED: its product,
its operands, or the forward's statistics and output, which nothing here computes anew, disagree with each other, and nobody can tell which
changed. A call without a suspect block adds its checks to the ledger and leaves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_sequences import first_key_of, first_row_of, sequence_of
from .judgement import ratio_of
from .record import (
    CHECKS,
    COUNTERS,
    EXECUTIONS,
    FIRST_VERDICT,
    HEAD,
    HEADER,
    INPUT,
    PRODUCTS,
    RECOMPUTED,
    RECORD,
    RING,
    ROW_MASK,
    STEP,
    TRANSIENT,
    UNCORRECTED,
    VERDICTS,
    bits,
)
from .verify import CALM, POISONED, SUSPECT

#: In the number of a row: that it is a key's.
OF_KEY = tl.constexpr(1 << 31)
NUMBER = tl.constexpr((1 << 31) - 1)


class Labels(NamedTuple):
    """What the records say: the roles' numbers in the ledger, the checks of each (0: not checked), the sizes of S, dP, dK and dV."""

    qk: Any
    pv: Any
    qk_checks: Any
    pv_checks: Any
    dtype: Any
    backend: Any
    queries: Any  # over all heads
    keys: Any
    length: Any  # keys that a query has
    depth: Any  # queries that a key has
    E: Any
    D: Any
    sites: Any


@triton.jit(do_not_specialize=["query_blocks", "key_blocks", "labels"], do_not_specialize_on_alignment=["site"])
def conclude(words, site, of_queries, of_queries_again, of_keys, of_keys_again, query_blocks, key_blocks, length, keys, labels,
             BM: tl.constexpr, BN: tl.constexpr, REPAIRED: tl.constexpr, TOLD: tl.constexpr,
             PACKED: tl.constexpr = False, SCORES=None):  # fmt: skip
    """One program. REPAIRED: suspect blocks were computed again; else their rows have the verdict TOLD. PACKED: SCORES are of packed
    sequences, length and keys of the longest."""
    here = tl.load(site)
    counters = words + HEADER + here * COUNTERS
    qk_checks, pv_checks = labels.qk_checks, labels.pv_checks
    if PACKED:
        rows = tl.load(SCORES.cu_q + SCORES.sequences) * (SCORES.heads * SCORES.group)
        columns = tl.load(SCORES.cu_k + SCORES.sequences) * SCORES.heads
        qk_checks, pv_checks = tl.where(qk_checks > 0, 2 * rows + columns, 0), tl.where(pv_checks > 0, rows + columns, 0)
    products = tl.where(labels.qk_checks > 0, 3, 0) + tl.where(labels.pv_checks > 0, 2, 0)
    tl.atomic_add(counters + CHECKS, tl.cast(qk_checks + pv_checks, tl.int64))
    tl.atomic_add(counters + PRODUCTS, tl.cast(products, tl.int64))
    tl.atomic_add(counters + EXECUTIONS, tl.cast(products, tl.int64))
    if tl.load(of_queries.unquiet) + tl.load(of_keys.unquiet) > 0:
        for role in tl.static_range(2):
            checks = labels.qk_checks if role == 0 else labels.pv_checks
            if checks > 0:
                counts, worst = tl.zeros((VERDICTS,), tl.int64), tl.zeros((VERDICTS,), tl.int64)
                counts, worst = _count(counts, worst, of_queries, of_queries_again, query_blocks, length, role, 0, BM, REPAIRED, TOLD,
                                       PACKED, SCORES)  # fmt: skip
                counts, worst = _count(counts, worst, of_keys, of_keys_again, key_blocks, keys, role, OF_KEY, BN, REPAIRED, TOLD,
                                       PACKED, SCORES)  # fmt: skip
                _enter(words, counters, here, of_queries, of_keys, counts, worst, role, labels)


@triton.jit
def _count(counts, worst, first, again, blocks, length, ROLE: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
           REPAIRED: tl.constexpr, TOLD: tl.constexpr, PACKED: tl.constexpr, SCORES):  # fmt: skip
    """Add the rows of suspect blocks to the (VERDICTS,) counts, and to the largest keys: ratio first, then the smallest row."""
    verdicts = tl.arange(0, VERDICTS)
    each = tl.cdiv(length, ROWS)
    for index in range(blocks):
        state = tl.load(first.blocks + index)
        if state != CALM:
            local = index % each * ROWS + tl.arange(0, ROWS)
            row, inside = _rows(SCORES, PACKED, index // each, local, length, KIND)
            at = ROLE * tl.cast(first.rows, tl.int64) + row
            code = tl.load(first.codes + at, mask=inside, other=0).to(tl.int32)
            verdict = tl.where(code == POISONED, INPUT, tl.where(code == SUSPECT, TOLD, -1))
            if REPAIRED:
                if state == SUSPECT:
                    # Of a block that is calm now nobody wrote codes.
                    later = tl.load(again.codes + at, mask=inside, other=0).to(tl.int32)
                    later = tl.where(tl.load(again.blocks + index) == CALM, CALM, later)
                    judged = tl.where(later == SUSPECT, UNCORRECTED, tl.where(later == POISONED, INPUT, RECOMPUTED))
                    verdict = tl.where((code == CALM) & (later == CALM), -1, judged)
            ratio = ratio_of(tl.load(first.residuals + at, mask=inside, other=0.0), tl.load(first.bounds + at, mask=inside, other=1.0))
            key = (bits(ratio).to(tl.int64) << 32) | ((row.to(tl.int64) | KIND) ^ ROW_MASK)
            for v in tl.static_range(VERDICTS):
                mine = inside & (verdict == v)
                counts += tl.where(verdicts == v, tl.sum(mine.to(tl.int64), 0), 0)
                worst = tl.where(verdicts == v, tl.maximum(worst, tl.max(tl.where(mine, key, 0), 0)), worst)
    return counts, worst


@triton.jit
def _rows(scores, PACKED: tl.constexpr, plane, local, length, KIND: tl.constexpr):
    """(numbers of the rows of a head of queries, or of keys, among those of all heads; which exist)"""
    if not PACKED:
        return plane * length + local, local < length
    elif KIND == 0:
        one = sequence_of(scores, plane // (scores.heads * scores.group))
        return first_row_of(one, plane) + local, local < one.length
    else:
        one = sequence_of(scores, plane // scores.heads)
        return first_key_of(one, plane) + local, local < one.keys


@triton.jit
def _enter(words, counters, site, of_queries, of_keys, counts, worst, ROLE: tl.constexpr, labels):
    """A role's counters, and one record: of the gravest verdict, its worst row."""
    verdicts = tl.arange(0, VERDICTS)
    tl.atomic_add(counters + FIRST_VERDICT + verdicts, counts)
    # INPUT is the least grave; the others are in the order of their numbers.
    rank = tl.where(counts > 0, tl.where(verdicts <= UNCORRECTED, verdicts + 2, 1), 0)
    gravest = tl.max(rank, 0)
    if gravest > 0:
        verdict = tl.where(gravest == 1, INPUT, gravest - 2)
        if gravest > 1:
            tl.atomic_add(counters + EXECUTIONS, tl.cast(1, tl.int64))
        number = (tl.sum(tl.where(verdicts == verdict, worst, 0), 0) & ROW_MASK) ^ ROW_MASK
        rows = tl.sum(tl.where(verdicts == verdict, counts, 0), 0)
        of_key = number >= OF_KEY
        row = number & NUMBER
        residual = _detail(of_queries.residuals, of_keys.residuals, of_queries.rows, of_keys.rows, of_key, row, ROLE)
        bound = _detail(of_queries.bounds, of_keys.bounds, of_queries.rows, of_keys.rows, of_key, row, ROLE)
        m = tl.where(of_key, labels.keys, labels.queries)
        width = labels.E if ROLE == 0 else labels.D
        n, k = tl.where(of_key, width, labels.length), tl.where(of_key, labels.depth, width)
        slot = tl.atomic_add(words + HEAD, tl.cast(1, tl.int64))
        at = words + HEADER + tl.cast(labels.sites, tl.int64) * COUNTERS + (slot % RING) * RECORD
        tl.store(at + 1, site)
        tl.store(at + 2, tl.cast(labels.qk if ROLE == 0 else labels.pv, tl.int64))
        tl.store(at + 3, tl.cast(verdict, tl.int64))
        tl.store(at + 4, tl.where(verdict == RECOMPUTED, TRANSIENT, 0).to(tl.int64))
        tl.store(at + 5, rows)
        tl.store(at + 6, row)
        tl.store(at + 7, tl.cast(-1, tl.int64))
        tl.store(at + 8, bits(residual).to(tl.int64))
        tl.store(at + 9, bits(bound).to(tl.int64))
        tl.store(at + 10, tl.cast(m, tl.int64))
        tl.store(at + 11, tl.cast(n, tl.int64))
        tl.store(at + 12, tl.cast(k, tl.int64))
        tl.store(at + 13, tl.cast(labels.dtype, tl.int64))
        tl.store(at + 14, tl.cast(labels.backend, tl.int64))
        tl.store(at + 15, tl.load(words + STEP))
        for i in tl.static_range(16, RECORD):
            tl.store(at + i, tl.cast(-1, tl.int64))
        tl.debug_barrier()
        tl.atomic_xchg(at, slot + 1, sem="release")


@triton.jit
def _detail(of_queries, of_keys, queries, keys, of_key, row, ROLE: tl.constexpr):
    mine = tl.load(of_queries + ROLE * tl.cast(queries, tl.int64) + row, mask=~of_key, other=0.0)
    return tl.where(of_key, tl.load(of_keys + ROLE * tl.cast(keys, tl.int64) + row, mask=of_key, other=0.0), mine)
