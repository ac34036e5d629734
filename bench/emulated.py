"""The checked kernel on an emulated tensor core: same panel, same K order, same sums, same bounds.

    acc     = X · Wᵀ through the emulator
    sums    = row sums of every 128-column tile in the epilogue's register order, tiles added in order, fp32
    squares = fp32, where they overflow above 1.8e19 as a kernel's do; such rows are judged by the range-safe form
    raw     = X · panelᵀ through the emulator; the panel's checksums summed in fp32 as its kernel sums them
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from abft.triton_kernels import configs
from torch import Tensor

from abft import checksum, floating, threshold
from abft.checksum import FULL, Groups, Layout, Panel, Sums
from bench import families
from bench.emulator import Emulator

TILE = 128
#: Of the four sums that the kernel takes, those that a cheaper epilogue could do with: what it would miss is counted beside.
E_ONE = FULL.kinds[:2]
TF32_MASK = -0x2000  # 13 mantissa bits that the unit does not read
PANEL_ROWS = 64  # rows of W that the panel's kernel adds as a tree


@dataclass(frozen=True)
class Unit:
    """A matrix unit: the emulator's model, the operand type, its parts per checksum, the bound's arithmetic, its group width."""

    name: str
    model: str
    dtype: torch.dtype
    parts: int
    arithmetic: threshold.Arithmetic
    group: int = configs.GROUP

    def operand(self, values: Tensor, family: str = "") -> Tensor:
        """fp32 numbers that the operand type holds."""
        if self.dtype == torch.float32:
            return truncated(values.float())
        return families.fit(values, self.dtype, family).float()


UNITS = {
    u.name: u
    for u in (
        Unit("bf16", "hopper16", torch.bfloat16, 3, threshold.HOPPER_16),
        Unit("fp16", "hopper16", torch.float16, 2, threshold.HOPPER_16),
        Unit("tf32", "hopper_tf32", torch.float32, 2, threshold.HOPPER_TF32, configs.GROUP_TF32),
        Unit("bf16-ampere", "ampere16", torch.bfloat16, 3, threshold.AMPERE_16),
    )
}


def truncated(values: Tensor) -> Tensor:
    """fp32 as the tf32 unit reads it."""
    return (values.contiguous().view(torch.int32) & TF32_MASK).view(torch.float32)


# --- panel ---------------------------------------------------------------------------------------------


def build_panel(w: Tensor, unit: Unit) -> Panel:
    """The panel of W (N, K), operand values in fp32: checksum.encode's numbers, in the panel kernel's order of summation."""
    n, k = w.shape
    groups = Groups.near_equal(n, unit.group, unit=min(TILE, n))
    layout = Layout(groups, FULL, unit.dtype, unit.parts)
    rms = torch.tensor([checksum.weight_rms(kind, groups.width) for kind in FULL.kinds])
    sums, sketches = [], []
    for g in range(groups.count):
        start, stop = groups.span(g)
        weights = checksum.weights(FULL.kinds, stop - start, w.device)
        s = torch.stack([_tree(w[start:stop] * row[:, None]) for row in weights])
        nu2 = _tree(w[start:stop].square()) + (s / rms[:, None]).square().sum(0)
        sums.append(s)
        sketches.append(nu2.sqrt() * checksum.sketch_coefficients(k, w.device))
    return _pack(torch.cat(sums), torch.cat(sketches), layout)


def _tree(rows: Tensor) -> Tensor:
    """Σ over rows in fp32: blocks as trees, blocks in order."""
    total = torch.zeros_like(rows[0])
    for block in rows.split(PANEL_ROWS):
        while len(block) > 1:
            half = len(block) // 2
            odd = block[2 * half :]
            block = torch.cat([block[: 2 * half : 2] + block[1 : 2 * half : 2], odd])
        total = total + block[0]
    return total


def _pack(s: Tensor, sketches: Tensor, layout: Layout) -> Panel:
    if layout.dtype == torch.float32:
        first = truncated(s)
        pieces = torch.stack([first, truncated(s - first)], 1).flatten(0, 1)
        return Panel(layout, torch.cat([pieces, truncated(sketches)]), None)
    if not layout.scaled:
        pieces = floating.split(s, layout.dtype, layout.parts).flatten(0, 1)
        return Panel(layout, torch.cat([pieces, sketches.to(layout.dtype)]).float(), None)
    scale, sketch_scale = floating.power_of_two_scale(s), floating.power_of_two_scale(sketches)
    pieces = floating.split(s / scale, layout.dtype, layout.parts).flatten(0, 1)
    columns = torch.cat([pieces, (sketches / sketch_scale).to(layout.dtype)]).float()
    return Panel(layout, columns, torch.cat([scale.repeat_interleave(layout.parts, 0), sketch_scale])[:, 0])


# --- product and judgement -----------------------------------------------------------------------------


@dataclass
class Checks:
    """|residual| / bound per row, group and kind (Inf: unexplained and without a ratio); rows judged by the range-safe form.

    floor: per row the smallest wrong element that ε must show, relative to the row's L2 norm, as ``CheckResult.floor``; Inf
    where the bound is not finite.
    """

    ratio: np.ndarray
    floor: np.ndarray
    range_safe: int = 0

    @property
    def suspect(self) -> np.ndarray:
        return self.suspect_by(self.ratio.shape[-1])

    def suspect_by(self, kinds: int) -> np.ndarray:
        """Rows that the first so-many kinds do not explain."""
        return ~(self.ratio[..., :kinds] <= 1.0).all((1, 2))


class Product:
    """A weight with its panel on one emulated unit."""

    def __init__(self, emulator: Emulator, unit: Unit, w: Tensor, kinds: tuple[checksum.Kind, ...] = FULL.kinds) -> None:
        self.emulator, self.unit, self.w, self.kinds = emulator, unit, w, kinds
        self.panel = build_panel(w, unit)
        self.groups = self.panel.layout.groups
        self._w, self._columns = w.T.contiguous().numpy(), self._padded(self.panel.columns)
        spans = [self.groups.span(g) for g in range(self.groups.count)]
        self.signs, *_ = self._weights = [np.concatenate([checksum.column_weights(kind, b - a) for a, b in spans]) for kind in kinds]

    @staticmethod
    def _padded(columns: Tensor) -> np.ndarray:
        return torch.nn.functional.pad(columns.T, (0, -len(columns) % 16)).contiguous().numpy()

    def multiply(self, x: Tensor, *, slow: bool = False) -> np.ndarray:
        return self.emulator.gemm(x.numpy(), self._w, self.unit.model, slow=slow)

    def predict(self, x: Tensor, *, slow: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(c (M, groups, kinds), h² (M, groups), mean |x·g| (M, groups))"""
        raw = torch.from_numpy(self.emulator.gemm(x.numpy(), self._columns, self.unit.model, slow=slow))[:, : len(self.panel.columns)]
        predicted, noise2 = checksum.predicted_sums(raw, self.panel)
        scaled = raw if self.panel.scales is None else raw * self.panel.scales
        magnitudes = scaled[:, self.panel.layout.checksum_columns :].unflatten(-1, (-1, checksum.SKETCHES)).abs().mean(-1)
        return predicted[..., : len(self.kinds)].numpy(), noise2.numpy(), magnitudes.numpy()

    def sum_rows(self, acc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(r (M, groups, kinds), Σ acc² (M, groups)), fp32."""
        r = np.zeros((len(acc), self.groups.count, len(self.kinds)), np.float32)
        squares = np.zeros(r.shape[:2], np.float32)
        values = torch.from_numpy(acc)
        for g in range(self.groups.count):
            begin, end = self.groups.span(g)
            for start in range(begin, end, TILE):
                stop = min(start + TILE, end)
                for j, weights in enumerate(self._weights):
                    if self.kinds[j] != "one":  # comes along with e
                        one, weighted = self.emulator.row_sums(acc, start, stop, weights[start:stop])
                        r[:, g, j] += weighted
                    if j == 0 and "one" in self.kinds:
                        r[:, g, self.kinds.index("one")] += one
                squares[:, g] += values[:, start:stop].square().sum(1).numpy()
        return r, squares

    def judge(self, acc: np.ndarray, prediction: tuple[np.ndarray, np.ndarray, np.ndarray], k: int) -> Checks:
        """What the kernel and, where squares leave fp32's range, its repair say about every row."""
        predicted, noise2, magnitudes = prediction
        with np.errstate(all="ignore"):
            r, squares = self.sum_rows(acc)
            c = threshold.coefficients(self.unit.arithmetic, k, self.kinds, self.groups.width)
            sums = Sums(self.kinds, r, predicted, squares, noise2)
            tau = threshold.bounds(sums, c)
            ratio = abs(r - predicted) / tau
            ratio[(r == predicted) & (tau >= 0)] = 0.0
            floor = tau[..., 0].max(1) / np.linalg.norm(acc.astype(np.float64), axis=1)
            infinite = ~(tau < c.largest).all((1, 2)) | ~np.isfinite(predicted).all((1, 2))
            if infinite.any():
                safe = self._range_safe(acc[infinite], predicted[infinite], magnitudes[infinite], c)
                ratio[infinite] = abs(r - predicted)[infinite] / safe
            return Checks(np.nan_to_num(ratio, nan=np.inf), np.where(np.isfinite(floor), floor, np.inf), int(infinite.sum()))

    def _range_safe(self, acc: np.ndarray, predicted: np.ndarray, magnitudes: np.ndarray, c: threshold.Coefficients) -> np.ndarray:
        """τ = U κ/2 · (√(max|acc| Σ|acc|) + |c| + √(π/2) mean|x·g|) + 2⁻¹²⁰; NaN where it is not finite."""
        scale = np.zeros(predicted.shape[:2], np.float32)
        for g in range(self.groups.count):
            part = np.abs(acc[:, slice(*self.groups.span(g))])
            scale[:, g] = np.sqrt(part.max(1)) * np.sqrt(part.sum(1, dtype=np.float32))
        scale = scale[..., None] + abs(predicted) + math.sqrt(math.pi / 2) * magnitudes[..., None]
        tau = scale * (np.array(c.accumulate, np.float32) / 2) + np.float32(2.0**-120)
        return np.where(np.isfinite(tau), tau, np.nan)
