"""The launches of an attention's gradient, in stream order: panels, dQ, its repair, dK and dV, their repair, verdicts. The host learns
nothing from them. Without checks: dQ, then dK and dV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_backward import (
    Bounds,
    Rows,
    Status,
    attention_dkv,
    attention_dkv_again,
    attention_dq,
    attention_dq_again,
)
from .attention_panels import PARTS, Panel, Weights, empty, encode
from .attention_scores import Scores, heads
from .attention_verdicts import Labels, conclude
from .configs import MAX_REGISTERS, REPAIR_PROGRAMS
from .gemm import fault_argument


@dataclass(frozen=True)
class Tiles:
    """rows: of queries or keys that a program owns; step: of the others that it takes at a time.

    again: the stages of a repetition, if it has not the registers for as many in flight; they decide no bits.
    """

    rows: int
    step: int
    warps: int
    stages: int
    again: int = 1


@dataclass(frozen=True)
class Config:
    """Tiles of the kernel for dQ (rows of queries) and of that for dK and dV (rows of keys)."""

    dq: Tiles
    dkv: Tiles


#: (architecture, kind of operand) → the widest head dimension it is for, and its config. Compiled (bench/results/audit-*.jsonl), not tuned.
CONFIGS: dict[tuple[int, str], tuple[tuple[int, Config], ...]] = {
    (80, "16-bit"): (
        (64, Config(Tiles(64, 16, 4, 2), Tiles(64, 16, 4, 2))),
        (128, Config(Tiles(32, 16, 4, 2), Tiles(32, 16, 4, 2))),
        (256, Config(Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1))),
    ),
    (90, "16-bit"): (
        (64, Config(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2))),
        (128, Config(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2, again=2))),
        (256, Config(Tiles(64, 16, 8, 1), Tiles(64, 16, 8, 1))),
    ),
    (100, "16-bit"): (
        (64, Config(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2))),
        (128, Config(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2))),
        (256, Config(Tiles(64, 16, 8, 1), Tiles(64, 16, 8, 1))),
    ),
    (80, "ieee"): (
        (64, Config(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))),
        (256, Config(Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))),
    ),
}
CONFIGS |= {(arch, "ieee"): CONFIGS[80, "ieee"] for arch in (90, 100)}
#: The interpreter pays per operation: but several blocks of a small problem are to be seen.
INTERPRETED = Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))


#: Steps, at most, where a mask, a soft-cap or dropout takes registers, too: the narrowest that all matrix units have.
LADEN_STEP = 16


def config_for(architecture: int | None, dtype: torch.dtype, width: int, laden: bool = False) -> Config:
    """The config of heads so wide; ``architecture`` None: interpreted. laden: with a mask, a soft-cap or dropout."""
    if architecture is None:
        return INTERPRETED
    table = CONFIGS[architecture, "ieee" if dtype == torch.float32 else "16-bit"]
    config = next(config for widest, config in table if width <= widest)
    if laden:
        dq, dkv = (replace(tiles, step=min(tiles.step, LADEN_STEP)) for tiles in (config.dq, config.dkv))
        config = Config(dq, dkv)
    return config


@dataclass(frozen=True)
class Judge:
    """How a gradient is judged. Weights, fp32: of a step of queries and of keys; of the columns of Q and K (2, E), and of V (2, D); of all
    rows (4, longest)."""

    bounds: Bounds
    of_queries: Tensor
    of_keys: Tensor
    of_e: Tensor
    of_d: Tensor
    sketch: Tensor
    labels: Labels
    repair: bool
    told: int  # the verdict of what is not repaired


@dataclass(frozen=True)
class Given:
    """q, d_out, out (B, H, G, L, ·); k, v (B, H, S, ·); of the forward: maxima and sums (B, H, G, L), contiguous fp32. Of packed sequences,
    of which the scores tell, B is one, and L and S are tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    out: Tensor
    maxima: Tensor
    sums: Tensor


