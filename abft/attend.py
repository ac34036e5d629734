"""``abft.scaled_dot_product_attention``: torch's signature over the checked operator.

What torch would refuse is handed to torch, whose error it is; what is unusual (other dtypes, subclasses, functorch, another device
than a CPU) is computed by torch and counted in ``Report.bypassed``. On a GPU kernels compute it; what they do not cover is torch's, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from abft import ledger, scope, sites
from abft import policy as policies
from abft.attention import dropout
from abft.attention.problem import Options, Problem
from abft.errors import DeviceError
from abft.functional import _site_here, bypassed, why_not
from abft.ops import attention_again, attention_kernels
from abft.ops.attention import CheckedAttention, attention_of
from abft.policy import Policy, PolicyLike

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, policy: PolicyLike = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.scaled_dot_product_attention``, checked and, if the policy says so, repaired.

    query (..., L, E), key (..., S, E), value (..., S, D), leading dimensions broadcasting; with ``enable_gqa`` query may have a multiple
    of key's heads. attn_mask broadcasts to (..., L, S): bool (True: seen) or added. fp16, bf16, fp32, fp64; computed in fp32 (fp64) and
    rounded once. dropout_p drops by a counter-based mask, other elements than torch's kernel would, of a seed drawn from torch's
    generator: ``torch.manual_seed`` repeats it, and so does recomputation.

    Detects wrong scores, exponentials, row sums, outputs and gradients above the bounds of docs/explanation/attention.md. Does not see
    operands that arrive wrong, the rounding and storing of the result, nor the factor of a soft-cap in the backward. Raises what
    torch raises.
    """
    own = None if policy is None else policies.as_policy(policy)
    return attention_at(None, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, own=own)


@dataclass(frozen=True)
class More:
    """What models ask of attention beyond torch's signature: see ``attention.problem.Options``."""

    offset: int = 0
    window: int | None = None
    softcap: float | None = None


