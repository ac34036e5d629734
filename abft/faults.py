"""What a fault is, once it is decided: a region of a product and what happens to the bits there.

The vocabulary in which users ask for faults is ``abft.inject``; here is the concrete form that backends apply,
and the one place they ask whether something strikes the product at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abft import bits

Place = Literal["accumulator", "operand", "output", "checksum", "panel", "weight", "S", "P", "l", "O", "dP", "dS", "dV", "dQ", "dK"]
PLACES: tuple[Place, ...] = ("accumulator", "operand", "output", "checksum", "panel", "weight")
#: Places inside attention, by the letters of its equations: see abft.attention.
ATTENTION_PLACES: tuple[Place, ...] = ("S", "P", "l", "O", "dP", "dS", "dV", "dQ", "dK")


@dataclass(frozen=True)
class BitOperation:
    """bits' = ((bits & keep) ^ flip) + add, on the integer pattern; covers nullify, flips, stuck bits, NaN, carries, scaling."""

    keep: int = -1
    flip: int = 0
    add: int = 0

    def apply(self, values: Tensor) -> Tensor:
        """The faulty copy of ``values``; any dtype of bits.INTEGER."""
        integers = bits.as_integers(values.contiguous())
        width = bits.WIDTH[values.dtype]
        keep, flip, add = (_signed(v, width) for v in (self.keep, self.flip, self.add))
        return (((integers & keep) ^ flip) + add).view(values.dtype)


@dataclass(frozen=True)
class Addition:
    """values' = values + amount, rounded to their type: an adder that is a little off, always in one direction."""

    amount: float

    def apply(self, values: Tensor) -> Tensor:
        """The faulty copy of ``values``; floating dtypes."""
        return values + self.amount

    def _no_word(self) -> int:
        # What the kernels read of a strike: it is no operation on bits, so it has none of their words.
        raise NotImplementedError("what='offset' strikes on a CPU only: the kernels turn bits; use backend='reference' or another fault")

    keep = flip = add = property(_no_word)


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


@dataclass(frozen=True)
class Region:
    """Rows [row0, row1) × every ``stride``-th column of [col0, col1) of the struck matrix; ``batch`` of a batched product."""

    row0: int
    row1: int
    col0: int
    col1: int
    stride: int = 1
    batch: int = 0

    def of(self, matrix: Tensor) -> Tensor:
        """The struck part, a view of a (M, N) or (B, M, N) matrix."""
        plane = matrix if matrix.dim() == 2 else matrix[self.batch]
        return plane[self.row0 : self.row1, self.col0 : self.col1 : self.stride]


@dataclass(frozen=True)
class Strike:
    """One fault on one product: where, which elements, and what happens to their bits.

    For ``place="operand"`` the region lies in the left operand (rows of A × its k), and the wrong
    values are seen by the result columns [tile0, tile1) only, as one wrong shared-memory tile would be.
    For ``checksum`` it lies in the accumulators of the check: rows of A × columns of the panel, what every row must sum to.
    Inside attention S, O, dP, dQ are the accumulators of that product, dK and dV their sums over tiles, P the exponentials, l their sums
    (one column), dS the gradient of the softmax.
    For ``panel`` it lies in the panel's columns (C, K), for ``weight`` in the weight.
    """

    place: Place
    region: Region
    operation: BitOperation | Addition
    tile0: int = 0
    tile1: int = 2**31 - 1

    def hit(self, matrix: Tensor) -> None:
        """Corrupt the region of ``matrix`` in place."""
        part = self.region.of(matrix)
        part.copy_(self.operation.apply(part))


@dataclass(frozen=True)
class Target:
    """What an injector needs to know of a product to decide: its name, sizes and the tensors a fault may lie in."""

    site: str
    role: str
    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    accumulator: torch.dtype  # of the accumulators a fault may lie in: the dtype itself where the product arrives rounded
    batch: int = 1
    weight: Tensor | None = None
    panel: Tensor | None = None
    output: torch.dtype | None = None  # of the result, where it is not the operands'
    checks: int = 0  # columns of the panel, remembered or not
    check: torch.dtype = torch.float32  # of the check's accumulators
    places: tuple[str, ...] = ()  # inside attention: which of ATTENTION_PLACES belong to it


#: Asked once per product; None outside ``abft.inject.faults``. Set by the injector only.
active: Callable[[Target], list[Strike]] | None = None

#: Called when a StepGuard attempt begins (True) and ends (False); set by the injector only.
on_attempt: Callable[[bool], None] | None = None


#: Writes a fault into a weight's memory, and remembers to undo it; set by the injector only.
on_weight: Callable[[Target, Strike], None] | None = None


def strike_weights(target: Target, hits: tuple[Strike, ...]) -> None:
    """Let the faults that lie in the weight's memory happen."""
    for strike in hits:
        if strike.place == "weight" and on_weight is not None:
            on_weight(target, strike)


def in_checksums(hits: tuple[Strike, ...]) -> bool:
    """Whether any fault lies in the accumulators of a check."""
    return any(strike.place == "checksum" for strike in hits)


def strike_checksums(raw: Tensor, hits: tuple[Strike, ...]) -> None:
    """Apply, in place, the faults that lie in the accumulators (…, rows, columns of the panel) of a check."""
    for strike in hits:
        if strike.place == "checksum":
            strike.hit(raw)


def strikes(target: Target) -> list[Strike]:
    """The faults that hit this product now; empty without an injector."""
    return active(target) if active is not None else []
