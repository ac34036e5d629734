"""The forward in one compiled pass over blocks of scores that stay in the cache (abft/native/attention.c), with all its checks.

What it finds clean is delivered. Else the pass is repeated: rows that are clean then were struck by something transient, and have
the bits of a fault-free run. Rows that are suspect twice go to the specification, step by step (``forward``), which decides.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abft import bits, checksum, encoding, threshold
from abft.attention import products, softmax, steps
from abft.attention.problem import Attended, Options, Problem
from abft.attention.tally import Tally
from abft.ledger import Verdict
from abft.native import library

#: What a row of scores, and a head's keys and values with their panels, may take of a thread's memory.
MOST_KEYS = 16384
MOST_WIDTH = 1024
KINDS = checksum.FULL.kinds
NO_MASK, SEEN, ADDED = range(3)
#: The places that attention.h names: those of the forward, and those of the backward, which has the first two as well.
IN_SCORES, IN_PROBABILITIES, IN_SUM, IN_OUT = range(1, 5)
IN_DP, IN_DELTA, IN_DX, IN_DQ, IN_DK, IN_DV = range(5, 11)


class Group(ctypes.Structure):
    _fields_ = [
        ("width", ctypes.c_int64), ("weights", ctypes.c_void_p),
        *((name, ctypes.c_double * len(KINDS)) for name in ("accumulate2", "absolute2", "share")),
    ]  # fmt: skip


class _Place(ctypes.Structure):
    _fields_ = [("row", ctypes.c_int64), ("product", ctypes.c_int64), ("residual", ctypes.c_double), ("bound", ctypes.c_double)]


class Described(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "batch", "heads", "members", "length", "keys", "width", "depth",
            "dtype", "mask_kind", "checked", "causal", "offset", "window",
        )),
        ("q_steps", ctypes.c_int64 * 4), ("k_steps", ctypes.c_int64 * 3), ("v_steps", ctypes.c_int64 * 3),
        ("out_steps", ctypes.c_int64 * 4), ("mask_steps", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out", "maxima", "sums")),
        *((name, ctypes.c_double) for name in ("scale", "softmax_bound", "range", "largest2")),
        ("keys_group", Group), ("last_keys", Group), ("columns", Group),
        *((name, ctypes.c_int64) for name in ("strike", "strike_row", "strike_column")), ("strike_value", ctypes.c_double),
        ("worst2", ctypes.c_double * 2), ("count", ctypes.c_int64), ("places", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Struck:
    """For tests: a number that the pass finds in place of another. row: among all heads'; column: a key, or one of the result's;
    below 0, of dX alone: the row becomes zero.
    """

    place: int
    row: int
    column: int
    value: float


#: What strikes every pass, or, as an iterator of one, the next; for tests.
strike: Callable[[], Struck | None] = lambda: None  # noqa: E731


@dataclass(frozen=True)
class Passed:
    """One execution: what it gives, and its suspect rows."""

    attended: Attended
    worst: tuple[float, float]  # largest |residual| / bound of S; of the softmax and O
    suspects: np.ndarray  # (n,) of row, product, residual, bound


def covers(problem: Problem, tally: Tally, weights: bool) -> bool:
    """Whether this attention can be computed in one pass; an injector strikes between steps."""
    o, group = problem.options, tally.policy.group
    tensors = [t for t in (problem.q, problem.k, problem.v, problem.mask) if t is not None]
    return (
        steps.compiled(problem.wide, problem.q.device)
        and not weights and not o.dropout and o.softcap is None and not tally.may_be_struck
        and is_checked(tally, "S") == is_checked(tally, "O")  # behind suspect scores the pass looks no further
        and 0 < problem.keys <= MOST_KEYS and max(problem.q.shape[-1], problem.v.shape[-1]) <= MOST_WIDTH
        and (group is None or group >= max(problem.v.shape[-1], min(problem.keys, steps.CHUNK)))
        and all(bits.readable(t) and t.numel() for t in tensors)
    )  # fmt: skip


def attend(problem: Problem, tally: Tally, by_steps: Callable[[Tally], Attended], first: Passed | None = None) -> Attended:
    """Attention of a problem that is covered. by_steps: the same, step by step, with findings of its own. first: a pass that has run."""
    named = {IN_SCORES: "S", IN_PROBABILITIES: "O", IN_OUT: "O"}
    first = first or _once(problem, tally)
    if first is None:
        return by_steps(tally)
    for name, worst in zip(("S", "O"), first.worst, strict=True):
        if is_checked(tally, name):
            outcome = tally.outcome(name)
            outcome.worst = max(outcome.worst, worst)
    if len(first.suspects) == 0:
        return first.attended
    suspects = first.suspects[[is_checked(tally, named[int(place)]) for place in first.suspects["product"]]]
    if len(suspects) == 0:
        return first.attended
    second = _once(problem, tally)
    for name in ("S", "O"):
        tally.outcome(name).executions += 1
    still = suspects["row"] if second is None else second.suspects["row"]
    verdict = Verdict.RECOMPUTED if tally.repairs else tally.only_told
    gone = suspects[~np.isin(suspects["row"], still)]
    find(tally, verdict, {"S": gone[gone["product"] == IN_SCORES], "O": gone[gone["product"] != IN_SCORES]}, "transient")
    if second is None or len(still):
        fresh = by_steps(tally)
        if second is not None:
            _compare(tally, second, fresh)
    else:
        fresh = second.attended
    return fresh if tally.repairs else first.attended


def is_checked(tally: Tally, name: str) -> bool:
    return tally.checks(products.ROLES[name])


def find(tally: Tally, verdict: Verdict, found: dict[str, np.ndarray], cause: str) -> None:
    for name, places in found.items():
        if len(places):
            with np.errstate(all="ignore"):
                worst = places[int(np.nan_to_num(places["residual"] / places["bound"], nan=np.inf).argmax())]
            tally.find(name, verdict, len(places), int(worst["row"]), float(worst["residual"]), float(worst["bound"]), cause)


def _compare(tally: Tally, passed: Passed, fresh: Attended) -> None:
    """Rows that were suspect twice, on which the steps found nothing to repair, and yet differ: the pass is persistently wrong there."""
    said = {f.verdict for name in ("S", "O") for f in tally.outcome(name).findings if f.cause != "transient"}
    if said & {Verdict.RECONSTRUCTED, Verdict.UNCORRECTED, Verdict.OBSERVED}:
        return
    same = bits.same(passed.attended.out, fresh.out).all(-1)
    same |= ~torch.isfinite(fresh.out).all(-1)  # which NaN it is depends on the order of the keys
    twice = passed.suspects
    wrong = twice[~same.reshape(-1).numpy()[twice["row"]]]
    verdict = Verdict.RECONSTRUCTED if tally.repairs else tally.only_told
    find(tally, verdict, {"S": wrong[wrong["product"] == IN_SCORES], "O": wrong[wrong["product"] != IN_SCORES]}, "persistent")


PLACE = np.dtype([("row", np.int64), ("product", np.int64), ("residual", np.float64), ("bound", np.float64)])


NO_PLACES = np.empty(0, PLACE)


def _once(problem: Problem, tally: Tally) -> Passed | None:
    """One pass; None if memory is short."""
    q, k, v, mask = adjacent(problem.q), adjacent(problem.k), adjacent(problem.v), readable_mask(problem)
    attended = problem.empty()
    out = attended.out if q.dtype == torch.float32 else torch.empty_like(attended.out, dtype=torch.float32)
    checked = is_checked(tally, "S") or is_checked(tally, "O")
    places, address = room_for_places(problem.rows if checked else 0)
    # What is like an earlier call is not described again: it costs as much as a small attention.
    template = described(*shape_of(q, k, v, mask), out.stride()[:4], problem.options, checked)
    x = Described.from_buffer_copy(template.plan)
    x.q, x.k, x.v, x.out, x.places = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), address
    x.mask = x.q if mask is None else mask.data_ptr()
    x.maxima = attended.statistics.data_ptr()
    x.sums = x.maxima + problem.rows * attended.statistics.element_size()
    if not run(x, problem.rows * problem.keys * (q.shape[-1] + v.shape[-1])):
        return None
    if out is not attended.out:
        attended.out.copy_(out)
    return Passed(attended, (math.sqrt(x.worst2[0]), math.sqrt(x.worst2[1])), places[: x.count].copy() if x.count else NO_PLACES)


def run(x: Described, work: int) -> bool:
    """The compiled pass over what is described, of so many multiply-adds; False if memory is short."""
    functions = library.functions()
    assert functions is not None
    strike_with(strike(), x)
    return bool(functions.abft_attention(ctypes.byref(x), steps.threads_for(work)))


def strike_with(hit: Struck | None, x: Described) -> None:
    if hit is not None:
        x.strike, x.strike_row, x.strike_column, x.strike_value = hit.place, hit.row, hit.column, hit.value


_kept = threading.local()


def room_for_places(rows: int) -> tuple[np.ndarray, int]:
    """This thread's room for as many suspect rows, and its address; what is in it lasts until the next call."""
    kept: tuple[np.ndarray, int] | None = getattr(_kept, "places", None)
    if kept is None or len(kept[0]) < rows:
        places = np.empty(max(rows, 1024), PLACE)
        kept = _kept.places = places, places.ctypes.data
    return kept


