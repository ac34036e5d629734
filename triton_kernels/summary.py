"""The summary of one call: words (int64) through which its launches, and the blocks of a launch, agree. Zero after the product.

[SUMMARY words of the whole call][batch × groups cases of CASE words]
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Words of the call.
SUMMARY = tl.constexpr(32)
#: Blocks that hold anything but calm rows; blocks that have settled; per verdict its rows, and its worst row.
UNQUIET, SETTLED, ROWS, KEYS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(10)
#: Cases that a program has taken on, and that are decided; groups in which elements of a weight are to be restored; tiles that
#: were computed again.
CLAIMED, DECIDED, RESTORING, TAKEN = (tl.constexpr(i) for i in range(18, 22))

#: Words of a group.
CASE = tl.constexpr(8)
#: Suspect rows; who is wrong (arbitration.py); changed elements of W that could be named, the one if there is
#: one, and a number that tells this state of W from others.
SUSPECTS, WHO, COUNT, ELEMENT, DIGEST = (tl.constexpr(i) for i in range(5))


#: Who is wrong (arbitration.py).
NOBODY, PANEL, RESTORED, LOST, STALE, EDITED = (tl.constexpr(i) for i in range(6))


@triton.jit
def case_of(summary, batch, group, groups):
    """Where the words of a group begin."""
    return summary + SUMMARY + (tl.cast(batch, tl.int64) * groups + group) * CASE


@triton.jit
def clear(summary, size):
    """Zero all words; every program of the launch calls it."""
    for start in range(tl.program_id(0) * SUMMARY, size, tl.num_programs(0) * SUMMARY):
        at = start + tl.arange(0, SUMMARY)
        tl.store(summary + at, tl.zeros((SUMMARY,), tl.int64), mask=at < size)


def words(batch: int, groups: int) -> int:
    """Words of a summary."""
    return SUMMARY.value + CASE.value * batch * groups
