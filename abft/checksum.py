"""Checksums of a matrix product Y = A Wᵀ: what is summed, what is predicted, and where they disagree.

    actual    r_j[m, g] = Σ_{n in g} w_j[n] Y[m, n]             summed from the result
    panel     s_j[g, k] = Σ_{n in g} w_j[n] W[n, k]             once per version of the weight
    predicted c_j[m, g] = A[m, :] · s_j[g, :]                   on the same arithmetic as Y
    residual  d_j = r_j - c_j                                   rounding, or a fault

The N columns of Y are cut into groups g; inside a group the weights w_j are

    e    a fixed, balanced random sign per column     (the truncation of tensor cores cancels in it)
    one  1                                            (sees equal errors, which signs may cancel)
    hi   e · (2⌊n/16⌋ - (⌈G/16⌉ - 1))                 (with lo: where the error is)
    lo   e · (2(n mod 16) - 15)

and *sketches*, random columns whose products estimate the uncancelled norm of the operands,
which is the scale of the rounding noise. Source of the layout: docs/explanation/checksums.md.

Everything here is a pure function of tensors, on any device; the arithmetic on sums also
accepts numpy arrays. Nothing reads the device from the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from abft import floating

Kind = Literal["e", "one", "hi", "lo"]

SKETCHES = 4  # fewer, and the tail of the estimate explodes (numerics study: max z 62 with two, 6.9 with seven)
FRAGMENT = 16  # columns of one radix digit of the location, and of one MMA fragment
SIGN_SEED = 20260
SKETCH_SEED = 20261
#: Rows of a matrix widened to fp64 together while its panel is built: they stay in the cache.
ROWS_AT_A_TIME = 256
#: Narrower than this a group cannot balance its signs; plain ones, and recomputation instead of location.
MIN_SIGNED_WIDTH = 4


@dataclass(frozen=True)
class Groups:
    """Columns of the result under one check: all groups ``width`` wide, the last one what remains."""

    columns: int
    width: int

    @staticmethod
    def near_equal(columns: int, target: int, unit: int = FRAGMENT) -> Groups:
        """Groups of about ``target`` columns, as equal as multiples of ``unit`` allow."""
        if columns <= target:
            return Groups(columns, max(columns, 1))
        count = -(-columns // target)
        width = -(-columns // (count * unit)) * unit
        return Groups(columns, width)

    @property
    def count(self) -> int:
        return -(-self.columns // self.width)

    @property
    def ragged(self) -> int:
        """Width of the last group if it is narrower than the others, else 0."""
        return self.columns % self.width

    def span(self, group: int) -> tuple[int, int]:
        start = group * self.width
        return start, min(start + self.width, self.columns)


@dataclass(frozen=True)
class Form:
    """Which checksum columns a panel holds. ``full`` sees every tested error pattern; ``lean`` is half-blind to equal pairs."""

    name: Literal["full", "lean"]
    kinds: tuple[Kind, ...]
    ingress: bool  # one ±1 column: Σ ± a over the input itself, for the producer to compare with


FULL = Form("full", ("e", "one", "hi", "lo"), ingress=False)
LEAN = Form("lean", ("e",), ingress=True)
FORMS = {"full": FULL, "lean": LEAN}


# --- weights -----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def signs(width: int) -> np.ndarray:
    """The fixed signs (±1, float32) of a group of ``width`` columns.

    Σε = Σε·hi = Σε·lo = 0 for multiples of 16; other widths come as near as they can (|Σε| ≤ 1).
    Random, then repaired by swaps: no antisymmetric pairs and no Thue–Morse pattern, which would
    cancel equal errors on aligned pairs or quads.
    """
    if width < MIN_SIGNED_WIDTH:
        return np.ones(width, np.float32)
    rng = np.random.default_rng([SIGN_SEED, width])
    eps = np.ones(width, np.int64)
    eps[rng.permutation(width)[: width // 2]] = -1
    hi, lo = _digits(width)
    hi_unit, lo_unit = max(hi.std(), 1.0), lo.std()

    def imbalance(h: Any, low: Any) -> Any:
        return np.abs(h) / hi_unit + np.abs(low) / lo_unit

    for _ in range(400):
        h, low = float((eps * hi).sum()), float((eps * lo).sum())
        if h == 0 and low == 0:
            break
        # Swapping a + with a - keeps Σε and moves the two weighted sums by known amounts.
        plus = rng.choice(np.flatnonzero(eps > 0), 256)
        minus = rng.choice(np.flatnonzero(eps < 0), 256)
        after = imbalance(h - 2 * (hi[plus] - hi[minus]), low - 2 * (lo[plus] - lo[minus]))
        best = int(np.argmin(after))
        if after[best] < imbalance(h, low):
            eps[plus[best]], eps[minus[best]] = -1, 1
    out = eps.astype(np.float32)
    out.setflags(write=False)
    return out


def _digits(width: int) -> tuple[np.ndarray, np.ndarray]:
    """The centred radix-16 digits (hi, lo) of the columns of a group."""
    n = np.arange(width)
    return 2 * (n // FRAGMENT) - (-(-width // FRAGMENT) - 1), 2 * (n % FRAGMENT) - 15


@lru_cache(maxsize=1024)
def column_weights(kind: Kind, width: int) -> np.ndarray:
    """w_kind[n] over one group, float32."""
    eps = signs(width)
    hi, lo = _digits(width)
    table = {"e": eps, "one": np.ones(width, np.float32), "hi": eps * hi, "lo": eps * lo}
    out = table[kind].astype(np.float32)
    out.setflags(write=False)
    return out


@lru_cache(maxsize=1024)
def weight_rms(kind: Kind, width: int) -> float:
    """w̄: root mean square of a kind's weights over its group, at least 1 so that it can divide."""
    return max(float(np.sqrt(np.mean(column_weights(kind, width).astype(np.float64) ** 2))), 1.0)


