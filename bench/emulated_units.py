"""The kernels themselves on emulated tensor cores: Triton's interpreter, whose matrix products the emulator computes.

Other things that the interpreter does otherwise than a GPU, and that decide about rounding, are put right while it lasts: fp32 rounds to
bf16 as the hardware does (the interpreter cuts off), bf16 operands are multiplied as numbers (it multiplies their bits), and exp2 is wrong
by as much as the unit that computes it may be. Attention has the blocks of the architecture, products the interpreter's tiles (no bit of
a sum depends on them: K is summed in steps of the unit's own depth); both have its bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.emulator import MODELS
from bench.tensor_core import TensorCore

#: architecture → the emulator's model of its 16-bit products.
ARCHITECTURES = {80: "ampere16", 90: "hopper16"}
#: Relative error of ex2.approx.ftz.f32, which Triton's exp2 becomes: at most two units in the last place.
EXP2_ERROR = np.float32(2.0**-22)
_GOLDEN = np.uint32(0x9E3779B9)


@contextmanager
def tensor_cores(core: TensorCore, architecture: int) -> Iterator[None]:
    """While it lasts, 16-bit kernels that are interpreted compute as those of an architecture do."""
    from abft.triton_kernels import attention_gradients, configs
    from triton.runtime.interpreter import InterpreterBuilder

    from abft.backends import triton as backend
    from abft.backends import triton_attention, triton_attention_backward, triton_decode

    builder: dict[str, Any] = {
        "create_dot": _dot_of(core, ARCHITECTURES[architecture]),
        "cast_impl": _cast_of(InterpreterBuilder.cast_impl),
        "create_exp2": lambda self, x: self.unary_op(x, _exp2),
    }
    arithmetic = backend.ARITHMETIC[architecture, "16-bit"]

    def choice(e: int, d: int, dtype: torch.dtype, device: torch.device, laden: bool = False) -> tuple[Any, Any]:
        return configs.choose_attention(architecture, "16-bit", max(e, d), laden), arithmetic

    def config_for(_: int | None, dtype: torch.dtype, columns: int, laden: bool = False) -> Any:
        return original(architecture, dtype, columns, laden)

    original = attention_gradients.config_for
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(InterpreterBuilder, **builder))
        stack.enter_context(mock.patch.object(backend, "_interpreter_unavailable", lambda dtype: None))
        stack.enter_context(mock.patch.object(triton_attention, "_choice", choice))
        stack.enter_context(mock.patch.object(attention_gradients, "config_for", config_for))
        stack.enter_context(mock.patch.dict(backend.ARITHMETIC, {(None, "16-bit"): arithmetic}))
        triton_decode._arithmetic.cache_clear()
        triton_attention_backward._bounds.cache_clear()
        backend.plan.cache_clear()
        try:
            yield
        finally:
            triton_decode._arithmetic.cache_clear()
            triton_attention_backward._bounds.cache_clear()
            backend.plan.cache_clear()


def _dot_of(core: TensorCore, model: str) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        x, y = _numbers(a), _numbers(b)
        if a.dtype.scalar.primitive_bitwidth != 16:
            return TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)
        return TensorHandle(_multiply(core, model, x, y, d.data), d.dtype.scalar)

    return create_dot


def _multiply(core: TensorCore, model: str, x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    depth = MODELS[model][0]
    short = -x.shape[1] % depth
    if short:
        x, y = np.pad(x, ((0, 0), (0, short))), np.pad(y, ((0, short), (0, 0)))
    wide = np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(start).all()
    if not wide:  # what is not finite stays so; the emulator does not know it
        with np.errstate(all="ignore"):
            return x @ y + start
    return core.gemm(x, y, model, start)


def _numbers(handle: Any) -> np.ndarray:
    """fp32; a bf16 tensor of the interpreter's is its bits."""
    data = np.ascontiguousarray(handle.data)
    if str(handle.dtype.scalar) == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32)


def _cast_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        if (str(src.dtype.scalar), str(dst_type.scalar)) == ("fp32", "bf16"):
            rounded = torch.from_numpy(np.array(src.data, np.float32)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)
        if (str(src.dtype.scalar), str(dst_type.scalar)) == ("bf16", "fp32"):
            return TensorHandle(_numbers(src), dst_type.scalar)
        return original(self, src, dst_type)

    return cast_impl


def _exp2(x: np.ndarray) -> np.ndarray:
    """2ˣ with an error that depends on x alone, up to EXP2_ERROR; subnormal results are flushed, as the unit does."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32) * _GOLDEN
    error = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    y = np.exp2(x) * (np.float32(1.0) + error * EXP2_ERROR)
    return np.where(y < np.float32(2.0**-126), np.float32(0), y).astype(np.float32)