def attention_at(
    site: Tensor | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, own: Policy | None = None, name: str = NAME,
    more: More | None = None,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` at a given site."""
    policy = scope.in_force(own)
    again = None if dropout_p or more else attention_again.key_of(query, key, value, attn_mask, is_causal, scale, enable_gqa, policy)
    if attention_again.is_known(again):
        out = _again(again, site, query, key, value, attn_mask, is_causal, scale, enable_gqa, policy, name)
        if out is not None:
            return out
    query, key, value = (_autocast(t) for t in (query, key, value))
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, policy)
    if reason is None:
        return attend(site, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, policy, name, more, again=again)[0]
    if more is not None and more != More():
        raise NotImplementedError(f"checked attention with {more} does not cover this call ({reason}), and torch has no such argument")

    def by_torch() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return by_torch() if reason == _EMPTY else bypassed(reason, by_torch)


_EMPTY = "nothing is multiplied"


def attention_with_weights_at(
    site: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    *, own: Policy | None, name: str, weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, probabilities as dropout left them, or anything without ``weights``), of operands (B, heads, ..., d) that fit each other."""
    if not weights:
        out = attention_at(site, query, key, value, mask, dropout_p, is_causal, own=own, name=name)
        return out, out
    policy = scope.in_force(own)
    query, key, value = (_autocast(t) for t in (query, key, value))
    reason = _why_not(query, key, value, mask, dropout_p, is_causal, False, policy, weights=True)
    if reason is None:
        return attend(site, query, key, value, mask, dropout_p, is_causal, None, False, policy, name, weights=True)

    def by_torch() -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, dropout_p, is_causal)

    return bypassed(reason, by_torch)  # type: ignore[return-value, arg-type]


def attention_or_none(
    site: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, *, own: Policy | None, more: More, weights: bool, name: str = NAME,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """``attend`` with autocast and the policy in force; None where the caller has to compute this otherwise, and to count it."""
    policy = scope.in_force(own)
    again = None
    if not dropout_p and not weights and more == More():
        again = attention_again.key_of(query, key, value, mask, is_causal, scale, enable_gqa, policy)
    if attention_again.is_known(again):
        out = _again(again, site, query, key, value, mask, is_causal, scale, enable_gqa, policy, name)
        if out is not None:
            return out, out
    query, key, value = (_autocast(t) for t in (query, key, value))
    if _why_not(query, key, value, mask, dropout_p, is_causal, enable_gqa, policy) is not None:
        return None
    return attend(site, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, policy, name, more, weights, again)


def attend(
    site: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool, policy: Policy, name: str, more: More | None = None, weights: bool = False, again: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (..., L, D), probabilities (..., L, S) if ``weights``, else an empty tensor), of operands that fit. again: what the next call
    like this one is known by."""
    device, more, unlike_torchs = query.device, more or More(), query.dim() != 4
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    q, k, v, batch, group = _as_heads(query, key, value, enable_gqa)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    chosen = Options(scale, bool(is_causal), more.offset, more.window, more.softcap, float(dropout_p))
    options = chosen.spelt()
    seed = dropout.draw_seed(torch.device("cpu")) if dropout_p > 0 else None
    mask = None if mask is None else _mask(mask, batch, group)
    site, book = _site_here(site, name, policy, device), ledger.tensor(device)
    if torch.is_grad_enabled():
        out, full = CheckedAttention.apply(q, k, v, mask, seed, options, weights, book, site, policy.text)
    else:
        out, _, full = attention_of(q, k, v, mask)(q, k, v, mask, seed, *options, weights, book, site, policy.text)
        if attention_again.is_new(again):
            attention_again.remember(again, operands, Problem(q, k, v, mask, 0, chosen), policy)
    leading = (*batch[:-1], batch[-1] * group) if enable_gqa else batch
    out = out.reshape(*leading, *out.shape[-2:])
    # Of four dimensions torch's kernel on a CPU leaves it in the memory order of q, too.
    return out.contiguous() if unlike_torchs else out, full.reshape(*leading, *full.shape[-2:]) if weights else full


def _again(
    again: Any, site: Tensor | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, policy: Policy, name: str,
) -> Tensor | None:  # fmt: skip
    """A call that is known, by the shortest way; None: decide anew."""
    number = sites.functional(name, policy.on_uncorrected).index if site is None else sites.number_of(site)
    found = attention_again.take(again, (query, key, value) if mask is None else (query, key, value, mask), number)
    if found is None:
        return None
    out, passed = found
    if passed is None:
        return out
    q, k, v, batch, group = _as_heads(query, key, value, enable_gqa)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    problem = Problem(q, k, v, None if mask is None else _mask(mask, batch, group), 0, Options(scale, bool(is_causal)))
    return attention_again.settle(problem, passed, number, policy).reshape(out.shape)


def _as_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, torch.Size, int]:
    """q (B, H, G, L, E), k (B, H, S, E), v (B, H, S, D), the leading dimensions, G."""
    group = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    query = query.unflatten(-3, (key.shape[-3], group)) if enable_gqa else query.unsqueeze(-3)
    key, value = key.unsqueeze(-3), value.unsqueeze(-3)
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        batch = torch.broadcast_shapes(batch, key.shape[:-3], value.shape[:-3])
        query, key, value = (t.expand(*batch, *t.shape[-3:]) for t in (query, key, value))
    q, k, v = (t if t.dim() == 5 else _five(t) for t in (query, key, value))
    return q, k.squeeze(2), v.squeeze(2), batch, group


def _autocast(t: Tensor) -> Tensor:
    """As torch's autocast would; a float mask stays as it is, and is added in fp32."""
    device = t.device.type if isinstance(t, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(device))


def _five(t: Tensor) -> Tensor:
    """(..., heads, G, n, d) as (B, heads, G, n, d)."""
    while t.dim() < 5:
        t = t.unsqueeze(0)
    return t.flatten(0, -5)


def _mask(mask: Tensor, batch: torch.Size, group: int) -> Tensor:
    """A mask that broadcasts to (..., heads, L, S) with five dimensions that broadcast to (B, heads, G, L, S)."""
    while mask.dim() < len(batch) + 2:
        mask = mask.unsqueeze(0)
    grouped = group > 1 and mask.dim() > 2 and mask.shape[-3] > 1
    mask = mask.unflatten(-3, (batch[-1], group)) if grouped else mask.unsqueeze(-3)
    if mask.dim() > 5 and any(size != 1 for size in mask.shape[:-4]):
        mask = mask.expand(*batch[:-1], *mask.shape[-4:])
    return _five(mask)


# --- what is left to torch -------------------------------------------------------------------------------


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool, policy: Policy,
    weights: bool = False,
) -> str | None:  # fmt: skip
    """Why torch has to compute this attention, and to refuse it where that is what it does; None if it is checked."""
    try:
        reason = why_not(query, key, value)
    except (DeviceError, TypeError):
        return "operands on several devices, or no tensors"
    if reason is None and mask is not None:
        reason = _why_not_mask(query, mask)
    if reason is not None:
        return reason
    if query.device.type == "cuda" or policy.backend == "triton":
        reason = _why_no_kernel(query, key, value, mask, policy, weights)
        if reason is not None:
            return reason
    fit = _operands_fit(query, key, value, enable_gqa) and 0.0 <= dropout_p <= 1.0
    if not (fit and (mask is None or not is_causal and _mask_fits(query, key, value, mask, enable_gqa))):
        return "attention of operands that do not fit"
    return _EMPTY if query.numel() == 0 or key.numel() == 0 or value.numel() == 0 else None


def _why_no_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, policy: Policy, weights: bool) -> str | None:
    """Why no kernel computes what only kernels may compute; DeviceError where the policy insists on them."""
    if not attention_kernels.roles_of(policy):
        return "level off" if policy.level == "off" else "roles qk and pv not in policy"
    reason = attention_kernels.unavailable(query.device, query.dtype, query.shape[-1], value.shape[-1])
    if reason is None and weights:
        reason = "the kernels of attention do not return its probabilities"
    if reason is None and torch.is_grad_enabled() and mask is not None and mask.requires_grad:
        reason = "the kernels of attention compute no gradient of a mask"
    if policy.backend == "vendor" or (reason is not None and policy.backend == "auto"):
        return "attention on a GPU: " + (reason or "a vendor's kernel is not checked")
    if policy.backend == "reference":
        reason = "backend='reference' has no attention on a GPU"
    if reason is not None:
        raise DeviceError(f"backend={policy.backend!r} cannot run this attention: {reason}. 'auto' counts what it leaves to torch.")
    return None


def _why_not_mask(query: Tensor, mask: Tensor) -> str | None:
    if mask.dtype != torch.bool:
        return why_not(query, mask)
    reason = why_not(mask, dtypes=(torch.bool,))
    return reason if reason is not None or mask.device == query.device else "mask on another device"


def _operands_fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether torch would compute this; where in doubt no, and torch decides."""
    if min(query.dim(), key.dim(), value.dim()) < (3 if enable_gqa else 2) or not query.dtype == key.dtype == value.dtype:
        return False
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return False
    if enable_gqa and (key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]):
        return False
    return _batch(query, key, value, enable_gqa) is not None


def _batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> torch.Size | None:
    """The leading dimensions of the result; None where they do not broadcast."""
    heads = query.shape[-3:-2] if enable_gqa else ()
    end = -3 if enable_gqa else -2
    if not heads and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return query.shape[:-2]  # which is to say the same, in a hundredth of the time
    try:
        return torch.broadcast_shapes(*((*t.shape[:end], *heads) for t in (query, key, value)))
    except RuntimeError:
        return None


def _mask_fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, enable_gqa: bool) -> bool:
    whole = (*(_batch(query, key, value, enable_gqa) or ()), query.shape[-2], key.shape[-2])
    if mask.dim() < 2 or mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    try:
        return tuple(torch.broadcast_shapes(mask.shape, whole)) == whole
    except RuntimeError:
        return False
