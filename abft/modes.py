"""Interception: inside a mode, torch's own matrix products are checked products.

Products that a mode cannot see into (einsum, bilinear, convolutions) are computed by torch and
counted under their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from abft import attend, functional, multihead
from abft.policy import Policy


def _linear(mode: ProductMode, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear_at(mode.site, input, weight, bias, mode.policy)


def _matmul(mode: ProductMode, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    reason = "out=" if out is not None else functional.why_not(input, other)
    if reason is not None:
        return functional.bypassed(reason, lambda: torch.matmul(input, other, out=out))
    return functional.matmul_at(mode.site, input, other, mode.policy)


def _bmm(mode: ProductMode, input: Tensor, mat2: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    reason = "out= or out_dtype" if args or kwargs or out is not None else functional.why_not(input, mat2)
    if reason is not None:
        return functional.bypassed(reason, lambda: torch.bmm(input, mat2, *args, out=out, **kwargs))
    if input.dim() != 3 or mat2.dim() != 3:
        return torch.bmm(input, mat2)  # torch's own error
    return functional.matmul_at(mode.site, input, mat2, mode.policy)


def _mm(mode: ProductMode, input: Tensor, mat2: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    reason = "out= or out_dtype" if args or kwargs or out is not None else functional.why_not(input, mat2)
    if reason is not None:
        return functional.bypassed(reason, lambda: torch.mm(input, mat2, *args, out=out, **kwargs))
    if input.dim() != 2 or mat2.dim() != 2:
        return torch.mm(input, mat2)  # torch's own error
    return functional.matmul_at(mode.site, input, mat2, mode.policy)


def _addmm(
    mode: ProductMode,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *args: Any,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    reason = "out= or out_dtype" if args or kwargs or out is not None else functional.why_not(input, mat1, mat2)
    if reason is not None:
        return functional.bypassed(reason, lambda: torch.addmm(input, mat1, mat2, *args, beta=beta, alpha=alpha, out=out, **kwargs))
    return functional.addmm_at(mode.site, input, mat1, mat2, beta, alpha, mode.policy)


def _int_mm(mode: ProductMode, input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    reason = "out=" if out is not None else functional.why_not(input, mat2, dtypes=(torch.int8,))
    if reason is not None:
        keywords = {} if out is None else {"out": out}
        return functional.bypassed(reason, lambda: torch._int_mm(input, mat2, **keywords))
    if input.dim() != 2 or mat2.dim() != 2:
        return torch._int_mm(input, mat2)  # torch's own error
    return functional.int_mm_at(mode.site, input, mat2, mode.policy)


def _attention(mode: ProductMode, *args: Any, **kwargs: Any) -> Tensor:
    return attend.attention_at(mode.site, *args, own=mode.policy, **kwargs)


def _multihead(mode: ProductMode, *args: Any, **kwargs: Any) -> Any:
    found = multihead.attend_or_none(mode.site, mode.policy, *args, **kwargs)
    return functional.bypassed(multihead.NAME, lambda: F.multi_head_attention_forward(*args, **kwargs)) if found is None else found


_CHECKED: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda mode, input, other: _matmul(mode, other, input),
    torch.linalg.matmul: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch._int_mm: _int_mm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multihead,
}

#: Products hidden from interception, by the name they are counted under.
_COUNTED: dict[Any, str] = {
    torch.ops.higher_order.flex_attention: "flex_attention",
    torch.einsum: "einsum",
    F.bilinear: "bilinear",
    torch.tensordot: "tensordot",
    torch.baddbmm: "baddbmm",
    Tensor.baddbmm: "baddbmm",
    Tensor.baddbmm_: "baddbmm",
    Tensor.addmm_: "addmm_",
    torch.addbmm: "addbmm",
    Tensor.addbmm: "addbmm",
    Tensor.addbmm_: "addbmm",
    torch.mv: "mv",
    Tensor.mv: "mv",
    torch.addmv: "addmv",
    Tensor.addmv: "addmv",
    Tensor.addmv_: "addmv",
    torch.dot: "dot",
    Tensor.dot: "dot",
    torch.vdot: "dot",
    Tensor.vdot: "dot",
    torch.linalg.vecdot: "dot",
    torch.inner: "inner",
    Tensor.inner: "inner",
    torch.matrix_power: "matrix_power",
    Tensor.matrix_power: "matrix_power",
    torch.linalg.matrix_power: "matrix_power",
    torch.cdist: "cdist",
    torch.sparse.mm: "sparse.mm",
    torch._VF.lstm: "lstm",
    torch._VF.gru: "gru",
    torch._VF.rnn_tanh: "rnn",
    torch._VF.rnn_relu: "rnn",
    torch._VF.lstm_cell: "lstm",
    torch._VF.gru_cell: "gru",
    torch._VF.rnn_tanh_cell: "rnn",
    torch._VF.rnn_relu_cell: "rnn",
    torch.chain_matmul: "chain_matmul",
    torch.linalg.multi_dot: "multi_dot",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
}


class ProductMode(TorchFunctionMode):
    """Every matrix product called while it is on is checked at ``site`` (None: the function's own) under ``policy``
    (None: the one in force)."""

    def __init__(self, site: Tensor | None = None, policy: Policy | None = None) -> None:
        super().__init__()
        self.site, self.policy = site, policy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        checked = _CHECKED.get(func)
        if checked is not None:
            return checked(self, *args, **kwargs)
        name = _COUNTED.get(func)
        if name is not None:
            return functional.bypassed(name, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)
