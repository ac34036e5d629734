"""The commands ``linear``, ``layer``, ``model`` and ``train``: what was asked for, case by case; a stopped run goes on with the next."""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import charts, devices, providers, timing_table
from bench.case import LAP_SECONDS, Case, compare
from bench.contender import WAYS
from bench.providers import AGAIN, BASELINE, Provider
from bench.results import UNFINISHED, Results
from bench.workloads import DTYPES, Passes, Workload

ROUNDS = 41


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
              on_cpu: Sequence[str] = providers.ON_CPU, on_gpu: Sequence[str] = providers.ON_GPU) -> int:  # fmt: skip
    """A command whose workloads have names of their own; ``on_cpu``, ``on_gpu``: its providers there."""
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
    if options.providers is None:
        options.providers = list(on_gpu if cuda else on_cpu)
    return run(command, chosen, options)


def run(command: str, workloads: list[Workload], options: argparse.Namespace, *, name: str | None = None) -> int:
    """Time everything that was asked for; 1 if nothing could be timed, UNFINISHED if --seconds were over before.

    name: of the result file, before the device's; default: time-COMMAND.
    """
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = device.type == "cuda"
    dtypes = options.dtypes or (["bf16", "fp16", "fp32"] if cuda else ["fp32", "bf16"])
    ways = options.ways or (["eager", "graph"] if cuda else ["eager"])
    contenders = chosen_providers(options.providers or (providers.ON_GPU if cuda else providers.ON_CPU))
    cases = [Case(w, dtype, way) for w in workloads for dtype in dtypes for way in ways if _makes_sense(w, dtype, way, cuda)]
    alone = "-1-thread" if device.type == "cpu" and options.threads == 1 else ""
    results = Results(
        f"{name or f'time-{command}'}-{devices.device_name(device)}{alone}", fresh=options.fresh, folder=options.out,
        rounds=options.rounds, seed=options.seed, lap_seconds=LAP_SECONDS[device.type],
        price_per_hour=options.gpu_price, threads=torch.get_num_threads(),
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
