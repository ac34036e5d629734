"""Fault-free attention: the largest residual of every check, in units of its bound, over shapes and distributions.

    python -m bench attention-clean
    python -m bench attention-clean --backend triton --dtype bf16      the kernels, on a GPU

The checks of the softmax and of its gradient are given in units of 2⁻²³, in which their constants are (attention/softmax.py, scoregrad.py).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import abft
from abft.attention import backward, keysums, scoregrad, softmax
from abft.attention.backward import Given
from abft.attention.forward import attend
from abft.attention.problem import Options, Problem
from abft.attention.softmax import UNIT
from abft.attention.tally import Tally
from abft.policy import Policy
from bench.results import UNFINISHED, Results

WIDTH, HEADS = 64, 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Of the kernels, (queries, keys, columns of a head).
ON_GPU = ((2048, 2048, 128), (4096, 4096, 64), (333, 8192, 128), (1000, 1000, 96), (1, 8192, 128))
HEADS_ON_GPU = (4, 16)
INTERPRETED = ((33, 40, 16),)
#: Of the reference, (queries, keys).
SHAPES = ((64, 64), (512, 512), (128, 2048), (64, 8192), (2048, 128))


def _outliers(*s: int) -> Tensor:
    return torch.randn(s) * torch.where(torch.arange(s[-1]) % 7 == 0, 30.0, 1.0)


def _sink(*s: int) -> Tensor:
    x = torch.randn(s) * 0.3
    x[..., :1, :] = 4.0
    return x


def _equal_but_one(*s: int) -> Tensor:
    """Long sums of equal numbers, all of which round the same way."""
    x = torch.full(s, 0.37) * (1 + 0.2 * torch.rand(*s[:-2], 1, 1))
    x[..., :1, :] = 1.1
    return x


FAMILIES = {
    "gauss": lambda *s: torch.randn(s), "shifted": lambda *s: torch.randn(s) + 3, "one sign": lambda *s: torch.rand(s) + 0.5,
    "sharp": lambda *s: torch.randn(s) * 6, "logits of 1e4": lambda *s: torch.randn(s) * 40, "outlier channels": _outliers, "sink": _sink,
    "equal": lambda *s: torch.full(s, 0.37), "equal but one": _equal_but_one, "tiny": lambda *s: torch.randn(s) * 1e-6,
    "sparse": lambda *s: torch.randn(s) * (torch.rand(s) < 0.05), "signs": lambda *s: torch.randn(s).sign(),
}  # fmt: skip


class Watch:
    """The largest residual of every check that is asked for while it is on."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def note(self, name: str, values: Any) -> None:
        found = float(np.asarray(values).max(initial=0.0))
        self.largest[name] = max(self.largest.get(name, 0.0), found)

    def evidence(self, *args: Any, **kwargs: Any) -> Any:
        out = _EVIDENCE(*args, **kwargs)
        self.note("sum_again_u", out.residual[:, 0] / UNIT[torch.float32])
        self.note("rows_of_p_u", out.residual[:, 1] / UNIT[torch.float32])
        return out

    def vanishing(self, g: Any) -> Any:
        residual, bound = _VANISHING(g)
        self.note("gradient_u", residual / bound * scoregrad.KAPPA_VANISHING)
        return residual, bound

    def worst(self, residual: np.ndarray, bound: np.ndarray, wrong: np.ndarray, keys: int) -> Any:
        with np.errstate(all="ignore"):
            self.note("key_rows" if residual.ndim > 2 else "key_columns", np.nan_to_num(residual / bound))
        return _WORST(residual, bound, wrong, keys)


_EVIDENCE, _VANISHING, _WORST = softmax.evidence, scoregrad._vanishing, keysums._worst


