"""What protection adds to whole models, to half a per cent: several equal models go through the same work in step.

    python -m bench in-step [--cases minilm-16x128] [--threads 1]

On a machine that others use two laps of half a second, one after the other, differ by several per cent. So a lap is cut into parts (the
layers of an encoder; forward, backward and optimizer of a training step), and everyone does a part before anyone does the next: what
the machine does meanwhile meets all of them. Equal models that lie elsewhere in memory differ, too. So there are as many models as
competitors, and from block to block each model belongs to another of them. A block counts once, by the median of its rounds'
quotients; the interval is that of the median of blocks (bench/intervals.py). Competitors: bench/providers.py. Two clocks read the same
laps: the wall's, and on one thread the CPU time of that thread, which leaves out whatever else ran in between.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import intervals, minilm, providers, workloads
from bench.contender import in_hands_of
from bench.providers import AGAIN, BASELINE, Provider
from bench.results import Results

COMPETITORS = ("abft", "abft:whole")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "thread": time.thread_time}
#: A block is repeated in other places; a round within it is not.
BLOCKS = 48

Part = Callable[[Any], Any]
#: Of a model and the optimizer of its weights.
Parts = Callable[[nn.Module, torch.optim.Optimizer], list[Part]]


@dataclass(frozen=True)
class Case:
    """A workload cut into parts, each of which takes what the one before returned; ``rounds`` of them are a block."""

    workload: workloads.Workload
    parts: Parts
    rounds: int


def encoder(model: nn.Module, _: torch.optim.Optimizer) -> list[Part]:
    """The embeddings, then layer by layer."""

    def embedded(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model.norm(model.words(inputs[0]) + model.positions(torch.arange(inputs[0].shape[1])))

    return [torch.no_grad()(part) for part in (embedded, *model.layers)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Part]:
    """Forward, backward, and the optimizer."""

    def updated(_: None) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [lambda inputs: model(*inputs), lambda loss: loss.backward(), updated]


def cases() -> Iterator[Case]:
    for workload in workloads.models("forward", cuda=False):
        if workload.model is minilm.MiniLM:
            yield Case(workload, encoder, 3 if workload.tokens > 1000 else 60)
    for workload in workloads.training():
        if workload.name.startswith("gpt"):
            yield Case(workload, step, 15)


def measure(case: Case, names: Sequence[str], results: Results, blocks: int, seed: int = 0) -> list[dict[str, Any]]:
    """A record for each competitor and clock: its time over torch's."""
    torch.manual_seed(seed)
    clocks = ["wall", "thread"] if torch.get_num_threads() == 1 else ["wall"]
    everyone = [providers.parse(name) for name in dict.fromkeys((BASELINE, AGAIN, *names))]
    model = case.workload.model()
    places = [_forms(case, copy.deepcopy(model), everyone) for _ in everyone]
    inputs = case.workload.draw(None)
    drawn = random.Random(seed)
    turns = list(itertools.permutations(range(len(everyone))))
    drawn.shuffle(turns)
    blocks = -(-blocks // len(turns)) * len(turns)  # every model belongs to every competitor equally often
    found = []
    for number in range(blocks):
        walks = [places[turns[number % len(turns)][i]][i] for i in range(len(everyone))]
        found.append(laps(walks, inputs, case.rounds, drawn, [CLOCKS[c] for c in clocks]))
        results.progress(number + 1, blocks, case.workload.name)
    times = np.array(found)  # blocks, rounds, competitors, clocks
    return [
        _record(case, provider, clock, times[..., i, c], times[..., 0, c], results)
        for i, provider in enumerate(everyone) if i for c, clock in enumerate(clocks)
    ]  # fmt: skip


def _forms(case: Case, model: nn.Module, everyone: Sequence[Provider]) -> list[list[Part]]:
    """One model's weights in everybody's hands."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shared = {id(weight): weight for weight in model.parameters()}
    return [case.parts(in_hands_of(p, copy.deepcopy(model, dict(shared))), optimizer) for p in everyone]


def laps(walks: Sequence[list[Part]], inputs: Any, rounds: int, drawn: random.Random, clocks: Sequence[Callable[[], float]]) -> Any:
    """Seconds (rounds, competitors, clocks) of all parts, after a round that does not count."""
    seconds = np.zeros((rounds + 1, len(walks), len(clocks)))
    order = list(range(len(walks)))
    for number in range(rounds + 1):
        values = [inputs] * len(walks)
        for at in range(len(walks[0])):
            drawn.shuffle(order)
            for i in order:
                before = [now() for now in clocks]
                values[i] = walks[i][at](values[i])
                seconds[number, i] += [now() - then for now, then in zip(clocks, before, strict=True)]
    return seconds[1:]


def _record(case: Case, provider: Provider, clock: str, times: Any, baseline: Any, results: Results) -> dict[str, Any]:
    quotients = np.median(times / baseline, 1)
    of_sums = float(times.sum() / baseline.sum())  # what few rounds take longer for, too, and whatever disturbed them
    low, high = intervals.median(quotients.tolist())
    w = case.workload
    return results.add(
        "in step", key=f"{w.name} {w.passes} {provider.name} {clock}", workload=w.name, passes=w.passes, provider=provider.name,
        clock=clock, threads=torch.get_num_threads(), ratio=float(np.median(quotients)), interval=[low, high], of_sums=of_sums,
        blocks=len(times), rounds=case.rounds, seconds=float(np.median(times)), baseline_seconds=float(np.median(baseline)),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    asking = argparse.ArgumentParser(prog="python -m bench in-step", description=__doc__, formatter_class=raw)
    known = {case.workload.name: case for case in cases()}
    asking.add_argument("--cases", nargs="+", choices=known, default=list(known))
    asking.add_argument("--providers", nargs="+", default=COMPETITORS, metavar="NAME", help="beside torch, which is there twice")
    asking.add_argument("--blocks", type=int, default=BLOCKS, help=f"default: {BLOCKS}; rounded up to whole turns")
    asking.add_argument("--threads", type=int, help="of torch")
    asking.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    asking.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = asking.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    name = "in-step-cpu-1-thread" if threads == 1 else "in-step-cpu"
    results = Results(name, fresh=options.fresh, folder=options.out, blocks=options.blocks, threads=threads)
    gc.disable()
    for name in options.cases:
        gc.collect()
        if {r["provider"] for r in results.records if r.get("workload") == name} >= set(options.providers):
            print(f"{name} is in {results.path.name}; --fresh measures it anew", file=sys.stderr)
            continue
        for r in measure(known[name], options.providers, results, options.blocks):
            print(f"{r['key']:<48} {r['ratio']:.4f} ({r['interval'][0]:.4f} to {r['interval'][1]:.4f})")
    return 0