@lru_cache(maxsize=256)
def weights(kinds: tuple[Kind, ...], width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of several kinds over one group: (kinds, width)."""
    stacked = np.stack([column_weights(kind, width) for kind in kinds])
    return torch.from_numpy(stacked).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _rms(kinds: tuple[Kind, ...], width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([weight_rms(kind, width) for kind in kinds], dtype=dtype).to(device)


@lru_cache(maxsize=64)
def _sketch_coefficients(length: int, device: torch.device) -> Tensor:
    rng = np.random.default_rng([SKETCH_SEED, length])
    magnitude = rng.uniform(0.5, 1.5, (SKETCHES, length)) / 1.041  # rms of U(0.5, 1.5) is 1.0408
    sign = rng.choice([-1.0, 1.0], (SKETCHES, length))
    return torch.from_numpy((magnitude * sign).astype(np.float32)).to(device)


def sketch_coefficients(k: int, device: torch.device) -> Tensor:
    """Fixed random ±U(0.5, 1.5)/1.041 of shape (SKETCHES, k); one table per power of two."""
    return _sketch_coefficients(max(16, 1 << (k - 1).bit_length() if k > 1 else 1), device)[:, :k]


# --- panel -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a panel is laid out: (groups × kinds × parts) checksum columns, then (spread × 4) sketches, then ingress.

    ``parts`` numbers of ``dtype`` carry each checksum. ``shared_sketch``: one set of sketches for
    the whole row instead of one per group (enough where the output rounding dominates).
    """

    groups: Groups
    form: Form
    dtype: torch.dtype
    parts: int
    shared_sketch: bool = False

    def __hash__(self) -> int:
        # Looked up several times for each product: of a few numbers, not of everything.
        return hash((self.groups.columns, self.groups.width, self.parts, self.shared_sketch))

    @property
    def checksum_columns(self) -> int:
        return self.groups.count * len(self.form.kinds) * self.parts

    @property
    def sketch_columns(self) -> int:
        return SKETCHES * (1 if self.shared_sketch else self.groups.count)

    @property
    def columns(self) -> int:
        return self.checksum_columns + self.sketch_columns + (1 if self.form.ingress else 0)

    @property
    def scaled(self) -> bool:
        """fp16 columns carry their own power-of-two scale: unscaled they overflow or go denormal."""
        return self.dtype == torch.float16


@dataclass(frozen=True)
class Memory:
    """By which bits the kernels tell, on the device, whether a panel or its weight has changed (abft.triton_kernels.fingerprint)."""

    integrity: Tensor  # (C, blocks) int32: sums of the panel's own bit patterns
    fingerprint: Tensor | None  # (groups, planes, K) int32: of the weight's; None: of no weight
    known: Tensor | None  # (groups,) int64: the last state of each group of the weight whose changes were counted

    @property
    def nbytes(self) -> int:
        return self.integrity.nbytes + sum(t.nbytes for t in (self.fingerprint, self.known) if t is not None)


@dataclass(frozen=True)
class Panel:
    """The checksum columns of one matrix: ``columns`` (C, K) in the layout's dtype, ``scales`` (C,) fp32 or None."""

    layout: Layout
    columns: Tensor
    scales: Tensor | None
    memory: Memory | None = None

    @property
    def nbytes(self) -> int:
        """Of the columns and their scales."""
        return self.columns.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def encode(matrix: Tensor, layout: Layout) -> Panel:
    """Build the panel of a matrix (N, K) of any strides. Leading batch dimensions are kept."""
    groups, form = layout.groups, layout.form
    wide = floating.ACCUMULATOR[matrix.dtype]
    whole = groups.count - (1 if groups.ragged else 0)
    sums, squares = [], []
    if whole:
        blocks = matrix[..., : whole * groups.width, :].unflatten(-2, (whole, groups.width)).to(wide)
        sums.append(_weighted_rows(blocks, form.kinds, groups.width))
        squares.append(_squares(blocks))
    if groups.ragged:
        block = matrix[..., whole * groups.width :, :].to(wide).unsqueeze(-3)
        sums.append(_weighted_rows(block, form.kinds, groups.ragged))
        squares.append(_squares(block))
    s = torch.cat(sums, -3) if len(sums) > 1 else sums[0]  # (..., groups, kinds, K)
    nu2 = torch.cat(squares, -2) if len(squares) > 1 else squares[0]  # (..., groups, K)
    # ν must include every vector that is checked, else a dominant checksum outgrows its own noise estimate.
    rms = _rms(form.kinds, groups.width, s.device, wide)
    nu2 = nu2 + (s / rms[:, None]).square().sum(-2)
    if layout.shared_sketch:
        nu2 = nu2.sum(-2, keepdim=True)
    k = matrix.shape[-1]
    sketches = nu2.sqrt().unsqueeze(-2) * sketch_coefficients(k, matrix.device).to(wide)
    return _pack(s, sketches, layout)


def _weighted_rows(blocks: Tensor, kinds: tuple[Kind, ...], width: int) -> Tensor:
    """Σ_n w_n W[n] per kind, (..., kinds, K), summed in fp64: sums of equal rows round the same way again and again,
    and a panel's error is in every row it ever judges (measured: z up to 65 for a weight of equal rows, in fp32)."""
    w = weights(kinds, width, blocks.device, torch.float64)
    total = None
    for start in range(0, width, ROWS_AT_A_TIME):
        block = blocks[..., start : start + ROWS_AT_A_TIME, :].to(torch.float64)
        part = torch.matmul(w[:, start : start + ROWS_AT_A_TIME], block)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(blocks.dtype)


#: Rows that are squared at a time: what stays in a cache, and no copy of the whole matrix.
_SQUARED_ROWS = 256


def _squares(blocks: Tensor) -> Tensor:
    """Σ_n of the squares of (..., N, K) over n."""
    if blocks.stride(-2) == 1:
        norm = torch.linalg.vector_norm(blocks, dim=-2)
        return norm * norm
    # Across rows of a row-major matrix torch's norm is 20 times slower than squaring and adding (measured on a CPU).
    pieces = [piece.square().sum(-2) for piece in blocks.split(_SQUARED_ROWS, dim=-2)]
    return pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)


