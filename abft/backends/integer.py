"""The reference backend for int8 operands: torch's own ``_int_mm`` and its evidence, exact, in plain torch. The specification.

Sums of the result are taken in fp64, which holds them all; predicted sums by ``torch._int_mm`` itself. So the two sides are
computed by different instructions, and an int8 unit that is wrong on every call is seen, too: that is how two cases were found
in which torch's own product is wrong (``_plainly_strided``, ``cpu_is_exact``).
"""

from __future__ import annotations

import functools
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from abft import bits, digits, panels, threshold
from abft.backends import arbitration, lane, reference
from abft.backends.call import Call
from abft.backends.reference import Judgement, Plan
from abft.checksum import Layout, Panel, Sums
from abft.faults import Strike, in_checksums, strike_checksums
from abft.ledger import Outcome

#: Columns under one check, unless the policy says otherwise. Bounds are zero whatever the width; wider ones have fewer panel columns.
GROUP = 1024
#: Nothing is rounded: no unit of error, and no bound but zero.
EXACT = threshold.Arithmetic("exact", 0.0, 1, torch.float64)
#: What ``torch._int_mm`` wants on CUDA: more than 16 rows, and multiples of eight.
CUDA_ROWS, CUDA_UNIT = 32, 8


@lru_cache(maxsize=8192)
def plan(n: int, form: str, group: int | None) -> Plan:
    """The plan of a product with ``n`` result columns."""
    layout = digits.layout(n, form, group or GROUP)
    return Plan(EXACT, layout, layout.form.kinds, torch.float64)


def plan_for(call: Call) -> Plan:
    return plan(call.w.shape[-2], call.policy.panel, call.policy.group)


# --- the product ----------------------------------------------------------------------------------


def multiply(a: Tensor, w: Tensor) -> Tensor:
    """A Wᵀ in int32, modulo 2³²: what ``torch._int_mm`` means, of any shape on every device."""
    if a.numel() == 0 or w.numel() == 0:
        return torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32, device=a.device)
    if a.device.type == "cpu":
        return torch._int_mm(_plainly_strided(a), _plainly_strided(w.mT)) if cpu_is_exact() else _multiply_in_fp64(a, w)
    # Whether a GPU's sums wrap beyond int32 or saturate is not torch's to say; sums of DEPTH products stay within, and these wrap.
    parts = zip(a.split(digits.DEPTH, 1), w.split(digits.DEPTH, 1), strict=True)
    return functools.reduce(torch.add, (_multiply_on_cuda(left, right) for left, right in parts))


def _multiply_on_cuda(a: Tensor, w: Tensor) -> Tensor:
    """With the zeros that ``torch._int_mm`` asks for there; they change no whole number."""
    pad_k = -a.shape[1] % CUDA_UNIT
    left = F.pad(a, (0, pad_k, 0, max(0, CUDA_ROWS - a.shape[0])))
    right = F.pad(w, (0, pad_k, 0, -w.shape[0] % CUDA_UNIT))
    return torch._int_mm(left, right.mT)[: a.shape[0], : w.shape[0]].contiguous()


def _plainly_strided(matrix: Tensor) -> Tensor:
    """Row- or column-major. Of other strides (0, or those of a single row or column) torch 2.13 returns numbers of other memory."""
    for view in (matrix, matrix.mT):
        if view.stride(1) == 1 and view.stride(0) >= view.shape[1] > 1 < view.shape[0]:
            return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1)
def cpu_is_exact() -> bool:
    """Whether this CPU's ``torch._int_mm`` is: without VNNI, oneDNN adds pairs of products in 16 bits, where they saturate."""
    a, w = ((torch.arange(64 * 64) * step % 256 - 128).to(torch.int8).view(64, 64) for step in (37, 101))
    exact = a.to(torch.int64) @ w.to(torch.int64).mT
    return bool((torch._int_mm(a, w.mT) == exact).numpy().all())


def _multiply_in_fp64(a: Tensor, w: Tensor) -> Tensor:
    """The same by other instructions; fp64 holds every sum of 2³⁹ products."""
    return wrapped((a.to(torch.float64) @ w.to(torch.float64).mT).to(torch.int64))


def execute(call: Call, strikes: tuple[Strike, ...] = ()) -> Tensor:
    """The product, hit by ``strikes`` where they lie in its operands, accumulators or output."""
    y = multiply(call.a, call.w)
    for strike in strikes:
        if strike.place == "operand":
            rows, columns = slice(strike.region.row0, strike.region.row1), slice(strike.tile0, strike.tile1)
            wrong = call.a.clone()
            strike.hit(wrong)
            y[rows, columns] = multiply(wrong[rows], call.w[columns])
        elif strike.place == "accumulator":
            strike.hit(y)
    reference.strike_output(y, strikes)
    return y


