"""Blocks per multiprocessor, computed by hand from the programming guide's limits."""

from __future__ import annotations

import pytest

from bench import occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        # 168 registers × 32 threads are 21 units of 256: 3 warps in a quarter's 16384, 12 in all, one block of 8.
        ("sm_90", 168, 131104, 8, {"registers": 1, "shared": 1, "warps": 8, "blocks": 32}),
        # 128 registers: 4 warps in a quarter, two blocks of 8. 64 KB and the system's 1 KB: three times in 228 KB.
        ("sm_90", 128, 65536, 8, {"registers": 2, "shared": 3, "warps": 8, "blocks": 32}),
        # 96 registers: 5 warps in a quarter, 20 in all; the next unit begins at 97.
        ("sm_80", 96, 1024, 4, {"registers": 5, "shared": 82, "warps": 16, "blocks": 32}),
        ("sm_80", 97, 1024, 4, {"registers": 4, "shared": 82, "warps": 16, "blocks": 32}),
        # The largest block: 163 KB of 164; a byte more does not fit.
        ("sm_80", 32, 163 * 1024, 1, {"registers": 64, "shared": 1, "warps": 64, "blocks": 32}),
        ("sm_80", 32, 163 * 1024 + 1, 1, {"registers": 64, "shared": 0, "warps": 64, "blocks": 32}),
    ],
)
def test_every_resource_allows_what_it_has_room_for(arch, registers, shared, warps, expected):
    assert occupancy.blocks(arch, registers, shared, warps) == expected


def test_tensor_memory_limits_too():
    assert occupancy.blocks("sm_100", 32, 1024, 4, tensor=256)["tensor memory"] == 2
