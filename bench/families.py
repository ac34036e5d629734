"""Data on which thresholds break: families of activations and of weights, drawn from a seeded generator.

After "Clean campaigns" in the fault study and the numerics study's bulk run; docs/explanation/thresholds.md. All return
fp32; ``fit`` brings them into the range of a narrower type.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Draw = Callable[[int, int, Generator], Tensor]


def generator(*seeds: int, device: torch.device | str = "cpu") -> Generator:
    """A generator whose stream depends on all of ``seeds``; ``activations`` and ``weights`` draw on its device."""
    seed = 0
    for s in seeds:
        seed = (seed * 1_000_003 + s + 1) % (2**63 - 1)
    return Generator(device).manual_seed(seed)


def _normal(m: int, k: int, g: Generator) -> Tensor:
    return torch.randn(m, k, generator=g)


def _uniform(m: int, k: int, g: Generator) -> Tensor:
    return torch.rand(m, k, generator=g) * 2 - 1


def _lognormal(m: int, k: int, g: Generator) -> Tensor:
    return (2 * _normal(m, k, g)).exp_()


def _student(m: int, k: int, g: Generator, freedom: float) -> Tensor:
    # Normal over the root of a chi-square; the floor keeps the square of the largest finite.
    chi2 = sum(torch.randn(m, k, generator=g).square_() for _ in range(int(freedom)))
    return _normal(m, k, g) / (chi2 / freedom).sqrt_().clamp_(min=1e-4)  # type: ignore[union-attr]


def _channels(k: int, share: int, g: Generator) -> Tensor:
    return torch.randperm(k, generator=g)[: max(1, k // share)]


def _outlier_channels(m: int, k: int, g: Generator) -> Tensor:
    x = _normal(m, k, g)
    x[:, _channels(k, 128, g)] *= 100
    return x


def _massive(m: int, k: int, g: Generator) -> Tensor:
    x = _normal(m, k, g)
    rows = torch.rand(m, 1, generator=g) < 0.25
    for channel in torch.randperm(k, generator=g)[:2].tolist():
        x[:, channel : channel + 1] = torch.where(rows, x[:, channel : channel + 1] * 1000, x[:, channel : channel + 1])
    return x


def _post_norm(m: int, k: int, g: Generator) -> Tensor:
    gain = (0.5 * torch.randn(k, generator=g)).exp_()
    return F.layer_norm(_student(m, k, g, 4), (k,), gain, 0.3 * torch.randn(k, generator=g))


def _gelu(m: int, k: int, g: Generator) -> Tensor:
    return F.gelu(_normal(m, k, g))


def _silu_gate(m: int, k: int, g: Generator) -> Tensor:
    return F.silu(_normal(m, k, g)) * _normal(m, k, g)


def _sparse(m: int, k: int, g: Generator) -> Tensor:
    """90 % zeros, and rows with a single non-zero."""
    x = F.relu(_normal(m, k, g)) * (torch.rand(m, k, generator=g) < 0.2)
    x[::7] = 0.0
    at = torch.randint(k, (x[::7].shape[0],), generator=g)
    x[::7].scatter_(1, at[:, None], torch.randn(at.shape[0], 1, generator=g))
    return x


def _zero_rows(m: int, k: int, g: Generator) -> Tensor:
    x = _normal(m, k, g)
    x[torch.rand(m, generator=g) < 0.5] = 0.0
    return x


def _constant_rows(m: int, k: int, g: Generator) -> Tensor:
    return torch.randn(m, 1, generator=g).expand(m, k).contiguous()


def _row_scales(m: int, k: int, g: Generator) -> Tensor:
    return _normal(m, k, g) * (3 * torch.randn(m, 1, generator=g)).exp_()


def _along_k(m: int, k: int, g: Generator, sign: int) -> Tensor:
    return _normal(m, k, g) * torch.linspace(0, 8 * sign, k).sub(max(0, 8 * sign)).exp_()


def _softmax(m: int, k: int, g: Generator) -> Tensor:
    return torch.softmax(3 * _normal(m, k, g), -1)


ACTIVATIONS: dict[str, Draw] = {
    "gauss": _normal,
    "uniform": _uniform,
    "shifted": lambda m, k, g: 1 + 0.5 * _normal(m, k, g),
    "lognormal": _lognormal,
    "student-t": lambda m, k, g: _student(m, k, g, 2),
    "outlier-channels": _outlier_channels,
    "massive": _massive,
    "post-norm": _post_norm,
    "post-gelu": _gelu,
    "silu-gate": _silu_gate,
    "sparse": _sparse,
    "zero-rows": _zero_rows,
    "constant-rows": _constant_rows,
    "row-scales": _row_scales,
    "k-decay": lambda m, k, g: _along_k(m, k, g, -1),
    "k-rise": lambda m, k, g: _along_k(m, k, g, 1),
    "softmax": _softmax,
    "denormal": lambda m, k, g: _normal(m, k, g) * 1e-39,
    "tiny": lambda m, k, g: _normal(m, k, g) * 1e-25,
    "huge": lambda m, k, g: _normal(m, k, g) * 1e25,
}
#: Their arithmetic, or their judgement in fp64, is ten to a hundred times slower: fewer rows.
SLOW = ("denormal", "huge")
#: The same families in fp16's range.
FP16_SCALE = {"denormal": 1e38 * 1e-5, "tiny": 1e21, "huge": 1e-22}


def _unit(n: int, k: int, g: Generator) -> Tensor:
    return torch.randn(n, k, generator=g) / math.sqrt(k)


def _one_big_column(n: int, k: int, g: Generator) -> Tensor:
    w = _unit(n, k, g)
    w[int(torch.randint(n, (1,), generator=g))] *= 200
    return w


def _two_valued(n: int, k: int, g: Generator) -> Tensor:
    """Two values of different size, as sign-quantised layers with an offset have."""
    return torch.where(torch.rand(n, k, generator=g) < 0.5, 1.25, -0.75) / math.sqrt(k)


WEIGHTS: dict[str, Draw] = {
    "gauss": _unit,
    "output-scales": lambda n, k, g: _unit(n, k, g) * torch.randn(n, 1, generator=g).exp_(),
    "input-scales": lambda n, k, g: _unit(n, k, g) * torch.randn(1, k, generator=g).exp_(),
    "offset": lambda n, k, g: _unit(n, k, g) + 2 / math.sqrt(k),
    "half-offset": lambda n, k, g: _unit(n, k, g) + 0.5 / math.sqrt(k),
    "big-output": _one_big_column,
    "student-t3": lambda n, k, g: _student(n, k, g, 3) / math.sqrt(k),
    "two-valued": _two_valued,
    "pruned": lambda n, k, g: _unit(n, k, g) * (torch.rand(n, k, generator=g) < 0.1),
}


def fit(values: Tensor, dtype: torch.dtype, family: str = "") -> Tensor:
    """The values in ``dtype``; fp16 has its own denormals and its own huge, and no heavy tail beyond a sixteenth of its range."""
    if dtype == torch.float16:
        values = (values * FP16_SCALE.get(family, 1.0)).clamp_(-4096.0, 4096.0)
    return values.to(dtype)


def activations(family: str, m: int, k: int, g: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """(m, k) activations of a family."""
    with g.device:
        return fit(ACTIVATIONS[family](m, k, g), dtype, family)


def weights(family: str, n: int, k: int, g: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, k) weights of a family, of the size that keeps activations near one."""
    with g.device:
        return fit(WEIGHTS[family](n, k, g), dtype)