def _pack(s: Tensor, sketches: Tensor, layout: Layout) -> Panel:
    batch = s.shape[:-3]
    k = s.shape[-1]
    extra = sketch_coefficients(k, s.device)[:1].sign().to(s.dtype).expand(*batch, 1, k) if layout.form.ingress else None
    flat_sums, flat_sketches = s.flatten(-3, -2), sketches.flatten(-3, -2)
    scales = None
    if layout.scaled:
        sum_scale = floating.power_of_two_scale(flat_sums)
        sketch_scale = floating.power_of_two_scale(flat_sketches)
        flat_sums, flat_sketches = flat_sums / sum_scale, flat_sketches / sketch_scale
        pieces = [sum_scale.repeat_interleave(layout.parts, -2), sketch_scale]
        if extra is not None:
            pieces.append(torch.ones_like(sketch_scale[..., :1, :]))
        scales = torch.cat(pieces, -2).squeeze(-1)
    columns = flat_sums.to(layout.dtype) if layout.parts == 1 else (floating.split(flat_sums, layout.dtype, layout.parts).flatten(-3, -2))
    pieces = [columns, flat_sketches.to(layout.dtype)] + ([extra.to(layout.dtype)] if extra is not None else [])
    return Panel(layout, torch.cat(pieces, -2).contiguous(), scales)


# --- sums --------------------------------------------------------------------------------------


@dataclass
class Sums:
    """The numbers a judgement needs, one per row and group; tensors or numpy arrays alike.

    actual, predicted: (..., M, groups, kinds) · squares: (..., M, groups) Σ Y² ·
    noise2: (..., M, groups or 1) the sketched square of the uncancelled norm.
    """

    kinds: tuple[Kind, ...]
    actual: Any
    predicted: Any
    squares: Any
    noise2: Any


