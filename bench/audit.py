"""What every kernel became: registers, spills, shared memory, occupancy, matrix instructions, loads, arithmetic; no GPU needed.

    python -m bench audit                                   compile everything, write results/audit-triton<version>.jsonl
    python -m bench audit --compare                         compile everything, say what differs from that file; exit status 1
    python -m bench audit [--compare] --arch 90 --case full --operands bf16 [--out FOLDER]            only these

A kernel enters the audit when a case launches it. A row is one launch of a case: kernel × operand type × case × architecture.

    local        bytes of local memory of a thread: its frame, arrays, spilled registers
    spills       instructions that access local memory
    blocks       per multiprocessor, and by which resource (occupancy.py)
    matrix       matrix instructions, as written, and how many; they tell the generation of the unit, the type, and K per instruction
    main, rest   instructions inside main loops (sass.py) and outside
    tiles        of products: for each main loop, in order, the instructions in it and between it and the loop around it, that is,
                 what one step in K takes, and what one tile takes besides

Counts are of instructions as they stand: one that is skipped or repeated at run time counts once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from bench import audited, compiled, occupancy, sass
from bench.compiled import Launch
from bench.results import Results, dump

ARCHITECTURES = ("80", "90", "100", "gfx942")
OPERANDS = tuple(compiled.OPERANDS)
FLOATS = tuple(name for name in OPERANDS if name != "int8")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A way of calling the library that makes kernels of its own. ``launches(operands, architecture, **shape)`` lists its launches."""

    name: str
    shape: dict[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = OPERANDS
    launches: Callable[..., list[Launch]] = compiled.launches_of


#: What is audited; a new kernel takes one line here. m = n = k = 4096 with bias unless said otherwise. A short N has a narrow panel
#: and narrow check tiles: of 16-bit operands 64 columns for 2048, 32 for 1024, 16 for 384. Up to 64 rows have tiles of their own.
#: "second" and "third" are the other configs that a table entry names, whatever shapes they are for.
CASES = (
    Case("full"),
    Case("lean", {"form": "lean"}),
    Case("transposed", {"transposed": True}),
    Case("short", {"n": 1024}),
    Case("half", {"n": 2048}, ("bf16", "fp16")),
    Case("narrow", {"n": 384, "bias": False}),
    Case("fine", {"group": 32}),
    Case("ones", {"m": 1, "n": 1, "k": 1}),
    Case("few", {"m": 64, "n": 8192}, FLOATS),
    Case("single", {"m": 1, "n": 1024}, FLOATS),
    Case("deferred", {"m": 64, "n": 8192, "timing": "deferred"}, FLOATS),
    Case("deferred lean", {"m": 64, "n": 8192, "timing": "deferred", "form": "lean"}, FLOATS),
    Case("second", {"candidate": 1}, ("bf16", "fp16", "tf32")),
    Case("second lean", {"candidate": 1, "form": "lean"}, ("bf16",)),
    Case("second transposed", {"candidate": 1, "transposed": True}, ("bf16", "tf32")),
    Case("third", {"candidate": 2}, ("bf16", "fp16", "tf32")),
    Case("third lean", {"candidate": 2, "form": "lean"}, ("bf16",)),
    Case("third transposed", {"candidate": 2, "transposed": True}, ("bf16", "tf32")),
    Case("short transposed", {"n": 1024, "transposed": True}, ("bf16", "tf32")),
)
#: For AMD only that the kernels build, with the configs of older GPUs: nothing is claimed of their arithmetic.
AMD_CASES, AMD_OPERANDS = ("full",), ("bf16", "ieee")


# --- one kernel -----------------------------------------------------------------------------------


def nvidia_row(launch: Launch, architecture: int) -> Row:
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
    """One kind of tile of a product: its main loop and what stands around it."""

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


# --- the table ------------------------------------------------------------------------------------


def rows(arch: str, operands: str, case: Case) -> list[Row]:
    """The launches of a case, in stream order."""
    amd = not arch.isdecimal()
    found = []
    for launch in case.launches(operands, 80 if amd else int(arch), **case.shape, numbered=not amd):
        numbers = amd_row(launch, arch) if amd else nvidia_row(launch, int(arch))
        name = {"kernel": launch.name, "case": case.name, "operands": operands, "arch": arch if amd else f"sm_{arch}"}
        found.append({**name, "config": launch.config, **numbers})
    return found


def work(arches: Iterable[str], names: Iterable[str], operands: Iterable[str]) -> Iterator[tuple[str, str, Case]]:
    """What of the table was asked for."""
    for arch, case in itertools.product(arches, CASES):
        amd = not arch.isdecimal()
        for kind in case.operands:
            if case.name in names and kind in operands and not (amd and (case.name not in AMD_CASES or kind not in AMD_OPERANDS)):
                yield arch, kind, case


def compile_all(todo: list[tuple[str, str, Case]], jobs: int) -> Iterator[Row]:
    """The rows, in order."""
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(rows, *zip(*todo, strict=True)):
            yield from found


# --- the command ----------------------------------------------------------------------------------


def sources() -> str:
    """A hash of the kernels that were compiled, the twin's among them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in [*sorted((root / "triton_kernels").glob("*.py")), root / "bench" / "twin.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(argv: list[str]) -> int:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench audit", description=__doc__, formatter_class=as_is)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only these; default: all")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only these; default: all")
    parser.add_argument("--operands", action="append", choices=OPERANDS, help="only these; default: all")
    parser.add_argument("--compare", action="store_true", help="write nothing; say what differs from the committed audit")
    parser.add_argument("--out", type=Path, help="folder of the result; needed for a part of the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each core")
    options = parser.parse_args(argv)
    partial = options.arch or options.case or options.operands
    if partial and not options.compare and options.out is None:
        parser.error("a part of the table would take the place of the whole: name another folder with --out, or --compare")
    todo = list(work(options.arch or ARCHITECTURES, options.case or [case.name for case in CASES], options.operands or OPERANDS))
    if not todo:
        parser.error(f"nothing is audited for this choice (on AMD only cases {AMD_CASES} and operands {AMD_OPERANDS})")
    if options.compare:
        return _compare([json.loads(dump(row)) for row in compile_all(todo, options.jobs)])
    results = Results(audited.path(triton.__version__).stem, fresh=True, folder=options.out, triton=triton.__version__, kernels=sources(),
                      shape="m = n = k = 4096 with bias, unless the case says otherwise",
                      cases={case.name: case.shape for case in CASES})  # fmt: skip
    for row in compile_all(todo, options.jobs):
        print(_line(results.add("audit", **row)), flush=True)
    return 0


def _compare(fresh: list[Row]) -> int:
    committed = audited.rows(audited.path(triton.__version__))
    if not committed:
        print(f"Triton {triton.__version__} was never audited: {audited.ADVICE}", file=sys.stderr)
        return 1
    lines = audited.differences(fresh, committed)
    print("\n".join(lines) or f"{len(fresh)} kernels as audited")
    return int(bool(lines))


def _line(row: Row) -> str:
    matrix = " ".join(f"{n} {mnemonic}" for mnemonic, n in row["matrix"].items())
    blocks = f"blocks {row['blocks']} ({', '.join(row['limited_by'])})" if "blocks" in row else ""
    return (f"{row['arch']:6} {row['operands']:4} {row['case']:10} {row['kernel']:17} registers {row['registers']:3} "
            f"local {row['local']} spills {row['spills']} shared {row['shared']:6} {blocks} {matrix}")  # fmt: skip
