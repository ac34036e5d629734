"""One case, and everybody at it: evidence of each, then a race.

A case is a workload, an operand type, how far it is run (forward, backward: forward and all gradients, step: a training step) and the way
it is called (eager, compiled, graph). Its records are written together once it is finished.
"""

from __future__ import annotations

import argparse
import copy
import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abft import panels
from bench import campaign, evidence, providers, timing
from bench.contender import Contender
from bench.devices import fp32_products
from bench.providers import AGAIN, BASELINE, TWIN, Provider
from bench.results import Results
from bench.workloads import DTYPES, Workload

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
            gc.collect()  # panels of models that are garbage are nobody's here: freed meanwhile, they would be taken from this row
            held = panels.live_bytes()
            contender = Contender(provider, case.workload, model, case.way, device, dtype)
            found: dict[str, Any] = {"error": evidence.error(contender.results(inputs), right)}
            found |= memory(contender, held, device)  # before faults are looked for: an injector has panels made, too
            found["expected_floor"] = evidence.expected_floor(contender, case.workload.tokens, device, dtype)
            seconds = FAULT_SECONDS[device.type]
            return contender, found | evidence.detection(contender, inputs, options.trials, harm_of(dtype), seconds=seconds)
    except Exception as error:
        if provider.name == BASELINE:
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
    results.add("left out", case=case.key, provider=provider.name, reason=reason)
    return None


def harm_of(dtype: torch.dtype) -> float:
    """The change of a row from which a fault counts as harmful: one number for every provider, also those that see less."""
    return campaign.HARM if dtype == torch.float32 else campaign.HARM_ROUNDED
