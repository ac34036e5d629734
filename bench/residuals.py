"""The sums that a checked product left, and their bounds, by abft.checksum and abft.threshold instead of by the kernels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from abft import ledger, threshold
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.checksum import Panel, Sums, predicted_sums
from abft.policy import Policy


def judged(partials: Tensor, raw: Tensor, panel: Panel, plan: backend.Plan, k: int) -> tuple[Sums, Any]:
    """Sums and bounds (B, M, groups, kinds) of evidence as gemm.Evidence holds it."""
    layout, tiles = plan.layout, plan.tiles_per_group
    pad = layout.groups.count * tiles - partials.shape[2]
    grouped = torch.nn.functional.pad(partials, (0, 0, 0, pad)).unflatten(2, (layout.groups.count, tiles))
    total = grouped[..., 0, :]
    for t in range(1, tiles):  # in the kernel's order
        total = total + grouped[..., t, :]
    *of_kind, squares = total.unbind(1)  # (B, groups, M)
    c, noise2 = predicted_sums(raw, panel)
    kinds = layout.form.kinds
    sums = Sums(kinds, torch.stack(of_kind, -1).transpose(1, 2), c, squares.transpose(1, 2), noise2)
    return sums, threshold.bounds(sums, threshold.coefficients(plan.arithmetic, k, kinds, layout.groups.width))


def ratios(a: Tensor, w: Tensor) -> tuple[backend.Plan, Tensor]:
    """(plan, residual / bound (M, groups, kinds)) of a fault-free product A (M, K) · W (N, K)ᵀ in the checked kernel; signed."""
    from abft.triton_kernels import gemm

    call = Call(a, w, None, None, False, "fprop", Policy(backend="triton", level="detect"), 0)
    plan, seen, multiply = backend.plan_for(call), {}, gemm.multiply

    def remembered(product: gemm.Product, *faults: Any) -> gemm.Evidence:
        seen["panel"], seen["evidence"] = product.panel, multiply(product, *faults)
        return seen["evidence"]

    panels, build = [], backend.build_panel

    def built(*args: Any, **kwargs: Any) -> Panel:
        panels.append(build(*args, **kwargs))
        return panels[-1]

    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64, device=a.device), torch.zeros((), dtype=torch.int64, device=a.device)
    with mock.patch.object(gemm, "multiply", remembered), mock.patch.object(backend, "build_panel", built):
        backend.product(call, words, site)
    evidence = seen["evidence"]
    sums, bounds = judged(evidence.partials, evidence.raw, panels[-1], plan, a.shape[-1])
    return plan, ((sums.actual - sums.predicted) / bounds)[0]
