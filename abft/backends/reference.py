"""The reference backend: torch's own product, with its evidence computed in plain torch. The specification.

On a CPU it is also the fast path. There the product arrives already rounded to its dtype: for fp32 and fp64 that
rounding is the accumulation's own, for fp16 and bf16 it hides everything below 2⁻⁹ of an element, so groups are
narrow, all four sums are judged on every row, and the floor is coarse (``threshold.expected_floor``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from abft import checksum, encoding, floating, threshold
from abft.backends.call import Call
from abft.checksum import FORMS, Groups, Kind, Layout, Panel, Sums
from abft.faults import Strike, strike_checksums

#: Columns under one check where the result is not rounded: the whole row costs least, and its floor is far below harm.
WIDE_GROUP = 8192
#: … and where it is: the floor falls with √(G/N), so narrow rows get narrow groups.
ROUNDED_GROUP = 512
ROUNDED_GROUPS_PER_ROW = 8


@dataclass(frozen=True)
class Plan:
    """Everything about a product's checks that its shapes, dtype and policy decide."""

    arithmetic: threshold.Arithmetic
    layout: Layout
    tested: tuple[Kind, ...]  # judged on every row
    sum_dtype: torch.dtype

    def __hash__(self) -> int:
        return hash((self.layout, len(self.tested)))

    @property
    def rounded(self) -> bool:
        return self.arithmetic.output_roundoff > 0.0


@lru_cache(maxsize=8192)
def plan(n: int, k: int, dtype: torch.dtype, form: str, group: int | None) -> Plan:
    """The plan of a product with ``n`` result columns and ``k`` products per element, on a CPU library's arithmetic."""
    wide = floating.ACCUMULATOR[dtype]
    base = threshold.FMA_64 if wide == torch.float64 else threshold.FMA_32
    arithmetic = threshold.rounded(base, dtype)
    narrow = arithmetic.output_roundoff > 0.0
    groups = Groups.near_equal(n, group or _default_group(n, narrow))
    layout = Layout(groups, FORMS[form], wide, 1, shared_sketch=narrow)
    # All kinds are judged, not e and one alone: those two are blind to half of all equal and opposite pairs, which is what
    # a carry fault in neighbouring elements looks like (bench/results/faults-emulated-*.jsonl).
    return Plan(arithmetic, layout, FORMS[form].kinds, wide)


