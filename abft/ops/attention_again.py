"""Attention like an earlier call, by the shortest way: a small one costs less than deciding how to compute it.

What a call is decided by are shapes, memory orders, options and the policy; where all of them are those of an earlier call, that was one
compiled pass, the pass is described already. Without gradients, on a CPU, in fp32, where nobody watches; the checks, their books and
what happens to a suspect row are those of ``abft::attention``.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from abft import faults, ledger, plans
from abft.attention import forward, fused
from abft.attention.problem import Attended, Problem, is_by_queries
from abft.attention.tally import ROLES, Tally
from abft.ops import checked
from abft.ops.watched import nobody_watches
from abft.policy import Policy

#: Calls that are remembered; of so many shapes none comes soon again.
MOST = 1024


@dataclass(frozen=True)
class Known:
    """A call that was one compiled pass."""

    template: fused.Template
    shape: tuple[int, int, int, int]  # of the result's memory: batch, heads, queries, columns; by_queries: batch, queries, heads, columns
    by_queries: bool
    grouped: tuple[int, int]  # key heads, query heads to each
    rows: int
    work: int  # multiply-adds
    reasons: tuple[tuple[str, str | None], ...]  # product → why it is not checked


_known: dict[Any, Known | None] = {}
_kept = threading.local()


def key_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, enable_gqa: bool, policy: Policy
) -> Any:
    """What such a call is known by; None where it is decided anew."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or faults.active is not None:
        return None
    if policy.dynamic or policy.redundancy != "none" or policy.backend == "triton":
        return None
    if not (scale is None or type(scale) in (float, int)) or type(causal) is not bool or type(enable_gqa) is not bool:
        return None  # a tensor may be another number next time
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    for t in operands:
        if not isinstance(t, Tensor) or t.is_nested or not t.is_cpu:
            return None
    if not nobody_watches(*operands) or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return None
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(), query.dtype, key.dtype, value.dtype,
        of_mask, causal, scale, enable_gqa, policy.text,
    )  # fmt: skip


def is_new(key: Any) -> bool:
    return key is not None and key not in _known


def is_known(key: Any) -> bool:
    return key is not None and _known.get(key) is not None


def remember(key: Any, operands: tuple[Tensor, ...], problem: Problem, policy: Policy) -> None:
    """That a call of this key is this problem. operands: as they were passed; what has to be copied first is not known."""
    if len(_known) >= MOST:
        _known.clear()
    tally = Tally(policy, 0, "fprop", problem.q.dtype)
    q, k, v, mask = problem.q, problem.k, problem.v, fused.readable_mask(problem)
    passed = [t for t in (q, k, v, mask) if t is not None]
    as_they_lie = len(passed) == len(operands) and all(
        a.data_ptr() == b.data_ptr() and fused.adjacent(a) is a for a, b in zip(passed, operands, strict=True)
    )
    if not (operands[0].dim() == 4 and q.dtype == torch.float32 and as_they_lie and fused.covers(problem, tally, False)):
        _known[key] = None
        return
    batch, heads, group, length, width = q.shape
    out = problem.empty().out
    reasons = tuple((name, None if tally.checks(ROLES[name]) else plans.why_unchecked(policy, ROLES[name])) for name in ("S", "O"))
    template = fused.described(*fused.shape_of(q, k, v, mask), out.stride()[:4], problem.options, any(r is None for _, r in reasons))
    depth = v.shape[-1]
    work = problem.rows * problem.keys * (width + depth)
    by_queries = is_by_queries(q)
    shape = (batch, length, heads * group, depth) if by_queries else (batch, heads * group, length, depth)
    _known[key] = Known(template, shape, by_queries, (heads, group), problem.rows, work, reasons)


def take(key: Any, operands: tuple[Tensor, ...], number: int) -> tuple[Tensor, fused.Passed | None] | None:
    """(the result (batch, heads, queries, columns), what the pass found if there are suspect rows) of a known call; None: decide anew.

    Without suspects its checks are counted at the site of this number.
    """
    known = _known.get(key)
    if known is None:  # another thread forgot it just now
        return None
    memory = operands[0].new_empty(known.shape)
    places, address = fused.room_for_places(known.rows)
    statistics = _statistics(known.rows)
    x = fused.Described.from_buffer_copy(known.template.plan)
    x.q, x.k, x.v, x.out, x.places = *(t.data_ptr() for t in operands[:3]), memory.data_ptr(), address
    x.mask = operands[3].data_ptr() if len(operands) == 4 else x.q
    x.maxima = statistics.data_ptr()
    x.sums = x.maxima + 4 * known.rows
    if not fused.run(x, known.work):
        return None
    out = memory.transpose(1, 2) if known.by_queries else memory
    worst = math.sqrt(x.worst2[0]), math.sqrt(x.worst2[1])
    if x.count:
        heads, group = known.grouped
        attended = Attended(out.unflatten(1, (heads, group)), statistics[: 2 * known.rows].clone().view(2, out.shape[0], heads, group, -1))
        return out, fused.Passed(attended, worst, places[: x.count].copy())
    book, repeated = ledger.cpu(), torch._C._current_graph_task_id() != -1
    for (_, reason), most in zip(known.reasons, worst, strict=True):
        if reason is None:
            book.count_clean(number, known.rows, most, repeated)
        else:
            ledger.bypass(reason)
    return out, None


def settle(problem: Problem, passed: fused.Passed, number: int, policy: Policy) -> Tensor:
    """The result (B, H, G, L, D) of a call whose pass found suspect rows."""
    tally = Tally(policy, number, "fprop", problem.q.dtype, note=checked.on_strike)
    attended = forward.attend(problem, tally, first=passed)
    tally.close()
    return attended.out


def _statistics(rows: int) -> Tensor:
    """Room for the maxima and sums, which nobody reads without gradients."""
    room: Tensor | None = getattr(_kept, "statistics", None)
    if room is None or room.numel() < 2 * rows:
        with torch.inference_mode(False):
            room = _kept.statistics = torch.empty(max(2 * rows, 4096), dtype=torch.float32, device="cpu")
    return room
