"""Launch shapes, as data, and which of them a product takes: the one whose slowest program is estimated to be done first.

The candidates of an architecture and kind of operand differ in tiles, not in arithmetic: same unit, same step in K, same precision.
Not tuned yet on hardware: compiled without spills (bench/results/audit-*.jsonl), compared by waves.py and tile_time.py. What
``python -m bench tune`` measures takes their place (tuning.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from . import tuning
from .tile_time import CHECK_BESIDES, tile_cycles
from .waves import makespan

#: Result columns under one check, near-equal in units of a tile. Wider costs less and sees less: the floor grows with its root.
GROUP = 512
#: In tf32 a panel has 12 columns per group, not 16: at three quarters of the width it costs what bf16's does, 1/32 of weight and product.
GROUP_TF32 = 384
#: Tall columns of tiles: neighbours in time share operands in the L2.
TALL = 8
#: Of one thread.
MAX_REGISTERS = 255
#: Data tiles that a repair may compute again, in products; rows of tiles beyond are left uncorrected, for the host to replay.
REPAIR_BUDGET = 1.0
#: Rows of one block and group of columns, suspect again with the same bits, that an independent product decides about: at most an
#: eighth of a product of blocks of 128, in fp64 and by the few programs that settle. Rows beyond are left uncorrected.
COMPARED_ROWS = 16
#: Programs of the repair, which share its tiles: one for each multiprocessor of the largest common GPU. Any number is right.
REPAIR_PROGRAMS = 132
#: Warpgroup MMA needs 64 rows and 16 columns; narrower tiles would fall to other instructions, that is, to other bits.
MIN_COLUMNS, MAX_COLUMNS = 16, 256
#: Columns of a check tile that narrow data tiles may have beside them, too.
WIDE_CHECKS = 64


@dataclass(frozen=True)
class Config:
    """bm × bn data tiles, bm × bc check tiles, bk the step in K; ``precision`` as in tl.dot.

    resident: programs that run on a multiprocessor at once. registers: what a thread may use; left to itself, the assembler
    weighs occupancy and would sometimes rather spill. descriptors: operands come through the copy engine where their layout allows.
    repair_stages, repair_bc: of a repetition, if it has not the registers for those of the product; they decide no bits: the same
    unit multiplies in the same steps of K. judge_warps: of the kernels that judge and settle a block of rows.
    check_cost: the time of a check tile in data tiles, by which check tiles are dealt.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    precision: str = "ieee"
    bc: int = 64
    resident: int = 1
    registers: int = MAX_REGISTERS
    descriptors: bool = False
    repair_stages: int = 0
    repair_bc: int = 0
    judge_warps: int = 4
    check_cost: float = 1.0

    def launch(self) -> dict[str, Any]:
        """The keyword arguments of a launch. Fused multiply-add is said aloud: its default differs between Triton versions."""
        return {
            "BM": self.bm, "BN": self.bn, "BK": self.bk, "BC": self.bc, "TALL": TALL, "PRECISION": self.precision,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, "maxnreg": self.registers,
        }  # fmt: skip

    def launch_repair(self) -> dict[str, Any]:
        """Those of a repetition: the same arithmetic."""
        return self.launch() | {
            "BC": self.repair_bc or self.bc, "num_stages": self.repair_stages or self.stages, "maxnreg": MAX_REGISTERS,
        }  # fmt: skip


