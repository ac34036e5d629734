"""Act (b): a small GPT learns Python's own sources four times, from one seed and in one order of the data.

    fault-free     nothing is injected: where the loss should go
    unprotected    a share of the steps is struck, nobody looks
    NaN watching   the same, but a step whose loss or gradient norm is not finite is skipped
    protected      the same, checked and repaired by abft, replayed by StepGuard what could not be repaired

All four clip the gradient, as everybody does: without it the unprotected runs would look worse than they are.
A fifth run is the yardstick: fault-free once more, with the rows of every batch in reverse. Its mathematics is the same
and its sums are taken in another order, so what separates it from the first is rounding alone: how close is close.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

import abft

from .corpus import fingerprint, sources
from .faultlog import Tally
from .gpt import GPT, Shape
from .progress import Progress

ARMS = ("fault-free", "unprotected", "NaN watching", "protected")
YARDSTICK = "fault-free, reversed"
FAULT_FREE = (ARMS[0], YARDSTICK)
BATCH = 16
LEARNING_RATE = 3e-3
WARM_UP = 20  # steps
HELD_OUT = 0.05  # share of the text, at its end, that no step trains on
HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class Text:
    """The sources as numbers: one symbol per character."""

    train: Tensor
    held_out: Tensor
    symbols: int
    characters: int
    sha256: str

    @classmethod
    def read(cls) -> Text:
        text = sources()
        number = {character: index for index, character in enumerate(sorted(set(text)))}
        numbers = torch.tensor([number[character] for character in text])
        split = int(len(numbers) * (1 - HELD_OUT))
        return cls(numbers[:split], numbers[split:], len(number), len(text), fingerprint([text]))


@dataclass
class Run:
    """One training run. ``losses`` are what the loop saw: under faults they may be wrong themselves."""

    arm: str
    rate: float
    seed: int
    losses: list[float] = field(default_factory=list)
    faults: Tally = field(default_factory=Tally)
    skipped: int = 0  # by NaN watching
    replays: int = 0  # by StepGuard
    dropped: int = 0
    seconds: float = 0.0
    held_out: float = math.nan  # measured without faults after the last step
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))  # after the last step, in one vector

    def record(self) -> dict:
        numbers = {key: value for key, value in vars(self).items() if key not in ("faults", "parameters")}
        return {**numbers, **self.faults.record(), "seconds": round(self.seconds, 3)}


class Trained(Protocol):
    """What is left of any training run."""

    losses: list[float]
    held_out: float
    parameters: Tensor


@dataclass(frozen=True)
class Distance:
    """How far a run went from the fault-free one of the same seed."""

    max_loss: float  # largest |Δloss| over the steps; inf if either is not finite
    bit_equal: bool  # every loss and every parameter
    held_out: float  # Δ of the held-out loss
    parameters: float  # ‖θ − θ*‖ / ‖θ*‖

    @classmethod
    def between(cls, run: Trained, reference: Trained) -> Distance:
        gaps = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
        apart = (run.parameters - reference.parameters).norm() / reference.parameters.norm()
        return cls(
            max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0),
            run.losses == reference.losses and torch.equal(run.parameters, reference.parameters),
            run.held_out - reference.held_out,
            float(apart),
        )


def train(arm: str, text: Text, *, steps: int, rate: float, seed: int, bar: Progress, shape: Shape | None = None) -> Run:
    """One run of one arm. ``rate`` is the share of the steps that a fault strikes; fault-free arms ignore it."""
    torch.manual_seed(seed)
    model = GPT(shape or Shape(text.symbols))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps))
    step = _step_of(arm, model, optimizer)
    faults: AbstractContextManager = nullcontext(())
    if arm not in FAULT_FREE:
        faults = abft.inject.faults(abft.inject.Mixture.gpu_2026(), rate=rate, seed=seed)
    run = Run(arm, 0.0 if arm in FAULT_FREE else rate, seed)
    abft.report(reset=True)
    with faults as log:
        for characters, targets in _batches(text.train, model.positions.num_embeddings, steps, seed):
            if arm == YARDSTICK:
                characters, targets = characters.flip(0), targets.flip(0)
            before, start = len(log), time.perf_counter()
            run.losses.append(step(characters, targets, run))
            schedule.step()
            run.seconds += time.perf_counter() - start
            run.faults.add(log[before:], abft.report(reset=True))
            bar.advance(f"{arm}: loss {run.losses[-1]:.2f}")
    run.held_out = held_out_loss(model, text.held_out)
    run.parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return run


Step = Callable[[Tensor, Tensor, Run], float]


def _step_of(arm: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    if arm == "protected":
        return _protected_step(abft.protect(model, "training"), optimizer)
    # Faults strike the products that abft computes; "off" computes each of them without a check. The fault-free runs, too: attention
    # of torch's own rounds otherwise, and only of one arithmetic can it be asked whether the bits are the same.
    abft.protect(model, abft.Policy(level="off"))
    return _plain_step(model, optimizer, watch=arm == "NaN watching")


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, watch: bool) -> Step:
    def step(characters: Tensor, targets: Tensor, run: Run) -> float:
        loss = model(characters, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if watch and not (loss.isfinite() and norm.isfinite()):
            run.skipped += 1
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _protected_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    # "drop" and not "raise": a step that no replay saves is left out and counted, and the demo goes on.
    guard = abft.StepGuard(model, optimizer, on_failed="drop")

    def step(characters: Tensor, targets: Tensor, run: Run) -> float:
        while guard.attempt():
            loss = model(characters, targets)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.step()
        optimizer.zero_grad(set_to_none=True)
        run.replays, run.dropped = guard.replays, guard.dropped
        return loss.item()

    return step


def _batches(text: Tensor, context: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    # A generator of its own: the order of the data must not depend on what else draws random numbers.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - context - 1, (BATCH, 1), generator=generator)
        places = starts + torch.arange(context)
        yield text[places], text[places + 1]


@torch.no_grad()
def held_out_loss(model: GPT, text: Tensor) -> float:
    batches = _batches(text, model.positions.num_embeddings, HELD_OUT_BATCHES, seed=0)
    return sum(model(characters, targets).item() for characters, targets in batches) / HELD_OUT_BATCHES
