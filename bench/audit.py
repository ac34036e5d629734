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
    tiles        of kernels that multiply: for each main loop, in order, the instructions in it and between it and the loop around it;
                 of a product what one step in K takes and what one tile takes besides, of attention what one block of keys takes
                 (or of queries), where some are hidden and where none is
    source       a hash of the kernel in Triton's IR, of its options, and of what reads these numbers (compiled.py, anatomy.py)
    text         a hash of the kernel's text and of what its launch was specialised for, which that IR follows from (kernel_text.py)

Counts are of instructions as they stand: one that is skipped or repeated at run time counts once. A kernel whose text or, of another
text, whose source stands in the committed audit of the same Triton has its numbers from there: what the compiler is given is what it was
given then. ``--afresh`` compiles everything. What was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from bench import anatomy, audited, compiled
from bench.compiled import Launch
from bench.results import Results, dump

ARCHITECTURES = ("80", "90", "100", "gfx942")
OPERANDS = tuple(compiled.OPERANDS)
FLOATS = tuple(name for name in OPERANDS if name != "int8")
Row = dict[str, Any]
#: What a row says of its launch, not of the kernel.
NAMES = ("kind", "kernel", "case", "operands", "arch", "config")


@dataclass(frozen=True)
class Case:
    """A way of calling the library that makes kernels of its own. ``launches(operands, architecture, **shape)`` lists its launches."""

    name: str
    shape: dict[str, Any] = field(default_factory=dict)
    operands: tuple[str, ...] = OPERANDS
    launches: Callable[..., list[Launch]] = compiled.launches_of
    arches: tuple[str, ...] = ARCHITECTURES


#: Attention is left to torch on Blackwell (docs/decisions/0048); AMD's GPUs were not tried.
ATTENTION = {"launches": compiled.attention_launches, "arches": ("80", "90")}
GRADIENT = {"launches": compiled.attention_gradient_launches, "arches": ("80", "90")}
DECODING = {"launches": compiled.decoding_launches, "arches": ("80", "90", "100")}
#: Types of attention's operands, of its commonest cases and of others.
THREE, TWO, ONE = ("bf16", "fp16", "ieee"), ("bf16", "ieee"), ("bf16",)
#: What is audited; a new kernel takes one line here. m = n = k = 4096 with bias unless said otherwise. A short N has a narrow panel
#: and narrow check tiles: of 16-bit operands 64 columns for 2048, 32 for 1024, 16 for 384. Up to 64 rows have tiles of their own.
#: "second" and "third" are the other configs that a table entry names, whatever shapes they are for.
#: Attention: causal, over heads of so many columns; "lean" is without products of exponentials, "whole" not causal.
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
    Case("statistical", {}, ("bf16",), compiled.weighing_launches),
    Case("attention 64", {"columns": 64}, THREE, **ATTENTION),
    Case("attention 64 lean", {"columns": 64, "form": "lean"}, ONE, **ATTENTION),
    Case("attention", {}, THREE, **ATTENTION),
    Case("attention lean", {"form": "lean"}, ("bf16", "fp16"), **ATTENTION),
    Case("attention 256", {"columns": 256}, TWO, **ATTENTION),
    Case("attention whole", {"causal": False}, ONE, **ATTENTION),
    Case("attention everything", {"asked": "everything"}, ONE, **ATTENTION),
    Case("attention added", {"asked": "added"}, ONE, **ATTENTION),
    Case("attention packed", {"columns": 64, "asked": "packed"}, ONE, **ATTENTION),
    Case("gradient 64", {"columns": 64}, THREE, **GRADIENT),
    Case("gradient 96", {"columns": 96}, ONE, **GRADIENT),
    Case("gradient", {}, THREE, **GRADIENT),
    Case("gradient 256", {"columns": 256}, TWO, **GRADIENT),
    Case("gradient whole", {"causal": False}, ONE, **GRADIENT),
    Case("gradient everything", {"asked": "everything"}, ONE, **GRADIENT),
    Case("gradient added", {"asked": "added"}, ONE, **GRADIENT),
    Case("gradient packed", {"columns": 64, "asked": "packed"}, ONE, **GRADIENT),
    Case("decode 64", {"columns": 64, "group": 1}, ONE, **DECODING),
    Case("decode", {}, TWO, **DECODING),
    Case("decode everything", {"asked": "everything", "group": 17}, ONE, **DECODING),
)
#: Hopper is audited in full, other GPUs in the commonest cases.
IN_FULL = "90"
ELSEWHERE = {
    "full": OPERANDS, "half": ("bf16", "fp16"), "deferred": FLOATS, "second": ("bf16", "tf32"), "third": ("bf16",),
    "statistical": ("bf16",),
    "attention 64": THREE, "attention": THREE, "gradient 64": THREE, "gradient": THREE, "decode": ONE,
}  # fmt: skip
#: For AMD only that the kernels build, with the configs of older GPUs: nothing is claimed of their arithmetic.
AMD_CASES, AMD_OPERANDS = ("full",), ("bf16", "ieee")


