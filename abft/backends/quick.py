"""The judgement of ``reference``, for the product that is almost always clean: as few calls as it takes.

Where a C compiler is found it is one call (``judging``). Else small layers are bound by the number of calls, not by
arithmetic: torch multiplies, sums and takes norms, numpy does the rest on arrays of a few numbers per row. What either says
is what ``reference.judge`` says (tests compare them); rows they do not like are judged again there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from abft import checksum, threshold
from abft.backends import judging
from abft.backends.reference import Plan
from abft.checksum import SKETCHES, Panel

#: Up to this many result elements one skinny product for all sums beats one matrix-vector product per sum.
FEW_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Compiled:
    """A judgement by ``judging``: its judge, the panel, and what the bias adds to the panel's products and their squared noise."""

    judge: judging.Judge
    columns: Tensor
    bias: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Prepared:
    """Everything about a judgement by torch and numpy that does not depend on the product's rows."""

    columns: Tensor
    sums: Tensor  # (tested, width): the weights of the judged sums
    sum_dtype: torch.dtype
    groups: int
    width: int
    kinds: int  # checksum columns per group in the panel; the first ``tested`` are judged
    tested: int
    shared_sketch: bool
    accumulate: np.ndarray
    absolute: np.ndarray
    round: np.ndarray | None
    largest: float
    checks: int  # columns of the panel's raw products: [0, checks) sums, [checks, sketched) sketches
    sketched: int
    bias_columns: Tensor | None  # (C,): what the bias adds to the panel's raw products
    accumulate2: np.ndarray
    absolute2: np.ndarray  # (groups, tested), the bias's share of the noise included
    bias_noise2: np.ndarray | float
    mixture: np.ndarray | None  # (C, tested), for one group: squares of the panel's products → their share of τ²


Quick = Compiled | Prepared


def prepare(panel: Panel, bias: tuple[Tensor, Tensor] | None, k: int, p: Plan, dtype: torch.dtype) -> Quick | None:
    """The row-independent part, or None where only the general judgement fits."""
    return compiled(panel, bias, k, p, dtype) or in_torch(panel, bias, k, p)


def compiled(panel: Panel, bias: tuple[Tensor, Tensor] | None, k: int, p: Plan, dtype: torch.dtype) -> Compiled | None:
    """… compiled; None without a compiler, or for other types than fp32, bf16 and fp16."""
    judge = judging.judge_for(p, k, dtype) if panel.columns.dim() == 2 else None
    if judge is None:
        return None
    if bias is not None:
        sums, noise2 = bias
        bias = sums.contiguous(), noise2.sum(0, keepdim=True) if panel.layout.shared_sketch else noise2.contiguous()
    return Compiled(judge, panel.columns, bias)


def in_torch(panel: Panel, bias: tuple[Tensor, Tensor] | None, k: int, p: Plan) -> Prepared | None:
    """… for torch and numpy; None for batches, ragged or split panels."""
    layout = panel.layout
    groups = layout.groups
    if panel.columns.dim() != 2 or groups.ragged or layout.parts != 1 or panel.scales is not None:
        return None
    tested = len(p.tested)
    c = threshold.coefficients(threshold.with_wide_squares(p.arithmetic), k, p.tested, groups.width)
    dtype = np.float64  # squares of small fp32 numbers must not underflow
    noise2 = 0.0 if bias is None else (bias[1].sum(0, keepdim=True) if layout.shared_sketch else bias[1]).numpy()
    accumulate2: np.ndarray = np.array(c.accumulate, dtype) ** 2
    mixture: np.ndarray | None = None
    if groups.count == 1 and not any(c.round):
        # c_j² of its own kind, and the mean square of all sketches.
        mixture = np.zeros((panel.columns.shape[0], tested), dtype)
        mixture[:tested] = np.diag(accumulate2)
        mixture[layout.checksum_columns :][:SKETCHES] = accumulate2 / SKETCHES
    return Prepared(
        columns=panel.columns,
        sums=checksum.weights(p.tested, groups.width, torch.device("cpu"), p.sum_dtype),
        sum_dtype=p.sum_dtype,
        groups=groups.count,
        width=groups.width,
        kinds=len(layout.form.kinds),
        tested=tested,
        shared_sketch=layout.shared_sketch,
        accumulate=np.array(c.accumulate, dtype),
        absolute=np.array(c.absolute, dtype),
        round=np.array(c.round, dtype) if any(c.round) else None,
        largest=c.largest,
        checks=layout.checksum_columns,
        sketched=layout.checksum_columns + layout.sketch_columns,
        bias_columns=None if bias is None else F.pad(bias[0].flatten(), (0, layout.columns - layout.checksum_columns)),
        accumulate2=accumulate2,
        absolute2=np.array(c.absolute, dtype) ** 2 + accumulate2 * np.reshape(noise2, (-1, 1)).astype(dtype),
        bias_noise2=noise2,
        mixture=mixture,
    )