@dataclass(frozen=True)
class AttentionConfig:
    """Blocks of bm queries and bn keys, with the programs' warps, and the steps of the loop over keys in flight.

    again: those of a repetition, if it has not the registers for as many (or for fewer, which wait in registers, not in shared memory);
    they decide no bits.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    again: int = 1


#: (architecture, kind of operand) → blocks by the columns of a head, padded to a power of two: those of the first that is wide enough.
#: Of up to 128 columns, what every call launches compiles without spills in bf16 on sm_90; what else is audited: bench/audit.py.
#: Not for Blackwell: Triton 3.6 fails there to compile what sums quads of exponentials.
ATTENTION = {
    (80, "16-bit"): {64: AttentionConfig(128, 64, 8, 3), 128: AttentionConfig(64, 64, 8, 2), 256: AttentionConfig(64, 32, 8, 2)},
    (90, "16-bit"): {
        64: AttentionConfig(128, 64, 8, 3, again=2), 128: AttentionConfig(128, 64, 8, 3, again=3), 256: AttentionConfig(128, 32, 8, 2),
    },
    (80, "ieee"): {64: AttentionConfig(64, 32, 4, 2), 256: AttentionConfig(32, 32, 8, 1)},
    (90, "ieee"): {64: AttentionConfig(64, 32, 4, 2), 256: AttentionConfig(32, 32, 8, 1)},
}
#: The interpreter's: small, so that small tests have several of them.
ATTENTION_INTERPRETED = AttentionConfig(32, 32, 4, 1)


#: Programs that attention over pages splits its keys for, and pages that a program reads at least: two to a multiprocessor of the largest.
DECODE_PROGRAMS, DECODE_PAGES = 264, 2
#: Parts of one head, at most: what puts them together is one program.
DECODE_SPLITS = 64


def decode_splits(units: int, pages: int) -> int:
    """Into how many parts the pages of a head are split, of so many heads over all sequences. By the table's width, not by lengths."""
    return max(1, min(DECODE_SPLITS, -(-DECODE_PROGRAMS // units), pages // DECODE_PAGES))


#: Keys of a block, at most, where a mask, a soft-cap or dropout takes registers, too.
LADEN_KEYS = 32


def choose_attention(architecture: int | None, kind: str, columns: int, laden: bool = False) -> AttentionConfig | None:
    """The blocks of an attention whose heads have so many columns, padded; None if there are none. architecture None: interpreted.

    laden: with a mask, a soft-cap or dropout.
    """
    if architecture is None:
        return ATTENTION_INTERPRETED
    config = next((config for widest, config in ATTENTION.get((architecture, kind), {}).items() if columns <= widest), None)
    return replace(config, bn=min(config.bn, LADEN_KEYS)) if laden and config is not None else config


#: (architecture, kind of operand) → candidates. Architectures: 80 stands for all before Hopper, 90, 100 for Blackwell's data centre.
#: The first has the tiles for many rows, and its columns are the unit of groups; the others, each half as large as the one before,
#: keep more multiprocessors busy. bk and precision are the same for all: they decide the bits. (64 × 128 would spill in repetitions
#: on sm_90, and its 64 rows take Blackwell's matrix units at half their rate.) Of 64 rows of transposed 16-bit operands, settling would
#: spill if two threads shared a row.
CONFIGS = {
    (80, "16-bit"): (
        Config(128, 128, 32, warps=8, stages=3),
        Config(128, 64, 32, warps=8, stages=3),
        Config(64, 64, 32, warps=4, stages=3, judge_warps=2),
    ),
    (90, "16-bit"): (
        Config(128, 128, 64, warps=8, stages=4, descriptors=True),
        Config(128, 64, 64, warps=8, stages=4, descriptors=True),
        Config(64, 64, 64, warps=4, stages=4, descriptors=True, judge_warps=2),
    ),
    (100, "16-bit"): (
        Config(128, 128, 64, warps=8, stages=4, descriptors=True),
        Config(128, 64, 64, warps=8, stages=4, descriptors=True),
        Config(64, 64, 64, warps=4, stages=4, descriptors=True, judge_warps=2),
    ),
    (80, "tf32"): (
        Config(128, 64, 32, warps=8, stages=3, precision="tf32"),
        Config(64, 64, 32, warps=4, stages=3, precision="tf32"),
    ),
    (90, "tf32"): (
        # With two widths of instructions the repetition of transposed operands would spill.
        Config(128, 128, 32, warps=8, stages=4, precision="tf32", descriptors=True, repair_bc=128),
        Config(128, 64, 32, warps=8, stages=4, precision="tf32", descriptors=True),
        Config(64, 64, 32, warps=4, stages=4, precision="tf32", descriptors=True),
    ),
    (100, "tf32"): (
        Config(128, 64, 32, warps=8, stages=4, precision="tf32", descriptors=True),
        Config(64, 64, 32, warps=4, stages=4, precision="tf32", descriptors=True),
    ),
    (80, "ieee"): (Config(128, 64, 16, warps=8, stages=2, repair_stages=1),),
    (90, "ieee"): (Config(128, 64, 16, warps=8, stages=2, repair_stages=1),),
    (100, "ieee"): (Config(128, 64, 16, warps=8, stages=2, repair_stages=1),),
    (80, "int8"): (Config(128, 128, 64, warps=8, stages=3),),
    # Not 128 in K: without descriptors the repair would spill.
    (90, "int8"): (Config(128, 128, 64, warps=8, stages=4, descriptors=True),),
    (100, "int8"): (Config(128, 128, 64, warps=8, stages=3),),
}
#: (architecture, kind of operand) → configs for few rows (decode.py), the lowest first. Such products are bound by reading W: shallow
#: tiles, and as many steps of K in flight as hide the memory's latency. bk, precision and unit are those of CONFIGS, for they
#: decide the bits; bn is the widest that decode.py may take. Warpgroup MMA wants 64 rows; elsewhere 16 do.
DECODE = {
    (80, "16-bit"): (Config(16, 64, 32, warps=4, stages=8), Config(64, 64, 32, warps=4, stages=6, judge_warps=2)),
    (90, "16-bit"): (Config(64, 64, 64, warps=4, stages=8, descriptors=True, judge_warps=2),),
    (100, "16-bit"): (Config(64, 64, 64, warps=4, stages=8, descriptors=True, judge_warps=2),),
    (80, "tf32"): (Config(16, 64, 32, warps=4, stages=5, precision="tf32"), Config(64, 64, 32, warps=4, stages=4, precision="tf32")),
    (90, "tf32"): (Config(64, 64, 32, warps=4, stages=8, precision="tf32", descriptors=True),),
    (100, "tf32"): (Config(64, 64, 32, warps=4, stages=8, precision="tf32", descriptors=True),),
    (80, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
    (90, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
    (100, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
}
#: Multiprocessors that tiles are chosen for where no device is asked: A100, H100 and H200, B200. Any number is right.
PROGRAMS = {80: 108, 90: 132, 100: 148}
#: Programs in the interpreter, which has no multiprocessors: a few, so that tiles are dealt there, too.
INTERPRETED_PROGRAMS = 3
#: The interpreter pays per operation, not per element.
INTERPRETED = (Config(128, 128, 256, warps=4, stages=1),)
#: How much sooner another candidate than the first must be done: what is not counted speaks for large tiles, which ask less of the L2.
ADVANTAGE = 0.1
INTERPRETED_DECODE = (Config(16, 64, 256, warps=4, stages=1), Config(64, 64, 256, warps=4, stages=1))


@dataclass(frozen=True)
class PanelConfig:
    """bn rows of W at a time, bk of its columns per program. scan: rows at a time where one program reads a whole group."""

    bn: int
    bk: int
    warps: int
    scan: int


PANEL = PanelConfig(32, 64, warps=4, scan=32)
PANEL_INTERPRETED = PanelConfig(128, 512, warps=4, scan=128)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the tiles of a launch."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def family(capability: tuple[int, int]) -> int:
    """The row of the table for a CUDA capability; consumer Blackwell (12.x) has the older matrix instructions."""
    major = capability[0]
    return {9: 90, 10: 100}.get(major, 80)


def default_group(kind: str) -> int:
    """The width of a group where the policy names none."""
    return GROUP_TF32 if kind == "tf32" else GROUP


def unit(architecture: int | None, kind: str, group: int | None, shape: tuple[int, int] | None = None) -> int:
    """Columns that groups are near-equal in units of: a panel is shared by products of any number of rows, so it knows one unit."""
    return candidates(architecture, kind, group, shape)[0].bn


def candidates(architecture: int | None, kind: str, group: int | None, shape: tuple[int, int] | None = None) -> tuple[Config, ...]:
    """Configs for more rows than decode.py's; ``architecture`` None: interpreted. A narrow ``group`` gets tiles that fit it.

    shape: (N, K). Where it was measured (tuning.py) there is one, whatever the rows.
    """
    table = CONFIGS[architecture, kind] if architecture is not None else tuple(replace(c, precision="ieee") for c in INTERPRETED)
    fields = tuning.find(architecture, kind, shape=shape)
    measured = None if fields is None else replace(table[0], **fields)
    # A tile that does not divide the group would make it wider than was asked for, and its floor coarser.
    if measured is not None and (group or default_group(kind)) % measured.bn == 0:
        table = (measured,)
    widest = MAX_COLUMNS if group is None else max(MIN_COLUMNS, 1 << (group.bit_length() - 1))
    return tuple(dict.fromkeys(replace(c, bn=min(c.bn, widest)) for c in table))


def choose(architecture: int | None, kind: str, group: int | None, n: int, k: int, width: int, checks: int, *,
           rows: int | None = None, batch: int = 1, programs: int | None = None) -> Config:  # fmt: skip
    """The config of a product whose N columns are checked in groups of ``width`` by a panel of ``checks`` columns (0: unchecked).

    ``rows`` None: as many as keep any GPU busy. programs: multiprocessors, by default those of PROGRAMS. Same numbers, same config:
    a recomputation under activation checkpointing sums in the order of the forward pass. Groups are whole tiles of any choice.
    """
    whole = [c for c in candidates(architecture, kind, group, (n, k)) if width >= n or width % c.bn == 0]
    if rows is None:
        return _with_check_tiles(whole[0], architecture, kind, k, checks)[0]
    programs = programs or (PROGRAMS[architecture] if architecture is not None else INTERPRETED_PROGRAMS)

    def time(c: Config) -> float:
        return cycles(c, architecture, kind, n, k, checks, rows, batch, programs)

    first, *others = (min(_with_check_tiles(c, architecture, kind, k, checks), key=time) for c in whole)  # of equals, the widest
    quickest = min(others, key=time, default=first)  # of equals, the largest
    return quickest if time(quickest) < (1 - ADVANTAGE) * time(first) else first


def _with_check_tiles(c: Config, architecture: int | None, kind: str, k: int, checks: int) -> list[Config]:
    """With check tiles as wide as the panel, but no wider than data tiles or 64; then, if it is narrower, 64.

    The wider, the less often A is fetched; the narrower, the more evenly they can be dealt.
    """
    widest = min(max(c.bn, WIDE_CHECKS), max(MIN_COLUMNS, 1 << max(checks - 1, 1).bit_length()))
    tile = tile_cycles(architecture, kind, c.bm, c.bn, c.bk, c.warps, k)
    return [
        replace(c, bc=bc, check_cost=tile_cycles(architecture, kind, c.bm, bc, c.bk, c.warps, k, CHECK_BESIDES) / tile)
        for bc in ([widest, WIDE_CHECKS] if widest > WIDE_CHECKS else [widest])
    ]


def cycles(c: Config, architecture: int | None, kind: str, n: int, k: int, checks: int, rows: int, batch: int,
           multiprocessors: int) -> float:  # fmt: skip
    """Cycles until the slowest program is done."""
    blocks = batch * -(-rows // c.bm)
    data, check = blocks * -(-n // c.bn), blocks * -(-checks // c.bc)
    programs = max(1, min(data + check, c.resident * multiprocessors))
    return makespan(data, check, programs, c.check_cost) * tile_cycles(architecture, kind, c.bm, c.bn, c.bk, c.warps, k)


def quickest_checks(c: Config, architecture: int | None, kind: str, n: int, k: int, checks: int, rows: int, multiprocessors: int) -> float:
    """``cycles`` with the check tiles that suit these tiles best."""
    ways = _with_check_tiles(c, architecture, kind, k, checks)
    return min(cycles(way, architecture, kind, n, k, checks, rows, 1, multiprocessors) for way in ways)
