"""Search for launch shapes on the GPU at hand, and write the table that the kernels read in place of the built-in one.

    python -m bench tune --seconds 600                     triton_kernels/tuned.json; again: goes on where it stopped
    python -m bench tune --shapes 'llama8b-*' --out DIR    DIR/tuned.json; nothing reads it until it lies beside configs.py
    python -m bench tune --list                            the candidates
    python -m bench tune --interpreted --out DIR           a trial in Triton's interpreter, on a CPU; its table is for no GPU

Candidates are those around the built-in configs (bench/candidates.py): tiles in the order of the wave simulator, then stages, steps in
K and loads of the best tile. Left out, and said so, is what spills, takes other matrix instructions, delivers other bits than the
built-in config, or alarms on clean data. The others are timed beside the built-in config and their own unchecked twin, interleaved, and
one takes its place if it is faster at every M that was timed with the same weight, the whole interval below one on the average.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench import candidates, devices, forms, shapes, stamp, timing, tuned_table
from bench.candidates import Compiled, Row
from bench.case import LAP_SECONDS
from bench.contender import captured
from bench.results import UNFINISHED, Results
from bench.shapes import Shape
from bench.workloads import DTYPES

ROUNDS = 15
#: Many rows of every weight of an 8B model, squares, and decoding.
SHAPES = ("square-4096", "square-8192", "llama8b-*-8192", "llama8b-qo-512", "llama8b-*-1", "llama8b-qo-16")
SHAPES_INTERPRETED = ("minilm-qkvo-16", "gpt-out-1024")
KINDS = {"bf16": "16-bit", "fp16": "16-bit", "tf32": "tf32", "fp32": "ieee"}
#: As the audit names them.
OPERANDS = {"bf16": "bf16", "fp16": "fp16", "tf32": "tf32", "fp32": "ieee"}
#: What counters of clean data must not hold.
ALARMS = ("observed", "recomputed", "reconstructed", "uncorrected", "false_alarms", "stale")


@dataclass(frozen=True)
class Case:
    """One product and the row of the table of configs that it falls under."""

    row: Row
    dtype: str
    shape: Shape

    def key(self, config: candidates.Config) -> str:
        return f"{self.dtype} {self.shape.name} {candidates.label(config)}"


Examine = Callable[[Case, candidates.Config], Compiled]


# --- the search -----------------------------------------------------------------------------------


def search(cases: list[Case], results: Results, *, examine: Examine, clock: timing.Clock, device: torch.device, rounds: int,
           most_tiles: int, deadline: float) -> bool:  # fmt: skip
    """Time candidates of every row in turn until there are no more; False: until the deadline, of time.monotonic."""
    rows = list(dict.fromkeys((case.row, case.dtype) for case in cases))
    mine = {row: [case for case in cases if (case.row, case.dtype) == row] for row in rows}
    searches = {row: _configs(row[0], mine[row], results, device, most_tiles) for row in rows}
    bench = _Bench(clock, device, rounds, deadline)
    while searches:
        for row in list(searches):
            config = next(searches[row], None)
            if config is None:
                del searches[row]
                continue
            for case in mine[row]:
                if results.find(case.key(config)) is None:
                    if time.monotonic() > deadline:
                        return False
                    _take(case, config, results, examine, bench)
    return True


def _configs(row: Row, cases: list[Case], results: Results, device: torch.device, most_tiles: int) -> Iterator[candidates.Config]:
    """Tiles, then the ways of the best of them."""
    from abft.triton_kernels import configs

    tiles = candidates.tiles(row, [case.shape for case in cases], configs.multiprocessors(device))[:most_tiles]
    yield from tiles
    timed = [r for r in results.records if r["kind"] == "candidate" and "ratio" in r and _of(r, cases)]
    fields, _ = tuned_table.best([r for r in timed if r["label"] in map(candidates.label, tiles)])
    yield from candidates.variants(row, candidates.replace(row.built_in, **fields))


def _of(record: dict[str, Any], cases: list[Case]) -> bool:
    return any((record["dtype"], record["shape"]) == (case.dtype, case.shape.name) for case in cases)


def _take(case: Case, config: candidates.Config, results: Results, examine: Examine, bench: _Bench) -> None:
    """Examine and time one candidate at one case; what became of it is written down."""
    found: dict[str, Any] = {}
    failed = False
    compiled, first = examine(case, config), examine(case, case.row.built_in)
    if compiled.reason is not None:
        found["reason"] = compiled.reason
    elif compiled.arithmetic != first.arithmetic:
        found["reason"] = f"other instructions: {', '.join(compiled.arithmetic)}, not {', '.join(first.arithmetic)}"
    else:
        results.add("begun", key=case.key(config))  # one that never ends is not begun again
        try:
            found = bench.measure(case, config)
        except RuntimeError as error:
            failed = True
            found["reason"] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
    results.add(
        "candidate", key=case.key(config), row=case.row.kind, height=case.row.height, dtype=case.dtype, shape=case.shape.name,
        m=case.shape.m, n=case.shape.n, k=case.shape.k, label=candidates.label(config),
        config=candidates.difference(config, case.row.built_in), **found,
    )  # fmt: skip
    if failed and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # what broke the device for everybody raises again, and ends this process
    print(f"{case.dtype} {case.shape.name:<22} {candidates.label(config):<58} {found.get('reason') or _times(found)}", flush=True)


def _times(found: dict[str, Any]) -> str:
    return f"× {found['ratio']:.3f} ({found['low']:.3f} … {found['high']:.3f}), × twin {found['over_twin']['ratio']:.3f}"


# --- one candidate --------------------------------------------------------------------------------


class _Bench:
    """Operands of the cases, drawn once, and what the built-in config makes of them."""

    def __init__(self, clock: timing.Clock, device: torch.device, rounds: int, deadline: float) -> None:
        self._clock, self._device, self._rounds, self._deadline = clock, device, rounds, deadline
        self._operands: dict[Case, tuple[Tensor, nn.Parameter, Tensor | None]] = {}

    def measure(self, case: Case, config: candidates.Config) -> dict[str, Any]:
        """Times beside the built-in config's and the own twin's; or a reason why this one is out of the question."""
        dtype, precision = DTYPES[case.dtype]
        with devices.fp32_products(precision), torch.no_grad():
            if case not in self._operands:
                self._operands[case] = draw(case.shape, dtype, self._device)
            operands = self._operands[case]
            ours, theirs = _Product(case.row, config, *operands), _Product(case.row, case.row.built_in, *operands)
            y, right = ours.checked(), theirs.checked()
            if not torch.equal(y, right) or not torch.equal(ours.twin(), right):
                return {"reason": "other bits than the built-in config"}
            racing = {"built-in": theirs.checked, "candidate": ours.checked, "twin": ours.twin}
            if self._device.type == "cuda":
                racing = {name: captured(work) for name, work in racing.items()}
            times = timing.race(
                racing, clock=self._clock, rounds=self._rounds, lap_seconds=LAP_SECONDS[self._device.type], deadline=self._deadline
            )
            if alarms := ours.alarms():
                return {"reason": f"{alarms} alarms on clean data"}
        ratio = timing.ratio(times["candidate"], times["built-in"])
        return {"seconds": times["candidate"].summary()["seconds"], **ratio, "over_twin": timing.ratio(times["candidate"], times["twin"])}


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, nn.Parameter, Tensor | None]:
    """X, W and the bias of a product."""
    torch.manual_seed(0)
    x, w = (torch.randn(*size, device=device).to(dtype) for size in ((shape.m, shape.k), (shape.n, shape.k)))
    bias = torch.randn(shape.n, device=device).to(dtype) if shape.bias else None
    return x, nn.Parameter(w, requires_grad=False), bias


class _Product:
    """A checked product and its twin under a config, with a ledger of its own."""

    def __init__(self, row: Row, config: candidates.Config, x: Tensor, w: nn.Parameter, bias: Tensor | None) -> None:
        import abft
        from abft import ledger
        from abft.backends import triton as backend
        from abft.backends.call import Call

        self._operands = x, w, bias
        self._call = Call(x, w, bias, w, False, "fprop", abft.Policy(on_uncorrected="record"), 0)
        with candidates.in_use(row, config):
            self._plan = backend.plan_for(self._call)
        self._words = torch.zeros(ledger.WORDS, dtype=torch.int64, device=x.device)
        self._site = torch.zeros((), dtype=torch.int64, device=x.device)

    def checked(self) -> Tensor:
        from abft.backends import triton as backend

        with self._planned():
            return backend.product(self._call, self._words, self._site)

    def twin(self) -> Tensor:
        from bench import twin_layer

        with self._planned():
            return twin_layer.multiply(*self._operands, config=self._plan.config)

    def alarms(self) -> int:
        from abft import ledger

        counters = self._words[ledger.HEADER : ledger.HEADER + ledger.COUNTERS].tolist()
        return sum(counters[ledger.COUNTER[name]] for name in ALARMS)

    def _planned(self) -> Any:
        from abft.backends import triton as backend

        return mock.patch.object(backend, "plan_for", lambda call: self._plan)


# --- compiling ahead ------------------------------------------------------------------------------


class Compiling:
    """Candidates compiled by other processes, each once: the shape of the first case that asks stands for the others of its row."""

    def __init__(self, jobs: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        self._asked: dict[tuple[Row, str, str], concurrent.futures.Future[Compiled]] = {}

    def ask(self, case: Case, config: candidates.Config) -> concurrent.futures.Future[Compiled]:
        key = case.row, case.dtype, candidates.label(config)
        if key not in self._asked:
            self._asked[key] = self._pool.submit(candidates.compiled, case.row, OPERANDS[case.dtype], config, case.shape)
        return self._asked[key]

    def __call__(self, case: Case, config: candidates.Config) -> Compiled:
        return self.ask(case, config).result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


# --- the command ----------------------------------------------------------------------------------


def cases_of(chosen: list[Shape], dtypes: list[str], architecture: int | None) -> list[Case]:
    from abft.triton_kernels import decode

    return [
        Case(Row(architecture, KINDS[dtype], decode.height(architecture, KINDS[dtype], shape.m)), dtype, shape)
        for dtype in dtypes
        for shape in chosen
    ]


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__, formatter_class=raw)
    parser.add_argument("--list", action="store_true", help="the tiles of every row that would be tried, in order")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="* for any letters; `bench linear --list` names them")
    parser.add_argument("--dtypes", nargs="+", choices=KINDS, help="default: bf16 tf32; interpreted: fp32. 16-bit types share a row")
    parser.add_argument("--tiles", type=int, default=sys.maxsize, help="no more of each row (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: one for each core)")
    parser.add_argument("--out", type=Path, help="folder of the table and of the times (default: triton_kernels, bench/results)")
    parser.add_argument("--interpreted", action="store_true", help="in Triton's interpreter, on a CPU")
    parser.add_argument("--fresh", action="store_true", help="forget earlier times")
    options = parser.parse_args(argv)
    if options.interpreted:
        if options.out is None and not options.list:
            parser.error("--interpreted measures no GPU: name a folder for its table with --out")
        forms.backend_of("interpreted")
    cuda = torch.cuda.is_available() and not options.interpreted
    try:
        chosen = shapes.named(options.shapes or (SHAPES_INTERPRETED if options.interpreted else SHAPES))
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if cuda else "cpu")
    return _list(chosen, options, device) if options.list else _tune(chosen, options, device)


def _dtypes(options: argparse.Namespace) -> list[str]:
    return options.dtypes or (["fp32"] if options.interpreted else ["bf16", "tf32"])


def _architecture(options: argparse.Namespace, device: torch.device) -> int | None:
    from abft.backends import triton as backend

    return backend.family_of(device) if device.type == "cuda" else None if options.interpreted else 90


def _list(chosen: list[Shape], options: argparse.Namespace, device: torch.device) -> int:
    from abft.triton_kernels import configs

    architecture = _architecture(options, device)
    programs = configs.multiprocessors(device) if device.type == "cuda" else configs.PROGRAMS.get(architecture or 0, 1)
    cases = cases_of(chosen, _dtypes(options), architecture)
    for row, dtype in dict.fromkeys((case.row, case.dtype) for case in cases):
        mine = [case.shape for case in cases if (case.row, case.dtype) == (row, dtype)]
        print(f"\n{dtype}, {'many rows' if row.height is None else f'{row.height} rows'}: {' '.join(s.name for s in mine)}")
        for config in candidates.tiles(row, mine, programs)[: options.tiles]:
            print(f"  {candidates.label(config)}{'   built in' if config == row.built_in else ''}")
    return 0


def _tune(chosen: list[Shape], options: argparse.Namespace, device: torch.device) -> int:
    import triton
    from abft.triton_kernels import tuning

    results = Results(f"tune-{devices.device_name(device)}", fresh=options.fresh, folder=options.out, rounds=options.rounds)
    if device.type != "cuda" and not options.interpreted:
        print("there is no GPU to tune for; --interpreted tries the search out, --list names candidates", file=sys.stderr)
        return 2
    from abft.backends import triton as backend

    for dtype in _dtypes(options):
        if reason := backend.available(device, DTYPES[dtype][0]):
            print(f"{dtype} cannot be timed here: {reason}", file=sys.stderr)
            return 2
    architecture = _architecture(options, device)
    cases = cases_of(chosen, _dtypes(options), architecture)
    examine: Any = _examined_by_nobody if options.interpreted else Compiling(options.jobs)
    try:
        if not options.interpreted:
            _ask_ahead(cases, examine, device, options.tiles)
        done = search(cases, results, examine=examine, clock=timing.clock_of(device), device=device, rounds=options.rounds,
                      most_tiles=options.tiles, deadline=time.monotonic() + options.seconds)  # fmt: skip
    finally:
        if not options.interpreted:
            examine.close()
    if not any("ratio" in r for r in results.records):
        return UNFINISHED if not done else 1
    found = tuned_table.entries(results.records)
    file = options.out / tuning.FILE.name if options.out else tuning.FILE
    tuned_table.write(file, "interpreted" if architecture is None else architecture, triton.__version__, found, stamp.stamp())
    for entry in found:
        print(f"{entry['kind']} height {entry['height']} n {entry['n']} k {entry['k']}: {entry['config']} × {entry['ratio']:.3f}")
    print(f"{len(found)} entries in {file.name}" + ("" if done else "; more to try: call it again"), flush=True)
    return 0 if done else UNFINISHED


def _examined_by_nobody(case: Case, config: candidates.Config) -> Compiled:
    """The interpreter compiles nothing."""
    return Compiled(None)


def _ask_ahead(cases: list[Case], compiling: Compiling, device: torch.device, most_tiles: int) -> None:
    """Tiles in the order in which they will be wanted: one of each row, then the next."""
    from abft.triton_kernels import configs

    rows: dict[tuple[Row, str], list[Case]] = {}
    for case in cases:
        rows.setdefault((case.row, case.dtype), []).append(case)
    tiles = [
        (mine[0], candidates.tiles(row, [case.shape for case in mine], configs.multiprocessors(device))[:most_tiles])
        for (row, _), mine in rows.items()
    ]
    for nth in range(max(len(found) for _, found in tiles)):
        for case, found in tiles:
            if nth < len(found):
                compiling.ask(case, found[nth])
