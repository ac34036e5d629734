"""``Fault``: a fault asked for in words, and its translation into a region and a bit operation on a product at hand."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

from abft import bits
from abft.errors import PolicyError
from abft.faults import ATTENTION_PLACES, Addition, BitOperation, Place, Region, Strike, Target
from abft.policy import ATTENTION_ROLES, ROLES

KINDS = ("nullify", "bitflip", "carry", "nan", "inf", "-inf", "near_inf", "nonfinite", "scale", "stuck_at", "offset")
INTEGER_KINDS = ("nullify", "bitflip", "carry", "stuck_at")
PATTERNS = ("element", "row", "column", "warp", "warp2", "warp4", "warp8", "warp16", "fragment", "tile")
WEIGHTINGS = ("uniform", "lsb")
#: An MMA accumulator fragment, and the result tile that a warp or one SM owns.
FRAGMENT = (16, 8)
TILE = (128, 128)
MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Fault:
    """A fault = what × where × pattern, at which products.

    what: nullify · bitflip · carry (±2^k on the pattern) · nan · inf · -inf · near_inf · nonfinite (one of the four) ·
    scale (by a power of two) · stuck_at (one bit, at 0 or 1) · offset (``amount`` is added; not in the kernels).
    An int8 product knows nullify, bitflip, carry and stuck_at only.
    where: accumulator · operand (a tile of A in shared memory) · output (after the product was rounded; the fused kernel
    has taken its sums by then) · checksum (the check's own accumulators: rows × columns of the panel) · panel (the remembered
    checksums) · weight (its bits in memory, undone at exit). Inside attention also, by the letters of its equations: S, dQ, dK (role qk) ·
    P (after exp), l (its row sums), O, dP, dS, dV (role pv); there a block of queries is a product.
    site: shell pattern of site names; role: fprop, dgrad, wgrad, qk, pv or "*".
    pattern: element · row · column (of all rows) · warp2/4/8/16 (every n-th column of a row in one tile; "warp" draws n) ·
    fragment (16 × 8) · tile (128 × 128).
    index: (row, column) of the first struck element, drawn if None. bits: how many bits a bitflip turns; bit: exactly which one;
    weighting: how bits are drawn ("lsb" favours low ones). call: fires once, at the call-th matching product, unless
    ``probability`` (of every matching product) is given. Raises PolicyError for unknown words.
    """

    what: str
    where: Place = "accumulator"
    _: KW_ONLY
    site: str = "*"
    role: str = "fprop"
    pattern: str = "element"
    index: tuple[int, int] | None = None
    bits: int = 1
    bit: int | None = None
    call: int = 0
    probability: float | None = None
    weighting: str = "uniform"
    amount: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("what", KINDS), ("where", get_args(Place)), ("pattern", PATTERNS),
            ("role", (*sorted(ROLES | ATTENTION_ROLES), "*")), ("weighting", WEIGHTINGS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise PolicyError(f"Fault.{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not (_is_count(self.bits) and self.bits and _is_count(self.call) and (self.bit is None or _is_count(self.bit))):
            raise PolicyError(f"Fault needs bits >= 1, bit >= 0 and call >= 0; got bits={self.bits}, bit={self.bit}, call={self.call}")
        if self.index is not None and not (
            isinstance(self.index, Sequence) and len(self.index) == 2 and all(_is_count(i) for i in self.index)
        ):
            raise PolicyError(f"Fault.index must be (row, column), two whole numbers, or None; got {self.index!r}")
        if not math.isfinite(self.amount) or (self.amount != 0) != (self.what == "offset"):
            raise PolicyError(
                f"Fault.amount is what 'offset' adds, finite and not 0, and belongs to no other fault; got {self.amount} for {self.what!r}"
            )
        if self.probability is not None and not 0 <= self.probability <= 1:
            raise PolicyError(f"Fault.probability must lie in [0, 1]; got {self.probability}")

    def matches(self, target: Target) -> bool:
        """Whether a product is one this fault may strike."""
        return self.matches_one(target.site, target.role, target.weight is not None, target.places)

    def matches_one(self, site: str, role: str, of_weight: bool, places: tuple[str, ...] = ()) -> bool:
        """The same, of a product known by its site, its role, whether a weight is in it, and its own places."""
        if self.role not in ("*", role) or not fnmatch.fnmatchcase(site, self.site):
            return False
        if self.where in ATTENTION_PLACES:
            return self.where in places
        return self.where not in ("weight", "panel") or of_weight

    def replace(self, **changes: Any) -> Fault:
        return replace(self, **changes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def strike_of(fault: Fault, target: Target, rng: np.random.Generator) -> Strike:
    """The concrete strike of a fault on a product: draws what the fault leaves open."""
    if fault.where == "weight":
        assert target.weight is not None
        shape, dtype, batch = (target.weight.shape[-2], target.weight.shape[-1]), target.weight.dtype, 0
    elif fault.where == "panel":
        assert target.panel is not None
        shape, dtype, batch = (target.panel.shape[-2], target.panel.shape[-1]), target.panel.dtype, 0
    else:
        columns = {"operand": target.depth, "checksum": target.checks, "l": 1}.get(fault.where, target.columns)
        output = target.output or target.dtype
        dtypes = {"operand": target.dtype, "accumulator": target.accumulator, "output": output, "checksum": target.check}
        shape = (target.rows, columns)
        if fault.where == "P":  # queries × keys, the left operand of O, and transposed that of dV
            shape = (target.rows, target.depth) if "O" in target.places else (target.depth, target.rows)
        dtype = dtypes.get(fault.where, target.accumulator)
        batch = int(rng.integers(target.batch))
    region = _region(fault, shape, batch, rng)
    operation = _operation(fault, dtype, rng)
    tile0 = int(rng.integers(-(-target.columns // TILE[1]))) * TILE[1]
    return Strike(fault.where, region, operation, tile0, min(tile0 + TILE[1], target.columns))


def _region(fault: Fault, shape: tuple[int, int], batch: int, rng: np.random.Generator) -> Region:
    rows, columns = shape
    if fault.index is not None:
        r, c = fault.index
        if not (0 <= r < rows and 0 <= c < columns):
            raise PolicyError(f"Fault.index {fault.index} lies outside the struck matrix {shape} (where={fault.where!r})")
    else:
        r, c = int(rng.integers(rows)), int(rng.integers(columns))
    if fault.pattern == "element":
        return Region(r, r + 1, c, c + 1, 1, batch)
    if fault.pattern == "row":
        return Region(r, r + 1, 0, columns, 1, batch)
    if fault.pattern == "column":
        return Region(0, rows, c, c + 1, 1, batch)
    if fault.pattern.startswith("warp"):
        stride = int(fault.pattern[4:]) if fault.pattern != "warp" else int(rng.choice([2, 4, 8, 16]))
        start = c // TILE[1] * TILE[1]
        return Region(r, r + 1, start + c % stride if start + c % stride < columns else start, min(start + TILE[1], columns), stride, batch)
    height, width = FRAGMENT if fault.pattern == "fragment" else TILE
    r, c = r // height * height, c // width * width
    return Region(r, min(r + height, rows), c, min(c + width, columns), 1, batch)


def _operation(fault: Fault, dtype: torch.dtype, rng: np.random.Generator) -> BitOperation | Addition:
    if not dtype.is_floating_point:
        return _integer_operation(fault, dtype, rng)
    width, mantissa = bits.WIDTH[dtype], MANTISSA[dtype]
    exponent_ones = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    what = fault.what if fault.what != "nonfinite" else str(rng.choice(["nan", "inf", "-inf", "near_inf"]))
    fixed = {
        "nullify": 0,
        "nan": exponent_ones | 1 << (mantissa - 1),
        "inf": exponent_ones,
        "-inf": exponent_ones | 1 << (width - 1),
        "near_inf": exponent_ones - (1 << mantissa) | ((1 << mantissa) - 1),
    }
    if what in fixed:
        return BitOperation(0, fixed[what], 0)
    if what == "offset":
        return Addition(fault.amount)
    if what == "scale":
        return BitOperation(-1, 0, int(rng.choice([-1, 1])) * (int(rng.integers(1, 5)) << mantissa))
    return _on_bits(fault, width, rng)


def _integer_operation(fault: Fault, dtype: torch.dtype, rng: np.random.Generator) -> BitOperation:
    if fault.what == "nullify":
        return BitOperation(0, 0, 0)
    if fault.what not in INTEGER_KINDS:
        raise PolicyError(
            f"Fault.what={fault.what!r} needs a float to strike, and the {fault.where} of this product is {str(dtype)[6:]}; "
            f"whole numbers know {', '.join(INTEGER_KINDS)}"
        )
    return _on_bits(fault, bits.WIDTH[dtype], rng)


def _on_bits(fault: Fault, width: int, rng: np.random.Generator) -> BitOperation:
    """What is the same on every pattern of bits: bitflip, stuck_at, carry."""
    if fault.what == "bitflip":
        mask = 0
        for bit in _draw_bits(fault, width, rng):
            mask |= 1 << bit
        return BitOperation(-1, mask, 0)
    if fault.what == "stuck_at":
        bit = _draw_bits(fault.replace(bits=1), width, rng)[0]
        return BitOperation(~(1 << bit), int(rng.integers(2)) << bit, 0)
    sign = int(rng.choice([-1, 1]))
    k = fault.bit if fault.bit is not None else int(rng.integers(width - 2))
    return BitOperation(-1, 0, sign << k if sign > 0 else -(1 << k))


def _draw_bits(fault: Fault, width: int, rng: np.random.Generator) -> list[int]:
    if fault.bit is not None:
        if fault.bit >= width:
            raise PolicyError(f"Fault.bit {fault.bit} does not exist in a {width}-bit number")
        rest = [b for b in range(width) if b != fault.bit]
        return [fault.bit, *(int(b) for b in rng.choice(rest, min(fault.bits, width) - 1, replace=False))]
    weight = np.arange(width, 0, -1, dtype=float) if fault.weighting == "lsb" else np.ones(width)
    return [int(b) for b in rng.choice(width, min(fault.bits, width), replace=False, p=weight / weight.sum())]