def measure(family: str, queries: int, keys: int, causal: bool) -> dict[str, Any]:
    """Largest residuals of a forward and a backward; of products over their bounds."""
    torch.manual_seed(len(family) + queries + keys)
    make = FAMILIES[family]
    q, k, v = make(1, HEADS, 1, queries, WIDTH), make(1, HEADS, keys, WIDTH), make(1, HEADS, keys, WIDTH)
    problem = Problem(q, k, v, None, 0, Options(WIDTH**-0.5, causal=causal))
    policy, watch = Policy(on_uncorrected="record"), Watch()
    forward, back = (Tally(policy, 0, direction, torch.float32) for direction in ("fprop", "dgrad"))
    with mock.patch.object(softmax, "evidence", watch.evidence), mock.patch.object(scoregrad, "_vanishing", watch.vanishing), \
            mock.patch.object(keysums, "_worst", watch.worst), torch.no_grad():  # fmt: skip
        done = attend(problem, forward)
        backward.gradients(problem, Given(torch.randn_like(done.out), None, done.statistics), back)
    tallies = {f"forward_{n}": p for n, p in forward.products.items()} | {f"backward_{n}": p for n, p in back.products.items()}
    alarms = sum(len(p.outcome.findings) for p in tallies.values())
    worst = {n: p.outcome.worst for n, p in tallies.items()}
    return {"checks": sum(p.outcome.checks for p in tallies.values()), "alarms": alarms} | worst | watch.largest


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench attention-clean", description=__doc__, formatter_class=raw)
    parser.add_argument("--backend", default="reference", choices=["reference", "interpreted", "triton"], help="triton: on a GPU")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the kernels; the reference computes in fp32")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    return of_kernels(options) if options.backend != "reference" else of_reference(options)


def of_kernels(options: argparse.Namespace) -> int:
    """Fault-free rows through the kernels, whose checks have one site: alarms, and the largest residual over bound of them all."""
    from bench import forms, kernel_rows

    results = Results(f"attention-clean-{options.backend}-{options.dtype}", fresh=options.fresh, folder=options.out)
    policy = abft.Policy(backend=forms.backend_of(options.backend), on_uncorrected="record")  # type: ignore[arg-type]
    shapes, heads, device = (ON_GPU, HEADS_ON_GPU, "cuda") if options.backend == "triton" else (INTERPRETED, (1, 1), "cpu")
    families = kernel_rows.families_of(DTYPES[options.dtype])
    todo = [(s, f, causal) for s in shapes for f in families for causal in (False, True)]
    deadline = time.monotonic() + options.seconds
    for i, (shape, family, causal) in enumerate(todo):
        key = f"{family} {'x'.join(map(str, shape))}{' causal' if causal else ''}"
        if results.find(key) is None:
            if time.monotonic() > deadline:
                return UNFINISHED
            found = kernel_rows.measure("attention", family, shape, causal, DTYPES[options.dtype], policy, heads=heads, device=device)
            results.add("cell", key=key, product="attention", family=family, shape=list(shape), causal=causal, **found)
        results.progress(i + 1, len(todo), key)
    print(kernel_rows.summarise(results))
    return 0


def of_reference(options: argparse.Namespace) -> int:
    results = Results("attention-clean", fresh=options.fresh, folder=options.out, width=WIDTH, heads=HEADS)
    todo = [(f, q, k, causal) for f in FAMILIES for q, k in SHAPES for causal in (False, True)]
    for i, (family, queries, keys, causal) in enumerate(todo):
        key = f"{family} {queries}x{keys}{' causal' if causal else ''}"
        if results.find(key) is None:
            found = measure(family, queries, keys, causal)
            results.add("clean", key=key, family=family, queries=queries, keys=keys, causal=causal, **found)
        results.progress(i + 1, len(todo), key)
    records = [r for r in results.records if r["kind"] == "clean"]
    names = [n for n in records[0] if n.startswith(("forward_", "backward_")) or n.endswith("_u") or n.startswith("key_")]
    largest = {n: max(r[n] for r in records) for n in names}
    total = {"checks": sum(r["checks"] for r in records), "alarms": sum(r["alarms"] for r in records)}
    print(results.replace("largest", **total, **largest))
    return 0
