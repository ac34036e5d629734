"""The judgement of a product on a CPU in one pass over each operand (abft/native/judge.c)."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abft import checksum, encoding, threshold
from abft.native import library

if TYPE_CHECKING:
    from abft.backends.reference import Plan

#: Of a panel whose products with some rows are kept before those rows are judged: wider ones (very narrow groups of very wide layers) are
#: judged in torch.
MOST_COLUMNS = 1024
KINDS = len(checksum.FULL.kinds)


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "width", "groups", "kinds", "shared_sketch", "dtype")),
        *((name, ctypes.c_void_p) for name in ("signs", "last_signs")),
        *((name, ctypes.c_double * KINDS) for name in ("accumulate2", "round2", "absolute2")),
        ("largest2", ctypes.c_double),
    ]


#: A product as judge.c wants it: panel, bias, its noise, y, a; ldy, rs, ks, rows; statistics; of a fresh panel layout, W, order, threads.
_PRODUCT = struct.Struct("@5P4q3P3q")


@dataclass(frozen=True)
class Judge:
    """What shapes, dtype and policy say about a product's judgement, as judge.c wants it."""

    address: int
    worst: Any  # abft_worst
    work: int  # multiplications per row
    kept: tuple[object, ...]  # what the address leads to


def judge_for(p: Plan, k: int, dtype: torch.dtype) -> Judge | None:
    """The judge of a product over k, or None where it has to be judged in torch."""
    return _judge(p, k, dtype, threshold.coefficients(threshold.with_wide_squares(p.arithmetic), k, p.tested, p.layout.groups.width))


@lru_cache(maxsize=4096)
def _judge(p: Plan, k: int, dtype: torch.dtype, c: threshold.Coefficients) -> Judge | None:
    functions = library.functions()
    layout = p.layout
    if functions is None or dtype not in encoding.DTYPES or layout.dtype != torch.float32 or layout.parts != 1 or not k:
        return None
    if layout.columns > MOST_COLUMNS:
        return None
    groups, kinds = layout.groups, len(p.tested)
    # Of kinds that are not in the panel: nothing beside a bound of one.
    missing = KINDS - kinds
    squares = [(*np.square(values), *[rest] * missing) for values, rest in ((c.accumulate, 0.0), (c.round, 0.0), (c.absolute, 1.0))]
    signs, last = encoding.padded(checksum.signs(groups.width)), encoding.padded(checksum.signs(groups.ragged or groups.width))
    plan = _Plan(
        groups.columns, k, groups.width, groups.count, kinds, int(layout.shared_sketch), encoding.DTYPES[dtype],
        signs.ctypes.data, last.ctypes.data, *((ctypes.c_double * KINDS)(*values) for values in squares), float(c.largest) ** 2,
    )  # fmt: skip
    work = layout.columns * k + 5 * groups.columns
    return Judge(ctypes.addressof(plan), functions.abft_worst, work, (plan, signs, last))


def worst(
    judge: Judge, panel: Tensor, bias: tuple[Tensor, Tensor] | None, y: Tensor, a: Tensor, statistics: int | None = None
) -> float:
    """The largest |residual| / bound over all rows of y (M, N) = a (M, K) Wᵀ; NaN if anything is not finite.

    ``panel`` (C, K) fp32; ``bias``: what it adds to the predictions (groups × kinds) and to the squares of the noise, fp32.
    ``statistics``: the address of an ``Accumulator``, to which a clean product is added.
    """
    rows = a.shape[0]
    row_stride, column_stride = a.stride()
    bias_sums, bias_noise = (0, 0) if bias is None else (bias[0].data_ptr(), bias[1].data_ptr())
    # Bytes of its own for each call, which another thread, or whatever runs in between, cannot write over.
    product = _PRODUCT.pack(
        panel.data_ptr(), bias_sums, bias_noise, y.data_ptr(), a.data_ptr(), y.stride(0), row_stride, column_stride, rows,
        statistics or 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    return judge.worst(judge.address, product, torch.get_num_threads() if rows * judge.work > encoding.WORTH_A_THREAD else 1)


def worst_of_fresh(judge: Judge, y: Tensor, a: Tensor, encoder: int, w: int, ld: int, along_n: bool, encoding_threads: int) -> float:
    """The same by a panel that is made here, of W at ``w`` (encoding.order_of), and dropped."""
    rows = a.shape[0]
    row_stride, column_stride = a.stride()
    product = _PRODUCT.pack(
        0, 0, 0, y.data_ptr(), a.data_ptr(), y.stride(0), row_stride, column_stride, rows, 0, encoder, w, ld, along_n, encoding_threads,
    )  # fmt: skip
    return judge.worst(judge.address, product, torch.get_num_threads() if rows * judge.work > encoding.WORTH_A_THREAD else 1)
