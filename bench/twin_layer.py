"""``nn.Linear`` whose three products run in the unchecked twin of abft's kernel: for timing, not for use."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import abft
from abft.backends import triton as backend
from abft.backends.call import Call


class TwinLinear(nn.Linear):
    """Takes the place of a layer by exchanging its class, as abft.protect does."""

    def forward(self, input: Tensor) -> Tensor:
        return _Linear.apply(input, self.weight, self.bias)


def exchange(model: nn.Module) -> nn.Module:
    """Every nn.Linear of a model becomes a TwinLinear, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = TwinLinear
    return model


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.has_bias = bias is not None
        return multiply(x.reshape(-1, x.shape[-1]), w, bias).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        rows, flat = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        wants_x, wants_w, wants_bias = ctx.needs_input_grad
        dx = multiply(rows, w.mT, None).view(x.shape) if wants_x else None
        dw = multiply(rows.mT, flat.mT, None) if wants_w else None
        return dx, dw, rows.sum(0) if ctx.has_bias and wants_bias else None


def multiply(a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """A Wᵀ (+ bias) as the checked kernel would compute it, in the configuration that it would take."""
    from abft.triton_kernels import gemm

    from bench import twin

    p = backend.plan_for(Call(a, w, bias, None, False, "fprop", _POLICY, 0))
    panel = _not_looked_at(p.layout.columns, a.shape[-1], a.dtype, a.device)
    weights = backend.column_weights(p.layout.groups, p.layout.form.kinds, a.device)
    product = gemm.Product(a, w, bias, panel, weights, p.layout.groups.count, p.config, numbered=False)
    with backend.quiet():
        return twin.multiply(product)


_POLICY = abft.Policy()


@lru_cache(maxsize=64)
def _not_looked_at(columns: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In the panel's place."""
    return torch.empty(columns, k, dtype=dtype, device=device)
