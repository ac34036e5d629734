"""Numbers as bit patterns: views, flips, and integer fingerprints that name a changed element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from abft.native import library

#: The signed integer type of the same width; torch has no unsigned arithmetic for all of them.
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int32: torch.int32,
    torch.int8: torch.int8,
}
#: Numbers in a matrix that a second thread is woken for.
_WORTH_A_THREAD = 1 << 15
WIDTH = {torch.float64: 64, torch.float32: 32, torch.float16: 16, torch.bfloat16: 16, torch.int32: 32, torch.int8: 8}


def as_integers(values: Tensor) -> Tensor:
    """The same memory seen as signed integers of the same width."""
    return values.view(INTEGER[values.dtype])


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: equal bit for bit (so NaN equals itself, and -0 differs from +0)."""
    return as_integers(a) == as_integers(b)


def on_host(values: Tensor) -> np.ndarray:
    """The same memory as an array to read. ``Tensor.numpy`` would make a user's storage unresizable, which FSDP needs."""
    return np.from_dlpack(values)


def readable(values: Tensor) -> bool:
    """Whether compiled code may read numbers where ``data_ptr`` says: no subclass, no wrapper, nothing whose numbers are only implied."""
    return (
        type(values) in (Tensor, torch.nn.Parameter)
        and values.is_cpu
        and torch._C._has_storage(values)
        and not torch._C._are_functorch_transforms_active()
        and not values._is_zerotensor()
        and not values.is_neg()
    )


def total(values: Tensor) -> int:
    """The sum of a tensor's 64-bit words modulo 2**64, in host memory: any one changed bit changes it. The cheapest look."""
    dense = values if values.is_contiguous() else values.mT if values.mT.is_contiguous() else values.contiguous()
    raw = on_host(dense.detach().reshape(-1).view(torch.uint8))
    whole = len(raw) // 8 * 8
    words = raw[:whole].view(np.int64).sum(dtype=np.int64)
    return int(words) + int(raw[whole:].astype(np.int64) @ (256 ** np.arange(len(raw) - whole)))


def total_of_words(values: Tensor) -> int:
    """The sum of a tensor's bit patterns as signed numbers of 32 bits, in host memory; the tensor is dense and of such a type."""
    functions = library.functions()
    if functions is None:
        return int(values.numpy().view(np.int32).sum(dtype=np.int64))
    return functions.abft_total(values.data_ptr(), values.numel())


@dataclass(frozen=True)
class Fingerprint:
    """Per column k of a matrix (N, K): sums of its 16-bit halves over the rows, plain and weighted by n + 1.

    plain, weighted: int64 held modulo 2**32 as int32, shape (halves, K). Two numbers per half are
    enough to name one changed element of a column and to give its old bits back, whatever
    the dtype and however wild the new value is: with d = change of the half, plain moves by d
    and weighted by (n + 1) d.
    """

    plain: Tensor
    weighted: Tensor

    @property
    def nbytes(self) -> int:
        return self.plain.nbytes + self.weighted.nbytes


@dataclass(frozen=True)
class ChangedElement:
    """One element (row, column) of a matrix whose bits differ from what its fingerprint remembers."""

    row: int
    column: int
    bits: int  # the remembered bit pattern, as an unsigned integer of the dtype's width


def _halves(matrix: Tensor) -> Tensor:
    """(N, K) numbers as (N, halves * K) unsigned 16-bit values, half-major, in int32."""
    width = _halves_per_number(matrix)
    pieces = _half_words(matrix).view(matrix.shape[0], matrix.shape[1], width)
    return (pieces.to(torch.int32) & 0xFFFF).permute(2, 0, 1)


