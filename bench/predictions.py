"""What the check is predicted to cost on a GPU, by counting: not a measurement.

    python -m bench predict

Cycles of the slowest program of a checked product over those of the same one unchecked, both dealt as the kernels deal their
tiles (abft.triton_kernels.waves). Counted: matrix instructions, and the row sums of the epilogue as if nothing overlapped them.
Not counted: memory, launches, and the verify launch that follows. Sizes are those of Llama 3's linear layers (arXiv 2407.21783,
table 3: d_model 4096 and 8192, 32 and 64 query heads and 8 key heads of 128, feed-forward 14336 and 28672).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from abft.backends import triton as backend
from bench.results import Results

#: One H100 or H200 SXM: multiprocessors, fused multiply-adds of 16-bit numbers and of fp32 per cycle and multiprocessor
#: (the data sheet's dense 989 and 67 TFLOP/s, at the 1.83 and 1.98 GHz that these counts make of them).
MULTIPROCESSORS, MMA_PER_CYCLE, FMA_PER_CYCLE = 132, 2048, 128
MODELS = {
    "Llama-3-8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3-70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
}
SQUARES = {f"{s}³": (s, s, s) for s in (2048, 4096, 8192, 16384)}
TOKENS = (2048, 8192)


def shapes() -> Iterator[tuple[str, int, int, int]]:
    for name, (m, n, k) in SQUARES.items():
        yield name, m, n, k
    for model, layers in MODELS.items():
        for layer, (n, k) in layers.items():
            for m in TOKENS:
                yield f"{model} {layer}", m, n, k


def predict(m: int, n: int, k: int, form: str = "full") -> dict[str, Any]:
    """Cycles of the slowest multiprocessor, bf16 on sm_90."""
    from abft.triton_kernels import waves

    p = backend.plan(n, k, torch.bfloat16, 90, False, form, None)
    c, columns = p.config, p.layout.columns
    data, checks = -(-m // c.bm) * -(-n // c.bn), -(-m // c.bm) * -(-columns // c.bc)
    programs = MULTIPROCESSORS * c.resident
    multiply = c.bm * c.bn * k / MMA_PER_CYCLE
    sums = c.bm * c.bn * (len(p.layout.form.kinds) + 1) / FMA_PER_CYCLE
    cost = waves.check_cost(c.bn, c.bc) * multiply / (multiply + sums)
    rounds = -(-data // programs)
    checked, unchecked = waves.makespan(data, checks, programs, cost) * (multiply + sums), rounds * multiply
    return {
        "group": p.layout.groups.width, "columns": columns, "data_tiles": data, "check_tiles": checks, "rounds": rounds,
        "waves": waves.makespan(data, checks, programs, cost), "cycles": checked, "unchecked_cycles": unchecked,
        "ratio": checked / unchecked, "of_sums": sums / multiply,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench predict", description=__doc__).parse_args(argv)
    results = Results("predictions", fresh=True, target="sm_90", dtype="bf16", multiprocessors=MULTIPROCESSORS)
    for name, m, n, k in shapes():
        for form in ("full", "lean"):
            r = results.add("prediction", name=name, form=form, m=m, n=n, k=k, **predict(m, n, k, form))
            print(f"{name:<22} {form} {m:>6} × {n:>6} × {k:>6}: waves {r['waves']:.2f} of {r['rounds']}, × {r['ratio']:.3f}")
    return 0
