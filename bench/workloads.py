"""What is timed: a model, its inputs, and how far it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from bench import llama, minilm
from bench.attention_layer import Attention
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
    multiplications: int  # of a forward's linear layers, or of its attention where there is no other; multiply-adds
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

    def words(batch: int, time: int) -> tuple[Tensor, ...]:
        return (torch.randint(llama.SMALL_VOCABULARY, (batch, time)),)

    batch, prompt = (16, 2048) if cuda else (1, 512)
    yield _sequences(f"llama-small-{batch}x{prompt}", passes, batch, prompt, llama.Llama, words)
    if passes == "forward":
        # The cache has a sequence for each of the batch; faults are looked for with all of them.
        workload = _sequences(f"llama-small-{batch}x1", passes, batch, 1, lambda: llama.Llama(prompt, batch), words)
        yield replace(workload, portion=batch)


def training(passes: Passes = "step", cuda: bool = False) -> Iterator[Workload]:
    """The demo's GPT: a loss of characters and of those that follow; and a small Llama."""
    from demo import gpt

    shape = gpt.Shape(symbols=100)

    def characters(batch: int, time: int) -> tuple[Tensor, ...]:
        text = torch.randint(shape.symbols, (batch, time + 1))
        return text[:, :-1], text[:, 1:]

    for batch in (16, 256) if cuda else (16,):
        yield _sequences(f"gpt-{batch}x{shape.context}", passes, batch, shape.context, lambda: gpt.GPT(shape), characters)

    def words(batch: int, time: int) -> tuple[Tensor, ...]:
        text = torch.randint(llama.SMALL_VOCABULARY, (batch, time + 1))
        return text[:, :-1], text[:, 1:]

    batch, time = (16, 2048) if cuda else (1, 256)
    yield _sequences(f"llama-small-{batch}x{time}", passes, batch, time, llama.Llama, words)


#: (batch, heads, key heads, queries, keys, width), causal; on a GPU 16,384 tokens of 2,048 numbers, as everybody times attention.
ON_CPU = (
    ((1, 8, 8, 16, 16, 64), False), ((16, 12, 12, 128, 128, 32), False), ((1, 8, 8, 512, 512, 64), True), ((1, 8, 8, 2048, 2048, 64), True),
    ((1, 32, 4, 1, 4096, 128), False),
)  # fmt: skip
ON_GPU = (
    *(((16384 // n, 2048 // e, 2048 // e, n, n, e), causal) for e in (64, 128) for causal in (True, False)
      for n in (512, 1024, 2048, 4096, 8192, 16384)),
    *(((1, 16, 4, n, n, 128), True) for n in (8192, 32768)),
    *(((batch, 64, 8, 1, n, 128), False) for batch, n in ((1, 4096), (16, 4096), (1, 32768), (16, 32768))),
)  # fmt: skip


def attentions(passes: Passes, cuda: bool) -> Iterator[Workload]:
    """Attention alone. A decoding step has no gradients."""
    for sizes, causal in ON_GPU if cuda else ON_CPU:
        if passes == "forward" or sizes[3] > 1:
            yield _attention(*sizes, causal=causal, passes=passes)


def _attention(batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int, *, causal: bool, passes: Passes) -> Workload:
    def draw(number: int | None) -> tuple[Tensor, ...]:
        some = number or batch
        return (torch.randn(some, heads, queries, width), *(torch.randn(some, key_heads, keys, width) for _ in range(2)))

    name = f"{batch}x{heads}x{queries}x{width}"
    name = f"decode-{name}-{keys}" if queries == 1 else f"attention-{name}{'-causal' if causal else ''}"
    numbers = 2 * batch * width * (heads * queries + key_heads * keys)
    scores = batch * heads * queries * keys // (2 if causal else 1)
    return Workload(name, passes, batch * queries, 2 * scores * width, numbers, lambda: Attention(causal), draw, 1)
