"""Compile every kernel for GPUs that need not be there, and read what became of it out of the machine code.

    python -m bench.cubins --out FILE        one JSON line per kernel × operand type × config × architecture

The launchers run with CPU tensors while the launches themselves are recorded; what would have been launched, with
Triton's own specialisation of its arguments, is what is compiled. Triton's wheel carries ptxas and cuobjdump.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from abft import ledger, policy
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.faults import BitOperation, Region, Strike

ARCHITECTURES = (80, 90, 100)
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
#: Matrix instructions in SASS, by generation; CUDA-core arithmetic; asynchronous copies, by tile (descriptors) and by thread.
MNEMONICS = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "FFMA", "UTMALDG", "LDGSTS")


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are listed, not run."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launches_of(kind: str, architecture: int, *, m: int = 4096, n: int = 4096, k: int = 4096, form: str = "full",
                group: int | None = None, transposed: bool = False, bias: bool = True, strike: bool = False,
                batch: int | None = None) -> list[Launch]:  # fmt: skip
    """The launches of one checked product: panel, product, recompute, settle."""
    lead = () if batch is None else (batch,)
    dtype = KINDS[kind]
    a, w = torch.empty(*lead, m, k, dtype=dtype), torch.empty(*lead, n, k, dtype=dtype)
    if transposed:
        a, w = torch.empty(*lead, k, m, dtype=dtype).mT, torch.empty(*lead, k, n, dtype=dtype).mT
    strikes = (Strike("accumulator", Region(0, 1, 0, 1), BitOperation(flip=1)),) if strike else ()
    call = Call(a, w, torch.empty(n, dtype=dtype) if bias else None, None, False, "fprop",
                policy.Policy(panel=form, group=group), 0, strikes)  # type: ignore[arg-type]  # fmt: skip
    plan = backend.plan(n, k, dtype, architecture, kind == "tf32", form, group)
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    with recorded() as launches, mock.patch.object(backend, "plan_for", lambda call: plan):
        backend.product(call, words, site)
    return launches


# --- compiling ------------------------------------------------------------------------------------


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The compiled kernel of a recorded launch, specialised as Triton would at that launch."""
    return compile_for(launch, GPUTarget("cuda", architecture, 32))


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    compiler = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
    bound, specialization, options = binder(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = launch.kernel._pack_args(compiler, launch.kwargs, bound, specialization, options)
    return triton.compile(ASTSource(launch.kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def sass(compiled: Any) -> str:
    """The machine code of a compiled kernel, as text."""
    return _cuobjdump(compiled, "-sass")


def _cuobjdump(compiled: Any, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor, and the matrix instructions it is made of."""

    registers: int
    stack: int  # bytes of local memory a thread's frame takes: spilled registers, or arrays indexed at run time
    shared: int
    instructions: dict[str, int]
    matrix: tuple[str, ...]  # the distinct matrix instructions, as written


def resources(compiled: Any) -> Resources:
    usage = _cuobjdump(compiled, "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    text = sass(compiled)
    counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in MNEMONICS}
    counts["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", text))
    matrix = sorted(set(re.findall(r"\b((?:HGMMA|HMMA|UTCHMMA|UTCQMMA)[.\w]*)", text)))
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared, counts, tuple(matrix))


# --- the table ------------------------------------------------------------------------------------

#: Shapes and layouts of operands that are compiled differently. A short N has a narrow panel, and narrow check tiles.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lean": {"form": "lean"},
    "transposed": {"transposed": True},
    "narrow": {"n": 384, "bias": False},
    "fine": {"group": 32},
    "ones": {"m": 1, "n": 1, "k": 1},
}


def rows(architectures: tuple[int, ...], variants: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One row per kernel × operand type × variant × architecture."""
    for architecture, kind, variant in itertools.product(architectures, KINDS, variants):
        for launch in launches_of(kind, architecture, **VARIANTS[variant]):
            start = time.perf_counter()
            r = resources(compile_launch(launch, architecture))
            yield {
                "kernel": launch.name, "kind": kind, "variant": variant, "arch": f"sm_{architecture}", "config": _config(launch),
                "registers": r.registers, "stack": r.stack, "shared": r.shared, **r.instructions,
                "matrix": list(r.matrix), "seconds": round(time.perf_counter() - start, 2),
            }  # fmt: skip


def amd_rows() -> Iterator[dict[str, Any]]:
    """That the kernels build for AMD's gfx942, with the configs of the older GPUs; nothing is claimed of their arithmetic."""
    for kind in ("bf16", "ieee"):
        for launch in launches_of(kind, 80):
            kwargs = {k: v for k, v in launch.kwargs.items() if k != "maxnreg"} | {"num_stages": 2}
            compiled = compile_for(replace(launch, kwargs=kwargs), GPUTarget("hip", "gfx942", 64))
            text = compiled.asm["amdgcn"]
            numbers = {key: int(value) for key, value in re.findall(r"\.([vs]gpr_(?:spill_)?count):\s*(\d+)", text)}
            yield {
                "kernel": launch.name, "kind": kind, "variant": "full", "arch": "gfx942", "config": _config(launch),
                "registers": numbers["vgpr_count"], "spills": numbers["vgpr_spill_count"], "shared": compiled.metadata.shared,
                "MFMA": len(re.findall(r"\bv_mfma", text)),
            }  # fmt: skip


def _config(launch: Launch) -> dict[str, Any]:
    return {k: v for k, v in launch.kwargs.items() if k.isupper() or k in ("num_warps", "num_stages")}


def stamp() -> dict[str, Any]:
    """Which software made the table."""
    source = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent.parent / "triton_kernels").glob("*.py")))
    return {
        "triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "sources": hashlib.sha256(source).hexdigest()[:16],
        "shape": "m = n = k = 4096 with bias, unless the variant says otherwise", "variants": VARIANTS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="compiled resources of every kernel")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--arch", action="append", choices=[*map(str, ARCHITECTURES), "gfx942"], help="only these; default: all")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only these; default: all")
    options = parser.parse_args()
    chosen = options.arch or [*map(str, ARCHITECTURES), "gfx942"]
    nvidia = tuple(int(a) for a in chosen if a != "gfx942")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        file.write(json.dumps({"stamp": stamp()}) + "\n")
        table = rows(nvidia, tuple(options.variant or VARIANTS))
        for row in itertools.chain(table, amd_rows() if "gfx942" in chosen else ()):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['arch']:6} {row['kind']:5} {row['variant']:10} {row['kernel']:16} registers {row['registers']:3} "
                  f"spills {row['spills']} shared {row['shared']} matrix {' '.join(row.get('matrix', ()))}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