# --- the table ------------------------------------------------------------------------------------


#: Hash of a text or of a source → numbers, in every process.
_known: dict[str, Row] = {}


def _remember(numbers: dict[str, Row]) -> None:
    """In a process of its own, which has this module's dictionary, and not the one that a pickled method would bring along."""
    _known.update(numbers)


def known(table: Iterable[Row]) -> dict[str, Row]:
    """The numbers of kernels by their text and by their source."""
    numbers = [{key: value for key, value in row.items() if key not in NAMES} for row in table]
    return {one[key]: one for one in numbers for key in ("text", "source") if key in one}


def rows(arch: str, operands: str, case: Case, kernels: list[str] | None = None) -> list[Row]:
    """The launches of a case, in stream order; ``kernels``: only these."""
    amd = not arch.isdecimal()
    found = []
    for launch in case.launches(operands, 80 if amd else int(arch), **case.shape, numbered=not amd):
        if kernels is not None and launch.name not in kernels:
            continue
        name = {"kernel": launch.name, "case": case.name, "operands": operands, "arch": arch if amd else f"sm_{arch}"}
        found.append({**name, "config": launch.config, **_numbers(launch, arch, amd)})
    return found


def _numbers(launch: Launch, arch: str, amd: bool) -> Row:
    text = _hash(compiled.text_for_amd(launch, arch) if amd else compiled.text(launch, int(arch)))
    if text not in _known:
        source = _hash(compiled.given_for_amd(launch, arch) if amd else compiled.given(launch, int(arch)))
        if source not in _known:
            _known[source] = (anatomy.amd_row(launch, arch) if amd else anatomy.nvidia_row(launch, int(arch))) | {"source": source}
        _known[text] = _known[source] | {"text": text}
    return _known[text]


def _hash(of: str) -> str:
    return hashlib.sha256((of + anatomy.method()).encode()).hexdigest()[:16]


def work(arches: Iterable[str], names: Iterable[str], operands: Iterable[str]) -> Iterator[tuple[str, str, Case]]:
    """What of the table was asked for."""
    for arch, case in itertools.product(arches, CASES):
        amd = not arch.isdecimal()
        for kind in case.operands:
            built = arch in case.arches and (arch == IN_FULL or kind in ELSEWHERE.get(case.name, ()))
            built = built and not (amd and (case.name not in AMD_CASES or kind not in AMD_OPERANDS))
            if built and case.name in names and kind in operands:
                yield arch, kind, case


def compile_all(
    todo: list[tuple[str, str, Case]], jobs: int, have: dict[str, Row], kernels: list[str] | None = None
) -> Iterator[Row]:
    """The rows, in order; ``have``: numbers that need not be found again; ``kernels``: only these."""
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _remember, (have,)) as pool:
        for found in pool.map(rows, *zip(*todo, strict=True), itertools.repeat(kernels)):
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
    parser.add_argument("--kernel", action="append", metavar="NAME", help="with --compare only these; default: all")
    parser.add_argument("--compare", action="store_true", help="write nothing; say what differs from the committed audit")
    parser.add_argument("--afresh", action="store_true", help="compile what the committed audit knows, too")
    parser.add_argument("--out", type=Path, help="folder of the result; needed for a part of the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one for each core")
    options = parser.parse_args(argv)
    partial = options.arch or options.case or options.operands
    if partial and not options.compare and options.out is None:
        parser.error("a part of the table would take the place of the whole: name another folder with --out, or --compare")
    if options.kernel and not options.compare:
        parser.error("--kernel needs --compare: a case is written with all of its kernels")
    todo = list(work(options.arch or ARCHITECTURES, options.case or [case.name for case in CASES], options.operands or OPERANDS))
    if not todo:
        parser.error(f"nothing is audited for this choice (on AMD only cases {AMD_CASES} and operands {AMD_OPERANDS})")
    committed = audited.path(triton.__version__)
    unfinished = (options.out or committed.parent) / f"unfinished-{committed.name}"  # of a run that was stopped
    have = {} if options.afresh else known(audited.rows(committed)) | known(audited.rows(unfinished))
    if options.compare:
        return _compare([json.loads(dump(row)) for row in compile_all(todo, options.jobs, have, options.kernel)], options.kernel)
    results = Results(unfinished.stem, fresh=True, folder=options.out, triton=triton.__version__, kernels=sources(),
                      shape="m = n = k = 4096 with bias; attention 2 × 8 heads of 4096 × 128; unless the case says otherwise",
                      cases={case.name: case.shape for case in CASES})  # fmt: skip
    for row in compile_all(todo, options.jobs, have):
        print(_line(results.add("audit", **row)), flush=True)
    results.path.replace(results.path.with_name(committed.name))
    return 0


def _compare(fresh: list[Row], kernels: list[str] | None) -> int:
    committed = [row for row in audited.rows(audited.path(triton.__version__)) if kernels is None or row["kernel"] in kernels]
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
