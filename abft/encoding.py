"""Panels of matrices on a CPU in one pass (abft/native/encode.c): what ``checksum.encode`` and ``bias_sums`` compute."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from abft import bits, checksum
from abft.checksum import FRAGMENT, Layout, Panel
from abft.native import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Multiplications that a second thread is woken for.
WORTH_A_THREAD = 1 << 18


class _Layout(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "width", "groups", "kinds", "shared_sketch", "ingress", "dtype", "step")),
        *((name, ctypes.c_void_p) for name in ("weights", "last_weights", "coefficients", "signs", "last_signs")),
        ("share", ctypes.c_double * 4),
    ]


@dataclass(frozen=True)
class Encoder:
    """What encode.c wants to know of a layout; whoever keeps the address keeps this."""

    address: int
    kept: tuple[object, ...]


@lru_cache(maxsize=4096)
def encoder_for(layout: Layout, k: int, dtype: torch.dtype) -> Encoder:
    groups, kinds = layout.groups, layout.form.kinds
    (weights, signs), (last, last_signs) = (_weights(kinds, width) for width in (groups.width, groups.ragged or groups.width))
    # A view of one table for each power of two: the rows of wgrad's panels are tokens, of which there may be any number.
    coefficients = checksum.sketch_coefficients(k, torch.device("cpu")).numpy()
    share = [checksum.weight_rms(kind, groups.width) ** -2 for kind in kinds]
    plan = _Layout(
        groups.columns, k, groups.width, groups.count, len(kinds), int(layout.shared_sketch), int(layout.form.ingress), DTYPES[dtype],
        coefficients.strides[0] // coefficients.itemsize,
        *(table.ctypes.data for table in (weights, last, coefficients, signs, last_signs)), (ctypes.c_double * 4)(*share),
    )  # fmt: skip
    return Encoder(ctypes.addressof(plan), (plan, weights, last, coefficients, signs, last_signs))


@lru_cache(maxsize=256)
def _weights(kinds: tuple[checksum.Kind, ...], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights of a group (kinds, padded width), and those of e, in fp64."""
    weights = padded(np.stack([checksum.column_weights(kind, width) for kind in kinds])).astype(np.float64)
    return weights, weights[0]


def padded(weights: np.ndarray) -> np.ndarray:
    """Weights (…, width) with zeros up to a whole fragment."""
    filled = np.zeros((*weights.shape[:-1], -(-weights.shape[-1] // FRAGMENT) * FRAGMENT), np.float32)
    filled[..., : weights.shape[-1]] = weights
    return filled


def encode(matrix: Tensor, layout: Layout, into: Panel | None = None) -> Panel | None:
    """``checksum.encode`` of a matrix (N, K) on a CPU; None where that has to be done in torch. ``into``: an earlier panel, filled anew."""
    functions = library.functions()
    if functions is None or not is_compiled(matrix, layout):
        return None
    n, k = matrix.shape
    if matrix.stride(1) != 1 and matrix.stride(0) != 1:
        matrix = matrix.contiguous()  # the panel of a copy has to have the same bits
    ld, along_n = order_of(matrix)
    out = torch.empty((layout.columns, k), dtype=torch.float32, device="cpu") if into is None else into.columns
    assert out.shape == (layout.columns, k) and out.is_contiguous()
    threads = torch.get_num_threads() if wants_threads(n, k) else 1
    encoder = encoder_for(layout, k, matrix.dtype)
    failed = functions.abft_encode(encoder.address, matrix.data_ptr(), ld, int(along_n), out.data_ptr(), threads)
    return None if failed else into or Panel(layout, out, None)


def is_compiled(matrix: Tensor, layout: Layout) -> bool:
    """Whether compiled code makes the panel of this matrix, where there is any."""
    return (
        matrix.dim() == 2 and matrix.dtype in DTYPES and bits.readable(matrix) and matrix.numel() > 0
        and layout.dtype == torch.float32 and layout.parts == 1
    )  # fmt: skip


def order_of(matrix: Tensor) -> tuple[int, bool]:
    """(numbers from one row to the next, or from one column to the next; whether it is columns) of a matrix in one of the two orders."""
    rows, columns = matrix.stride()
    return (rows, False) if columns == 1 else (columns, True)


def wants_threads(n: int, k: int) -> bool:
    """Whether the panel of a matrix (n, k) is worth waking threads for."""
    return n * k * 5 > WORTH_A_THREAD


def bias_sums(bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """``checksum.bias_sums``, compiled where that can be."""
    functions = library.functions()
    bias = bias.detach()
    if bias.dtype not in DTYPES or not bits.readable(bias) or layout.dtype != torch.float32 or functions is None or bias.stride(0) != 1:
        return checksum.bias_sums(bias, layout)
    sums = torch.empty((layout.groups.count, len(layout.form.kinds)), dtype=torch.float32, device="cpu")
    noise2 = torch.empty(layout.groups.count, dtype=torch.float32, device="cpu")
    functions.abft_bias(encoder_for(layout, 1, bias.dtype).address, bias.data_ptr(), sums.data_ptr(), noise2.data_ptr())
    return sums, noise2
