"""What a check of a product should cost by counting alone: its multiplications and bytes over those of the product. Not a measurement.

On a CPU, of the judgement of clean products, counted as it is written: a product with the panel, M·K·C, and a multiply-add of every
number of Y for each sum and for its norm. Compiled (abft/native/judge.c) that is one pass over each operand; in torch
(abft/backends/quick.py) a pass over Y for each sum, or fewer where one skinny product takes all sums at once, and one more that widens
half precision. Calls, which decide for small layers, are left out, and so is what stays in a cache. On a GPU: bench/predictions.py.
"""

from __future__ import annotations

import torch

from bench import predictions

#: Rows up to which a GPU's kernels are bound by memory (triton_kernels/decode.py).
FEW_ROWS = 64


def on_cpu(m: int, n: int, k: int, dtype: torch.dtype, group: int | None = None, *, compiled: bool | None = None) -> dict[str, float]:
    """Checked over unchecked: by multiply-adds, and by bytes read and written, each number once for every call that takes it.

    compiled: who judges; None: who does here.
    """
    from abft.backends import judging, quick, reference

    p = reference.plan(n, k, dtype, "full", group)
    columns, sums, narrow, wide = p.layout.columns, len(p.tested), dtype.itemsize, p.layout.dtype.itemsize
    multiplications = m * k * columns + m * n * (sums + 1)
    if judging.judge_for(p, k, dtype) is not None if compiled is None else compiled:
        moved = narrow * (m * k + m * n) + wide * k * columns
    else:
        passes = 2 if m * n <= quick.FEW_ELEMENTS else sums + 1
        moved = wide * (m * k + k * columns + 2 * m * columns + passes * m * n)
        if narrow != wide:
            moved += (narrow + wide) * (m * k + m * n)  # widened first
    return {
        "multiplications": 1 + multiplications / (m * n * k),
        "bytes": 1 + moved / (narrow * (m * k + n * k + m * n)),
    }


def on_gpu(m: int, n: int, k: int, dtype: str, architecture: int, group: int | None = None) -> dict[str, float]:
    """Checked over the unchecked twin: by waves and instructions, of few rows by bytes; nothing where neither was counted."""
    if (dtype, architecture) != ("bf16", 90):
        return {}
    if m <= FEW_ROWS:
        return {"bytes": float(predictions.bytes_moved(m, n, k, "immediate")["ratio"])} if group is None else {}
    return {"waves": float(predictions.predict(m, n, k, group=group)["ratio"])}
