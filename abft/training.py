"""``StepGuard``: a training step is replayed, on all ranks together, if one of its products is wrong and unrepaired."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from abft import faults, ledger, reporting
from abft import policy as policies
from abft.errors import UncorrectedFault
from abft.reporting import Report


class StepGuard:
    """Guard the steps of one optimizer. See the loop in docs/quickstart.md.

    model: its buffers are restored on a replay; unprotected products are not seen. optimizer: its ``step`` raises while a detected,
    uncorrected fault is pending. policy: the reaction of sites without one of their own is recording. scaler: a GradScaler, stepped and
    updated by ``step``. process_group: replay together with these ranks (None: the default group, if there is one).
    After ``max_replays``: on_failed="raise" raises UncorrectedFault on every rank, "drop" skips the step (parameters, optimizer
    and scaler untouched), a callable receives the guard and then the step is dropped.

    Attributes: replays, dropped (counts), last (the Report of the last finished step).
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, policy: policies.PolicyLike = "training", *, scaler: Any = None,
        process_group: Any = None, max_replays: int = 2, on_failed: Literal["raise", "drop"] | Callable[[StepGuard], None] = "raise",
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise TypeError(f"StepGuard needs a Module and an Optimizer; got {type(model).__name__} and {type(optimizer).__name__}")
        if max_replays < 0:
            raise ValueError(f"max_replays must not be negative; got {max_replays}")
        if not callable(on_failed) and on_failed not in ("raise", "drop"):
            raise ValueError(f"on_failed must be 'raise', 'drop' or a callable; got {on_failed!r}")
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.policy = policies.as_policy(policy)
        self.process_group, self.max_replays, self.on_failed = process_group, max_replays, on_failed
        self.replays = self.dropped = 0
        self.last = Report()
        self._attempt = 0
        self._step = 0
        self._drop = self._pending = False
        self._mark = reporting.mark()
        guard = weakref.ref(self)
        self._hook = optimizer.register_step_pre_hook(lambda *_: _refuse_pending(guard()))

    def attempt(self) -> bool:
        """True for the first attempt of a step, then only to replay it. Holds the step's only host synchronisation."""
        if self._attempt == 0:
            self._begin()
            return True
        found = self._found()
        self.last = found
        self._pending = False
        if not self._wrong_anywhere(found):
            self._attempt = 0
            return False
        if self._attempt > self.max_replays:
            self._attempt = 0
            self._fail(found)
            return False
        self.replays += 1
        self._restore()
        self._start_attempt()
        return True

    def step(self) -> bool:
        """``scaler.step`` and ``update``, or ``optimizer.step``; False if the step was dropped."""
        if self._attempt:
            raise RuntimeError("StepGuard.step() was called inside the attempt loop; use `while guard.attempt(): …` and step after it")
        self._step += 1
        ledger.set_step(self._step)
        if self._drop:
            self._drop = False
            if self.scaler is not None:
                # The user's unscale_ left a mark that only update clears; the scale itself stays.
                self.scaler.update(self.scaler.get_scale())
            return False
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return True

    # --- one step ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._drop = False
        self._random = _random_states()
        self._buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        self._grads = [(p, None if p.grad is None else p.grad.detach().clone()) for p in self._parameters()]
        self._start_attempt()

    def _start_attempt(self) -> None:
        self._attempt += 1
        self._mark = reporting.mark()
        self._pending = True
        if faults.on_attempt is not None:
            faults.on_attempt()

    def _restore(self) -> None:
        _set_random_states(self._random)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
            for p, grad in self._grads:
                p.grad = None if grad is None else grad.clone()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _found(self) -> Report:
        return reporting.since(self._mark)

    def _wrong_anywhere(self, found: Report) -> bool:
        wrong = found.observed + found.uncorrected > 0
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return wrong
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        if torch.distributed.get_backend(self.process_group) == "gloo":
            device = torch.device("cpu")
        flag = torch.tensor([float(wrong)], device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return float(flag.cpu().numpy()[0]) > 0

    def _fail(self, found: Report) -> None:
        if self.on_failed == "raise":
            first = next((e.message for e in found.events), "the fault was found on another rank")
            raise UncorrectedFault(f"step {self._step} is still wrong after {self.max_replays} replays: {first}")
        self.dropped += 1
        self._drop = True
        if callable(self.on_failed):
            self.on_failed(self)


def _refuse_pending(guard: StepGuard | None) -> None:
    """Before ``optimizer.step``: a fault that was detected and not repaired must not reach the weights."""
    if guard is None or not guard._pending:
        return
    found = guard._found()
    if found.observed + found.uncorrected:
        first = next((e.message for e in found.events), "")
        raise UncorrectedFault(f"optimizer.step() with {found.observed + found.uncorrected} wrong row(s) pending; let StepGuard.attempt() replay the step. {first}")


def _random_states() -> tuple[Any, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_random_states(states: tuple[Any, Any]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state_all(states[1])
