"""A new version of a weight, on the way of calls like earlier ones: all that is remembered of it filled anew, in one compiled call.

What ``panels.rebuild`` and ``panels.remember_bias`` do, with the same storage, so that a judgement prepared from it stays as it is.
Every step of a training run makes a new version of every weight; of a narrow one, each call takes longer than its numbers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abft import bits, encoding, panels
from abft.backends.quick import Compiled
from abft.native import library


class _Remembered(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "ld", "rows_adjacent", "bytes")),
        *((name, ctypes.c_void_p) for name in ("layout", "panel")), ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("plain", "weighted")), ("integrity", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias_layout", "bias_values")), ("bias_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "noise2", "noise")), ("groups", ctypes.c_int64),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Renewal:
    """Where everything lies that is remembered of one weight, and of its bias as it was remembered last."""

    run: Any  # abft_renew
    remembered: _Remembered
    address: int
    strides: tuple[int, ...]  # of the weight
    wide: bool  # worth a second thread: the panel
    large: bool  # … the fingerprint
    kept: tuple[object, ...]  # what the addresses lead to

    def leads_to(self, entry: panels.Entry, quick: object) -> bool:
        panel, print_, values, judgement, *_ = self.kept
        of_bias = None if entry.bias is None else entry.bias.values
        return panel is entry.panel and print_ is entry.fingerprint and values is of_bias and judgement is quick


def prepare(entry: panels.Entry, quick: object, source: Tensor, transposed: bool) -> Renewal | None:
    """How to fill an entry anew; None where that takes the whole way: without a compiler, of a weight in no order, or a cast."""
    functions, print_ = library.functions(), entry.fingerprint
    panel = entry.panel
    if (
        functions is None or type(quick) is not Compiled or entry.audited or print_ is None or panel.memory is not None
        or source.dim() != 2 or source.dtype is not entry.dtype or 1 not in source.stride()
        or not encoding.is_compiled(source, panel.layout)
    ):  # fmt: skip
        return None
    matrix = source.detach()
    matrix = matrix.mT if transposed else matrix
    (n, k), (ld, along_n) = matrix.shape, encoding.order_of(matrix)
    columns, bias, shared = panel.columns, entry.bias, panel.layout.shared_sketch
    encoder = encoding.encoder_for(panel.layout, k, matrix.dtype)
    of_bias: tuple[Any, ...] = (None, None, 0, None, None, None)
    bias_encoder = None
    if bias is not None:
        (sums, noise2), used = bias.sums, quick.bias
        in_order = all(t.is_contiguous() for t in (bias.values, sums, noise2))
        if used is None or not in_order or bias.values.dtype not in encoding.DTYPES or used[0].data_ptr() != sums.data_ptr():
            return None
        if not shared and used[1].data_ptr() != noise2.data_ptr():
            return None
        bias_encoder = encoding.encoder_for(panel.layout, 1, bias.values.dtype)
        of_bias = (
            bias_encoder.address, bias.values.data_ptr(), bias.values.nbytes, sums.data_ptr(), noise2.data_ptr(),
            used[1].data_ptr() if shared else None,
        )  # fmt: skip
    remembered = _Remembered(
        n, k, ld, along_n, matrix.element_size(), encoder.address, columns.data_ptr(), columns.numel(), print_.plain.data_ptr(),
        print_.weighted.data_ptr(), 0, *of_bias, panel.layout.groups.count,
    )  # fmt: skip
    return Renewal(
        functions.abft_renew, remembered, ctypes.addressof(remembered), source.stride(), encoding.wants_threads(n, k),
        bits.wants_threads(n * k), (panel, print_, bias and bias.values, quick, encoder, bias_encoder),
    )  # fmt: skip


def renew(
    entry: panels.Entry, quick: object, source: Tensor, transposed: bool, now: tuple[int, ...],
    bias: Tensor | None, bias_now: tuple[int, ...] | None,
) -> bool:  # fmt: skip
    """Whether weight and bias are remembered now as they are: filled anew from what changed on purpose since, and from that alone.

    ``bias``: the one whose values are remembered, of another version or not. What is not changed on purpose is not read: a fault in it
    would be taken for right.
    """
    with panels.lock:
        renewal = entry.renewal
        if renewal is None or not renewal.leads_to(entry, quick):
            renewal = entry.renewal = prepare(entry, quick, source, transposed)
        if renewal is None or renewal.strides != source.stride() or not bits.readable(source):
            return False
        weight_address, bias_address, kept = 0, 0, entry.bias
        if entry.validity != now:
            weight_address = source.data_ptr()
            if not weight_address:
                return False  # nothing lies there now (FSDP2 between its products)
        if bias is not None and kept is None:
            return False  # another thread has another bias
        if bias is not None and kept is not None and kept.validity != bias_now:
            bias_address = bias.data_ptr()
            if not bias_address or bias.dtype is not kept.values.dtype or not bias.is_contiguous() or not bits.readable(bias):
                return False
        threads = torch.get_num_threads()
        if renewal.run(
            renewal.address, weight_address, bias_address, threads if renewal.wide else 1, threads if renewal.large else 1
        ):
            entry.validity = ()  # half of it may have been written: what is remembered now is of no version
            return False
        if weight_address:
            entry.integrity, entry.validity = renewal.remembered.integrity, now
        if bias_address:
            assert kept is not None and bias_now is not None
            entry.bias = panels.RememberedBias(kept.owner, bias_now, kept.values, kept.shape, kept.sums)
        return True
