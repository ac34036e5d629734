"""``StepGuard``: a training step is replayed, on all ranks together, if one of its products is wrong and unrepaired."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abft import faults, ledger, protection, reporting, scope
from abft import policy as policies
from abft.errors import UncorrectedFault
from abft.ledger import Point, Verdict
from abft.nn.checked import Checked
from abft.reporting import Report

OnFailed = Literal["raise", "drop"] | Callable[["StepGuard"], None]

#: Wrong rows that any guard's attempts found, and replayed or gave up.
_replayed = 0
_USE = "use `while guard.attempt(): …` for forward and backward, and guard.step() after it"


class StepGuard:
    """Guard the steps of one optimizer. See the loop in docs/quickstart.md.

    model: protected, if none of its modules is yet; its buffers are restored on a replay. optimizer: its ``step`` raises
    while a detected, uncorrected fault is pending. policy: in force inside the attempts, for products whose module
    has none of its own. scaler: a GradScaler, stepped and updated by ``step``. process_group: replay together with
    these ranks (None: the default group, if there is one). After ``max_replays``: on_failed="raise" raises
    UncorrectedFault on every rank, "drop" skips the step, a callable receives the guard and then the step is dropped.
    Either way parameters, optimizer and scaler are untouched, and buffers are as before the step.

    A replay restores the random states of torch's CPU and CUDA generators, module buffers and ``.grad``; not Python's or
    numpy's generators, and nothing else that the step has written. An exception that leaves the attempt and is
    caught outside must be followed by ``abandon``.

    ``optimizer.step`` also refuses a fault in a product between the last attempt and the step, whoever issued it: the ledgers
    do not know whose gradients it went into. It waits for a device only if Python issued a product since the attempt ended,
    so a fault in a CUDA graph replayed there is not seen before the next report or attempt (one replayed inside an attempt
    is). It raises on this rank alone, and again until ``attempt`` begins another step or ``abandon`` is called.

    Attributes: replays, dropped (counts), last (the Report of the last finished step, all its attempts together).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: policies.PolicyLike = "training",
        *,
        scaler: Any = None,
        process_group: Any = None,
        max_replays: int = 2,
        on_failed: OnFailed = "raise",
    ) -> None:
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"StepGuard needs a Module and an Optimizer; got {type(model).__name__} and {type(optimizer).__name__}"
            )
        if scaler is not None and not all(hasattr(scaler, name) for name in ("step", "update", "get_scale")):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None; got {type(scaler).__name__}")
        if isinstance(max_replays, bool) or not isinstance(max_replays, int) or max_replays < 0:
            raise ValueError(f"max_replays must be a whole number, not negative; got {max_replays!r}")
        if not callable(on_failed) and on_failed not in ("raise", "drop"):
            raise ValueError(f"on_failed must be 'raise', 'drop' or a callable; got {on_failed!r}")
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        if not any(isinstance(module, Checked) for module in model.modules()):
            # A guard over nothing would be a silent one.
            protection.protect(model)
        self.policy = scope.in_force(None if policy is None else policies.as_policy(policy))
        self.process_group, self.max_replays, self.on_failed = process_group, max_replays, on_failed
        self.replays = self.dropped = 0
        self.last = Report()
        self._attempt = 0  # 1, 2, …: inside the loop; 0: outside
        self._step = 0
        self._finished = self._drop = False
        self._failure = ""  # why this step must not be taken, once that is known
        self._before: _State | None = None
        self._start: Point | None = None  # of the step
        self._mark: Point | None = None  # of the attempt
        self._settled = reporting.drain()  # where the last attempt ended
        self._replayed = _replayed  # wrong rows that attempts had dealt with by then
        self._refused = False
        guard = weakref.ref(self)
        self._hook = optimizer.register_step_pre_hook(lambda *_: _refuse(guard()))

    def attempt(self) -> bool:
        """True for the first attempt of a step, then only to replay it. Holds the step's only host synchronisation."""
        if self._attempt == 0:
            self._begin()
            return True
        self._end_attempt()
        assert self._mark is not None
        self._settled = reporting.drain()
        found = reporting.between(self._mark, self._settled)
        wrong = self._wrong_anywhere(found)
        self._deal_with(found)
        if wrong and self._attempt <= self.max_replays:
            self.replays += 1
            assert self._before is not None
            self._before.restore()
            self._start_attempt()
            return True
        self.last = found if self._attempt == 1 else reporting.between(self._start, self._settled)
        before, self._before, self._attempt = self._before, None, 0
        if wrong:
            assert before is not None
            before.restore_buffers()
            self._fail(found)
        self._finished = True
        return False

    def step(self) -> bool:
        """``scaler.step`` and ``update``, or ``optimizer.step``; False if the step was dropped."""
        if self._attempt:
            raise RuntimeError(f"StepGuard.step() was called inside the attempt loop; {_USE}")
        if not self._finished:
            raise RuntimeError(f"StepGuard.step() was called without a finished attempt before it; {_USE}")
        if not self._drop:
            _refuse(self)
        self._finished = False
        self._step += 1
        ledger.set_step(self._step)
        if self._drop:
            self._drop, self._failure = False, ""
            self._forget_unscaling()
            return False
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return True

    def abandon(self) -> None:
        """Forget the present step and every fault so far: the next ``attempt`` begins another step.

        After an exception that left an attempt; or when ``optimizer.step`` refused a fault that has no part in the gradients:
        then step the optimizer (or the scaler) without the guard.
        """
        if self._attempt:
            self._end_attempt()
        self._attempt, self._before, self._finished, self._drop, self._failure = 0, None, False, False, ""
        self._refused = False
        self._settled, self._replayed = reporting.drain(), _replayed

    # --- one step ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._refused:
            self._forget_unscaling()
        self._finished = self._drop = self._refused = False
        self._failure = ""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        self._before = _State.of(self.model, list(parameters))
        self._start_attempt()
        self._start = self._mark

    def _start_attempt(self) -> None:
        self._attempt += 1
        self._mark = reporting.mark()
        scope.push(self.policy)
        if faults.on_attempt is not None:
            faults.on_attempt(True)

    def _end_attempt(self) -> None:
        scope.drop(self.policy)
        if faults.on_attempt is not None:
            faults.on_attempt(False)

    def _deal_with(self, found: Report) -> None:
        """Another guard's step must not be refused for what this one replays or drops."""
        global _replayed
        _replayed += found.observed + found.uncorrected
        self._replayed = _replayed

    def _forget_unscaling(self) -> None:
        # The user's unscale_ left a mark that only update clears; the scale itself stays.
        if self.scaler is not None and getattr(self.scaler, "_scale", None) is not None:
            self.scaler.update(self.scaler.get_scale())

    def _wrong_anywhere(self, found: Report) -> bool:
        wrong = found.observed + found.uncorrected > 0
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return wrong
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if torch.distributed.get_backend(self.process_group) == "gloo":
            device = torch.device("cpu")
        flag = torch.tensor([float(wrong)], device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return float(flag.cpu().numpy()[0]) > 0

    def _fail(self, found: Report) -> None:
        self._failure = (
            f"step {self._step} is still wrong after {self.max_replays} replays: "
            f"{_first_fault(found) or 'the fault was found on another rank'}"
        )
        if self.on_failed == "raise":
            raise UncorrectedFault(self._failure)
        self.dropped += 1
        self._drop = True
        if callable(self.on_failed):
            self.on_failed(self)


def _refuse(guard: StepGuard | None) -> None:
    """Before ``optimizer.step``: a fault that was detected and not repaired must not reach the weights."""
    if guard is None:
        return
    if guard._failure:
        raise UncorrectedFault(f"optimizer.step() although {guard._failure}. StepGuard.step() drops the step")
    if guard._attempt:
        assert guard._mark is not None
        rows, what = reporting.unrepaired(guard._mark, reporting.drain())
        if rows:
            raise UncorrectedFault(f"optimizer.step() with {rows} wrong row(s) pending; let StepGuard.attempt() replay the step. {what}")
        return
    rows, what = reporting.unrepaired(guard._settled, reporting.drain(issued_only=True))
    rows -= _replayed - guard._replayed
    if rows > 0:
        guard._refused = True
        raise UncorrectedFault(
            f"optimizer.step() with {rows} wrong row(s) pending, of products after the last attempt. If the gradients depend on them: "
            f"zero_grad() and do the step again, those products included, inside StepGuard.attempt(). If not (an evaluation): "
            f"StepGuard.abandon(), then step without the guard. {what}"
        )


def _first_fault(found: Report) -> str:
    return next((e.message for e in found.events if e.verdict in (Verdict.OBSERVED, Verdict.UNCORRECTED)), "")


# --- what a replay restores ----------------------------------------------------------------------------


@dataclass
class _State:
    """Random states, buffers and gradients as they stood before the first attempt."""

    cpu: Tensor
    cuda: list[Tensor] | None
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # whose, name, the tensor itself, its values
    grads: list[tuple[Tensor, Tensor | None]]

    @staticmethod
    def of(model: nn.Module, parameters: list[Tensor]) -> _State:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        grads = [(p, None if p.grad is None else p.grad.detach().clone()) for p in parameters]
        return _State(torch.get_rng_state(), cuda, buffers, grads)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        self.restore_buffers()
        for p, grad in self.grads:
            p.grad = None if grad is None else grad.clone()

    def restore_buffers(self) -> None:
        with torch.no_grad():
            for module, name, buffer, values in self.buffers:
                # A forward may have put another tensor in its place instead of writing into it.
                module._buffers[name] = buffer
                buffer.copy_(values)
