"""What is timed: a model, its inputs, and how far it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bench import llama, minilm
from bench.shapes import Shape

Passes = Literal["forward", "backward", "step"]
#: name → (dtype, arithmetic of fp32 products on CUDA)
DTYPES = {
    "fp32": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32"), "bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"),
}  # fmt: skip


#: Rows of a single product that faults are looked for in. More than 64: decoding has tiles of its own (triton_kernels/decode.py).
FEW = 256


@dataclass(frozen=True)
class Workload:
    """passes: forward; backward (a forward and the gradients of everything); step (backward and AdamW's step, the model returns a loss).

    draw: inputs, of a given number of rows or sequences if not of all. portion: so many of them are enough to look for faults.
    """

    name: str
    passes: Passes
    tokens: int
    multiplications: int  # of a forward's linear layers, multiply-adds
    numbers: int  # that a forward reads and writes at least: weights, of a single layer also input and output
    model: Callable[[], nn.Module]
    draw: Callable[[int | None], tuple[Tensor, ...]]
    portion: int

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int, number: int | None = None) -> tuple[Tensor, ...]:
        """Drawn anew from ``seed``; ``number``: not all of them."""
        torch.manual_seed(seed)
        drawn = self.draw(number)
        return tuple(x.to(device, dtype if x.is_floating_point() else None) for x in drawn)

    @property
    def times(self) -> int:
        """Products for each layer: the gradients of weight and input cost what a forward does."""
        return 1 if self.passes == "forward" else 3


def linear(shape: Shape, passes: Passes) -> Workload:
    """One nn.Linear."""
    return Workload(
        shape.name, passes, shape.m, shape.multiplications, shape.m * shape.k + shape.n * shape.k + shape.m * shape.n,
        lambda: nn.Linear(shape.k, shape.n, bias=shape.bias), lambda number: (torch.randn(number or shape.m, shape.k),), min(shape.m, FEW),
    )  # fmt: skip


def _layers(model: nn.Module) -> int:
    """Weights of linear layers: multiply-adds for each token."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def _sequences(name: str, passes: Passes, batch: int, time: int, build: Callable[[], nn.Module],
               draw: Callable[[int, int], tuple[Tensor, ...]]) -> Workload:  # fmt: skip
    with torch.device("meta"):
        weights = _layers(build())
    tokens = batch * time
    return Workload(name, passes, tokens, tokens * weights, weights, build, lambda number: draw(number or batch, time), 1)


def _hidden(width: int) -> Callable[[int, int], tuple[Tensor, ...]]:
    return lambda batch, time: (torch.randn(batch, time, width),)


def layers(passes: Passes, cuda: bool) -> Iterator[Workload]:
    """One transformer layer. Llama's only on a GPU; with 1024 tokens in its cache for a decoding step."""
    yield _sequences("minilm-layer-16x128", passes, 16, 128, minilm.Layer, _hidden(minilm.WIDTH))
    yield _sequences("minilm-layer-1x16", passes, 1, 16, minilm.Layer, _hidden(minilm.WIDTH))
    if cuda:
        for name, model, width in (("llama8b", "Llama-3-8B", 4096), ("llama70b", "Llama-3-70B", 8192)):
            yield _sequences(f"{name}-layer-4x2048", passes, 4, 2048, lambda model=model: llama.Layer(model), _hidden(width))
            if passes == "forward":
                for batch in (1, 16):
                    build = lambda model=model, batch=batch: llama.Layer(model, past=1024, batch=batch)  # noqa: E731
                    yield _sequences(f"{name}-layer-{batch}x1", passes, batch, 1, build, _hidden(width))


def models(passes: Passes, cuda: bool) -> Iterator[Workload]:
    """Whole models: hidden states of a sentence encoder."""

    def tokens(batch: int, time: int) -> tuple[Tensor, ...]:
        return (torch.randint(minilm.VOCABULARY, (batch, time)),)

    for batch, time in ((16, 128), (1, 16), *(((256, 128),) if cuda else ())):
        yield _sequences(f"minilm-{batch}x{time}", passes, batch, time, minilm.MiniLM, tokens)


def training(passes: Passes = "step", cuda: bool = False) -> Iterator[Workload]:
    """The demo's GPT: a loss of characters and of those that follow."""
    from demo import gpt

    shape = gpt.Shape(symbols=100)

    def characters(batch: int, time: int) -> tuple[Tensor, ...]:
        text = torch.randint(shape.symbols, (batch, time + 1))
        return text[:, :-1], text[:, 1:]

    for batch in (16, 256) if cuda else (16,):
        yield _sequences(f"gpt-{batch}x{shape.context}", passes, batch, shape.context, lambda: gpt.GPT(shape), characters)
