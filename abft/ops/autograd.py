"""Gradients of the checked product, themselves checked products: dgrad and wgrad.

An operator that writes a ledger cannot use ``register_autograd``, so this is an ``autograd.Function`` around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abft import sites
from abft.backends.lane import Lane
from abft.ops.checked import bypass, directly, take
from abft.ops.checked import product as product_operator
from abft.ops.watched import nobody_watches


class CheckedProduct(torch.autograd.Function):
    """y = a · Wᵀ (+ bias) with W = b, or bᵀ if ``tb``; a (M, K) or (B, M, K). Every gradient product is checked."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, tb: bool, ledger: Tensor, site: Tensor, policy: str, fitting: Lane | None
    ) -> Tensor:
        ctx.save_for_backward(a, b)
        # Not through save_for_backward: the next layer's forward writes the ledger again (a compiled graph would take that for
        # an error), and hooks on saved tensors would hand back copies, which are no ledger and no site.
        ctx.ledger, ctx.site = ledger, site
        ctx.tb, ctx.policy, ctx.bias_dtype = tb, policy, None if bias is None else bias.dtype
        if fitting is not None:
            return take(fitting, a, b, tb, bias, "fprop", sites.number_of(site))
        return product_operator(a, False, b, tb, bias, ledger, site, "fprop", policy)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        ledger, site, tb, policy = ctx.ledger, ctx.site, ctx.tb, ctx.policy
        da = db = dbias = None
        if torch.is_grad_enabled():
            # create_graph=True: the gradient's own gradient is torch's business, unchecked and counted.
            bypass(ledger, "double backward")
            w = (b.mT if tb else b).to(a.dtype)
            da = g @ w if ctx.needs_input_grad[0] else None
            if ctx.needs_input_grad[1]:
                db = (a.mT @ g if tb else g.mT @ a).to(b.dtype)
        else:
            # Dynamo traces this and knows the first answer; it could not trace the second question.
            product = product_operator if torch.compiler.is_compiling() or not nobody_watches(g, a, b) else directly
            if ctx.needs_input_grad[0]:
                da = product(g, False, b, not tb, None, ledger, site, "dgrad", policy)
            if ctx.needs_input_grad[1]:
                left, right = (a, g) if tb else (g, a)
                db = product(left, True, right, True, None, ledger, site, "wgrad", policy).to(b.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = g.sum(tuple(range(g.dim() - 1))).to(ctx.bias_dtype)
        return da, db, dbias, None, None, None, None, None


#: CheckedProduct.apply without its search for functorch transforms, for callers who know that there are none.
apply_directly = super(torch.autograd.Function, CheckedProduct).apply
