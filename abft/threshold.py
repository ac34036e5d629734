"""Bounds: how large a residual rounding alone can explain.

    S_j[m]  = sqrt( Σ_n Y² + c_j² + h² )                     h² the sketched uncancelled norm
    τ_j[m]  = w̄_j · ( U · κ_j · S_j  +  7/√3 · u_out · sqrt(Σ_n Y²)  +  7 · √(G/12) · q_out  +  τ_abs )
    suspect = ~( |r_j - c_j| <= τ_j ) | ~( τ_j < largest )

κ = κ₀ g + T/2 with T = K / L accumulation steps and g = √(G/512) ≥ 1 for the summation over a group's G columns; ones:
κ₀ g + G/16 + 1.5 T; a softmax probability as operand: 2 T. κ₀ is 16 for tensor cores, 48 for sequential fma. The terms
in u_out, and in q_out, the spacing of the type's subnormal numbers, exist only where the result arrives already rounded
to a narrow type.
NaN, Inf and an infinite bound fail closed. Constants and their evidence:
docs/explanation/thresholds.md and bench/results/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from abft import floating, keyweights
from abft.checksum import Groups, Kind, Sums, weight_rms

KAPPA_BASE = 16.0
#: Sequential fma rounds every product: two to three times the noise at equal T (rms z at K=512 1.4 … 2.1 against 0.73). Where one
#: result dominates a row, S rests on five squares (it, and four sketches), and z has the tail of Student's t with five
#: degrees of freedom: κ has to be 40 σ there too.
KAPPA_BASE_FMA = 48.0
KAPPA_SLOPE = 0.5
KAPPA_SLOPE_ONE = 1.5
KAPPA_SLOPE_SOFTMAX = 2.0
#: Summing G columns adds noise of 0.034 √G U S rms (CPU libraries, G = 128 … 8192): inside the base up to this width.
KAPPA_WIDTH = 512
#: Sums of equal results round the same way at every step: worst case u per step of a chain of G/8, measured G/16.
KAPPA_PER_COLUMN_ONE = 1.0 / 16.0
#: Scores of a query and this many keys sum within the base (emulated: 512 … 8,192 keys, largest 4.3 of 20); their sum over more grows as
#: the root of the number of blocks that are added one by one.
KAPPA_KEYS = 8192
#: Of exponents x = s - m, whose m drops out of their sum: largest clean 1.7 of 20 (emulated, with signs).
KAPPA_SHIFT = 20.0
#: Sums of probabilities, by the unit that multiplies and beside it: relative, per accumulation step, and for the sum beside it.
SUM_PER_STEP, SUM_BASE = 3.0, 1e-6
#: Sums of a row of a softmax, or of its gradient, in units for each key: probabilities of equal keys are equal, and a chain of additions of
#: equal numbers rounds them alike, by up to half a unit of its sum. A chain adds what many keys have together (16 lanes, the block of a
#: kernel); measured 69 units at 131,072 equal keys.
KAPPA_PER_KEY = 1.0 / 128
#: Rounding moves a sum over a segment by 0.43 u_out ‖y‖ rms where mantissas are spread, by up to u_out/√3 ‖y‖ where all lie just
#: above a power of two. Seven of the larger are nine of the usual; both are below 1e-11 a check.
ROUNDING_SIGMA = math.sqrt(1.0 / 3.0)
ROUNDING_SIGMAS = 7.0
#: Rounding to a fixed spacing q: uniform in ±q/2.
SPACING_SIGMA = math.sqrt(1.0 / 12.0)


@dataclass(frozen=True)
class Arithmetic:
    """How a unit accumulates: unit of error U, products per accumulation step L, rounding of the delivered result."""

    name: str
    unit: float
    depth: int
    dtype: torch.dtype  # of the accumulator
    base: float = KAPPA_BASE  # κ₀
    output_roundoff: float = 0.0  # u_out, if the result arrives rounded
    output_spacing: float = 0.0  # … and the spacing of that type's subnormal numbers
    softmax_operand: bool = False  # whether the left operand is a softmax probability
    wide_squares: bool = False  # whether squares of fp32 sums are taken in fp64, where they do not underflow

    def __hash__(self) -> int:
        # Looked up several times for each product: of a few numbers, not of everything.
        return hash((self.unit, self.depth, self.base, self.output_roundoff, self.wide_squares))

    @property
    def floor_abs(self) -> float:
        """τ_abs: below this magnitude squares underflow, or numbers do, and rows are effectively unchecked."""
        if self.dtype == torch.float32:
            # Units that flush subnormal operands (AVX-512 BF16 does, always) lose up to 2⁻¹²⁶ Σ|w|: room for a sum of 2²⁶.
            return 2.0**-100 if self.wide_squares else 1e-18
        return 1e-150

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max


# T-FDPA tensor cores (published MMA-Sim model): L products enter one truncated accumulation step.
HOPPER_16 = Arithmetic("hopper16", 2.0**-23, 16, torch.float32)
AMPERE_16 = Arithmetic("ampere16", 2.0**-23, 8, torch.float32)
HOPPER_TF32 = Arithmetic("hopper_tf32", 2.0**-23, 8, torch.float32)
AMPERE_TF32 = Arithmetic("ampere_tf32", 2.0**-23, 4, torch.float32)
# Sequential fused multiply-add (CUDA cores, CPU libraries): calibrated as 16 products a step.
FMA_32 = Arithmetic("fma32", 2.0**-23, 16, torch.float32, KAPPA_BASE_FMA)
FMA_64 = Arithmetic("fma64", 2.0**-52, 16, torch.float64, KAPPA_BASE_FMA)
ARITHMETICS = {a.name: a for a in (HOPPER_16, AMPERE_16, HOPPER_TF32, AMPERE_TF32, FMA_32, FMA_64)}


@lru_cache(maxsize=256)
def with_wide_squares(arithmetic: Arithmetic) -> Arithmetic:
    """The same arithmetic, judged where squares of small numbers do not underflow."""
    return replace(arithmetic, wide_squares=True)


@lru_cache(maxsize=256)
def of_probabilities(arithmetic: Arithmetic) -> Arithmetic:
    """The same arithmetic, for products whose left operand is a softmax probability."""
    return replace(arithmetic, softmax_operand=True)


def rounded(arithmetic: Arithmetic, dtype: torch.dtype) -> Arithmetic:
    """The same accumulation whose result arrives as ``dtype``."""
    if dtype not in (torch.float16, torch.bfloat16):
        return replace(arithmetic, name=f"{arithmetic.name}>{str(dtype)[6:]}")
    info = torch.finfo(dtype)
    return replace(
        arithmetic,
        name=f"{arithmetic.name}>{str(dtype)[6:]}",
        output_roundoff=floating.UNIT_ROUNDOFF[dtype],
        output_spacing=info.smallest_normal * info.eps,
    )


def kappa(arithmetic: Arithmetic, k: int, kind: Kind = "e", *, width: int = KAPPA_WIDTH, softmax_operand: bool = False) -> float:
    """κ for a product over ``k`` products per element, summed over groups of ``width`` columns."""
    slope = KAPPA_SLOPE_ONE if kind == "one" else KAPPA_SLOPE
    if softmax_operand or arithmetic.softmax_operand:
        slope = max(slope, KAPPA_SLOPE_SOFTMAX)
    base = arithmetic.base * max(1.0, math.sqrt(width / KAPPA_WIDTH))
    if kind == "one":
        base += KAPPA_PER_COLUMN_ONE * width
    return base + slope * k / arithmetic.depth


@dataclass(frozen=True)
class Coefficients:
    """What a bound needs besides the sums, per kind: τ_j = accumulate_j · S_j + round_j · sqrt(Σ Y²) + absolute_j."""

    accumulate: tuple[float, ...]
    round: tuple[float, ...]
    absolute: tuple[float, ...]
    largest: float


@lru_cache(maxsize=8192)
def coefficients(arithmetic: Arithmetic, k: int, kinds: tuple[Kind, ...], width: int) -> Coefficients:
    """The bound's coefficients for groups of ``width`` columns."""
    rms = [weight_rms(kind, width) for kind in kinds]
    rounding = [_rounding(arithmetic, kind, width) for kind in kinds]
    return Coefficients(
        tuple(w * arithmetic.unit * kappa(arithmetic, k, _judged_as(kind, width), width=width) for w, kind in zip(rms, kinds, strict=True)),
        tuple(w * r for w, r in zip(rms, rounding, strict=True)),
        tuple(w * (arithmetic.floor_abs + _spacing(arithmetic, kind, width)) for w, kind in zip(rms, kinds, strict=True)),
        arithmetic.largest,
    )


