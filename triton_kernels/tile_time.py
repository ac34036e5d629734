"""How long one tile takes, in cycles of its multiprocessor: an estimate, to compare launch shapes by; nothing here is measured.

    tile = ⌈K / bk⌉ · step + besides
    step = max( multiplying   bm · bn · bk / multiplications per cycle
                issuing       instructions of its warps / 4 per cycle
                fetching      (bm + bn) · bk · bytes / bytes per cycle that reach a multiprocessor from the L2 )

Fetching is why half a tile takes more than half the time. Not counted: latency, nor that all multiprocessors share the L2.
"""

from __future__ import annotations

#: Multiply-adds per cycle and multiprocessor: what the data sheets' dense rates (A100, H100 SXM, B200; fp32 for "ieee") make over
#: their multiprocessors and boost clocks (1.41, 1.83, 1.85 GHz; 1.98 for H100's fp32), as a power of two.
MULTIPLIED = {
    (80, "16-bit"): 1024, (80, "tf32"): 512, (80, "int8"): 2048, (80, "ieee"): 64,
    (90, "16-bit"): 2048, (90, "tf32"): 1024, (90, "int8"): 4096, (90, "ieee"): 128,
    (100, "16-bit"): 4096, (100, "tf32"): 2048, (100, "int8"): 8192, (100, "ieee"): 128,
}  # fmt: skip
BYTES = {"16-bit": 2, "tf32": 4, "ieee": 4, "int8": 1}
#: Columns at which a warpgroup's MMA is bound by multiplying rather than by reading its left operand: m64n32k16 takes 16 cycles.
MMA_FLOOR = 32
#: Instructions of each warp in a step on matrix units (``step`` of sm_90's tiles in bench/results/audit-*.jsonl), and how many warp
#: instructions a multiprocessor issues per cycle: one by each of four schedulers (CUDA C++ Programming Guide, "Compute Capabilities").
STEP_ISSUED, ISSUED_PER_CYCLE = 90, 4
#: Bytes per cycle from the L2 to one multiprocessor. NVIDIA states 64 of Volta to Ampere; of later ones nothing more is assumed.
PATH = 64
#: Cycles that a tile takes besides its steps, sums and stores above all, as if nothing overlapped them: by warp, and by number in it.
#: From the instructions issued around the loops of sm_90's bf16 tiles in bench/results/audit-*.jsonl, data tiles and check tiles.
DATA_BESIDES, CHECK_BESIDES = (122, 0.073), (73, 0.04)


def step_cycles(architecture: int | None, kind: str, bm: int, bn: int, bk: int, warps: int) -> float:
    """One step in K; ``architecture``, ``kind`` as in the table of configs, None: interpreted, as if it were Hopper's bf16."""
    architecture, kind = (90, "16-bit") if architecture is None else (architecture, kind)
    multiplying = bm * max(bn, MMA_FLOOR) * bk / MULTIPLIED[architecture, kind]
    return max(multiplying, warps * STEP_ISSUED / ISSUED_PER_CYCLE, fetched(bm, bn, bk, BYTES[kind]) / PATH)


def fetched(bm: int, bn: int, bk: int, size: int) -> int:
    """Bytes of operands that a step in K brings from the L2."""
    return (bm + bn) * bk * size


def tile_cycles(architecture: int | None, kind: str, bm: int, bn: int, bk: int, warps: int, k: int,
                besides: tuple[float, float] = DATA_BESIDES) -> float:  # fmt: skip
    """One tile; ``besides``: DATA_BESIDES or CHECK_BESIDES."""
    by_warp, by_number = besides
    return -(-k // bk) * step_cycles(architecture, kind, bm, bn, bk, warps) + by_warp * warps + by_number * bm * bn
