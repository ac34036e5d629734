"""The launches of one checked product, in stream order: product, verify, recompute (which arbitrates first), settle; after verify, if
harmless rows may be left as they are, weigh. The host learns nothing from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arbitration import Remembered
from .configs import COMPARED_ROWS, MAX_REGISTERS, REPAIR_BUDGET, REPAIR_PROGRAMS, PanelConfig, multiprocessors
from .gemm import Evidence, Product, fault_argument
from .judgement import Bound, Shape, Sums
from .panel import Rms, batch_stride
from .record import DETAILS, Labels, Units
from .repair import RANGE, recompute
from .residuals import Kept
from .settle import settle
from .tiles import PATCHED, matrix
from .verify import verify
from .weigh import weigh


@dataclass(frozen=True)
class Memory:
    """What is remembered of a panel and of its weight, and how the panel is built."""

    scales: Tensor | None  # (C,) or (B, C), of an fp16 panel
    integrity: Tensor  # (C, blocks) or (B, C, blocks) int32
    fingerprint: Tensor | None  # (groups, planes, K) int32; None: W is no weight
    known: Tensor | None  # (groups,) int64: the last state of each group whose changes were counted
    sketch: Tensor  # (4, K) fp32
    rms: Rms
    config: PanelConfig
    frozen: bool  # any change of the weight is a fault
    transposed: bool  # W is the weight's transpose


@dataclass(frozen=True)
class Judge:
    """How a product is judged: its bound, the order of its panel, and what to do about a suspect row."""

    bound: Bound
    memory: Memory
    parts: int
    width: int  # of a group of columns
    tiles_per_group: int
    correct: bool
    repeat: bool = False  # recomputation under activation checkpointing
    kept: Kept | None = None  # where statistics of residuals are added, if the policy asks for them
    gate: Tensor | None = None  # (weigh.GATE,) int64, of a site whose harmless rows are left as they are; with ``kept``


def check(product: Product, evidence: Evidence, judge: Judge, words: Tensor, site: Tensor, labels: Labels,
          faults: Tensor | None = None) -> Tensor:  # fmt: skip
    """Verify, repair, settle. Y is repaired in place; returns the status (B, groups, M) that each row had at first (verify.py).

    words, site: abft.ledger, abft.sites. ``faults`` hit the repetition.
    """
    batch, m, n, k, c = product.sizes
    y, config, device, groups, memory = evidence.y, product.config, product.a.device, product.groups, judge.memory
    assert memory.fingerprint is None or batch == 1, "a remembered weight is one matrix: its groups are arbitrated once"
    blocks = -(-m // config.bm)
    partials, raw = product.workspace(product.kinds + 1 + RANGE.value)
    status = torch.empty(batch, groups, m, dtype=torch.int8, device=device)
    flags = torch.empty(batch * blocks * groups, dtype=torch.int8, device=device)
    moved = torch.empty(batch, partials.shape[2], m, dtype=torch.int32, device=device)
    details = torch.empty(DETAILS.value, batch * m, dtype=torch.int32, device=device)
    units = Units(evidence.units, product.units())
    patches = None
    if memory.fingerprint is not None:
        patches = torch.empty(groups * 3 * PATCHED.value, dtype=torch.int32, device=device)

    scales_batch = batch_stride(memory.scales)
    first = Sums(evidence.partials, evidence.raw, memory.scales, scales_batch)
    again = Sums(partials, raw, memory.scales, scales_batch)
    shape = Shape(m, n, k, c, groups, judge.tiles_per_group)
    a, w = matrix(product.a), matrix(product.w)
    was = Remembered(memory.scales, scales_batch, memory.fingerprint, product.weights, judge.width)
    panel = matrix(product.panel), matrix(memory.integrity), matrix(memory.sketch), memory.rms
    order = {"KINDS": product.kinds, "PARTS": judge.parts, "BM": config.bm, "BN": config.bn, "OUT_LARGEST": torch.finfo(y.dtype).max}
    # Rarely more than an early exit: left to itself, the assembler would rather spill than take another register.
    order |= {"num_warps": config.judge_warps, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}
    # Of a tracked weight, elements that changed in several groups are an edit.
    most_restored = groups if memory.frozen else 1
    verify[(max(1, batch * blocks * groups),)](
        first, judge.bound, shape, status, flags, evidence.summary, words, site, batch, judge.kept,
        None if judge.kept is None else evidence.units, None if judge.kept is None else multiprocessors(device),
        REPEAT=judge.repeat, **order,
    )  # fmt: skip
    if judge.gate is not None and judge.kept is not None:
        apart = torch.empty(judge.tiles_per_group * config.bn, dtype=torch.float32, device=device)
        out = torch.finfo(y.dtype)
        weigh[(1,)](
            a, w, product.bias, y, product.weights, first, judge.bound, shape, status, evidence.units, judge.kept.groups, judge.gate, apart,
            evidence.summary, words, site, labels, batch, ROUND=out.eps / 2, TINY=out.tiny * out.eps / 2,
            **{name: choice for name, choice in order.items() if name != "OUT_LARGEST"},
        )  # fmt: skip
    recompute[(max(1, min(sum(product.tiles), REPAIR_PROGRAMS)),)](
        a, w, *panel, was, product.bias, y, again, moved, units.again, patches, flags, evidence.summary, shape, batch,
        int(REPAIR_BUDGET * product.tiles[0]), most_restored, fault_argument(faults), FROZEN=memory.frozen, TRANSPOSED=memory.transposed,
        KINDS=product.kinds, PARTS=judge.parts, CORRECT=judge.correct, WN=memory.config.scan, WK=memory.config.bk,
        **config.launch_repair(),
    )  # fmt: skip
    settle[(max(1, batch * blocks),)](
        a, w, product.bias, y, product.weights, first, again, moved, units, status, flags, memory.known, judge.bound, shape, words, site,
        evidence.summary, details, labels, batch, most_restored, COMPARED_ROWS, CORRECT=judge.correct, **order,
    )  # fmt: skip
    return status