def worst(y: Tensor, a: Tensor, q: Quick, statistics: int | None = None) -> float:
    """The largest |residual| / bound over all rows of y (M, N) = a (M, K) Wᵀ; NaN if anything is not finite.

    ``statistics``: the address of an ``Accumulator``, to which a compiled judgement adds a clean product.
    """
    if type(q) is Compiled:
        return judging.worst(q.judge, q.columns, q.bias, y, a, statistics)
    assert type(q) is Prepared
    if a.dtype != q.columns.dtype:
        a, y = a.to(q.columns.dtype), y.to(q.sum_dtype)
    if q.mixture is not None and y.numel() <= FEW_ELEMENTS:
        return _worst_in_one_group(y, a, q, q.mixture)
    rows = a.shape[0]
    raw = F.linear(a, q.columns, q.bias_columns).numpy()
    blocks = y.reshape(rows * q.groups, q.width)
    if y.numel() <= FEW_ELEMENTS:
        actual = F.linear(blocks, q.sums).numpy().reshape(rows, q.groups, q.tested)
    else:
        actual = np.stack([torch.mv(blocks, w).numpy() for w in q.sums], -1).reshape(rows, q.groups, q.tested)
    seen = torch.linalg.vector_norm(blocks, dim=1).numpy().reshape(rows, q.groups).astype(np.float64)
    with np.errstate(all="ignore"):
        return _ratio(raw.astype(np.float64), actual, seen * seen, q)


def _worst_in_one_group(y: Tensor, a: Tensor, q: Prepared, mixture: np.ndarray) -> float:
    """The same where one group spans the row, which is what small layers in fp32 have."""
    raw = F.linear(a, q.columns, q.bias_columns).numpy().astype(np.float64)
    residual = F.linear(y, q.sums).numpy().astype(np.float64)
    norms = torch.linalg.vector_norm(y, dim=1, keepdim=True).numpy()
    with np.errstate(all="ignore"):
        residual -= raw[:, : q.tested]
        residual *= residual
        raw *= raw
        norms *= norms
        tau2 = norms * q.accumulate2
        tau2 += raw.dot(mixture)
        tau2 += q.absolute2
        residual /= tau2
        tau2 *= 0.0  # NaN where a bound is infinite, which would divide any residual away
        residual += tau2
        return math.sqrt(residual.item(residual.argmax()))  # argmax stops at NaN, as max does, in a third of its time


def _ratio(raw: np.ndarray, actual: np.ndarray, squares: np.ndarray, q: Prepared) -> float:
    rows = len(raw)
    predicted, sketches = raw[:, : q.checks], raw[:, q.checks : q.sketched]
    predicted = predicted.reshape(rows, q.groups, q.kinds)[:, :, : q.tested]
    sketches = sketches.reshape(rows, -1, SKETCHES)
    noise2 = np.einsum("rgs,rgs->rg", sketches, sketches)
    noise2 *= 1.0 / SKETCHES
    residual = actual - predicted
    seen = predicted * predicted
    if q.round is None:
        # Squares throughout: (a S)² + b² is at most (a S + b)², so what passes here passes there.
        noise2 += squares
        seen += noise2[:, :, None]
        seen *= q.accumulate2
        seen += q.absolute2
        residual *= residual
        residual /= seen
        found = math.sqrt(residual.max())
        return found if seen.max() < q.largest else math.nan
    noise2 += q.bias_noise2
    seen += squares[:, :, None]
    tau = np.sqrt(seen + noise2[:, :, None])
    tau *= q.accumulate
    tau += np.sqrt(squares)[:, :, None] * q.round
    tau += q.absolute
    residual /= tau
    found = float(np.abs(residual, out=residual).max())
    # An infinite bound would divide any residual away.
    return found if tau.max() < q.largest else math.nan
