"""One provider at one workload: the call that is timed, and the same passes once more for evidence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import abft
from bench import attention_layer
from bench.providers import TWIN, Provider
from bench.workloads import Passes, Workload

WAYS = ("eager", "compiled", "graph")
#: Inputs that eager and compiled calls take in turn.
ROTATED = 4
WARM_UP = 3  # calls before a capture, on a stream of their own (torch's notes on CUDA graphs)


class Contender:
    """A copy of a model in a provider's hands.

    work: the call that is timed. way: eager; compiled (torch.compile); graph (a CUDA graph of the same call, one set of inputs).
    """

    def __init__(self, provider: Provider, workload: Workload, model: nn.Module, way: str, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.provider, self.workload = provider, workload
        self.model = in_hands_of(provider, copy.deepcopy(model))
        called = torch.compile(self.model) if way == "compiled" else self.model
        drawn = [workload.inputs(device, dtype, seed) for seed in range(1 if way == "graph" else ROTATED)]
        once = self._pass(called)
        self.work: Callable[[], Any] = _in_turn(once, drawn)
        if way == "graph":
            self.work = captured(self.work)

    def results(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The output, and with a backward the gradients, of these inputs, eagerly."""
        out = results(self.model, self.workload.passes, inputs)
        self._judge()
        return out

    def _pass(self, called: Callable[..., Tensor]) -> Callable[..., Any]:
        if self.workload.passes == "step":
            return self._step(called)

        def forward(*inputs: Tensor) -> Any:
            with torch.no_grad():
                y = called(*inputs)
            self._judge()
            return y

        def backward(*inputs: Tensor) -> Any:
            out = _gradients(called, inputs, self.model)
            self._judge()
            return out

        return forward if self.workload.passes == "forward" else backward

    def _step(self, called: Callable[..., Tensor]) -> Callable[..., Any]:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        guard = abft.StepGuard(self.model, optimizer, self.provider.policy) if self.provider.guarded else None

        def plain(*inputs: Tensor) -> None:
            called(*inputs).backward()
            self._judge()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def guarded(*inputs: Tensor) -> None:
            while guard.attempt():
                called(*inputs).backward()
            guard.step()
            optimizer.zero_grad(set_to_none=True)

        return plain if guard is None else guarded

    def _judge(self) -> None:
        """A deferred check belongs to the pass that it checks."""
        if self.provider.policy is not None and self.provider.policy.timing == "deferred":
            abft.verify_deferred()


def results(model: nn.Module, passes: Passes, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output; unless ``passes`` is forward, then the gradients of floating inputs and of all parameters."""
    if passes == "forward":
        with torch.no_grad():
            return [model(*inputs)]
    return [t.detach() for t in _gradients(model, inputs, model)]


def in_hands_of(provider: Provider, model: nn.Module) -> nn.Module:
    if provider.name == TWIN:
        from bench import twin_layer

        return twin_layer.exchange(model)
    if provider.whole or not any(isinstance(m, nn.Linear) for m in model.modules()):
        attention_layer.given(model, provider.policy, provider.kernel, provider.paged)
    return model if provider.policy is None else abft.protect(model, provider.policy, name=f"bench/{provider.name}")


def _gradients(called: Callable[..., Tensor], inputs: tuple[Tensor, ...], model: nn.Module) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    y = called(*leaves)
    wanted = [x for x in leaves if x.is_floating_point()] + list(model.parameters())
    return [y, *torch.autograd.grad(y, wanted, _of_output(y.shape, y.dtype, y.device))]


@lru_cache(maxsize=16)
def _of_output(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient that a backward begins with: of a loss one, else numbers that every type holds exactly. (Of equal numbers a
    normalisation would leave nothing.)"""
    if not shape:
        return torch.ones((), dtype=dtype, device=device)
    return (torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(0)) / 64).to(device, dtype)


def _in_turn(once: Callable[..., Any], inputs: list[tuple[Tensor, ...]]) -> Callable[[], Any]:
    turn = 0

    def work() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        return once(*inputs[turn])

    return work


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
