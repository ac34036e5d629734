"""``verify_matmul``, ``verify_attention``: check what something else computed (a vendor library, a quantised kernel, another node)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abft import checksum, floating, scope, threshold
from abft import policy as policies
from abft.backends import reference
from abft.errors import DeviceError, DtypeError, ShapeError
from abft.policy import PolicyLike


@dataclass(frozen=True)
class CheckResult:
    """suspect: bool (*batch, M). residual, bound: float32 (*batch, M, groups), of the e check.

    floor: float32 (*batch, M): the smallest single deviation that would have been flagged, relative to the row's L2; several
        wrong elements can cancel, and pass above it.
    """

    suspect: Tensor
    residual: Tensor
    bound: Tensor
    floor: Tensor

    @property
    def ok(self) -> bool:
        """Whether no row is suspect; waits for the device."""
        return not bool(self.suspect.any().cpu().numpy())


def verify_matmul(a: Tensor, b: Tensor, c: Tensor, *, policy: PolicyLike = None) -> CheckResult:
    """Check that c = a @ b: a (..., M, K), b (..., K, N), c (..., M, N). Never writes c; does not wait for the device.

    The checksums are those of the operands as given. If c's dtype is fp16 or bf16 it arrived rounded, and the floor is
    coarse (``CheckResult.floor`` says how coarse); narrow groups lower it (``Policy(group=…)``). fp32 products are judged as
    fp32 accumulation; products computed from TF32-truncated operands do not meet that bound. Rows whose operands hold
    NaN or Inf are suspect. Raises ShapeError, DtypeError, DeviceError.
    """
    _check(a, b, c)
    chosen = scope.in_force(None if policy is None else policies.as_policy(policy))
    operand = torch.promote_types(a.dtype, b.dtype)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    p = reference.plan(b.shape[-1], a.shape[-1], c.dtype, chosen.panel, chosen.group)
    wide = p.layout.dtype
    left = a.detach().to(wide).expand(*batch, *a.shape[-2:])
    if b.shape[-1] == 0 or a.shape[-1] == 0:
        return _empty(c, p)
    flat_b = b.detach().mT.to(torch.promote_types(operand, wide))
    panel = reference.build_panel(flat_b.expand(*batch, *flat_b.shape[-2:]) if b.dim() > 2 else flat_b, p.layout)
    # Half-precision results of wide operands are judged by their own rounding; everything sums in fp32 or fp64.
    columns = panel.columns.mT
    raw = torch.matmul(left, columns)
    predicted, noise2 = checksum.predicted_sums(raw, panel)
    kinds = p.layout.form.kinds
    actual, squares = checksum.actual_sums(c.detach(), p.layout.groups, kinds, wide)
    sums = checksum.Sums(kinds, actual, predicted, squares, noise2)
    coefficients = threshold.coefficients(p.arithmetic, a.shape[-1], kinds, p.layout.groups.width)
    tau = threshold.bounds(sums, coefficients)
    suspect = threshold.suspect(sums, tau, coefficients.largest).any(-1).any(-1)
    bound = tau[..., 0].float()
    norm = torch.linalg.vector_norm(c.detach().to(wide), dim=-1)
    return CheckResult(suspect, (actual - predicted)[..., 0].float(), bound, (bound.amax(-1) / norm).float())


#: Scores that are recomputed at a time.
SCORES = 1 << 22


def verify_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None = None, *, attn_mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, policy: PolicyLike = None,
) -> CheckResult:  # fmt: skip
    """Check that out = softmax(query keyᵀ scale + mask) value. Never writes; does not wait for the device.

    query (..., L, E), key (..., S, E), value (..., S, D), out (..., L, D), the same leading dimensions (with ``enable_gqa`` query and out
    a multiple of key's heads); lse (..., L): Σ exp of the row's logits, as its logarithm, if the kernel returned it: it is judged, too.
    Arguments as in ``scaled_dot_product_attention``; no dropout.

    The scores and their softmax are computed again, in fp32 (fp64): Σ_d w_d out_d must be Σ_t P_t Σ_d w_d value_td. That costs the product
    query keyᵀ and its exponentials, not the one with value. Seen, above ``CheckResult.floor``: wrong scores, mask, exponentials, sums and
    output of the other kernel, and value as it read it. Not seen: operands that are wrong for both. The bound allows for scores that were
    accumulated in fp32 in another order, and, where the operands are fp16 or bf16, for probabilities rounded to that type. Rows that see
    no key must be zero. Raises ShapeError, DtypeError, DeviceError.
    """
    scale, group = _check_attention(query, key, value, out, lse, attn_mask, scale, enable_gqa)
    chosen = scope.in_force(None if policy is None else policies.as_policy(policy))
    keys, depth = value.shape[-2:]
    p = reference.plan(depth, keys, out.dtype, chosen.panel, chosen.group)
    wide = p.layout.dtype
    q, k, v = (t.detach().to(wide) for t in (query, key, value))
    k, v = (t.repeat_interleave(group, -3) if group > 1 else t for t in (k, v))
    columns = reference.build_panel(v.mT, p.layout)
    longest = torch.linalg.vector_norm(k, dim=-1).amax(-1, keepdim=True) * abs(scale)
    parts = []
    each = max(1, SCORES // max(1, keys * q.shape[:-2].numel()))
    for start in range(0, q.shape[-2], each):
        rows = slice(start, min(start + each, q.shape[-2]))
        x = torch.matmul(q[..., rows, :] * scale, k.mT)
        x = _masked(x, attn_mask, is_causal, rows)
        m = x.amax(-1, keepdim=True)
        m = torch.where(m == -torch.inf, 0.0, m)
        e = torch.exp(x - m)
        total = e.sum(-1, keepdim=True)
        raw = torch.matmul(e / torch.where(total == 0, 1.0, total), columns.columns.mT)
        size = torch.linalg.vector_norm(q[..., rows, :], dim=-1) * longest + m.squeeze(-1).abs()
        parts.append(torch.cat([raw, (m + total.log()), size.unsqueeze(-1)], -1))
    sums, sizes = torch.cat(parts, -2).split([columns.columns.shape[-2], 2], -1)
    return _judge_attention(out.detach(), None if lse is None else lse.detach(), sums, sizes, query, columns, p)


def _masked(x: Tensor, mask: Tensor | None, is_causal: bool, rows: slice) -> Tensor:
    if is_causal:
        query = torch.arange(rows.start, rows.stop, device=x.device).unsqueeze(1)
        return x.masked_fill(torch.arange(x.shape[-1], device=x.device) > query, -torch.inf)
    if mask is None:
        return x
    mask = mask.detach()
    mask = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
    return x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask.to(x.dtype)


def _judge_attention(
    out: Tensor, lse: Tensor | None, raw: Tensor, sizes: Tensor, query: Tensor, panel: checksum.Panel, p: reference.Plan
) -> CheckResult:
    """raw (..., L, C): P times the panel. sizes (..., L, 2): of each row the recomputed lse, and |scale| ‖q‖ max ‖k‖ + |m|, of which
    rounding moves a logit by some units."""
    keys, (found_lse, size) = panel.columns.shape[-1], sizes.unbind(-1)
    kinds, width = p.layout.form.kinds, p.layout.groups.width
    arithmetic = threshold.of_probabilities(p.arithmetic)
    predicted, noise2 = checksum.predicted_sums(raw, panel)
    actual, squares = checksum.actual_sums(out, p.layout.groups, kinds, p.layout.dtype)
    sums = checksum.Sums(kinds, actual, predicted[..., : len(kinds)], squares, noise2)
    c = threshold.coefficients(arithmetic, keys, kinds, width)
    # A logit that is off by δ changes its probability by δ of it, whatever the other kernel's order of summation.
    logit = arithmetic.unit * threshold.kappa(arithmetic, query.shape[-1]) * size
    rounding = threshold.ROUNDING_SIGMAS * threshold.ROUNDING_SIGMA * floating.UNIT_ROUNDOFF[query.dtype]
    weights = torch.tensor([checksum.weight_rms(kind, width) for kind in kinds], dtype=p.layout.dtype, device=out.device)
    tau = threshold.bounds(sums, c) + (logit + rounding)[..., None, None] * noise2.sqrt()[..., None] * weights
    suspect = threshold.suspect(sums, tau, c.largest).any(-1).any(-1)
    if lse is not None:
        room = logit + arithmetic.unit * (arithmetic.base + found_lse.abs())
        suspect = suspect | ~((lse.to(found_lse.dtype) == found_lse) | ((lse - found_lse).abs() <= room))
    norm = torch.linalg.vector_norm(out.to(p.layout.dtype), dim=-1)
    bound = tau[..., 0].float()
    return CheckResult(suspect, (sums.actual - sums.predicted)[..., 0].float(), bound, (bound.amax(-1) / norm).float())


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None, mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> tuple[float, int]:
    """(scale, query heads to each key head)."""
    named = {"query": query, "key": key, "value": value, "out": out}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"verify_attention: {name} must be a tensor; got {type(t).__name__}")
        if not floating.is_checked(t.dtype) or t.layout != torch.strided:
            raise DtypeError(
                f"verify_attention: {name} must be a strided float tensor (fp16, bf16, fp32, fp64); got {str(t.dtype)[6:]}, {t.layout}"
            )
    if len({t.device for t in [*named.values(), *(t for t in (lse, mask) if t is not None)]}) > 1:
        raise DeviceError("verify_attention: operands lie on several devices; move them to one")
    few = min(t.dim() for t in named.values()) < (3 if enable_gqa else 2)
    group = 1 if few or not enable_gqa or not key.shape[-3] else query.shape[-3] // key.shape[-3]
    leading = () if few else (*key.shape[:-3], key.shape[-3] * group) if enable_gqa else key.shape[:-2]
    fits = not few and (
        query.shape == (*leading, query.shape[-2], key.shape[-1]) and value.shape[:-1] == key.shape[:-1]
        and out.shape == (*query.shape[:-1], value.shape[-1]) and (lse is None or lse.shape == query.shape[:-1])
        and all(t.numel() for t in named.values())
    )  # fmt: skip
    if not fits:
        raise ShapeError(
            "verify_attention needs query (…, L, E), key (…, S, E), value (…, S, D), out (…, L, D), lse (…, L), none of them empty; got "
            + ", ".join(str(tuple(t.shape)) for t in [*named.values(), *([] if lse is None else [lse])])
        )
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale), group


def _empty(c: Tensor, p: reference.Plan) -> CheckResult:
    nothing = c.new_zeros((*c.shape[:-1], p.layout.groups.count), dtype=torch.float32)
    wrong = (c != 0).any(-1)
    return CheckResult(wrong, nothing, nothing, nothing.new_zeros(c.shape[:-1]))


def _check(a: Tensor, b: Tensor, c: Tensor) -> None:
    for name, t in (("a", a), ("b", b), ("c", c)):
        if not isinstance(t, Tensor):
            raise TypeError(f"verify_matmul: {name} must be a tensor; got {type(t).__name__}")
        if not floating.is_checked(t.dtype) or t.layout != torch.strided:
            raise DtypeError(
                f"verify_matmul: {name} must be a strided float tensor (fp16, bf16, fp32, fp64); got {str(t.dtype)[6:]}, {t.layout}"
            )
        if t.dim() < 2:
            raise ShapeError(f"verify_matmul: {name} must have at least two dimensions; got {tuple(t.shape)}")
    if not a.device == b.device == c.device:
        raise DeviceError(f"verify_matmul: operands lie on {a.device}, {b.device} and {c.device}; move them to one device")
    try:
        expected = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    except RuntimeError:
        expected = ()
    if a.shape[-1] != b.shape[-2] or tuple(c.shape) != expected:
        raise ShapeError(
            f"verify_matmul needs a (…, M, K), b (…, K, N), c (…, M, N); got {tuple(a.shape)}, {tuple(b.shape)}, {tuple(c.shape)}"
        )
