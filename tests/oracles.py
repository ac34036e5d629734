"""What the right answer is, and how far from it an honest one may lie. Nothing here uses abft's own arithmetic.

Products in fp64; budgets after "at most twice as wrong, against fp64, as an independent low-precision product, plus one
rounding".
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

#: Half the spacing at one: what one rounding to the type may cost, relatively.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: The type in which a type's products are accumulated.
WIDE = {torch.float64: torch.float64, torch.float32: torch.float32, torch.float16: torch.float32, torch.bfloat16: torch.float32}
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def name_of(value: object) -> str | None:
    """Test ids: dtypes by their short names, tuples as 2x3."""
    if isinstance(value, torch.dtype):
        return NAMES.get(value, str(value)[6:])
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return "x".join(map(str, value)) or "scalar"
    return None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b (+ bias) in fp64."""
    y = torch.matmul(a.detach().double(), b.detach().double())
    return y if bias is None else y + bias.detach().double()


def worst_case(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """γ_K · |a| |b| (+ the bias) and one rounding of the result: no order of summation errs by more (Higham, 3.5).

    For tensors of any dtype that accumulate in fp32 (half precision, fp32) or fp64.
    """
    depth = a.shape[-1] + (bias is not None)
    unit = ROUNDOFF[WIDE[a.dtype]]
    reach = product(a.abs(), b.abs(), None if bias is None else bias.abs())
    return depth * unit / (1 - depth * unit) * reach + ROUNDOFF[a.dtype] * product(a, b, bias).abs() * (1 + 1e-6) + torch.finfo(a.dtype).tiny


def budget(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Twice the error of an independent product (k by k, in the accumulator's type) plus one rounding; per element.

    The independent product's own error may happen to be zero in an element, so its largest over the row counts.
    """
    wide = WIDE[a.dtype]
    exact = product(a, b, bias)
    y = torch.zeros(exact.shape, dtype=wide)
    for k in range(a.shape[-1]):
        y = y + a.detach()[..., :, k : k + 1].to(wide) * b.detach()[..., k : k + 1, :].to(wide)
    y = y if bias is None else y + bias.detach().to(wide)
    error = (y.double() - exact).abs()
    error = error.amax(-1, keepdim=True) if error.shape[-1] else error
    return 2 * error + ROUNDOFF[a.dtype] * exact.abs() * (1 + 1e-6) + torch.finfo(a.dtype).tiny


def assert_within(actual: Tensor, exact: Tensor, allowed: Tensor, what: str = "") -> None:
    """|actual - exact| ≤ allowed in every element; says where it is not."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = (actual.detach().double() - exact).abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements beyond their budget; at {at} {actual[at].item():.9g} for {exact[at].item():.9g}, "
            f"error {error[at].item():.3g}, allowed {allowed[at].item():.3g}"
        )


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN equals itself, -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integer), b.detach().contiguous().view(integer))


def seen_by_one_sum(weights: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors, at most 1, in four columns that cancel in every weighted sum, weights (4, columns), but one: (columns, errors)."""
    rng = np.random.default_rng(kind)
    for _ in range(100):
        columns = rng.choice(weights.shape[1], 4, replace=False)
        w = weights[:, columns].astype(np.float64)
        if abs(np.linalg.det(w)) > 1e-6:
            errors = np.linalg.solve(w, np.eye(4)[kind])
            return columns, errors / np.abs(errors).max()
    raise AssertionError("the four sums depend on each other")


def relative_change(before: Tensor, after: Tensor) -> np.ndarray:
    """‖after - before‖ / ‖before‖ per row, in fp64."""
    before, after = before.detach().double().numpy(), after.detach().double().numpy()
    with np.errstate(all="ignore"):
        return np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(tensors_in(v) for v in value.values()))
    if isinstance(value, list | tuple):
        return list(itertools.chain.from_iterable(tensors_in(v) for v in value))
    return []
