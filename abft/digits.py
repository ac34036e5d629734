"""Checksums of an int8 product Y = A Wᵀ in int32: whole numbers, so that any difference is a fault.

    actual    r_j[m, g] = Σ_{n in g} w_j[n] Y[m, n]              kinds and weights as in checksum.py
    panel     s_j[g, k] = Σ_{n in g} w_j[n] W[n, k]              = d0 + 2⁸ d1 + 2¹⁶ d2, three int8 columns
    predicted c_j[m, g] = A·d0 + 2⁸ A·d1 + 2¹⁶ A·d2
    residual  r_j - c_j                                           zero, or a fault: there is nothing to round

Three ranges carry this. (1) |s| <= 128 Σ|w_n| must not exceed 8 355 711 = 127 (1 + 2⁸ + 2¹⁶), what three digits hold: ``widest``.
(2) Up to K = 131 071 no sum of K products can leave int32, so both sides are compared as whole numbers; beyond it, torch's
results wrap, and both sides are compared modulo 2³². (3) |r| <= 2³¹ Σ|w_n| < 2⁴⁸: fp64 sums it without rounding.

What stays unseen must cancel in all four kinds. No change of one element does. With K <= 131 071, no change of two does
either (one and e say δ₁ = -δ₂ and equal signs, then hi and lo say the same column), and of three only where columns of one
sign lie on a line in (hi, lo) with errors in the ratio of their distances. Modulo 2³² an even number of flipped top bits in
one row and group is unseen: all weights there have one parity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from abft import checksum
from abft.checksum import FORMS, FRAGMENT, Groups, Kind, Layout, Panel, column_weights

DIGITS = 3
#: The largest number of three digits -128 … 127; the smallest is -8 421 504.
LARGEST = 127 * (1 + 2**8 + 2**16)
#: The largest |x · y| of two int8 numbers, and how many such products an int32 sum holds for certain.
PRODUCT = 2**14
DEPTH = (2**31 - 1) // PRODUCT


@dataclass(frozen=True)
class DigitLayout(Layout):
    """(groups × kinds × three digits) columns and no others: what is exact needs no sketches."""

    @property
    def columns(self) -> int:
        return self.checksum_columns


@lru_cache(maxsize=1024)
def layout(n: int, form: str, group: int, unit: int = FRAGMENT) -> DigitLayout:
    """The panel of N columns in near-equal groups of about ``group`` columns, at most as many as three digits hold."""
    width = min(group, widest(FORMS[form].kinds) // unit * unit)
    return DigitLayout(Groups.near_equal(n, width, unit), FORMS[form], torch.int8, DIGITS)


@lru_cache(maxsize=8)
def widest(kinds: tuple[Kind, ...]) -> int:
    """The widest group, a multiple of 16, of which every checksum fits three digits: 1440 columns (hi), 65 264 for e alone."""
    allowed = LARGEST // 128  # Σ|w|
    if kinds == ("e",):
        return allowed // FRAGMENT * FRAGMENT
    # Σ|hi| over D fragments is 16 ⌊D²/2⌋, and grows fastest: Σ|lo| is 128 D, the others 16 D.
    fragments = 1
    while FRAGMENT * ((fragments + 1) ** 2 // 2) <= allowed:
        fragments += 1
    return fragments * FRAGMENT


# --- panel ----------------------------------------------------------------------------------------


def encode(matrix: Tensor, layout: Layout) -> Panel:
    """The panel of an int8 matrix (N, K) of any strides: columns (C, K) int8."""
    groups = layout.groups
    sums = [_weighted_rows(matrix[slice(*groups.span(g))], layout.form.kinds) for g in range(groups.count)]
    s = torch.stack(sums) if sums else torch.zeros(0, len(layout.form.kinds), matrix.shape[1], dtype=torch.int32, device=matrix.device)
    return Panel(layout, split(s).flatten(0, 2).contiguous(), None)


def _weighted_rows(block: Tensor, kinds: tuple[Kind, ...]) -> Tensor:
    """Σ_n w_n W[n] per kind, (kinds, K) int32; fp64 holds every partial sum."""
    w = checksum.weights(kinds, block.shape[0], block.device, torch.float64)
    total = torch.zeros(len(kinds), block.shape[1], dtype=torch.float64, device=block.device)
    for start in range(0, block.shape[0], checksum.ROWS_AT_A_TIME):
        rows = slice(start, start + checksum.ROWS_AT_A_TIME)
        total += w[:, rows] @ block[rows].to(torch.float64)
    return total.to(torch.int32)


def split(s: Tensor) -> Tensor:
    """int32 (..., K) within three digits as int8 (..., 3, K), the smallest digit first."""
    digits = []
    for _ in range(DIGITS - 1):
        digit = ((s + 128) & 255) - 128
        digits.append(digit)
        s = (s - digit) >> 8
    return torch.stack([*digits, s], -2).to(torch.int8)


# --- sums -----------------------------------------------------------------------------------------


def actual_sums(y: Tensor, groups: Groups, kinds: tuple[Kind, ...]) -> Tensor:
    """r (M, groups, kinds) int64 of a result (M, N) int32, by fp64 sums in which nothing is rounded."""
    out = torch.empty(y.shape[0], groups.count, len(kinds), dtype=torch.int64, device=y.device)
    whole = groups.count - (1 if groups.ragged else 0)
    rows_at_a_time = y.shape[0] if y.device.type != "cpu" else max(1, ELEMENTS_AT_A_TIME // max(groups.columns, 1))
    for start in range(0, y.shape[0], max(rows_at_a_time, 1)):
        rows = slice(start, start + rows_at_a_time)
        wide = y[rows].to(torch.float64)
        if whole:
            blocks = wide[:, : whole * groups.width].unflatten(-1, (whole, groups.width))
            out[rows, :whole] = _weighted(blocks, kinds)
        if groups.ragged:
            out[rows, whole] = _weighted(wide[:, whole * groups.width :], kinds)
    return out


#: Results widened together: they stay in a CPU's cache.
ELEMENTS_AT_A_TIME = 1 << 16


def _weighted(blocks: Tensor, kinds: tuple[Kind, ...]) -> Tensor:
    w = checksum.weights(kinds, blocks.shape[-1], blocks.device, torch.float64)
    return torch.nn.functional.linear(blocks, w).to(torch.int64)


def predicted_sums(raw: Tensor, layout: Layout) -> Tensor:
    """c (M, groups, kinds) int64 from raw = A · panelᵀ (M, C) int32."""
    d = raw.to(torch.int64).unflatten(-1, (layout.groups.count, len(layout.form.kinds), DIGITS))
    return d[..., 0] + (d[..., 1] << 8) + (d[..., 2] << 16)


def residuals(actual: Tensor, predicted: Tensor, depth: int) -> Tensor:
    """r - c, int64; modulo 2³², nearest zero, where results of ``depth`` products may have wrapped."""
    d = actual - predicted
    return d if depth <= DEPTH else ((d + 2**31) & (2**32 - 1)) - 2**31


def agree(y: Tensor, depth: int, product: Callable[[Tensor], Tensor], panel: Panel) -> bool:
    """Whether all sums of a small result, on a host, are right, in as few calls as it takes: small products are bound by those.

    ``product``: A · panelᵀ of the panel's columns. False also where only the sums above can tell.
    """
    groups, kinds = panel.layout.groups, panel.layout.form.kinds
    if groups.ragged or depth > DEPTH or not 0 < y.numel() <= ELEMENTS_AT_A_TIME:
        return False
    w, together = _tables(groups, kinds)
    actual = torch.nn.functional.linear(y.to(torch.float64).view(-1, groups.width), w).view(y.shape[0], -1)
    return torch.equal(actual, product(panel.columns).to(torch.float64) @ together)


@lru_cache(maxsize=256)
def _tables(groups: Groups, kinds: tuple[Kind, ...]) -> tuple[Tensor, Tensor]:
    """Weights (kinds, width), and what puts digits together (columns of the panel, groups × kinds), fp64."""
    place = torch.tensor([[1.0], [2.0**8], [2.0**16]], dtype=torch.float64)
    together = torch.kron(torch.eye(groups.count * len(kinds), dtype=torch.float64), place)
    return checksum.weights(kinds, groups.width, torch.device("cpu"), torch.float64), together


# --- location -------------------------------------------------------------------------------------


def locate(d: np.ndarray, kinds: tuple[Kind, ...], width: int, depth: int) -> int | None:
    """The column, inside a group of ``width``, whose change alone explains the residuals d (kinds,) int64; None if none or several.

    That change is d_one, to the bit. Names every single change up to K = 131 071. Modulo 2³² only those
    that few powers of two divide: hi and lo step by two.
    """
    if "one" not in kinds:
        return None
    table = np.stack([column_weights(kind, width) for kind in kinds]).astype(np.int64)
    change = int(d[kinds.index("one")])
    left = table * change - d[:, None]
    left = left if depth <= DEPTH else left % 2**32
    fitting = np.flatnonzero((left == 0).all(0))
    return int(fitting[0]) if len(fitting) == 1 and change else None
