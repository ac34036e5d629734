"""One compiled kernel: registers, spills, shared memory, occupancy, instructions. The fields are described in bench/audit.py."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from bench import compiled, occupancy, sass
from bench.compiled import Launch

Row = dict[str, Any]


@cache
def method() -> str:
    """A hash of what these numbers are read by."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(occupancy.__file__), Path(sass.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def nvidia_row(launch: Launch, architecture: int) -> Row:
    """What the kernel of a launch became on an NVIDIA GPU."""
    kernel = compiled.compile_launch(launch, architecture)
    code, usage = sass.read(compiled.sass(kernel)), compiled.usage(kernel)
    warps, shared, main = launch.kwargs["num_warps"], kernel.metadata.shared, code.main_loops
    inside = frozenset().union(*main)
    rest = frozenset(range(len(code.instructions))) - inside
    limits = occupancy.blocks(f"sm_{architecture}", usage["REG"], shared, warps, getattr(kernel.metadata, "tmem_size", 0) or 0)
    least = min(limits.values())
    row = {
        "registers": usage["REG"], "local": usage["STACK"] + usage["LOCAL"], "spills": sum(code.count(sass.SPILLS).values()),
        "shared": shared, "warps": warps, "blocks": least, "limited_by": [name for name, n in limits.items() if n == least],
        "matrix": code.matrix(), "loads": code.count(sass.LOADS),
        "main": code.count(sass.ARITHMETIC, inside), "rest": code.count(sass.ARITHMETIC, rest),
    }  # fmt: skip
    return row | ({"tiles": [_tile(code, loop) for loop in main]} if "PRECISION" in launch.kwargs else {})


def _tile(code: sass.Code, loop: frozenset[int]) -> Row:
    """One main loop and what stands around it: of a product, one kind of tile."""

    def counts(indices: Iterable[int]) -> Row:
        return {"issued": code.issued(indices), **code.count(sass.LOADS + sass.ARITHMETIC, indices)}

    return {"matrix": code.matrix(loop), "step": counts(loop), "besides": counts(code.around(loop))}


def amd_row(launch: Launch, name: str) -> Row:
    """Of AMD's kernels, what the code object says of itself: local memory is scratch, shared memory LDS.

    Scalar registers spill to lanes of vector registers, not to memory, as long as ``local`` is zero.
    """
    kernel = compiled.compile_for_amd(launch, name)
    text = kernel.asm["amdgcn"]
    said = {key: int(value) for key, value in re.findall(r"\.(\w+_(?:count|size)):\s*(\d+)", text.split(".amdgpu_metadata")[-1])}
    matrix = sorted(re.findall(r"\bv_mfma_\w+", text))
    return {
        "registers": said["vgpr_count"], "accumulation_registers": said["agpr_count"], "scalar_registers": said["sgpr_count"],
        "local": said["private_segment_fixed_size"], "spills": said["vgpr_spill_count"], "scalar_spills": said["sgpr_spill_count"],
        "shared": kernel.metadata.shared, "warps": launch.kwargs["num_warps"],
        "matrix": {mnemonic: len(list(same)) for mnemonic, same in itertools.groupby(matrix)},
    }  # fmt: skip
