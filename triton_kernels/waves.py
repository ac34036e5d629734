"""Waves: which program computes which tiles of a product, and how long the slowest of them works.

Data tiles are dealt round by round, so that programs that work at the same time share operands in the L2. When they do not
come out even, some programs have one tile less than the others: check tiles, which are cheaper, go to those first, and
to all evenly after that. No table is needed: the share of a program follows from six numbers.

    data tiles     program p computes p, p + P, p + 2P, …
    check tiles    in the order of rank (programs with a data tile less first), consecutive ones
"""

from __future__ import annotations

from typing import NamedTuple


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
