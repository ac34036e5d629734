"""Settle an attention: compute blocks of suspect rows again, before anyone reads O, and say what became of each row.

    suspect at first; after the repetition
        explained                                   RECOMPUTED     a transient fault
        not, an operand not being finite            INPUT          q of the row, or K or V among the visited keys, by their sums
        not, otherwise                              UNCORRECTED

At level detect nothing is written, and RECOMPUTED and UNCORRECTED are OBSERVED. Rows of O whose scores were suspect, and that are
explained with the right ones, count with their scores only.

The same device function in the same configuration on the same operands: without a fault a repetition has the bits that the first
execution should have had. Every block at most once: the work is bounded by one more attention. Only rows that were suspect are written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_forward import PV, QK, Attention, Evidence, attend_block, limits_of, prefix_of, store_rows, suspects
from .attention_panel import PANEL, SIGNED
from .attention_scores import Scores, heads_of, visited
from .attention_sequences import first_row_of, key_block, plane_of, sequence_of, start_of_queries
from .configs import REPAIR_PROGRAMS
from .gemm import fault_argument, note_unit
from .judgement import is_finite, ratio_of
from .record import CLEAN, INPUT, OBSERVED, RECOMPUTED, TRANSIENT, UNCORRECTED, Labels, Units, add_verdicts, arrive, bits, keep
from .summary import CASE, SUMMARY, UNQUIET

#: Where in a row's status its bits after the repetition begin.
AGAIN = tl.constexpr(2)


@triton.jit(do_not_specialize_on_alignment=["site"])
def settle_attention(q, k, v, out, statistics, sums, weights, scores, limits, words, site, status, details, details_pv, units, flags,
                     summary, E, D, rows_total, tiles, roles, labels_qk, labels_pv, FAULT, CORRECT: tl.constexpr, PROGRAMS: tl.constexpr,
                     CAUSAL: tl.constexpr, SCALED: tl.constexpr, EXPONENTIALS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """PROGRAMS share the blocks (fewer, if there are fewer blocks); they leave at once when nothing is suspect. First what multiplies,
    then what is said of it: a loop that did both would keep what the verdicts need in registers while it multiplies, and spill."""
    if tl.load(summary + UNQUIET) > 0:
        of_pv = summary + SUMMARY + CASE
        for index in tl.range(tl.program_id(0), tiles, PROGRAMS, disable_licm=True):
            if tl.load(flags + index) > 0:
                # In the loop, not before it: compilers keep in registers what they once had there.
                blocks = tl.cdiv(scores.length, BM)
                number, block = index // blocks, index % blocks
                note_unit(units.again, index)
                if scores.cu_q is None:
                    own, coefficients = scores, limits
                else:
                    one = sequence_of(scores, number // (scores.heads * scores.group))
                    own = Scores(one.length, one.keys, scores.heads, scores.group, scores.scale, scores.scale2, one.offset, scores.window,
                                 scores.cap, scores.mask, scores.dropped, scores.seed_low, scores.seed_high, scores.undropped,
                                 scores.cu_q, scores.cu_k, scores.sequences, scores.tokens, scores.key_tokens, one.begin_q, one.begin_k,
                                 one.sequence)  # fmt: skip
                    coefficients = limits_of(limits, one.keys)
                y, m, l, qk, pv = attend_block(q, k, v, sums, weights, own, coefficients, number, block, E, D, FAULT, CAUSAL, SCALED, True,
                                               EXPONENTIALS, PARTS, BM, BN, BE, BD, PRECISION)  # fmt: skip
                rows = block * BM + tl.arange(0, BM)
                inside, row = rows < own.length, first_row_of(own, number) + rows
                was = tl.load(status + row, mask=inside, other=0).to(tl.int32)
                if CORRECT:
                    store_rows(out, statistics, y, m, l, own, number, rows, D, rows_total, inside & (was > 0), FAULT, BD)
                still = suspects(qk, pv, roles) & tl.where(was > 0, QK | PV, 0)
                tl.store(status + row, (was | (still << AGAIN)).to(tl.int8), mask=inside)
                _replace(details, qk, row, rows_total, inside & ((still & QK) > 0))
                _replace(details_pv, pv, row, rows_total, inside & ((still & PV) > 0))
        tl.debug_barrier()  # what other threads of this program wrote of its rows
        for index in tl.range(tl.program_id(0), tiles, PROGRAMS, disable_licm=True):
            if tl.load(flags + index) > 0:
                _conclude(q, sums, scores, index, status, details, details_pv, summary, of_pv, E, rows_total, CORRECT, CAUSAL, BM, BN, BE)
        arrive(words, site, summary, details, units, rows_total, labels_qk)
        arrive(words, site, of_pv, details_pv, units, rows_total, labels_pv)


@triton.jit
def _replace(details, finding, row, rows_total, mask):
    """What a record may say of rows that stay suspect: what the repetition found."""
    tl.store(details + row, bits(finding.residual), mask=mask)
    tl.store(details + rows_total + row, bits(finding.tau), mask=mask)


@triton.jit
def _conclude(q, sums, scores, index, status, details, details_pv, summary, of_pv, E, rows_total, CORRECT: tl.constexpr,
              CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """The verdicts of a block that was computed again."""
    blocks = tl.cdiv(scores.length, BM)
    number, block = index // blocks, index % blocks
    if scores.cu_q is None:
        own = scores
    else:
        one = sequence_of(scores, number // (scores.heads * scores.group))
        own = Scores(one.length, one.keys, scores.heads, scores.group, scores.scale, scores.scale2, one.offset, scores.window,
                     scores.cap, scores.mask, scores.dropped, scores.seed_low, scores.seed_high, scores.undropped,
                     scores.cu_q, scores.cu_k, scores.sequences, scores.tokens, scores.key_tokens, one.begin_q, one.begin_k,
                     one.sequence)  # fmt: skip
    rows, first = block * BM + tl.arange(0, BM), first_row_of(own, number) + block * BM
    inside, row = rows < own.length, first + tl.arange(0, BM)
    code = tl.load(status + row, mask=inside, other=0).to(tl.int32)
    was, still = code & (QK | PV), code >> AGAIN
    # With right scores a row of O is right; alone it was wrong only if its scores were not.
    of_values = tl.where((was & QK) > 0, still & PV, (was | still) & PV)
    bad_scores, bad_values = _not_finite(q, sums, own, number, block, E, CAUSAL, BM, BN, BE)
    _settle(details, row, rows_total, index, summary, first, (was | still) & QK, still & QK, bad_scores, CORRECT)
    _settle(details_pv, row, rows_total, index, of_pv, first, of_values, still & PV, bad_scores | bad_values, CORRECT)


@triton.jit
def _not_finite(q, sums, scores, number, block, E, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr):
    """(whether q of a row or any of its keys, whether any of its values is not finite), (BM,) each: no unit that multiplied is asked."""
    batch, head, member = heads_of(scores, number)
    rows, e = block * BM + tl.arange(0, BM), tl.arange(0, BE)
    begin, _, _, end = visited(scores, block * BM, CAUSAL, BM, BN)
    plane = plane_of(scores, batch, head)
    at = start_of_queries(scores, q, batch, head, member) + tl.cast(rows, tl.int64)[:, None] * q.row + tl.cast(e, tl.int64)[None, :] * q.col
    queries = tl.load(at, mask=(rows[:, None] < scores.length) & (e[None, :] < E), other=0.0).to(tl.float32)
    keys = tl.load(sums.prefix + prefix_of(scores, plane, end, E, BN) + SIGNED * E + e, mask=e < E, other=0.0)
    bad = tl.max((~is_finite(queries)).to(tl.int32), 1) + tl.max((~is_finite(keys)).to(tl.int32), 0)
    bad_values = tl.zeros((BN,), tl.int32)
    for n in range(begin, end):
        bad_values += _not_finite_values(sums, key_block(scores, plane, n, PANEL, BN) * BN + tl.arange(0, BN))
    return bad > 0, (bad >= 0) & (tl.max(bad_values, 0) > 0)


@triton.jit
def _not_finite_values(sums, at):
    return (~is_finite(tl.load(sums.panel + at).to(tl.float32))).to(tl.int32)


@triton.jit
def _settle(details, row, rows_total, tile, summary, first_row, found, still, bad, CORRECT: tl.constexpr):
    """The verdicts of one role. found: rows that are its concern; still: of these, those that the repetition does not explain; bad: those
    of which an operand is not finite."""
    wrong = tl.where(bad, INPUT, UNCORRECTED if CORRECT else OBSERVED)
    verdict = tl.where(still > 0, wrong, RECOMPUTED if CORRECT else OBSERVED)
    verdict = tl.where(found > 0, verdict, CLEAN)
    zero, plane = tl.zeros(row.shape, tl.int32), tl.cast(rows_total, tl.int64)
    residual = tl.load(details + row, mask=found > 0, other=0).to(tl.float32, bitcast=True)
    tau = tl.load(details + plane + row, mask=found > 0, other=0).to(tl.float32, bitcast=True)
    cause = tl.where((found > 0) & (still == 0), TRANSIENT if CORRECT else 0, 0)
    keep(details, row, rows_total, residual, tau, zero - 1, cause, zero, zero + tile, found > 0)
    add_verdicts(summary, verdict, tl.where(found > 0, ratio_of(residual, tau), 0.0), first_row)


# --- launcher -------------------------------------------------------------------------------------


def settle(attention: Attention, evidence: Evidence, words: Tensor, site: Tensor, labels: tuple[Labels, Labels], roles: int,
           correct: bool, faults: Tensor | None = None) -> None:  # fmt: skip
    """Launch. labels: of qk and of pv. ``faults`` hit the repetition."""
    heads, blocks, rows = attention.sizes
    tiles = heads * blocks
    settle_attention[(min(tiles, REPAIR_PROGRAMS),)](
        *attention.operands(), evidence.out, evidence.statistics, evidence.sums, attention.weights, attention.scores, attention.limits,
        words, site, evidence.status, *evidence.details, Units(evidence.units, attention.units()), evidence.flags, evidence.summary,
        attention.q.shape[-1], attention.v.shape[-1], rows, tiles, roles, *labels, fault_argument(faults), CORRECT=correct,
        PROGRAMS=REPAIR_PROGRAMS, **attention.order() | {"num_stages": attention.config.again},
    )  # fmt: skip
