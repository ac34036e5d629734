"""The backward in one compiled pass (abft/native/attention_backward.c), with all its checks.

As of the forward's (``fused``): what it finds clean is delivered; what is suspect once is repeated, what is suspect twice goes to
the specification, step by step (``backward``).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from abft import bits, checksum, threshold
from abft.attention import fused, scoregrad, softmax, steps
from abft.attention.fused import IN_DK, IN_DP, IN_DQ, IN_DV, IN_DX, IN_PROBABILITIES, IN_SCORES, Described, Group, Struck
from abft.attention.gradients import Given, Gradients
from abft.attention.problem import Options, Problem
from abft.attention.tally import Tally
from abft.ledger import Verdict
from abft.native import library

#: In the order of attention_backward.c.
PRODUCTS = ("S", "dP", "dQ", "dK", "dV")
#: Where a suspect lies → the product whose finding it is.
NAMED = {IN_SCORES: "S", IN_PROBABILITIES: "dP", IN_DP: "dP", IN_DX: "dP", IN_DQ: "dQ", IN_DK: "dK", IN_DV: "dV"}

#: What strikes every pass, or, as an iterator of one, the next; for tests.
strike: Callable[[], Struck | None] = lambda: None  # noqa: E731


class _Gradients(ctypes.Structure):
    _fields_ = [
        ("forward", Described), ("above_steps", ctypes.c_int64 * 4), ("dk_steps", ctypes.c_int64 * 3), ("dv_steps", ctypes.c_int64 * 3),
        ("tile", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("above", "dk", "dv", "weights", "sketches")),
        ("sketch_step", ctypes.c_int64), ("vanishing_bound", ctypes.c_double), ("columns_bound", ctypes.c_double),
        *((name, Group) for name in ("values_group", "last_values", "rows_of_q", "rows_of_k", "rows_of_v")),
        ("worst2", ctypes.c_double * len(PRODUCTS)),
    ]  # fmt: skip


@dataclass(frozen=True)
class Passed:
    """One execution: what it gives, the largest |residual| / bound of each product, and its suspect rows."""

    gradients: Gradients
    worst: tuple[float, ...]
    suspects: np.ndarray  # (n,) of row, product, residual, bound

    @property
    def identities(self) -> np.ndarray:
        """Numbers that tell a query's row from a key's of dK, and from one of dV."""
        product, row = self.suspects["product"], self.suspects["row"]
        return row * 3 + np.where(product == IN_DK, 1, np.where(product == IN_DV, 2, 0))


def covers(problem: Problem, given: Given, tally: Tally, of_mask: bool) -> bool:
    """Whether these gradients can be computed in one pass."""
    o, policy = problem.options, tally.policy
    width, depth = problem.q.shape[-1], problem.v.shape[-1]
    tensors = [t for t in (problem.q, problem.k, problem.v, problem.mask, given.d_out, given.statistics) if t is not None]
    return (
        steps.compiled(problem.wide, problem.q.device)
        and not of_mask and given.d_weights is None and not o.dropout and o.softcap is None and not tally.may_be_struck
        and fused.is_checked(tally, "S") == fused.is_checked(tally, "dP")
        and given.d_out.dtype == problem.q.dtype
        and 0 < problem.keys <= fused.MOST_KEYS and max(width, depth) <= fused.MOST_WIDTH
        and (policy.group is None or policy.group >= max(width, depth, min(problem.keys, steps.CHUNK)))
        and all(bits.readable(t) and t.numel() for t in tensors)
    )  # fmt: skip


def gradients(problem: Problem, given: Given, tally: Tally, by_steps: Callable[[Tally], Gradients]) -> Gradients:
    """The gradients of a problem that is covered. by_steps: the same, step by step, with findings of its own."""
    first = _once(problem, given, tally)
    if first is None:
        return by_steps(tally)
    if not fused.is_checked(tally, "S"):
        return first.gradients
    for name, worst in zip(PRODUCTS, first.worst, strict=True):
        tally.outcome(name).worst = max(tally.outcome(name).worst, worst)
    if len(first.suspects) == 0:
        return first.gradients
    second = _once(problem, given, tally)
    for name in PRODUCTS:
        tally.outcome(name).executions += 1
    still = first.identities if second is None else second.identities
    gone = first.suspects[~np.isin(first.identities, still)]
    _find(tally, Verdict.RECOMPUTED if tally.repairs else tally.only_told, gone, "transient")
    if second is not None and len(still) == 0:
        return second.gradients if tally.repairs else first.gradients
    fresh = by_steps(tally)
    if second is not None:
        _compare(tally, second, fresh)
    return fresh if tally.repairs else first.gradients


def _find(tally: Tally, verdict: Verdict, places: np.ndarray, cause: str) -> None:
    names = np.array([NAMED[int(p)] for p in places["product"]], dtype="U2")
    fused.find(tally, verdict, {name: places[names == name] for name in PRODUCTS}, cause)


def _compare(tally: Tally, passed: Passed, fresh: Gradients) -> None:
    """Rows that were suspect twice, where the steps found nothing to repair, and results differ: the pass is persistently wrong there."""
    said = {f.verdict for name in PRODUCTS for f in tally.outcome(name).findings if f.cause != "transient"}
    if said & {Verdict.RECONSTRUCTED, Verdict.UNCORRECTED, Verdict.OBSERVED}:
        return
    twice, wrong = passed.suspects, np.zeros(len(passed.suspects), bool)
    pairs = [(a, b) for a, b in zip(passed.gradients.of_operands, fresh.of_operands, strict=True)]
    same = [(bits.same(a, b) | ~torch.isfinite(b)).all(-1).reshape(-1).numpy() for a, b in pairs]
    for of, places in zip(same, (None, IN_DK, IN_DV), strict=True):
        mine = ~np.isin(twice["product"], (IN_DK, IN_DV)) if places is None else twice["product"] == places
        wrong[mine] = ~of[twice["row"][mine]]
    if not all(of.all() for of in same):
        # A query's wrong row may show in the keys' gradients alone.
        _find(tally, Verdict.RECONSTRUCTED if tally.repairs else tally.only_told, twice[wrong] if wrong.any() else twice, "persistent")


def _once(problem: Problem, given: Given, tally: Tally) -> Passed | None:
    """One pass; None if memory is short."""
    functions = library.functions()
    assert functions is not None
    q, k, v, mask = fused.adjacent(problem.q), fused.adjacent(problem.k), fused.adjacent(problem.v), fused.readable_mask(problem)
    above, statistics = fused.adjacent(given.d_out), given.statistics.contiguous()
    found = Gradients(_like(problem.q), _like(problem.k), _like(problem.v), None)
    dq, dk, dv = (t if t.dtype == torch.float32 else torch.empty_like(t, dtype=torch.float32) for t in found.of_operands)
    checked = fused.is_checked(tally, "S")
    places, address = fused.room_for_places(problem.rows + 2 * k.shape[:3].numel() if checked else 0)
    template = _described(
        *fused.shape_of(q, k, v, mask), above.stride(), dq.stride(), dk.stride(), dv.stride(), problem.options, checked, problem.rows_each
    )
    y = _Gradients.from_buffer_copy(template.plan)
    x = y.forward
    x.q, x.k, x.v, y.above, x.places = q.data_ptr(), k.data_ptr(), v.data_ptr(), above.data_ptr(), address
    x.out, y.dk, y.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    x.mask = x.q if mask is None else mask.data_ptr()
    x.maxima = statistics.data_ptr()
    x.sums = x.maxima + problem.rows * statistics.element_size()
    fused.strike_with(strike(), x)
    work = problem.rows * problem.keys * (3 * q.shape[-1] + 2 * v.shape[-1])
    if not functions.abft_attention_backward(ctypes.byref(y), steps.threads_for(work)):
        return None
    for to, of in zip(found.of_operands, (dq, dk, dv), strict=True):
        if to is not of:
            to.copy_(of)
    return Passed(found, tuple(map(math.sqrt, y.worst2)), places[: x.count].copy())


@lru_cache(maxsize=1024)
def _described(
    q: torch.Size, k: torch.Size, v: torch.Size, q_steps: tuple[int, ...], k_steps: tuple[int, ...], v_steps: tuple[int, ...],
    dtype: torch.dtype, mask: tuple[torch.Size, tuple[int, ...], torch.dtype] | None, above_steps: tuple[int, ...],
    dq_steps: tuple[int, ...], dk_steps: tuple[int, ...], dv_steps: tuple[int, ...], options: Options, checked: bool, tile: int,
) -> fused.Template:  # fmt: skip
    forward = fused.described(q, k, v, q_steps, k_steps, v_steps, dtype, mask, dq_steps[:4], options, checked)
    plan = _plan(k[2], q[-1], v[-1], q[2] * q[3])
    y = _Gradients(Described.from_buffer_copy(forward.plan))
    y.above_steps[:], y.dk_steps[:], y.dv_steps[:], y.tile = above_steps[:4], dk_steps[:3], dv_steps[:3], tile
    y.values_group, y.last_values, y.rows_of_q, y.rows_of_k, y.rows_of_v = plan.groups
    y.weights, y.sketches, y.sketch_step = plan.weights.ctypes.data, plan.sketches.ctypes.data, plan.sketches.strides[0] // 4
    y.vanishing_bound, y.columns_bound = scoregrad.kappa(k[2]) * softmax.UNIT[torch.float32], plan.columns_bound
    return fused.Template(y, (forward, plan))


def _like(t: Tensor) -> Tensor:
    """Room for its gradient: laid out as it is, if rows are adjacent there."""
    room = torch.empty_like(t)
    return room if room.stride(-1) == 1 or t.shape[-1] == 1 else torch.empty(t.shape, dtype=t.dtype)


@dataclass(frozen=True)
class _Plan:
    groups: tuple[Group, ...]
    weights: np.ndarray  # (padded keys): of the second sum over dX
    sketches: np.ndarray  # (SKETCHES, queries)
    columns_bound: float
    kept: tuple[object, ...]


@lru_cache(maxsize=1024)
def _plan(keys: int, width: int, depth: int, queries: int) -> _Plan:
    """How the sums of a backward are weighted and judged; queries: of all members of a group."""
    last, cpu = keys % steps.CHUNK or steps.CHUNK, torch.device("cpu")
    kept: list[object] = []
    groups = (
        fused.group(min(keys, steps.CHUNK), depth, kept), fused.group(last, depth, kept),
        *(fused.group(columns, n, kept, probabilities=True) for columns, n in ((width, keys), (width, queries), (depth, queries))),
    )  # fmt: skip
    # The tables are of powers of two: their rows can be read up to a whole vector, and zeros meet what lies behind the last key.
    weights = checksum.sketch_coefficients(-(-keys // 16) * 16, cpu)[0].numpy()
    sketches = checksum.sketch_coefficients(queries, cpu).numpy()
    kappa = threshold.kappa(threshold.FMA_32, queries + keys, "one", softmax_operand=True)
    return _Plan(groups, weights, sketches, kappa * softmax.UNIT[torch.float32], tuple(kept))
