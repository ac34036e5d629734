"""Checks that were deferred: who holds their evidence, and having it judged.

Whoever reads a ledger calls ``flush`` before: what was computed before a report belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Holder:
    """flush: launch the judgement of all that waits, without waiting. waiting: how many products that is."""

    flush: Callable[[], None]
    waiting: Callable[[], int]


_holders: list[Holder] = []


def register(holder: Holder) -> None:
    """Once, when it first holds anything."""
    if holder not in _holders:
        _holders.append(holder)


def flush() -> None:
    """Judge what deferred checks have left (``Policy(timing="deferred")``); does not wait for the device.

    ``abft.report``, leaving ``abft.protected`` and ``StepGuard.attempt`` do it on their own. Call it at the end of what a CUDA graph
    captures: then every replay is judged as part of the graph.
    """
    for holder in _holders:
        holder.flush()


def waiting() -> int:
    """Products whose evidence nobody has judged yet."""
    return sum(holder.waiting() for holder in _holders)
