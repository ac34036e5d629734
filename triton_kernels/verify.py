"""Verify: compare the sums of every row and group, in stream order, after the product.

One program per (batch, row block, group). What it finds goes to ``status`` (B, groups, M) and, per block, to ``flags``
(B, row blocks, groups); a call in which nothing is suspect ends here, and what follows it leaves at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .judgement import judge, ratio_of
from .record import count_call, raise_worst
from .residuals import add_residuals
from .summary import SUSPECTS, UNQUIET, case_of
from .tiles import split_program

#: Status of a row in one group, int8. POISONED: actual and predicted both not finite, so repeating tells nothing.
#: HUGE: explained, but so large that its delivered numbers may lie beyond their type.
CALM, HUGE, POISONED, SUSPECT = (tl.constexpr(i) for i in range(4))
#: A flag only: the repair's budget was spent before this block.
BEYOND = tl.constexpr(4)


# One build for all shapes, roles and sites: Triton would else make one for every divisibility of every number.
@triton.jit(do_not_specialize=["shape", "batches", "multiprocessors"], do_not_specialize_on_alignment=["site"])
def verify(sums, bound, shape, status, flags, summary, words, site, batches, kept, units, multiprocessors,
           REPEAT: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, OUT_LARGEST: tl.constexpr):  # fmt: skip
    """kept: where statistics of residuals are added (residuals.py), or None; units: who computed each data tile."""
    blocks, tiles_n = tl.cdiv(shape.m, BM), tl.cdiv(shape.n, BN)
    if tl.program_id(0) == 0:
        count_call(words, site, batches * shape.m, REPEAT)
    batch, index = split_program(blocks * shape.groups)
    if index < blocks * shape.groups:
        block, group = index // shape.groups, index % shape.groups
        rows = block * BM + tl.arange(0, BM)
        suspect, poisoned, residual, tau, squares = judge(sums, bound, KINDS + 1, KINDS, PARTS, shape, tiles_n, batch, group, rows)
        # A factor of two before the type's end leaves room for the bias.
        code = tl.where(tl.sqrt(squares) >= OUT_LARGEST / 2, HUGE, CALM)
        code = tl.where(rows < shape.m, tl.where(suspect, tl.where(poisoned, POISONED, SUSPECT), code), CALM)
        at = (tl.cast(batch, tl.int64) * shape.groups + group) * shape.m + rows
        tl.store(status + at, code.to(tl.int8), mask=rows < shape.m)
        gravest = tl.max(code, 0)
        tl.store(flags + (tl.cast(batch, tl.int64) * blocks + block) * shape.groups + group, gravest.to(tl.int8))
        if gravest != CALM:
            tl.atomic_add(summary + UNQUIET, tl.cast(1, tl.int64))
        raise_worst(words, site, tl.max(tl.where((rows < shape.m) & ~suspect, ratio_of(residual, tau), 0.0), 0))
        if gravest == SUSPECT:
            tl.atomic_add(case_of(summary, batch, group, shape.groups) + SUSPECTS, tl.sum((code == SUSPECT).to(tl.int64), 0))
        if kept is not None:
            calm = (rows < shape.m) & ~suspect
            add_residuals(kept, units, multiprocessors, sums, bound, calm, KINDS + 1, KINDS, PARTS, shape, tiles_n, batch,
                          tl.cast(batch, tl.int64) * blocks + block, group, rows)  # fmt: skip