def adjacent(t: Tensor) -> Tensor:
    """Its numbers adjacent along the last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def readable_mask(problem: Problem) -> Tensor | None:
    """A mask of bool or fp32, whole along the keys, and whatever it was along the rest."""
    mask = problem.mask
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(torch.float32)
    return adjacent(mask if mask.shape[-1] == problem.keys else mask.expand(*mask.shape[:-1], problem.keys).contiguous())


Shape = tuple[torch.Size, torch.Size, torch.Size, tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, Any]


def shape_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Shape:
    """Everything that tells these operands from those of another problem, but for where they lie."""
    of_mask = None if mask is None else (mask.shape, mask.stride(), mask.dtype)
    return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, of_mask


@dataclass(frozen=True)
class Template:
    """What describes a problem but for its addresses, to be copied, and what its own addresses lead to."""

    plan: ctypes.Structure
    kept: tuple[object, ...]


@lru_cache(maxsize=1024)
def described(
    q: torch.Size, k: torch.Size, v: torch.Size, q_steps: tuple[int, ...], k_steps: tuple[int, ...], v_steps: tuple[int, ...],
    dtype: torch.dtype, mask: tuple[torch.Size, tuple[int, ...], torch.dtype] | None, out_steps: tuple[int, ...], o: Options, checked: bool,
) -> Template:  # fmt: skip
    x = Described()
    x.batch, x.heads, x.members, x.length, x.width = q
    x.keys, x.depth = v[-2:]
    x.q_steps[:], x.k_steps[:], x.v_steps[:], x.out_steps[:] = q_steps[:4], k_steps[:3], v_steps[:3], out_steps
    x.dtype, x.checked = encoding.DTYPES[dtype], checked
    x.causal, x.offset, x.window, x.scale = o.causal, o.offset, o.window or 0, o.scale
    if mask is not None:
        sizes, mask_steps, of_mask = mask
        x.mask_kind = SEEN if of_mask == torch.bool else ADDED
        x.mask_steps[:] = [0 if size == 1 else step for size, step in zip(sizes[:4], mask_steps[:4], strict=True)]
    plan = _plan(x.keys, x.width, x.depth)
    x.keys_group, x.last_keys, x.columns, x.largest2 = plan.keys, plan.last_keys, plan.columns, plan.largest2
    x.softmax_bound, x.range = softmax.kappa(x.keys) * softmax.UNIT[torch.float32], softmax.RANGE
    return Template(x, (plan,))


@dataclass(frozen=True)
class _Plan:
    keys: Group
    last_keys: Group
    columns: Group
    largest2: float
    kept: tuple[object, ...]  # what the groups' addresses lead to


@lru_cache(maxsize=1024)
def _plan(keys: int, width: int, depth: int) -> _Plan:
    """How the sums of an attention are weighted and judged: scores by CHUNK keys, the result by all its columns."""
    last = keys % steps.CHUNK or steps.CHUNK
    kept: list[object] = []
    groups = group(min(keys, steps.CHUNK), width, kept), group(last, width, kept), group(depth, keys, kept, probabilities=True)
    return _Plan(*groups, torch.finfo(torch.float32).max ** 2, tuple(kept))


def group(columns: int, over: int, kept: list[object], probabilities: bool = False) -> Group:
    """How sums over so many columns, of ``over`` products each, are weighted and judged. What its address leads to goes to ``kept``."""
    arithmetic = threshold.with_wide_squares(products.plan(columns, over, torch.float32, "full", None, probabilities).arithmetic)
    c = threshold.coefficients(arithmetic, over, KINDS, columns)
    weights = encoding.padded(np.stack([checksum.column_weights(kind, columns) for kind in KINDS]))
    kept.append(weights)
    four = ctypes.c_double * len(KINDS)
    return Group(
        columns, weights.ctypes.data, four(*np.square(c.accumulate)), four(*np.square(c.absolute)),
        four(*(checksum.weight_rms(kind, columns) ** -2 for kind in KINDS)),
    )  # fmt: skip

