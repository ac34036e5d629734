"""Waves: which program computes which tiles of a product, and how long the slowest of them works.

Data tiles are dealt round by round, so that programs that work at the same time share operands in the L2. When they do not
come out even, some programs have one tile less than the others: check tiles, which are cheaper, go to those first, and
to all evenly after that. No table is needed: the share of a program follows from six numbers.

    data tiles     program p computes p, p + P, p + 2P, …
    check tiles    in the order of rank (programs with a data tile less first), consecutive ones
"""

from __future__ import annotations

from typing import NamedTuple

#: Columns at which a warpgroup's MMA is bound by multiplying rather than by reading its left operand: m64n32k16 takes 16 cycles.
MMA_FLOOR = 32
#: Columns at which a step in K is bound by multiplying rather than by issuing its instructions: 90 of each of 8 warps (``step`` of
#: sm_90's tiles in bench/results/audit-*.jsonl), four a cycle, are 180 cycles, in which 45 columns of 128 rows × 64 are multiplied.
ISSUE_FLOOR = 45


class Deal(NamedTuple):
    """Check tiles by rank; program p has rank (p - behind) mod programs.

    behind: programs with one data tile more than the others. ``early`` check tiles (one more for the first ``early_more`` ranks)
    go to each of the ``programs - behind`` others, then ``share`` (one more for the first ``share_more``) to everyone.
    """

    behind: int
    early: int
    early_more: int
    share: int
    share_more: int


def check_cost(bn: int, bc: int) -> float:
    """Time of a check tile of bc columns in units of a data tile of bn columns (same rows, same K): multiplying, or issuing."""
    return max(bc, ISSUE_FLOOR) / max(bn, ISSUE_FLOOR)


def deal(data_tiles: int, check_tiles: int, programs: int, cost: float) -> Deal:
    """Deal the check tiles to programs that were dealt the data tiles; ``cost`` of a check tile in data tiles."""
    behind = data_tiles % programs
    others = programs - behind
    # As many as fit into the time of the data tile they lack.
    room = others * int(1 / cost) if behind else 0
    early, rest = min(check_tiles, room), max(0, check_tiles - room)
    return Deal(behind, early // others, early % others, rest // programs, rest % programs)


def first_of(rank: int, programs: int, d: Deal) -> int:
    """The first check tile of a rank; what the kernel computes, too."""
    others = programs - d.behind
    return d.early * min(rank, others) + min(rank, d.early_more) + d.share * rank + min(rank, d.share_more)


def shares(data_tiles: int, check_tiles: int, programs: int, cost: float) -> list[tuple[int, int]]:
    """(data tiles, check tiles) of every program."""
    d = deal(data_tiles, check_tiles, programs, cost)
    out = []
    for p in range(programs):
        rank = (p - d.behind) % programs
        out.append((-(-(data_tiles - p) // programs), first_of(rank + 1, programs, d) - first_of(rank, programs, d)))
    return out


def loads(data_tiles: int, check_tiles: int, programs: int, cost: float) -> list[float]:
    """How long every program works, in data tiles."""
    return [data + cost * checks for data, checks in shares(data_tiles, check_tiles, programs, cost)]


def makespan(data_tiles: int, check_tiles: int, programs: int, cost: float) -> float:
    """When the last program is done, in data tiles."""
    return max(loads(data_tiles, check_tiles, programs, cost))


def overhead(m: int, n: int, columns: int, *, bm: int, bn: int, bc: int, programs: int) -> float:
    """Time of a checked product over that of the same one without check tiles, both dealt like this; epilogues not counted."""
    data, checks = -(-m // bm) * -(-n // bn), -(-m // bm) * -(-columns // bc)
    return makespan(data, checks, programs, check_cost(bn, bc)) / -(-data // programs)
