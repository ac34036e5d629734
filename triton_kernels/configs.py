"""Launch shapes, as data. The tile decides the order of summation, so it is part of the arithmetic that a bound holds for.

Not tuned yet on hardware: chosen from compiled registers, spills and shared memory (bench/results/audit-*.jsonl). What
``python -m bench tune`` measures takes their place (tuning.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from . import tuning

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
MIN_COLUMNS = 16


@dataclass(frozen=True)
class Config:
    """bm × bn data tiles, bm × bc check tiles, bk the step in K; ``precision`` as in tl.dot.

    resident: programs that run on a multiprocessor at once. registers: what a thread may use; left to itself, the assembler
    weighs occupancy and would sometimes rather spill. descriptors: operands come through the copy engine where their layout allows.
    repair_stages: of a repetition, if it has not the registers for as many as the product.
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

    def launch(self) -> dict[str, Any]:
        """The keyword arguments of a launch. Fused multiply-add is said aloud: its default differs between Triton versions."""
        return {
            "BM": self.bm, "BN": self.bn, "BK": self.bk, "BC": self.bc, "TALL": TALL, "PRECISION": self.precision,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, "maxnreg": self.registers,
        }  # fmt: skip

    def launch_repair(self) -> dict[str, Any]:
        """Those of a repetition: the same arithmetic."""
        return self.launch() | {"num_stages": self.repair_stages or self.stages, "maxnreg": MAX_REGISTERS}


#: (architecture, kind of operand) → config. Architectures: 80 stands for all before Hopper, 90, 100 for Blackwell's data centre.
CONFIGS = {
    (80, "16-bit"): Config(128, 128, 32, warps=8, stages=3),
    (90, "16-bit"): Config(128, 128, 64, warps=8, stages=4, descriptors=True),
    (100, "16-bit"): Config(128, 128, 64, warps=8, stages=4, descriptors=True),
    (80, "tf32"): Config(128, 64, 32, warps=8, stages=3, precision="tf32"),
    (90, "tf32"): Config(128, 128, 32, warps=8, stages=4, precision="tf32", descriptors=True),
    (100, "tf32"): Config(128, 64, 32, warps=8, stages=4, precision="tf32", descriptors=True),
    (80, "ieee"): Config(128, 64, 16, warps=8, stages=2, repair_stages=1),
    (90, "ieee"): Config(128, 64, 16, warps=8, stages=2, repair_stages=1),
    (100, "ieee"): Config(128, 64, 16, warps=8, stages=2, repair_stages=1),
    (80, "int8"): Config(128, 128, 64, warps=8, stages=3),
    # Not 128 in K: without descriptors the repair would spill.
    (90, "int8"): Config(128, 128, 64, warps=8, stages=4, descriptors=True),
    (100, "int8"): Config(128, 128, 64, warps=8, stages=3),
}
#: (architecture, kind of operand) → configs for few rows (decode.py), the lowest first. Such products are bound by reading W: shallow
#: tiles, and as many steps of K in flight as hide the memory's latency. bk, precision and unit are those of CONFIGS, for they
#: decide the bits; bn is the widest that decode.py may take. Warpgroup MMA wants 64 rows; elsewhere 16 do.
DECODE = {
    (80, "16-bit"): (Config(16, 64, 32, warps=4, stages=8), Config(64, 64, 32, warps=4, stages=6)),
    (90, "16-bit"): (Config(64, 64, 64, warps=4, stages=8, descriptors=True),),
    (100, "16-bit"): (Config(64, 64, 64, warps=4, stages=8, descriptors=True),),
    (80, "tf32"): (Config(16, 64, 32, warps=4, stages=5, precision="tf32"), Config(64, 64, 32, warps=4, stages=4, precision="tf32")),
    (90, "tf32"): (Config(64, 64, 32, warps=4, stages=8, precision="tf32", descriptors=True),),
    (100, "tf32"): (Config(64, 64, 32, warps=4, stages=8, precision="tf32", descriptors=True),),
    (80, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
    (90, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
    (100, "ieee"): (Config(16, 64, 16, warps=4, stages=5), Config(64, 32, 16, warps=4, stages=4)),
}
#: Multiprocessors that decode tiles are made for: A100, H100 and H200, B200. Any number is right.
PROGRAMS = {80: 108, 90: 132, 100: 148}
#: Programs in the interpreter, which has no multiprocessors: a few, so that tiles are dealt there, too.
INTERPRETED_PROGRAMS = 3
#: The interpreter pays per operation, not per element.
INTERPRETED = Config(128, 128, 256, warps=4, stages=1)
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


def choose(architecture: int | None, kind: str, group: int | None, checksum_columns: int = 64,
           shape: tuple[int, int] | None = None) -> Config:  # fmt: skip
    """The config of a product; ``architecture`` None: interpreted. A narrow ``group`` gets tiles that fit it.

    shape: (N, K), which may have been measured.
    """
    config = CONFIGS[architecture, kind] if architecture is not None else replace(INTERPRETED, precision="ieee")
    measured = replace(config, **tuning.find(architecture, kind, shape=shape))
    # A tile that does not divide the group would make it wider than was asked for, and its floor coarser.
    if (group or default_group(kind)) % measured.bn == 0:
        config = measured
    if group is not None and group < config.bn:
        config = replace(config, bn=max(MIN_COLUMNS, 1 << (group.bit_length() - 1)))
    return replace(config, bc=check_width(checksum_columns))


def check_width(columns: int) -> int:
    """Columns of a check tile: as few as hold the panel, at most 64."""
    return min(64, max(MIN_COLUMNS, 1 << max(columns - 1, 1).bit_length()))
