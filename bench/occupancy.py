"""How many blocks of a kernel a multiprocessor holds at once, from what the kernel takes and what the architecture has.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability"; 8.0, 9.0 and
10.0 differ only in shared memory. Units of allocation: NVIDIA's cuda_occupancy.h. Tensor memory: PTX ISA, "Tensor Memory".
"""

from __future__ import annotations

from dataclasses import dataclass

#: Registers are given to warps, in units of 256; warps and blocks of a multiprocessor; the largest number of a thread.
REGISTERS, REGISTER_UNIT, WARPS, BLOCKS, THREAD_REGISTERS = 65536, 256, 64, 32, 255
#: Warps are spread over four partitions with a quarter of the registers each.
PARTITIONS = 4
#: Shared memory is given to blocks in units of 128 bytes, and 1 KB of each block belongs to the system.
SHARED_UNIT, SHARED_RESERVED = 128, 1024


@dataclass(frozen=True)
class Limits:
    """Bytes of shared memory per multiprocessor and of one block; columns of tensor memory per multiprocessor, 0: there is none."""

    shared: int
    block_shared: int
    tensor: int = 0


LIMITS = {
    "sm_80": Limits(164 * 1024, 163 * 1024),
    "sm_90": Limits(228 * 1024, 227 * 1024),
    "sm_100": Limits(228 * 1024, 227 * 1024, tensor=512),
}


def blocks(arch: str, registers: int, shared: int, warps: int, tensor: int = 0) -> dict[str, int]:
    """Blocks per multiprocessor as each resource alone would allow; the least of them run.

    registers: of one thread. shared: bytes of one block, without the system's. tensor: columns of tensor memory.
    """
    limits = LIMITS[arch]
    per_warp = _up(max(registers, 1) * 32, REGISTER_UNIT)
    per_block = _up(shared + SHARED_RESERVED, SHARED_UNIT)
    found = {
        "registers": PARTITIONS * (REGISTERS // PARTITIONS // per_warp) // warps,
        "shared": limits.shared // per_block if shared <= limits.block_shared else 0,
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    return found | ({"tensor memory": limits.tensor // tensor} if tensor else {})


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