@dataclass(frozen=True)
class AttentionCoefficients:
    """Bounds of a fused attention forward: |Σ w x - c| <= scores · S + shift · |m|; |Σ w O - c_w| <= output_w · S; |ℓ - ℓ'| <= sums · ℓ."""

    scores: float
    shift: float
    output: tuple[float, ...]
    sums: float


@lru_cache(maxsize=8192)
def attention(arithmetic: Arithmetic, e: int, d: int, keys: int, kinds: tuple[Kind, ...]) -> AttentionCoefficients:
    """Of heads of ``e`` columns and values of ``d``, over so many keys. Constants: docs/explanation/attention.md."""
    own = arithmetic.base * max(1.0, math.sqrt(keys / KAPPA_KEYS)) + KAPPA_SLOPE * e / arithmetic.depth
    output = coefficients(of_probabilities(arithmetic), keys, kinds, d).accumulate
    sums = SUM_PER_STEP * arithmetic.unit * keys / arithmetic.depth + SUM_BASE
    # κ was found with signs. Weights w make of errors e_t of the scores Σ w e, at most max|w| times as large whichever of them dominates;
    # what the shift rounds is as large for every key, so there their root mean square counts.
    shift = arithmetic.unit * KAPPA_SHIFT * keyweights.RMS * math.sqrt(keys)
    return AttentionCoefficients(arithmetic.unit * own * keyweights.LARGEST, shift, output, sums)