# --- the evidence -----------------------------------------------------------------------------------


def build_panel(matrix: Tensor, layout: Layout) -> Panel:
    """The panel of W (N, K)."""
    return digits.encode(matrix.detach(), layout)


def sums(y: Tensor, a: Tensor, panel: Panel, strikes: tuple[Strike, ...] = ()) -> tuple[Tensor, Tensor]:
    """(residuals, predicted sums) of every row, (M, groups, kinds) int64."""
    layout = panel.layout
    raw = multiply(a, panel.columns)
    strike_checksums(raw, strikes)
    predicted = digits.predicted_sums(raw, layout)
    actual = digits.actual_sums(y, layout.groups, layout.form.kinds)
    return digits.residuals(actual, predicted, a.shape[1]), predicted


def examine(y: Tensor, call: Call, panel: Panel, strikes: tuple[Strike, ...] = ()) -> Judgement:
    """Judge every row of a result, on host memory. ``strikes``: those of the call, where it is examined for the first time."""
    residual, predicted = (t.numpy() for t in sums(y, call.a, panel, strikes))
    nothing = np.zeros((*residual.shape[:-1],))
    seen = Sums(panel.layout.form.kinds, predicted + residual, predicted, nothing, nothing)
    worst = float("inf") if residual.any() else 0.0
    return Judgement(y, seen, np.zeros(residual.shape), worst, EXACT.largest)


# --- the check, on a host whose memory may be read ------------------------------------------------------


def entry_of(call: Call, p: Plan) -> panels.Entry | None:
    """The remembered panel of a weight."""
    if call.source is None:
        return None
    frozen = call.policy.weights == "frozen"
    return panels.entry_for(call.source, call.w, p.layout, transposed=call.transposed, frozen=frozen, build=build_panel)


def panel_of(call: Call, p: Plan) -> Panel:
    """The panel of a call's W, remembered if W is a weight."""
    entry = entry_of(call, p)
    return build_panel(call.w, p.layout) if entry is None else entry.panel


def check(call: Call, y: Tensor, outcome: Outcome, backend: str) -> Tensor:
    """Judge a product and settle what is wrong; returns what is delivered."""
    p = plan_for(call)
    entry = entry_of(call, p)
    panel = entry.panel if entry is not None else build_panel(call.w, p.layout)
    for strike in call.strikes:
        if strike.place == "panel":
            strike.hit(panel.columns)
    if entry is not None:
        entry.uses += 1
    believed = entry is None or bool(entry.uses % lane.PANEL_AUDIT) or panels.intact(entry)
    if believed and not in_checksums(call.strikes) and digits.agree(y, call.a.shape[1], functools.partial(multiply, call.a), panel):
        return y
    judgement = examine(y, call, panel, call.strikes)
    if judgement.clean and believed:
        return y
    return arbitration.settle(ExactCase(call, p, y, judgement, panel, entry, None, execute, outcome))


class ExactCase(arbitration.Case):
    """A product of whole numbers under suspicion."""

    def examine(self, y: Tensor, call: Call) -> Judgement:
        return examine(y, call, self.panel)

    def build_panel(self, matrix: Tensor, layout: Layout) -> Panel:
        return build_panel(matrix, layout)

    def explained(self, rows: np.ndarray) -> np.ndarray:
        agreed: Any = bits.same(self.independent(rows), self.y[torch.from_numpy(rows)]).all(-1)
        return agreed.numpy()

    def independent(self, rows: np.ndarray) -> Tensor:
        return _multiply_in_fp64(self.call.a[torch.from_numpy(rows)], self.call.w)

    def locate(self, y: Tensor, row: int, group: int) -> int | None:
        groups = self.plan.layout.groups
        start, stop = groups.span(group)
        residual, _ = sums(y[row : row + 1], self.call.a[row : row + 1], self.panel)
        column = digits.locate(residual[0, group].numpy(), self.plan.layout.form.kinds, stop - start, self.call.a.shape[1])
        return None if column is None else start + column


def wrapped(values: Tensor) -> Tensor:
    """int64 as int32, modulo 2³²."""
    return (((values + 2**31) & (2**32 - 1)) - 2**31).to(torch.int32)
