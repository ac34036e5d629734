"""The commands ``linear``, ``layer``, ``model`` and ``train``: every provider at every case, each time beside its evidence.

A case is a workload, an operand type, how far it is run (forward, backward: forward and all gradients, step: a training step) and the way
it is called (eager, compiled, graph). Its records are written together once it is finished, so a stopped run goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abft import panels
from bench import campaign, charts, evidence, providers, timing, timing_table
from bench.contender import WAYS, Contender
from bench.providers import AGAIN, BASELINE, TWIN, Provider
from bench.results import UNFINISHED, Results
from bench.workloads import DTYPES, Passes, Workload

ROUNDS = 41
#: A lap repeats short calls until it takes about so long, so that the clock's own cost and step vanish.
LAP_SECONDS = {"cpu": 0.005, "cuda": 0.0005}
#: Looking for faults ends after so long for each provider, however few were tried.
FAULT_SECONDS = {"cpu": 5.0, "cuda": 1.0}
SECONDS_PER_HOUR = 3600.0
PRICED_TOKENS = 1e9


@dataclass(frozen=True)
class Case:
    workload: Workload
    dtype: str
    way: str

    @property
    def key(self) -> str:
        return f"{self.workload.name} {self.dtype} {self.workload.passes} {self.way}"


def parser(command: str, text: str | None) -> argparse.ArgumentParser:
    """A command's parser with the options that all of them share; ``text``: its module's."""
    out = argparse.ArgumentParser(prog=f"python -m bench {command}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(out)
    return out


def _add_options(asking: argparse.ArgumentParser) -> None:
    asking.add_argument("--list", action="store_true", help="the names of shapes or models, and of providers")
    asking.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes or models, * for any letters (default: small ones on a CPU)")
    asking.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32 bf16; on a GPU bf16 fp16 fp32")
    asking.add_argument("--providers", nargs="+", metavar="NAME", help="torch is always among them, twice")
    asking.add_argument("--ways", nargs="+", choices=WAYS, help="default: eager; on a GPU eager and graph")
    asking.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    asking.add_argument("--trials", type=int, default=30, help="faults looked for by each provider at each case")
    asking.add_argument("--threads", type=int, help="of torch, on a CPU")
    asking.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asking.add_argument("--gpu-price", type=float, help="of the device, per hour: what a billion tokens cost")
    asking.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    asking.add_argument("--seed", type=int, default=0)
    asking.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    asking.add_argument("--plots", type=Path, help="folder for PNG plots; needs matplotlib")
    asking.add_argument("--fresh", action="store_true", help="forget earlier results")


def list_providers() -> None:
    print("\nproviders")
    for name, meaning in providers.MEANINGS.items():
        print(f"  {name:<24} {meaning}")


def run_named(command: str, text: str | None, family: Callable[[Passes, bool], Iterable[Workload]], passes: list[Passes], argv: list[str],
              on_cpu: Sequence[str] = providers.ON_CPU) -> int:  # fmt: skip
    """A command whose workloads have names of their own; ``on_cpu``: its providers there."""
    asking = parser(command, text)
    if len(passes) > 1:
        asking.add_argument("--passes", nargs="+", choices=passes, default=passes)
    options = asking.parse_args(argv)
    cuda = options.device.startswith("cuda")
    every = [w for p in getattr(options, "passes", passes) for w in family(p, cuda)]
    if options.list:
        for name in dict.fromkeys(w.name for w in every):
            print(f"  {name}")
        list_providers()
        return 0
    wanted = options.shapes or ["*"]
    chosen = [w for w in every if any(fnmatch.fnmatchcase(w.name, pattern) for pattern in wanted)]
    if not chosen:
        asking.error(f"nothing is called {' or '.join(wanted)}; --list names what there is")
    if options.providers is None and not cuda:
        options.providers = list(on_cpu)
    return run(command, chosen, options)


def run(command: str, workloads: list[Workload], options: argparse.Namespace) -> int:
    """Time everything that was asked for; 1 if nothing could be timed, UNFINISHED if --seconds were over before."""
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = device.type == "cuda"
    dtypes = options.dtypes or (["bf16", "fp16", "fp32"] if cuda else ["fp32", "bf16"])
    ways = options.ways or (["eager", "graph"] if cuda else ["eager"])
    contenders = chosen_providers(options.providers or (providers.ON_GPU if cuda else providers.ON_CPU))
    cases = [Case(w, dtype, way) for w in workloads for dtype in dtypes for way in ways if _makes_sense(w, dtype, way, cuda)]
    results = Results(
        f"time-{command}-{device_name(device)}", fresh=options.fresh, folder=options.out, rounds=options.rounds, seed=options.seed,
        lap_seconds=LAP_SECONDS[device.type], price_per_hour=options.gpu_price, threads=torch.get_num_threads(), device=device_name(device),
    )  # fmt: skip
    deadline, status = time.monotonic() + options.seconds, 0
    for number, case in enumerate(cases, 1):
        if results.find(case.key) is None:
            if time.monotonic() > deadline:
                print(f"{len(cases) - number + 1} cases left for another time", file=sys.stderr)
                status = UNFINISHED
                break
            rows = compare(case, contenders, results, options, device, deadline)
            if rows:
                print(timing_table.of(case.key, rows), flush=True)
        results.progress(number, len(cases), case.key)
    if options.plots:
        charts.draw(results.records, options.plots, results.path.stem)
    return status if any(r["kind"] == "timing" for r in results.records) else 1


def chosen_providers(names: Any) -> list[Provider]:
    """torch, torch again, then the others."""
    return [providers.parse(name) for name in dict.fromkeys([BASELINE, AGAIN, *names])]


def _makes_sense(workload: Workload, dtype: str, way: str, cuda: bool) -> bool:
    # tf32 is CUDA's; a captured optimizer would need to be capturable, which is slower.
    return (cuda or (dtype != "tf32" and way != "graph")) and not (way == "graph" and workload.passes == "step")


def compare(case: Case, contenders: list[Provider], results: Results, options: argparse.Namespace, device: torch.device,
            deadline: float) -> list[dict[str, Any]]:  # fmt: skip
    """Evidence, then a race; writes and returns a record for each provider."""
    dtype, precision = DTYPES[case.dtype]
    torch.manual_seed(options.seed)
    with fp32_products(precision), torch.device(device):
        model = case.workload.model().to(dtype)
    with fp32_products(precision):
        racing, beside = {}, {}
        inputs = case.workload.inputs(device, dtype, options.seed + 1000, case.workload.portion)
        right = evidence.exact(copy.deepcopy(model), case.workload, inputs)
        tokens = case.workload.tokens
        for provider in contenders:
            found = _prepared(case, provider, model, inputs, right, options, device, results)
            if found is not None:
                racing[provider.name], beside[provider.name] = found
        del right
        times = timing.race(
            {name: c.work for name, c in racing.items()}, clock=timing.clock_of(device), rounds=options.rounds, seed=options.seed,
            lap_seconds=LAP_SECONDS[device.type], deadline=deadline,
        )  # fmt: skip
    rows = []
    for name in racing:
        found = {**times[name].summary(), **timing.ratio(times[name], times[BASELINE])}
        if TWIN in times and name not in (BASELINE, AGAIN, TWIN):
            found["over_twin"] = timing.ratio(times[name], times[TWIN])
        rows.append(results.add(
            "timing", case=case.key, workload=case.workload.name, dtype=case.dtype, passes=case.workload.passes, way=case.way,
            provider=name, tokens=tokens, multiplications=case.workload.times * case.workload.multiplications,
            bytes=case.workload.times * case.workload.numbers * dtype.itemsize, **found, **beside[name],
            **_price(found["seconds"], tokens, options),
        ))  # fmt: skip
    results.add("case", key=case.key)
    del racing, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _price(seconds: float, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    if options.gpu_price is None:
        return {}
    return {"per_billion_tokens": options.gpu_price / SECONDS_PER_HOUR * seconds / tokens * PRICED_TOKENS}


def memory(contender: Contender, held: int, device: torch.device) -> dict[str, int]:
    """Bytes: panels that stay, since ``held`` were held before; on a GPU also the peak of one call above what was allocated."""
    if device.type != "cuda":
        return {"panel_bytes": panels.live_bytes() - held}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.work()
    torch.cuda.synchronize(device)
    return {"panel_bytes": panels.live_bytes() - held, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def _prepared(case: Case, provider: Provider, model: nn.Module, inputs: tuple[Tensor, ...], right: list[Tensor],
              options: argparse.Namespace, device: torch.device, results: Results) -> tuple[Contender, dict[str, Any]] | None:  # fmt: skip
    """A contender and its evidence. None: it cannot take part; why is written down, and the others go on."""
    dtype, _ = DTYPES[case.dtype]
    reason = providers.unavailable(provider, device, dtype)
    if reason is None and provider.name == TWIN and case.way == "compiled":
        reason = "torch.compile does not see into it"
    try:
        if reason is None:
            held = panels.live_bytes()
            contender = Contender(provider, case.workload, model, case.way, device, dtype)
            found: dict[str, Any] = {"error": evidence.error(contender.results(inputs), right)}
            found |= memory(contender, held, device)  # before faults are looked for: an injector has panels made, too
            found["expected_floor"] = evidence.expected_floor(contender, case.workload.tokens, device, dtype)
            return contender, found | evidence.detection(contender, inputs, options.trials, harm_of(dtype), seconds=FAULT_SECONDS[device.type])
    except Exception as error:
        if provider.name == BASELINE:
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
    results.add("left out", case=case.key, provider=provider.name, reason=reason)
    return None


def harm_of(dtype: torch.dtype) -> float:
    """The change of a row from which a fault counts as harmful: one number for every provider, also those that see less."""
    return campaign.HARM if dtype == torch.float32 else campaign.HARM_ROUNDED


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How CUDA multiplies fp32 numbers inside: ieee or tf32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def device_name(device: torch.device) -> str:
    """cpu, interpreted (the kernels on a CPU), or the GPU's model, as a part of a file's name."""
    if device.type != "cuda":
        return "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
