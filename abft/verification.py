"""``verify_matmul``: check a product that something else computed (a vendor library, a quantised kernel, another node)."""

from __future__ import annotations

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
