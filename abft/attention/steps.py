"""The steps of the fused passes one at a time (abft/native/attention*.c): fp32 on a CPU, the same bits as there; else torch's.

What the fused passes give can so be computed again, struck between two steps, and judged by the specification.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from abft import bits
from abft.encoding import WORTH_A_THREAD
from abft.native import library

#: Keys whose products are one chain of additions (CHUNK in attention.c). Keys in front of a tile's first are counted in these.
CHUNK = 128


class _Factors(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "rows", "columns", "depth")),
        ("a_steps", ctypes.c_int64 * 3), ("w_steps", ctypes.c_int64 * 3), ("y_steps", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("a", "w", "y")),
    ]  # fmt: skip


def compiled(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention that is computed in this type runs compiled."""
    return dtype == torch.float32 and device.type == "cpu" and library.functions() is not None


def threads_for(work: int) -> int:
    return torch.get_num_threads() if work > WORTH_A_THREAD else 1


def multiply(a: Tensor, w: Tensor) -> Tensor:
    """a (heads, M, K) · wᵀ, w (heads, N, K)."""
    functions = library.functions()
    if functions is None or a.dtype != torch.float32 or not (bits.readable(a) and bits.readable(w)) or not a.numel() or not w.numel():
        return torch.bmm(a, w.mT)
    heads, rows, depth = a.shape
    y = torch.empty((heads, rows, w.shape[1]), dtype=torch.float32, device="cpu")
    factors = _Factors(
        heads, rows, w.shape[1], depth, a.stride(), w.stride(), y.stride()[:2], a.data_ptr(), w.data_ptr(), y.data_ptr()
    )
    return y if functions.abft_multiply(ctypes.byref(factors), threads_for(y.numel() * depth)) else torch.bmm(a, w.mT)


def exp_(x: Tensor) -> Tensor:
    """e to the power of x, in place."""
    functions = library.functions()
    if functions is None or x.dtype != torch.float32 or not x.is_contiguous() or not bits.readable(x):
        return x.exp_()
    functions.abft_exponentials(x.data_ptr(), x.numel(), threads_for(x.numel()))
    return x


def row_sums(p: Tensor, q: Tensor | None = None) -> Tensor:
    """Σ p over the last dimension, or Σ p q."""
    functions = library.functions()
    tensors = [t for t in (p, q) if t is not None]
    if functions is None or p.dtype != torch.float32 or not all(t.is_contiguous() and bits.readable(t) for t in tensors):
        return p.sum(-1) if q is None else (p * q).sum(-1)
    sums = torch.empty(p.shape[:-1], dtype=torch.float32, device="cpu")
    addresses = p.data_ptr(), None if q is None else q.data_ptr()
    functions.abft_row_sums(*addresses, sums.numel(), p.shape[-1], sums.data_ptr(), threads_for(p.numel()))
    return sums
