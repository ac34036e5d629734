"""Checked products with torch's signatures: linear, matmul, bmm, addmm, int_mm.

Each returns what torch would return, bit for bit where nothing was wrong. What cannot be checked (other integer
and complex dtypes, tensor subclasses, ``out=``, functorch transforms, forward-mode AD) is computed by torch and counted
in ``Report.bypassed``, never silently.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from abft import faults, floating, ledger, plans, scope, sites
from abft import policy as policies
from abft.backends import lane
from abft.errors import DeviceError, DtypeError, ShapeError
from abft.ops.autograd import CheckedProduct, apply_directly
from abft.ops.checked import bypass, product, take
from abft.ops.integer import WEIGHTS, int_product
from abft.policy import Policy, PolicyLike

_PLAIN = (Tensor, torch.nn.Parameter)
#: What subclasses that change nothing have for ``__torch_function__``.
_ORDINARY = (vars(Tensor)["__torch_function__"].__func__, torch._C._disabled_torch_function_impl)
_DEVICES = ("cpu", "cuda", "meta")
_INT8 = (torch.int8,)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, policy: PolicyLike = None) -> Tensor:
    """Return ``input @ weight.T + bias``, checked and, if the policy says so, repaired.

    input is (..., in) or (in,), weight (out, in), bias (out,); any floating dtype. Detects any deviation of an output row
    above the bound of docs/explanation/thresholds.md, and a weight that changed since its panel was built (panels are
    kept for ``nn.Parameter`` weights; of other tensors they are built at every call). Does not see an input that was already
    wrong when it arrived. Raises ShapeError, DtypeError, DeviceError.
    """
    return linear_at(None, input, weight, bias, None if policy is None else policies.as_policy(policy))


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None, policy: PolicyLike = None) -> Tensor:
    """``torch.matmul``, checked: vectors, matrices, batches, broadcasting. Sees and misses what ``linear`` does."""
    reason = "out=" if out is not None else why_not(input, other)
    if reason is not None:
        return bypassed(reason, lambda: torch.matmul(input, other, out=out))
    return matmul_at(None, input, other, _own(policy))


def bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None, policy: PolicyLike = None) -> Tensor:
    """``torch.bmm``, checked: input (B, M, K), mat2 (B, K, N). Raises ShapeError unless both have three dimensions."""
    reason = "out=" if out is not None else why_not(input, mat2)
    if reason is not None:
        return bypassed(reason, lambda: torch.bmm(input, mat2, out=out))
    if input.dim() != 3 or mat2.dim() != 3 or input.shape[0] != mat2.shape[0]:
        raise ShapeError(
            f"bmm needs input (B, M, K) and mat2 (B, K, N) of one batch size; got {tuple(input.shape)} and {tuple(mat2.shape)}. "
            "matmul broadcasts batches."
        )
    return matmul_at(None, input, mat2, _own(policy), "bmm")


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None, policy: PolicyLike = None
) -> Tensor:
    """``torch.addmm``, checked: beta · input + alpha · (mat1 @ mat2). The product is checked; scaling and adding a matrix are not."""
    reason = "out=" if out is not None else why_not(input, mat1, mat2)
    if reason is not None:
        return bypassed(reason, lambda: torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha, out=out))
    return addmm_at(None, input, mat1, mat2, beta, alpha, _own(policy))


def int_mm(input: Tensor, mat2: Tensor, *, policy: PolicyLike = None) -> Tensor:
    """``torch._int_mm``, checked without a bound: int8 (M, K) @ int8 (K, N) → int32 (M, N), modulo 2³², of any shape on every device.

    Whole numbers are not rounded, so any difference between a row and its checksums is a fault: every change of one or two
    elements of a row (K <= 131,071), and a weight that changed since its panel was built. Panels are remembered for an
    ``nn.Parameter`` or ``nn.Buffer``, passed itself or as its ``.t()``. Does not see an input that was already wrong when it
    arrived, nor changes that cancel in all sums (docs/explanation/checksums.md). Raises ShapeError, DtypeError, DeviceError.
    """
    reason = why_not(input, mat2, dtypes=_INT8)
    if reason is not None:
        return bypassed(reason, lambda: torch._int_mm(input, mat2))
    return int_mm_at(None, input, mat2, _own(policy))


# --- at a site: what modules and scopes call ----------------------------------------------------------


def linear_at(site: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, own: Policy | None, name: str = "linear") -> Tensor:
    """``linear`` at a given site (its 0-d tensor)."""
    if not torch.compiler.is_compiling() and _is_ordinary(input, weight, bias):
        own = scope.in_force(own)
        if (own.dynamic or own.level == "off") and not _wants_gradients(input, weight, bias):
            own = plans.now(own.text, _number(site, own, name), "fprop")  # gradients are decided each when its time comes
            if not own.protects and _is_left_to_torch(input, weight, bias):
                return bypassed(plans.why_unchecked(own, "fprop"), lambda: F.linear(input, weight, bias))
        y = _linear_again(site, input, weight, bias, own, name)
        if y is not None:
            return y
    reason = why_not(input, weight) if bias is None else why_not(input, weight, bias)
    if reason is not None:
        return bypassed(reason, lambda: F.linear(input, weight, bias))
    unusual = _check_linear(input, weight, bias)
    if unusual is not None:
        return bypassed(unusual, lambda: F.linear(input, weight, bias))
    y = _product(_as_matrix(input), weight, bias, False, site, own, name)
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def _is_ordinary(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody could tell if this product, on a CPU, went through the operator or not."""
    return (
        type(input) is Tensor
        and type(weight) is torch.nn.Parameter
        and not input.is_nested
        and not input._is_zerotensor()
        and not input.is_neg()
        and torch._C._has_storage(input)  # not so sparse ones, and functorch's wrappers, which say that they are plain tensors
        and (dtype := input.dtype) is weight.dtype
        and (bias is None or (type(bias) is torch.nn.Parameter and bias.dtype is dtype))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not _profiler_enabled()
    )


