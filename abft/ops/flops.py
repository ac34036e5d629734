"""FLOP formula of the checked product, so that users' MFU counts what it counted before.

torch's counter imports Triton, which ``import abft`` must not do: the formula is registered when the counter is imported,
before or after abft.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

COUNTER = "torch.utils.flop_counter"


def product_flops(a_shape: Any, ta: bool, b_shape: Any, tb: bool, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 M N K per batch: the product's own work, without the checks (reported by ``bench``)."""
    rows, depth = (a_shape[-1], a_shape[-2]) if ta else (a_shape[-2], a_shape[-1])
    columns = b_shape[-1] if tb else b_shape[-2]
    batch = 1
    for size in a_shape[:-2]:
        batch *= size
    return 2 * batch * rows * columns * depth


def int_product_flops(a_shape: Any, b_shape: Any, tb: bool, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 M N K: operations on whole numbers, but the same work."""
    return product_flops(a_shape, False, b_shape, tb)


def attention_parts(q_shape: Any, k_shape: Any, v_shape: Any, *, backward: bool) -> dict[str, int]:
    """Role → 2 · rows · keys · width for each of its products, causal or not (as torch counts): two forward, five backward."""
    rows = math.prod(q_shape[:-1])
    qk, pv = (2 * rows * k_shape[2] * width for width in (q_shape[-1], v_shape[-1]))
    return {"qk": 3 * qk, "pv": 2 * pv} if backward else {"qk": qk, "pv": pv}


def attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(attention_parts(q_shape, k_shape, v_shape, backward=False).values())


def attention_backward_flops(
    d_out_shape: Any, d_weights_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sum(attention_parts(q_shape, k_shape, v_shape, backward=True).values())


def varlen_parts(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *, backward: bool) -> dict[str, int]:
    """The same of packed sequences, each with its own keys. Lengths that cannot be read are the longest's, as torch counts."""
    (_, heads, e), (_, of_keys, d), total = q.shape, v.shape, {"qk": 0, "pv": 0}
    for length, keys in zip(_lengths(cu_seq_q, max_q), _lengths(cu_seq_k, max_k), strict=True):
        parts = attention_parts((1, of_keys, heads // of_keys, length, e), (1, of_keys, keys, e), (1, of_keys, keys, d), backward=backward)
        total = {role: total[role] + parts[role] for role in total}
    return total


def _lengths(cumulative: Any, longest: int) -> list[int]:
    return cumulative.diff().tolist() if _can_be_read(cumulative) else [longest] * (cumulative.shape[0] - 1)


def _can_be_read(numbers: Any) -> bool:
    return not isinstance(numbers, (FakeTensor, FunctionalTensor)) and numbers.device.type != "meta"


def paged_parts(q: Any, k: Any, v: Any, table: Any, lengths: Any) -> dict[str, int]:
    """The same over pages: every query of a sequence, q (B, H, G, L, E), by the tokens that the sequence holds, seen or not, as torch
    counts what is masked. Lengths that cannot be read are what the table has room for."""
    tokens = sum(lengths.tolist()) if _can_be_read(lengths) else table.numel() * k.shape[1]
    queries = math.prod(q.shape[1:-1])
    return {"qk": 2 * queries * tokens * q.shape[-1], "pv": 2 * queries * tokens * v.shape[-1]}


def paged_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    table, lengths = args[5:7]  # behind what the pages remember
    return sum(paged_parts(q, k, v, table, lengths).values())


def varlen_flops(q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *args: Any, **kwargs: Any) -> int:
    return sum(varlen_parts(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, backward=False).values())


def varlen_backward_flops(
    d_out: Any, q: Any, k: Any, v: Any, cu_seq_q: Any, cu_seq_k: Any, statistics: Any, max_q: int, max_k: int, *args: Any, **kwargs: Any
) -> int:
    return sum(varlen_parts(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, backward=True).values())


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.abft.product)(product_flops)
    counter.register_flop_formula(torch.ops.abft.int_product)(int_product_flops)
    counter.register_flop_formula(torch.ops.abft.attention)(attention_flops)
    counter.register_flop_formula(torch.ops.abft.attention_backward)(attention_backward_flops)
    counter.register_flop_formula(torch.ops.abft.varlen_attention, get_raw=True)(varlen_flops)
    counter.register_flop_formula(torch.ops.abft.varlen_attention_backward, get_raw=True)(varlen_backward_flops)
    counter.register_flop_formula(torch.ops.abft.paged_attention, get_raw=True)(paged_flops)


class _AtImport(importlib.abc.MetaPathFinder):
    """Waits for the counter's import, then steps aside."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _AtImport())