def actual_sums(y: Tensor, groups: Groups, kinds: tuple[Kind, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(r (..., M, groups, kinds), Σ Y² (..., M, groups)) of a result (..., M, N), in ``dtype``."""
    whole = groups.count - (1 if groups.ragged else 0)
    sums, squares = [], []
    wide = y.to(dtype)
    if whole:
        blocks = wide[..., : whole * groups.width].unflatten(-1, (whole, groups.width))
        sums.append(_weighted(blocks, kinds, groups.width))
        squares.append(torch.linalg.vector_norm(blocks, dim=-1))
    if groups.ragged:
        block = wide[..., whole * groups.width :].unsqueeze(-2)
        sums.append(_weighted(block, kinds, groups.ragged))
        squares.append(torch.linalg.vector_norm(block, dim=-1))
    r = torch.cat(sums, -2) if len(sums) > 1 else sums[0]
    norm = torch.cat(squares, -1) if len(squares) > 1 else squares[0]
    return r, norm * norm


def _weighted(blocks: Tensor, kinds: tuple[Kind, ...], width: int) -> Tensor:
    w = weights(kinds, width, blocks.device, blocks.dtype)
    # One matrix-vector product per kind: a skinny blocks @ w is 2 to 3 times slower on a CPU.
    return torch.stack([torch.mv(blocks.reshape(-1, width), w[j]).view(blocks.shape[:-1]) for j in range(len(kinds))], -1)


def predicted_sums(raw: Tensor, panel: Panel) -> tuple[Tensor, Tensor]:
    """(c (..., M, groups, kinds), noise2 (..., M, groups or 1)) from raw = A · panelᵀ (..., M, C)."""
    layout = panel.layout
    if panel.scales is not None:
        raw = raw * panel.scales.unsqueeze(-2)
    checks, sketches = raw[..., : layout.checksum_columns], raw[..., layout.checksum_columns :]
    sketches = sketches[..., : layout.sketch_columns]
    c = checks.unflatten(-1, (layout.groups.count, len(layout.form.kinds), layout.parts))
    # Smallest part first: the sum keeps what the split kept.
    total = c[..., -1]
    for part in range(layout.parts - 2, -1, -1):
        total = c[..., part] + total
    noise2 = sketches.unflatten(-1, (-1, SKETCHES)).square().mean(-1)
    return total, noise2


def bias_sums(bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """What a bias (N,) adds: (c (groups, kinds), noise2 (groups,)); as one more k with input 1."""
    dtype = floating.ACCUMULATOR[bias.dtype]
    c, squares = actual_sums(bias.detach().unsqueeze(0), layout.groups, layout.form.kinds, dtype)
    rms = _rms(layout.form.kinds, layout.groups.width, c.device, dtype)
    return c[0], squares[0] + (c[0] / rms).square().sum(-1)


# --- location and reconstruction ----------------------------------------------------------------


def locate(d_e: float, d_hi: float, d_lo: float, tolerance: float, width: int, *, rounded: bool = False) -> int | None:
    """The column (inside its group) of a single error with residuals d, or None if no single error explains them.

    Accepts n only if hi and lo are in range and |d_w - w_n d_e| ≤ (τ/8)(w̄ + |w_n|) for both
    (docs/explanation/thresholds, "location"). ``tolerance`` is τ of the e check. Of a result that arrived ``rounded``
    τ/8 is the noise itself: small errors there fit several columns, and then none is named.
    """
    if not (np.isfinite([d_e, d_hi, d_lo]).all() and d_e != 0.0) or width < MIN_SIGNED_WIDTH:
        return None
    digits = -(-width // FRAGMENT)
    hi = round((d_hi / d_e + digits - 1) / 2)
    lo = round((d_lo / d_e + 15) / 2)
    n = hi * FRAGMENT + lo
    if not (0 <= hi < digits and 0 <= lo < FRAGMENT and n < width):
        return None
    for d_w, kind, digit in ((d_hi, "hi", 2 * hi - (digits - 1)), (d_lo, "lo", 2 * lo - 15)):
        window = tolerance / 8 * (weight_rms(kind, width) + abs(digit))  # type: ignore[arg-type]
        if abs(d_w - digit * d_e) > window or (rounded and window > abs(d_e)):
            return None
    return n


def reconstruct(y_row: Tensor, predicted_e: float, column: int, groups: Groups) -> Tensor:
    """The value of one element from its checksum: ε_n (c - Σ_others ε y), the others summed with a select.

    ``y_row`` is one row (N,) of accumulators. Never y - d: the wrong value may be Inf or dwarf the row.
    """
    group = column // groups.width
    start, stop = groups.span(group)
    eps = weights(("e",), stop - start, y_row.device, torch.float64)[0]
    others = y_row[start:stop].to(torch.float64).clone()
    others[column - start] = 0.0
    return eps[column - start] * (predicted_e - torch.dot(eps, others))