@dataclass(frozen=True)
class DecodeCoefficients:
    """Bounds of an attention whose number of keys n only the device knows:

    |Σ w x - c| <= (scores · max(1, √(n / 8192)) + slope) · S + shift · √n · |m|;  |Σ w O - c_w| <= (output_w + n · output_slope_w) · S;
    |ℓ - ℓ'| <= (sums + n · sums_slope) · ℓ.
    """

    scores: float
    slope: float
    shift: float
    output: tuple[float, ...]
    output_slope: tuple[float, ...]
    sums: float
    sums_slope: float


@lru_cache(maxsize=256)
def decode(arithmetic: Arithmetic, e: int, d: int, kinds: tuple[Kind, ...]) -> DecodeCoefficients:
    """``attention`` with its number of keys left open."""
    at_none, at_one = (coefficients(of_probabilities(arithmetic), n, kinds, d).accumulate for n in (0, arithmetic.depth))
    return DecodeCoefficients(
        keyweights.LARGEST * arithmetic.unit * arithmetic.base, keyweights.LARGEST * arithmetic.unit * KAPPA_SLOPE * e / arithmetic.depth,
        keyweights.RMS * arithmetic.unit * KAPPA_SHIFT,
        at_none, tuple((b - a) / arithmetic.depth for a, b in zip(at_none, at_one, strict=True)),
        SUM_BASE, SUM_PER_STEP * arithmetic.unit / arithmetic.depth,
    )  # fmt: skip


def _judged_as(kind: Kind, width: int) -> Kind:
    # Groups too narrow for balanced signs carry plain ones, and plain ones keep the truncation bias.
    return "one" if kind == "e" and width < 4 else kind


def _rounding(arithmetic: Arithmetic, kind: Kind, width: int) -> float:
    if not arithmetic.output_roundoff:
        return 0.0
    statistical = ROUNDING_SIGMAS * ROUNDING_SIGMA
    # Equal results round equally: for plain ones only the worst case, u · Σ|y| ≤ u √G ‖y‖, is safe.
    factor = max(statistical, math.sqrt(width)) if _judged_as(kind, width) == "one" else statistical
    return factor * arithmetic.output_roundoff


def _spacing(arithmetic: Arithmetic, kind: Kind, width: int) -> float:
    """What rounding to subnormal numbers does to a sum: their spacing is the same however small they are."""
    statistical = ROUNDING_SIGMAS * SPACING_SIGMA * math.sqrt(width)
    return arithmetic.output_spacing * (max(statistical, width / 2) if _judged_as(kind, width) == "one" else statistical)


def bounds(sums: Sums, c: Coefficients) -> Any:
    """τ with the shape of ``sums.actual``; tensors or numpy arrays, in their own precision."""
    accumulate, rounding, absolute = (_like(values, sums.actual) for values in (c.accumulate, c.round, c.absolute))
    seen = sums.squares[..., None] + sums.predicted * sums.predicted
    scale = (seen + sums.noise2[..., None]) ** 0.5
    tau = accumulate * scale + absolute
    # What was rounded is Y alone: c has no part in that noise, and would double the bound of every other row.
    return tau + rounding * sums.squares[..., None] ** 0.5 if any(c.round) else tau


def _like(values: tuple[float, ...], example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return _on_device(values, example.dtype, example.device)
    return np.array(values, dtype=example.dtype)


@lru_cache(maxsize=4096)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(device)


def suspect(sums: Sums, tau: Any, largest: float) -> Any:
    """True where rounding does not explain the residual: (..., M, groups, kinds). Fails closed."""
    return ~(abs(sums.actual - sums.predicted) <= tau) | ~(tau < largest)


def expected_floor(arithmetic: Arithmetic, k: int, groups: Groups) -> float:
    """The typical floor: smallest single deviation, relative to the row's L2, that the e check flags.

    Assumes rows whose energy is spread evenly over the columns: ‖segment‖ = ‖row‖ √(G/N), c² = ‖segment‖²,
    and a sketch of Σ W² plus four checksums: S = √7 ‖segment‖.
    """
    c = coefficients(arithmetic, k, ("e",), groups.width)
    share = math.sqrt(min(groups.width, max(groups.columns, 1)) / max(groups.columns, 1))
    return (c.accumulate[0] * math.sqrt(7.0) + c.round[0]) * share
