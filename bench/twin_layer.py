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


def multiply(a: Tensor, w: Tensor, bias: Tensor | None, config: Any = None) -> Tensor:
    """A Wᵀ (+ bias) in our kernel without its check, in the tiles of ``config``: by default those it would choose if it had no
    check tiles to deal."""
    from abft.triton_kernels import decode, gemm

    from bench import twin

    call = Call(a, w, bias, None, False, "fprop", _POLICY, 0)
    p = backend.plan_for(call)
    few = a.shape[-2] <= decode.FEW_ROWS  # which have one tile's height, and its width by what is read
    if config is None:
        config = p.config if few else _unchecked_config(p.layout.groups.width, *backend.situation(call))
    panel = _not_looked_at(p.layout.columns, a.shape[-1], a.dtype, a.device)
    weights = backend.column_weights(p.layout.groups, p.layout.form.kinds, a.device)
    product = gemm.Product(a, w, bias, panel, weights, p.layout.groups.count, config, numbered=False)
    with backend.quiet():
        return twin.multiply(product)


@lru_cache(maxsize=1024)
def _unchecked_config(width: int, n: int, k: int, dtype: torch.dtype, architecture: int | None, tf32: bool, form: str, group: int | None,
                      rows: int, batch: int, programs: int) -> Any:  # fmt: skip
    from abft.triton_kernels import configs

    kind = "tf32" if tf32 else backend.KIND[dtype]
    return configs.choose(architecture, kind, group, n, k, width, 0, rows=rows, batch=batch, programs=programs)


_POLICY = abft.Policy()


@lru_cache(maxsize=64)
def _not_looked_at(columns: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """In the panel's place."""
    return torch.empty(columns, k, dtype=dtype, device=device)
