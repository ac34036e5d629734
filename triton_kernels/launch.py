"""The launches of one checked product, in stream order: product, verify, recompute, settle. The host learns nothing from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import MAX_REGISTERS, REPAIR_PROGRAMS
from .gemm import Evidence, Product, fault_argument
from .judgement import Bound, Shape, Sums
from .record import DETAILS, Labels
from .repair import RANGE, recompute
from .settle import settle
from .tiles import matrix
from .verify import verify


@dataclass(frozen=True)
class Judge:
    """How a product is judged: its bound, the order of its panel, and what to do about a suspect row."""

    bound: Bound
    scales: Tensor | None  # (C,) or (B, C), of an fp16 panel
    parts: int
    groups: int
    tiles_per_group: int
    correct: bool
    repeat: bool = False  # recomputation under activation checkpointing


def check(product: Product, evidence: Evidence, judge: Judge, words: Tensor, site: Tensor, labels: Labels,
          faults: Tensor | None = None) -> Tensor:  # fmt: skip
    """Verify, repair, settle. Y is repaired in place; returns the status (B, groups, M) that each row had at first (verify.py).

    words, site: abft.ledger, abft.sites. ``faults`` hit the repetition.
    """
    batch, m, n, k, c = product.sizes
    y, config, device = evidence.y, product.config, product.a.device
    blocks = -(-m // config.bm)
    partials, raw = product.workspace(product.kinds + 1 + RANGE.value)
    status = torch.empty(batch, judge.groups, m, dtype=torch.int8, device=device)
    flags = torch.empty(batch * blocks * judge.groups, dtype=torch.int8, device=device)
    moved = torch.empty(batch, partials.shape[2], m, dtype=torch.int32, device=device)
    details = torch.empty(DETAILS.value, batch * m, dtype=torch.int32, device=device)

    scales_batch = judge.scales.stride(0) if judge.scales is not None and judge.scales.dim() == 2 else 0
    first = Sums(evidence.partials, evidence.raw, judge.scales, scales_batch)
    again = Sums(partials, raw, judge.scales, scales_batch)
    shape = Shape(m, n, k, c, judge.groups, judge.tiles_per_group)
    a, w = matrix(product.a), matrix(product.w)
    order = {"KINDS": product.kinds, "PARTS": judge.parts, "BM": config.bm, "BN": config.bn, "OUT_LARGEST": torch.finfo(y.dtype).max}
    # Rarely more than an early exit: left to itself, the assembler would rather spill than take another register.
    order |= {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}
    verify[(max(1, batch * blocks * judge.groups),)](
        first, judge.bound, shape, status, flags, evidence.summary, words, site, batch, REPEAT=judge.repeat, **order
    )
    operands, layout = product.operands()
    recompute[(max(1, min(sum(product.tiles), REPAIR_PROGRAMS)),)](
        *operands, product.bias, y, product.weights, again, moved, flags, evidence.summary, shape, batch,
        fault_argument(faults), **layout, KINDS=product.kinds, CORRECT=judge.correct, **(config.launch() | {"maxnreg": MAX_REGISTERS}),
    )  # fmt: skip
    settle[(max(1, batch * blocks),)](
        a, w, y, first, again, moved, status, judge.bound, shape, words, site, evidence.summary, details, labels, batch,
        CORRECT=judge.correct, **order,
    )  # fmt: skip
    return status