def _linear_again(
    site: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy, name: str
) -> Tensor | None:
    """A linear like an earlier one, by the shortest way; None if it has to be decided anew."""
    dimensions = input.dim()
    if dimensions == 0:
        return None
    a = input if dimensions == 2 else _as_matrix(input)
    now = plans.planned(policy, _number(site, policy, name)) if policy.dynamic else policy
    fitting = None if now.dynamic else lane.find(a, weight, False, bias, "fprop", now.text)
    if fitting is None:
        return None
    own_site = sites.functional(name, policy.on_uncorrected) if site is None else None
    if _wants_gradients(input, weight, bias):
        if own_site is not None:
            site = sites.functional_tensor(own_site)
        elif not site.is_cpu:  # type: ignore[union-attr]
            site = sites.here(site, a.device)  # type: ignore[arg-type]
        y = apply_directly(a, weight, bias, False, ledger.tensor(a.device), site, policy.text, fitting)
    else:
        number = sites.number_of(site) if own_site is None else own_site.index  # type: ignore[arg-type]
        y = take(fitting, a, weight, False, bias, "fprop", number)
    return y if a is input else y.view(*input.shape[:-1], weight.shape[0])


def _wants_gradients(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def _number(site: Tensor | None, policy: Policy, name: str) -> int:
    return sites.functional(name, policy.on_uncorrected).index if site is None else sites.number_of(site)


def _is_left_to_torch(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether an unprotected product is no more than torch's: of sizes that fit, on a CPU, and nobody injects faults."""
    return faults.active is None and input.is_cpu and weight.is_cpu and _check_linear(input, weight, bias) is None


def addmm_at(site: Tensor | None, input: Tensor, mat1: Tensor, mat2: Tensor, beta: float, alpha: float, own: Policy | None) -> Tensor:
    """``addmm`` at a given site."""
    if mat1.dim() != 2 or mat2.dim() != 2 or mat1.shape[1] != mat2.shape[0]:
        raise ShapeError(f"addmm needs mat1 (M, K) and mat2 (K, N); got {tuple(mat1.shape)} and {tuple(mat2.shape)}")
    rows, columns = mat1.shape[0], mat2.shape[1]
    try:
        fits = torch.broadcast_shapes(input.shape, (rows, columns)) == (rows, columns)
    except RuntimeError:
        fits = False
    if not fits:
        raise ShapeError(f"addmm's input {tuple(input.shape)} does not broadcast to the product's shape ({rows}, {columns})")
    if beta == 1 and alpha == 1 and input.dim() == 1 and input.shape[0] == columns:
        return _product(mat1, mat2, input, True, site, own, "addmm")
    y = _product(mat1, mat2, None, True, site, own, "addmm")
    if input.dtype != y.dtype:
        if not torch.is_autocast_enabled(y.device.type):
            raise DtypeError(f"addmm's input must have the dtype of its product, {str(y.dtype)[6:]}; got {str(input.dtype)[6:]}")
        input = input.to(y.dtype)
    y = y if alpha == 1 else alpha * y
    return y if beta == 0 else y + (input if beta == 1 else beta * input)


def matmul_at(site: Tensor | None, a: Tensor, b: Tensor, own: Policy | None, name: str = "matmul") -> Tensor:
    """``matmul`` at a given site."""
    if a.dim() == 0 or b.dim() == 0:
        raise ShapeError(f"matmul needs at least one dimension on both sides; got {tuple(a.shape)} and {tuple(b.shape)}")
    left, right = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(1) if b.dim() == 1 else b)
    if left.shape[-1] != right.shape[-2]:
        raise ShapeError(
            f"matmul cannot multiply {tuple(a.shape)} by {tuple(b.shape)}: inner sizes {left.shape[-1]} and {right.shape[-2]} differ"
        )
    if right.dim() == 2:
        y = _product(_as_matrix(left), right, None, True, site, own, name)
        y = y.view(*left.shape[:-1], right.shape[-1])
    else:
        try:
            batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        except RuntimeError:
            raise ShapeError(f"matmul cannot broadcast the batches of {tuple(a.shape)} and {tuple(b.shape)}") from None
        # flatten, not reshape(-1, …), which cannot tell how many empty matrices there are.
        flat_left = left.expand(*batch, *left.shape[-2:]).flatten(0, -3)
        flat_right = right.expand(*batch, *right.shape[-2:]).flatten(0, -3)
        y = _product(flat_left, flat_right, None, True, site, own, name)
        y = y.view(*batch, left.shape[-2], right.shape[-1])
    y = y.squeeze(-1) if b.dim() == 1 else y
    return y.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else y


def int_mm_at(site: Tensor | None, a: Tensor, b: Tensor, own: Policy | None) -> Tensor:
    """``int_mm`` at a given site."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ShapeError(f"int_mm needs input (M, K) and mat2 (K, N); got {tuple(a.shape)} and {tuple(b.shape)}")
    policy = scope.in_force(own)
    site = _site_here(site, "int_mm", policy, a.device)
    weight, transposed = _weight_of(b)
    return int_product(a, weight, transposed, ledger.tensor(a.device), site, policy.text)


def _weight_of(b: Tensor) -> tuple[Tensor, bool]:
    """(the weight that b (K, N) is a view of, or b itself; whether it is (K, N) rather than (N, K))."""
    # Under a tracer views have no base: a weight has to be passed itself there, or its panel is built anew.
    base = None if isinstance(b, WEIGHTS) or torch.compiler.is_compiling() else b._base
    if base is not None and isinstance(base, WEIGHTS) and base.dtype == b.dtype and base.storage_offset() == b.storage_offset():
        for view, transposed in ((base, True), (base.mT, False)) if base.dim() == 2 else ():
            if view.shape == b.shape and view.stride() == b.stride():
                return base, transposed
    return b, True


def _as_matrix(t: Tensor) -> Tensor:
    """(..., K) as (rows, K), whatever is empty."""
    if t.dim() == 2:
        return t
    return t.unsqueeze(0) if t.dim() == 1 else t.flatten(0, -2)


def _own(policy: PolicyLike) -> Policy | None:
    return None if policy is None else policies.as_policy(policy)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, tb: bool, site: Tensor | None, own: Policy | None, name: str) -> Tensor:
    policy = scope.in_force(own)
    device_type = a.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        # As autocast would: inputs are cast here, where autograd sees it; the weight inside, where its identity is known.
        dtype = torch.get_autocast_dtype(device_type)
        a = _autocast(a, dtype)
        bias = None if bias is None else _autocast_weight(bias, dtype)
        b = _autocast_weight(b, dtype)
        if (a.dtype == torch.float64) != (b.dtype == torch.float64):
            raise DtypeError(
                f"autocast leaves float64 alone, and operands must have one dtype; got {str(a.dtype)[6:]} and {str(b.dtype)[6:]}"
            )
        with torch.autocast(device_type, enabled=False):
            return _apply(a, b, bias, tb, site, policy, name)
    if a.dtype != b.dtype:
        raise DtypeError(f"operands must have one dtype outside autocast; got {str(a.dtype)[6:]} and {str(b.dtype)[6:]}")
    if bias is not None and bias.dtype != a.dtype:
        raise DtypeError(f"bias must have the operands' dtype, {str(a.dtype)[6:]}; got {str(bias.dtype)[6:]}")
    return _apply(a, b, bias, tb, site, policy, name)


def _apply(a: Tensor, b: Tensor, bias: Tensor | None, tb: bool, site: Tensor | None, policy: Policy, name: str) -> Tensor:
    site = _site_here(site, name, policy, a.device)
    book = ledger.tensor(a.device)
    if not torch.is_grad_enabled():
        return product(a, False, b, tb, bias, book, site, "fprop", policy.text)
    return CheckedProduct.apply(a, b, bias, tb, book, site, policy.text, None)


def _site_here(site: Tensor | None, name: str, policy: Policy, device: torch.device) -> Tensor:
    if site is None:
        return sites.at(_own_site(name, policy.text, device), device)
    # Elsewhere where the weights came past the module: offloaded, or put into its dictionary.
    return site if site.device == device else sites.here(site, device)


def _own_site(name: str, policy: str, device: torch.device) -> int:
    """The number of a function's own site. A tracer takes the result for a constant and calls this itself, once."""
    site = sites.functional(name, policies.decode(policy).on_uncorrected)
    ledger.make(device)
    sites.as_tensor(site, device)
    return site.index


# What torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton, with abft.
_own_site._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype in (torch.float64, dtype) else t.to(dtype)


def _autocast_weight(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if isinstance(t, torch.nn.Parameter) and t.dtype != torch.float64 else _autocast(t, dtype)


# --- what cannot be checked -----------------------------------------------------------------------------


def why_not(*operands: Tensor, dtypes: Collection[torch.dtype] = floating.UNIT_ROUNDOFF) -> str | None:
    """The reason these operands cannot be checked, in words that end up in ``Report.bypassed``; None if they can."""
    device = None
    for t in operands:
        if type(t) not in _PLAIN:
            if not isinstance(t, Tensor):
                if hasattr(type(t), "__torch_function__"):
                    return type(t).__name__  # torch.fx's Proxy, for one: torch's functions know what to do with it
                raise TypeError(f"operands must be tensors; got {type(t).__name__}")
            if isinstance(t, FakeTensor) and not torch.compiler.is_compiling() and not t.fake_mode.allow_non_fake_inputs:
                return "fake tensor"  # has no numbers, and its mode refuses the ledger's
            if not _is_plain(t):
                return f"tensor subclass {type(t).__name__}"
        if t.layout != torch.strided:
            return f"layout {str(t.layout)[6:]}"
        if t.is_nested:
            return "nested tensor"
        if t.dtype not in dtypes:
            return f"dtype {str(t.dtype)[6:]}"
        if device is None:
            device = t.device
        elif t.device != device:
            raise DeviceError(f"operands lie on different devices: {', '.join(str(t.device) for t in operands)}; move them to one")
    if operands[0].device.type not in _DEVICES:
        return f"device {operands[0].device.type}"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "functorch transform"
        if forward_ad._current_level >= 0:
            return "forward-mode AD"
    return None


def _is_plain(t: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return not is_traceable_wrapper_subclass(t)
    own = getattr(type(t).__torch_function__, "__func__", type(t).__torch_function__)
    ordinary = own in _ORDINARY
    return not is_traceable_wrapper_subclass(t) and (ordinary or isinstance(t, FakeTensor))


def bypassed(reason: str, compute: Any) -> Tensor:
    out = compute()  # first: what torch refuses is no product
    if torch.compiler.is_compiling():
        bypass(ledger.tensor(torch.device("cpu")), reason)
    else:
        ledger.bypass(reason)
    return out


def _check_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """None for a layer's product; in words what torch allows beside it; ShapeError for what torch would refuse."""
    if weight.dim() not in (1, 2):
        raise ShapeError(f"weight must be (out, in); got {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        features = input.shape[-1] if input.dim() else "no"
        hint = "; did you mean weight.T?" if input.dim() and input.shape[-1] == weight.shape[0] else ""
        raise ShapeError(f"weight has {weight.shape[-1]} input features but input has {features}{hint}")
    if weight.dim() == 1:
        return "weight of one dimension"
    if bias is not None and bias.shape != (weight.shape[0],):
        if bias.dim() < 2 and bias.numel() == 1 or bias.dim() >= 2:
            return "bias of another shape"
        raise ShapeError(f"bias must have shape ({weight.shape[0]},), one number per output feature; got {tuple(bias.shape)}")
    return None
