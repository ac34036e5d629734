"""Extra work of a repair, counted in the kernels under Triton's interpreter: data tiles computed again, of those of the product.

    python -m bench work

One protected layer with M = 8192 rows, as many as a training step of a large model has; what strikes it is what makes many
rows suspect at once. Arbitration comes before any repetition: ``arbitration`` is what it reads of one group of 512 columns
at K = 4096 in bf16, from the sizes of what the kernels read (docs/decisions/0028).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import abft
from abft.inject import Fault
from bench import forms
from bench.results import Results

M, N, K, GROUP = 8192, 256, 16, 128
DTYPE = torch.float16
TILE = 128  # rows and columns of a data tile, and what a fault of pattern "tile" strikes


@dataclass(frozen=True)
class Scenario:
    """What happens to a clean layer and its input, and what is asked for besides."""

    name: str
    faults: tuple[Fault, ...] = ()
    to_input: Callable[[Tensor], Tensor] = lambda x: x
    to_weight: Callable[[Tensor], Any] = lambda w: w
    announced: bool = False  # the change of the weight
    weights: str = "tracked"
    verdicts: tuple[str, ...] = field(default=())


def _poison(x: Tensor) -> Tensor:
    return torch.where(torch.arange(K) == 3, torch.nan, x)


def _tiles_of_one(programs: int, tall: int = 8) -> tuple[Fault, ...]:
    """Every data tile that the first of so many persistent programs computes (triton_kernels/tiles.py, tile_of)."""
    across = N // TILE
    found = []
    for index in range(0, M // TILE * across, programs):
        column, inside = index // (tall * across), index % (tall * across)
        found.append((column * tall + inside % tall, inside // tall))
    return tuple(Fault("nullify", pattern="tile", index=(TILE * row, TILE * col)) for row, col in found)


SCENARIOS = (
    Scenario("clean"),
    Scenario(
        "one element of the weight", (Fault("bitflip", "weight", bit=14, index=(77, 5)),), weights="frozen", verdicts=("reconstructed",),
    ),
    Scenario("weight edited, unannounced", to_weight=lambda w: w.data.mul_(2), verdicts=("stale",)),
    Scenario("one check tile", (Fault("nullify", "checksum", pattern="tile", index=(256, 0)),), verdicts=("recomputed",)),
    Scenario("every tile of one of three multiprocessors", _tiles_of_one(programs=3), verdicts=("recomputed",)),
    Scenario("NaN in the input", to_input=_poison, verdicts=("input_rows",)),
    Scenario(
        "legitimate overflow", to_input=lambda x: x * 0 + 600, to_weight=lambda w: w.data.fill_(600), announced=True,
        verdicts=("overflow_rows",),
    ),
    Scenario("panel changed", (Fault("nullify", "panel", pattern="row", index=(0, 0)),), verdicts=("false_alarms",)),
)  # fmt: skip


def count(scenario: Scenario) -> dict[str, Any]:
    """One product under a scenario: tiles and rows."""
    from abft.triton_kernels import launch, summary

    torch.manual_seed(0)
    layer = nn.Linear(K, N, dtype=DTYPE)
    policy = abft.Policy(backend="triton", group=GROUP, weights=scenario.weights, on_uncorrected="record")  # type: ignore[arg-type]
    abft.protect(layer, policy, name=scenario.name)
    x = torch.randn(M, K).to(DTYPE)
    with torch.no_grad(), _watching(launch) as seen:
        right = layer(x)
        scenario.to_weight(layer.weight)
        x = scenario.to_input(x)
        if scenario.announced:
            abft.refresh(layer)
            right = layer(x)
        abft.report(reset=True)
        with abft.inject.faults(*scenario.faults) if scenario.faults else contextlib.nullcontext():
            y = layer(x)
    report = abft.report(reset=True)
    product, evidence = seen[-1]
    tiles = product.tiles[0]
    names = ("observed", "recomputed", "reconstructed", "uncorrected", "false_alarms", "stale", "input_rows", "overflow_rows")
    verdicts = {name: getattr(report, name) for name in names if getattr(report, name)}
    taken = int(evidence.summary[summary.TAKEN.value])
    assert set(verdicts) == set(scenario.verdicts), f"{scenario.name}: {verdicts}"
    return {"data_tiles": tiles, "again": taken, "share": taken / tiles, "verdicts": verdicts, "same": bool(torch.equal(y, right))}


class _watching:
    """Keeps the evidence of every product that is checked inside."""

    def __init__(self, launch: Any) -> None:
        self._launch, self._check, self.seen = launch, launch.check, []  # type: ignore[var-annotated]

    def __enter__(self) -> list[tuple[Any, Any]]:
        def check(product: Any, evidence: Any, *more: Any) -> Tensor:
            self.seen.append((product, evidence))
            return self._check(product, evidence, *more)

        self._launch.check = check
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._launch.check = self._check


def arbitration_bytes(k: int = 4096) -> dict[str, int]:
    """What arbitration reads of one group in bf16: the weight, and what is remembered of it, panel and its sums of bits."""
    from abft.backends import triton

    p = triton.plan(4096, k, torch.bfloat16, 90, False, "full", None)
    weight = p.layout.groups.width * k * 2
    columns = p.layout.columns // p.layout.groups.count
    return {"weight": weight, "panel": columns * k * 2, "fingerprint": 3 * 4 * k, "integrity": 4 * columns * -(-k // 64)}


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench work", description=__doc__).parse_args(argv)
    forms.backend_of("interpreted")
    torch.set_num_threads(1)
    results = Results("work", fresh=True, m=M, n=N, k=K, group=GROUP, dtype="fp16")
    for i, scenario in enumerate(SCENARIOS):
        r = results.add("work", name=scenario.name, **count(scenario))
        print(f"{r['name']:<34} {r['again']:>4} of {r['data_tiles']} tiles again, {r['verdicts']}, same bits: {r['same']}", flush=True)
        results.progress(i + 1, len(SCENARIOS))
    bytes_ = arbitration_bytes()
    results.add("arbitration", group=512, k=4096, dtype="bf16", bytes=bytes_, total=sum(bytes_.values()))
    print(f"arbitration of one group reads {sum(bytes_.values()) / 1e6:.2f} MB: {bytes_}")
    return 0
