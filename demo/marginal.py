"""Act (c): one of four devices that train a small GPT together turns marginal: it adds a little to one column of every product.

    fault-free   nothing happens
    left in      nobody looks, and the bias doubles every few steps, as degrading hardware does
    watched      abft checks every product and compares the devices' residuals. No check sees anything, the statistics do: the
                 device is named and taken out, the run goes back to a checkpoint from before, and on without it

The devices are simulated: replicas of one model in one process, under names of their own, that share the weights' memory, so their
gradients add up as an all-reduce would add them. Whoever takes over a share of the batch computes the very same numbers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import abft
from abft.statistics import watches

from .gpt import GPT, Shape
from .progress import Progress
from .training import LEARNING_RATE, Text, held_out_loss

ARMS = ("fault-free", "left in", "watched")
DEVICES = 4
MARGINAL = 2
SEQUENCES = 32  # of a device in a step: with 32 characters each 1,024 rows, which make a batch of the statistics
CHECKPOINT = 8  # steps
WARM_UP = 32  # steps in which is learnt by how much the devices differ
ONSET = 40  # the step in which the device turns marginal
COLUMN = 7
FIRST = 2e-7  # what it adds then: about 0.1 σ of the residuals' noise
DOUBLING = 3  # steps


@dataclass
class Run:
    """One run. ``losses`` are what the loop saw, of steps that were repeated the last time."""

    arm: str
    losses: list[float] = field(default_factory=list)
    levels: list[list[float]] = field(default_factory=list)  # of each device: its highest sum of the test for a bias; 1 is an alarm
    checks: int = 0
    detected: int = 0  # rows beyond their bounds until the device was named, and later
    named: str = ""
    blamed: int = -1
    message: str = ""
    found: int = -1  # the step
    began: int = -1  # … in which the statistics say that it began
    resumed: int = -1  # … of the checkpoint
    amount: float = 0.0  # what the device added when it was named
    of_bound: float = 0.0  # the largest of its residuals by then, in units of the bound
    held_out: float = math.nan  # after the last step, without faults
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "parameters"}


def amount(step: int) -> float:
    """What the marginal device adds in a step; 0 before it turns marginal."""
    return FIRST * 2.0 ** ((step - ONSET) / DOUBLING) if step >= ONSET else 0.0


def train(arm: str, text: Text, *, steps: int, seed: int, bar: Progress, shape: Shape | None = None) -> Run:
    """One run of one arm."""
    torch.manual_seed(seed)
    watches.forget()
    model = GPT(shape or Shape(text.symbols, context=32, width=32, heads=2, layers=1))
    fleet = _Fleet(model, watched=arm == "watched", marginal=arm != "fault-free")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    peers = abft.Peers(fleet.names, warm_up=WARM_UP) if arm == "watched" else None
    run = Run(arm, [math.nan] * steps)
    saved: dict[int, tuple[dict, dict]] = {}
    abft.report(reset=True)
    step = 0
    with _quietly():
        while step < steps:
            if step % CHECKPOINT == 0:
                saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            run.losses[step] = fleet.gradients(*_batch(text.train, model.positions.num_embeddings, step, seed), step)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.advance(f"{arm}: loss {run.losses[step - 1]:.2f}")
            if peers is None:
                continue
            report = abft.report(reset=True)
            run.checks, run.detected = run.checks + report.checks, run.detected + report.detected
            found = [outlier for outlier in peers.compare() if outlier.alarm.quarantine]
            if run.blamed < 0:
                run.levels.append([1.0 if any(f.unit == unit for f in found) else float(v) for unit, v in enumerate(peers.levels())])
            if found and run.blamed < 0:
                blamed = found[0]
                _name(run, blamed, min(f.began for f in found if f.unit == blamed.unit), step - 1, report)
                fleet.quarantine(blamed.unit)
                peers = abft.Peers([name for name in fleet.names if name != blamed.name], warm_up=WARM_UP)
                step = run.resumed = max(s for s in saved if s <= run.began)
                weights, moments = saved[step]
                model.load_state_dict(weights)
                optimizer.load_state_dict(copy.deepcopy(moments))
    run.held_out = held_out_loss(model, text.held_out)
    run.parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return run


def _name(run: Run, found: Any, began: int, step: int, report: abft.Report) -> None:
    run.blamed, run.named, run.message = found.unit, found.name, found.alarm.message
    run.found, run.began, run.amount = step, began, amount(step)  # one comparison a step
    run.of_bound = max(s.most * s.sigma for s in report.statistics if s.site.startswith(found.name + "."))


class _Fleet:
    """Replicas that share their weights; who computes which share of a batch."""

    def __init__(self, model: GPT, *, watched: bool, marginal: bool) -> None:
        self.names = [f"device{number}" for number in range(DEVICES)]
        self._who = list(range(DEVICES))
        self._marginal = marginal
        policy = abft.Policy(detector="both", on_uncorrected="record") if watched else abft.Policy(level="off")
        weights = {id(parameter): parameter for parameter in model.parameters()}
        self._devices = [abft.protect(copy.deepcopy(model, dict(weights)), policy, name=name) for name in self.names]

    def gradients(self, characters: Tensor, targets: Tensor, step: int) -> float:
        """Add every share's gradients; the mean loss."""
        loss = 0.0
        for share, device in enumerate(self._who):
            mine = slice(share * SEQUENCES, (share + 1) * SEQUENCES)
            with self._fault(device, step):
                part = self._devices[device](characters[mine], targets[mine]) / DEVICES
                part.backward()
            loss += part.item()
        return loss

    def quarantine(self, device: int) -> None:
        """Its shares go to the next device."""
        self._who = [(device + 1) % DEVICES if who == device else who for who in self._who]

    def _fault(self, device: int, step: int) -> AbstractContextManager:
        if not self._marginal or device != MARGINAL or step < ONSET:
            return nullcontext()
        fault = abft.inject.Fault("offset", role="fprop", pattern="column", index=(0, COLUMN), probability=1.0, amount=amount(step))
        return abft.inject.faults(fault)


def _batch(text: Tensor, context: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
    # A generator of every step's own: a step that is repeated draws the same text.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    places = torch.randint(len(text) - context - 1, (DEVICES * SEQUENCES, 1), generator=generator) + torch.arange(context)
    return text[places], text[places + 1]


@contextmanager
def _quietly() -> Iterator[None]:
    """Every site of the device alarms, and the demo prints one of them."""
    logger = logging.getLogger("abft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