def _halves_per_number(matrix: Tensor) -> int:
    return max(1, WIDTH[matrix.dtype] // 16)


def _half_words(matrix: Tensor) -> Tensor:
    """The 16-bit words of a matrix in row-major order. Flat first: a single column counts as contiguous whatever its stride."""
    if matrix.element_size() == 1:  # a byte is one word, its upper half zero
        return matrix.contiguous().reshape(-1).view(torch.uint8).to(torch.int16)
    return as_integers(matrix.contiguous().reshape(-1)).view(torch.int16)


def fingerprint(matrix: Tensor) -> Fingerprint:
    """Fingerprint of a matrix (N, K), any strides; one pass over it. Names elements of up to 2**17 rows for certain."""
    if matrix.device.type == "cpu":
        return _fingerprint_compiled(matrix.detach()) or _fingerprint_numpy(matrix)
    halves = _halves(matrix.detach()).to(torch.int64)
    index = torch.arange(1, matrix.shape[0] + 1, device=matrix.device, dtype=torch.int64)
    return Fingerprint(halves.sum(1).to(torch.int32), (halves * index[:, None]).sum(1).to(torch.int32))


def _fingerprint_compiled(matrix: Tensor) -> Fingerprint | None:
    """The same without a copy of a transposed matrix (abft/native/fingerprint.c); None for what is not compiled."""
    functions = library.functions()
    size = matrix.element_size()
    if functions is None or size not in (2, 4) or not matrix.numel() or 1 not in matrix.stride() or not readable(matrix):
        return None
    row_stride, column_stride = matrix.stride()
    rows, columns = matrix.shape
    adjacent = column_stride != 1 or columns == 1  # rows are
    if adjacent and row_stride != 1:
        return None
    plain, weighted = torch.empty((2, size // 2, columns), dtype=torch.int32, device="cpu").unbind()
    step = column_stride if adjacent else row_stride
    threads = torch.get_num_threads() if wants_threads(matrix.numel()) else 1
    functions.abft_fingerprint(matrix.data_ptr(), rows, columns, step, adjacent, size, plain.data_ptr(), weighted.data_ptr(), threads)
    return Fingerprint(plain, weighted)


def wants_threads(numbers: int) -> bool:
    """Whether a fingerprint of so many numbers is worth waking threads for."""
    return numbers > _WORTH_A_THREAD


def _fingerprint_numpy(matrix: Tensor) -> Fingerprint:
    # Blocks of rows keep the widened copy in cache; integer arithmetic wraps modulo 2**32 on its own.
    rows, columns = matrix.shape
    width = _halves_per_number(matrix)
    plain = np.zeros(columns * width, np.uint32)
    weighted = np.zeros(columns * width, np.uint32)
    whole = on_host(_half_words(matrix.detach())).view(np.uint16).reshape(rows, -1)
    for start in range(0, rows, 64):
        block = whole[start : start + 64].astype(np.uint32)
        block_plain = block.sum(0, dtype=np.uint32)
        plain += block_plain
        weighted += np.einsum("n,nk->k", np.arange(1, len(block) + 1, dtype=np.uint32), block)
        weighted += np.uint32(start) * block_plain
    shape = (columns, width)
    return Fingerprint(
        torch.from_numpy(plain.view(np.int32).reshape(shape).T.copy()),
        torch.from_numpy(weighted.view(np.int32).reshape(shape).T.copy()),
    )


def changed_columns(now: Fingerprint, then: Fingerprint) -> Tensor:
    """bool (K,): columns whose bits are not the remembered ones. Exact up to cancelling changes modulo 2**32."""
    return ((now.plain != then.plain) | (now.weighted != then.weighted)).any(0)


def changed_elements(matrix: Tensor, now: Fingerprint, then: Fingerprint) -> list[ChangedElement] | None:
    """Name the changed elements if every changed column holds exactly one; otherwise None.

    Reads device memory on the host: for the slow path only.
    """
    columns = changed_columns(now, then).nonzero().flatten().cpu().numpy()
    d_plain = (now.plain.cpu().numpy().astype(np.int64) - then.plain.cpu().numpy())[:, columns]
    d_weighted = (now.weighted.cpu().numpy().astype(np.int64) - then.weighted.cpu().numpy())[:, columns]
    rows = matrix.shape[0]
    found = []
    for j, column in enumerate(columns):
        row: int | None = None
        for dp, dw in zip(_wrap(d_plain[:, j]), d_weighted[:, j], strict=True):
            if dp == 0 and dw % 2**32 == 0:
                continue
            n = _row_of(int(dp), int(dw), rows)
            if n is None or (row is not None and n != row):
                return None
            row = n
        if row is None:
            return None
        width = WIDTH[matrix.dtype]
        pattern = int(as_integers(matrix.detach()[row, column].reshape(1).clone()).cpu().numpy()[0]) & ((1 << width) - 1)
        for half, dp in enumerate(_wrap(d_plain[:, j])):
            pattern_half = ((pattern >> (16 * half)) & 0xFFFF) - int(dp)
            if not 0 <= pattern_half <= 0xFFFF:
                return None
            pattern = (pattern & ~(0xFFFF << (16 * half))) | (pattern_half << (16 * half))
        found.append(ChangedElement(row, int(column), pattern))
    return found


def _wrap(values: np.ndarray) -> np.ndarray:
    """Differences modulo 2**32, as the signed number nearest zero."""
    return (values + 2**31) % 2**32 - 2**31


def _row_of(d_plain: int, d_weighted: int, rows: int) -> int | None:
    """The n in [0, rows) with (n + 1) * d_plain = d_weighted modulo 2**32, if a half-word changed alone."""
    if d_plain == 0 or abs(d_plain) > 0xFFFF:
        return None
    # d = o 2**s with o odd determines n + 1 modulo 2**(32 - s), and s < 16: uniquely for up to 2**17 rows.
    s = (d_plain & -d_plain).bit_length() - 1
    modulus = 2 ** (32 - s)
    if d_weighted % 2**s:
        return None
    n = (d_weighted >> s) * pow(d_plain >> s, -1, modulus) % modulus
    return n - 1 if 1 <= n <= rows < n + modulus else None


def restored(matrix: Tensor, elements: list[ChangedElement]) -> Tensor:
    """A copy of ``matrix`` with the remembered bits put back at ``elements``; the original is not written."""
    copy = matrix.detach().clone(memory_format=torch.preserve_format)
    integers = as_integers(copy)
    width = WIDTH[matrix.dtype]
    for element in elements:
        signed = element.bits - (1 << width) if element.bits >= 1 << (width - 1) else element.bits
        integers[element.row, element.column] = signed
    return copy