def _default_group(n: int, rounded: bool) -> int:
    if not rounded:
        return WIDE_GROUP
    return min(ROUNDED_GROUP, max(checksum.FRAGMENT, n // ROUNDED_GROUPS_PER_ROW // checksum.FRAGMENT * checksum.FRAGMENT))


def plan_for(call: Call) -> Plan:
    return plan(call.w.shape[-2], call.a.shape[-1], call.a.dtype, call.policy.panel, call.policy.group)


# --- the product --------------------------------------------------------------------------------


def multiply(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Exactly the product torch computes: same call, same bits."""
    if a.dim() == 2:
        return F.linear(a, w, bias)
    y = torch.bmm(a, w.mT)
    return y if bias is None else y + bias


def execute(call: Call, strikes: tuple[Strike, ...] = ()) -> Tensor:
    """The product, hit by ``strikes`` where they lie in its operands, accumulators or output."""
    y = multiply(call.a, call.w, call.bias)
    strike_accumulators(y, call, strikes)
    strike_output(y, strikes)
    return y


def _strike_operand(y: Tensor, call: Call, strike: Strike) -> None:
    """What a wrong tile of A in shared memory does: some rows of one column tile are products of the wrong values."""
    region, columns = strike.region, slice(strike.tile0, strike.tile1)
    wrong = call.a.clone()
    strike.hit(wrong)
    rows = slice(region.row0, region.row1)
    if call.a.dim() == 2:
        # In y's own precision, so that accumulators may be struck before they are rounded.
        y[rows, columns] = multiply(wrong[rows].to(y.dtype), call.w[columns].to(y.dtype), _part(call.bias, columns, y))
    else:
        b = region.batch
        y[b, rows, columns] = multiply(wrong[b, rows].to(y.dtype), call.w[b, columns].to(y.dtype), _part(call.bias, columns, y))


def _part(bias: Tensor | None, columns: slice, y: Tensor) -> Tensor | None:
    return None if bias is None else bias[columns].to(y.dtype)


def strike_accumulators(y: Tensor, call: Call, strikes: tuple[Strike, ...]) -> None:
    """Apply, in place, the strikes that a product's sums see."""
    for strike in strikes:
        if strike.place == "operand":
            _strike_operand(y, call, strike)
        elif strike.place == "accumulator":
            strike.hit(y)


def strike_output(y: Tensor, strikes: tuple[Strike, ...]) -> None:
    """Apply, in place, the strikes on the delivered, rounded result."""
    for strike in strikes:
        if strike.place == "output":
            strike.hit(y)


# --- the evidence -------------------------------------------------------------------------------


def build_panel(matrix: Tensor, layout: Layout) -> Panel:
    """The panel of W (N, K) or (B, N, K): ``checksum.encode``, compiled where that can be."""
    matrix = matrix.detach()
    return encoding.encode(matrix, layout) or checksum.encode(matrix, layout)


def sums(
    y: Tensor, a: Tensor, panel: Panel, bias: tuple[Tensor, Tensor] | None, p: Plan, dtype: torch.dtype | None = None,
    strikes: tuple[Strike, ...] = (),
) -> Sums:  # fmt: skip
    """The judged sums of every row, in plain torch: the specification of every other path. ``dtype``: to sum and square in."""
    dtype = dtype or p.sum_dtype
    actual, squares = checksum.actual_sums(y, p.layout.groups, p.tested, dtype)
    raw = _predict(a.to(p.layout.dtype), panel.columns)
    strike_checksums(raw, strikes)
    raw = raw.to(dtype)
    predicted, noise2 = checksum.predicted_sums(raw, panel)
    predicted = predicted[..., : len(p.tested)]
    if bias is not None:
        c, extra = bias
        predicted = predicted + c[:, : len(p.tested)]
        noise2 = noise2 + (extra.sum() if p.layout.shared_sketch else extra)
    return Sums(p.tested, actual, predicted, squares, noise2)


def _predict(a: Tensor, columns: Tensor) -> Tensor:
    # F.linear, never a @ P: the transposed panel is 2 to 3 times faster on a CPU. In a batch, where a may be a transposed view,
    # the few columns stand on the left: up to 20 times faster.
    return F.linear(a, columns) if columns.dim() == 2 else torch.bmm(columns, a.mT).mT


@dataclass(frozen=True)
class Judgement:
    """Residuals and bounds of every row, on the host. Shapes (rows, groups, kinds), rows flattened over the batch."""

    y: Tensor  # what was judged
    sums: Sums
    tau: np.ndarray
    worst: float  # largest |residual| / bound; NaN if anything is not finite
    largest: float

    @property
    def clean(self) -> bool:
        # One comparison decides: NaN fails it, and an infinite bound was turned into NaN.
        return self.worst <= 1.0

    def suspects(self) -> np.ndarray:
        """bool (rows,)"""
        with np.errstate(invalid="ignore", over="ignore"):
            return threshold.suspect(self.sums, self.tau, self.largest).any(axis=(-1, -2))


def judge(y: Tensor, s: Sums, k: int, p: Plan) -> Judgement:
    """Compare sums with their bounds, on host memory."""
    c = threshold.coefficients(p.arithmetic, k, p.tested, p.layout.groups.width)
    host = _on_host(s)
    with np.errstate(all="ignore"):
        tau = threshold.bounds(host, c)
        if tau.size == 0:
            return Judgement(y, host, tau, 0.0, c.largest)
        worst = float(np.max(abs(host.actual - host.predicted) / tau))
        if not float(np.max(tau)) < c.largest:
            worst = float("nan")
    return Judgement(y, host, tau, worst, c.largest)


def _on_host(s: Sums) -> Sums:
    def rows(value: Any, trailing: int) -> np.ndarray:
        array = value.numpy() if isinstance(value, Tensor) else value
        return array.reshape(-1, *array.shape[array.ndim - trailing :])

    return Sums(s.kinds, rows(s.actual, 2), rows(s.predicted, 2), rows(s.squares, 1), rows(s.noise2, 1))


def examine(
    y: Tensor, call: Call, panel: Panel, bias: tuple[Tensor, Tensor] | None, p: Plan, strikes: tuple[Strike, ...] = ()
) -> Judgement:
    """Judge every row of a result. ``strikes``: those of the call, where it is examined for the first time."""
    j = judge(y, sums(y, call.a, panel, bias, p, strikes=strikes), call.a.shape[-1], p)
    if p.sum_dtype == torch.float32 and _squares_underflow(j, call.a.shape[-1], p):
        wide = replace(p, arithmetic=threshold.with_wide_squares(p.arithmetic))
        return judge(y, sums(y, call.a, panel, bias, p, torch.float64, strikes), call.a.shape[-1], wide)
    return j


def _squares_underflow(j: Judgement, k: int, p: Plan) -> bool:
    """Whether some row is not zero, but so small that its bound says nothing of it."""
    absolute = np.array(threshold.coefficients(p.arithmetic, k, p.tested, p.layout.groups.width).absolute, j.tau.dtype)
    small = j.tau < 2.0 * absolute
    return bool(small.any()) and bool((small & ((j.sums.actual != 0) | (j.sums.predicted != 0))).any())