def gradients(given: Given, scores: Scores, causal: bool, config: Config, judge: Judge | None, words: Tensor, site: Tensor,
              faults: Tensor | None = None, again: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV, contiguous, of packed sequences (tokens, heads, ·); checked if there is a judge. ``again``: faults that hit the
    repetition."""
    q, k, v = given.q, given.k, given.v
    planes, of_keys, length, keys = q.shape[:3].numel(), k.shape[:2].numel(), q.shape[3], k.shape[2]
    rows, columns, packed = planes * length, of_keys * keys, scores if scores.cu_q is not None else None
    if packed is None:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    else:  # what belongs to no sequence is nobody's, and zero
        dq, dk, dv = (torch.zeros(t.shape[-2], t.shape[:-2].numel(), t.shape[-1], dtype=t.dtype, device=t.device) for t in (q, k, v))
        planes, of_keys, length, keys = planes * packed.sequences, of_keys * packed.sequences, packed.length, packed.keys
    delta = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    at_q, at_k, at_v, at_do, at_o = (heads(t) for t in (q, k, v, given.d_out, given.out))
    x = Rows(given.maxima, given.sums, delta)
    row_blocks, key_blocks = planes * -(-length // config.dq.rows), of_keys * -(-keys // config.dkv.rows)
    wide = {"E": q.shape[-1], "D": v.shape[-1], "BE": _power(q.shape[-1]), "BD": _power(v.shape[-1]), "PRECISION": "ieee"}
    wide |= {"PARTS": PARTS[q.dtype], "SCALED": q.dtype == torch.float16}
    order = wide | {"CAUSAL": causal, "CHECK": judge is not None}
    by_rows = order | {"BM": config.dq.rows, "BN": config.dq.step} | _launch(config.dq)
    by_keys = order | {"BM": config.dkv.step, "BN": config.dkv.rows} | _launch(config.dkv)
    if judge is None:
        plain_rows = (at_q, at_k, at_v, at_do, at_o, x, scores, None, None, None, None, None)
        plain_keys = (at_q, at_k, at_v, at_do, x, scores, None, None, None, None, None, None)
        attention_dq[(row_blocks,)](*plain_rows, dq, None, words, site, fault_argument(faults), **by_rows)
        attention_dkv[(key_blocks,)](*plain_keys, dk, dv, None, words, site, fault_argument(faults), **by_keys)
        return dq, dk, dv

    summary = torch.empty(4, dtype=torch.int32, device=q.device)
    of_q, of_k, of_v, of_do = _panels(given, scores, config, judge, summary, planes, wide)
    for_rows = (at_q, at_k, at_v, at_do, at_o, x, scores, of_k, of_v, judge.of_keys, judge.of_e, judge.bounds)
    for_keys = (at_q, at_k, at_v, at_do, x, scores, of_q, of_do, judge.of_queries, judge.of_e, judge.of_d, judge.bounds)
    seen, seen_again = (_status(row_blocks, rows, summary[i : i + 1]) for i in (0, 2))
    found, found_again = (_status(key_blocks, columns, summary[i : i + 1]) for i in (1, 3))
    attention_dq[(row_blocks,)](*for_rows, dq, seen, words, site, fault_argument(faults), **by_rows)
    if judge.repair:
        attention_dq_again[(min(row_blocks, REPAIR_PROGRAMS),)](
            *for_rows, dq, seen, seen_again, words, site, row_blocks, fault_argument(again),
            **by_rows | _launch(config.dq, again=True),
        )  # fmt: skip
    attention_dkv[(key_blocks,)](*for_keys, dk, dv, found, words, site, fault_argument(faults), **by_keys)
    if judge.repair:
        attention_dkv_again[(min(key_blocks, REPAIR_PROGRAMS),)](
            *for_keys, dk, dv, found, found_again, words, site, key_blocks, fault_argument(again),
            **by_keys | _launch(config.dkv, again=True),
        )  # fmt: skip
    conclude[(1,)](
        words, site, seen, seen_again, found, found_again, row_blocks, key_blocks, length, keys, judge.labels,
        BM=config.dq.rows, BN=config.dkv.rows, REPAIRED=judge.repair, TOLD=judge.told, PACKED=packed is not None,
        SCORES=packed, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return dq, dk, dv


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _launch(tiles: Tiles, again: bool = False) -> dict[str, Any]:
    stages = tiles.again if again else tiles.stages
    return {"num_warps": tiles.warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}


def _status(blocks: int, rows: int, unquiet: Tensor) -> Status:
    device = unquiet.device
    numbers = torch.empty(2, 2, rows, dtype=torch.float32, device=device)
    states = torch.empty(blocks + 2 * rows, dtype=torch.int8, device=device)
    return Status(states, states[blocks:], numbers[0], numbers[1], rows, unquiet)


def _panels(
    given: Given, scores: Scores, config: Config, judge: Judge, summary: Tensor, planes: int, wide: dict[str, Any]
) -> tuple[Panel, ...]:
    """The panels of the operands: hats over the blocks that are stepped over, columns beside what products multiply by."""
    q, k, v, d_out = given.q, given.k, given.v, given.d_out
    of_queries, of_keys = config.dkv.step, config.dq.step
    n = scores.sequences
    built = empty(q, of_queries, True, n), empty(k, of_keys, True, n), empty(v, of_keys, False, n), empty(d_out, of_queries, True, n)
    longest, e, d = judge.sketch.stride(0), judge.of_e, judge.of_d
    pairs = ((judge.of_queries, e), (judge.of_keys, e), (judge.of_keys, d), (judge.of_queries, d))
    weights = [Weights(of_rows, w, w.shape[1], judge.sketch, longest) for of_rows, w in pairs]
    blocks = planes * -(-scores.length // of_queries) + planes // scores.group * -(-scores.keys // of_keys)
    encode[(blocks,)](
        heads(q), heads(k), heads(v), heads(d_out), *built, *weights, scores, q.shape[-1], v.shape[-1], summary, planes,
        BM=of_queries, BN=of_keys, BE=wide["BE"], BD=wide["BD"], PARTS=wide["PARTS"], SCALED=wide["SCALED"], num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    return built
