"""``abft.varlen_attention``: attention of packed sequences, with the signature of ``torch.nn.attention.varlen.varlen_attn``.

On a CPU, where torch has no such function, every sequence is computed by the reference; on a GPU kernels find a sequence's rows by the
cumulative lengths. What they do not cover is torch's there, and counted in ``Report.bypassed``.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from abft import ledger, scope
from abft import policy as policies
from abft.attend import _autocast, _why_no_kernel
from abft.errors import DeviceError, DtypeError, ShapeError
from abft.functional import _site_here, bypassed, why_not
from abft.ops.varlen import CheckedVarlen
from abft.ops.varlen import varlen_attention as varlen_operator
from abft.policy import Policy, PolicyLike

NAME = "varlen_attention"


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, policy: PolicyLike = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.attention.varlen.varlen_attn``, checked and, if the policy says so, repaired. Returns (T_q, H_q, D).

    query (T_q, H_q, E), key (T_k, H_k, E), value (T_k, H_k, D): the tokens of N sequences one after the other; fp16, bf16, fp32, fp64.
    Sequence n has the queries cu_seq_q[n] up to cu_seq_q[n + 1], and keys likewise; cu_seq_q, cu_seq_k (N + 1,) int32 on query's device,
    from 0 upwards, max_q and max_k the longest sequences. A sequence may have no query or no key; then its rows are zeros.
    window_size (left, right): keys that a query sees before and behind its own position, -1: all; a sequence's last query stands at its
    last key. (-1, 0) is causal. With ``enable_gqa`` H_q may be a multiple of H_k.

    Detects what ``scaled_dot_product_attention`` detects, counted in the same way: a check is an output row of a sequence. Tokens behind
    the last sequence are zeros, unchecked. On a CPU lengths that do not fit raise; on a GPU nobody reads them, and rows beyond max_q are
    left zero, as gradients of keys beyond max_k are. Has no dropout, ``seqused_k``, ``block_table`` or ``return_aux``. Raises ShapeError,
    DtypeError, DeviceError; NotImplementedError for what nothing here computes (tensor subclasses, functorch).
    """
    own = scope.in_force(None if policy is None else policies.as_policy(policy))
    query, key, value = (_autocast(t) for t in (query, key, value))
    reason = why_not(query, key, value)
    _fit(query, key, value, enable_gqa)
    _fit_sequences(query, cu_seq_q, cu_seq_k, max_q, max_k)
    left, right = _window(window_size)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if reason is None and (query.device.type == "cuda" or own.backend == "triton"):
        reason = _why_no_kernel(query, key, value, None, own, False)
    if reason is not None:
        return _by_torch(reason, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, (left, right), enable_gqa)
    window = 0 if left < 0 else left + max(right, 0) + 1
    return _checked(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k, scale, right >= 0, max(right, 0), window), own)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, options: tuple[int, int, float, bool, int, int], policy: Policy
) -> Tensor:
    site, book = _site_here(None, NAME, policy, q.device), ledger.tensor(q.device)
    if torch.is_grad_enabled():
        return CheckedVarlen.apply(q, k, v, cu_seq_q, cu_seq_k, options, book, site, policy.text)
    return varlen_operator(q, k, v, cu_seq_q, cu_seq_k, *options, book, site, policy.text)[0]


# --- what is refused ------------------------------------------------------------------------------


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 3:
        raise ShapeError(f"query, key and value must be (tokens, heads, head_dim); got {shapes}. Padded: scaled_dot_product_attention")
    if query.shape[-1] != key.shape[-1] or min(query.shape[-1], value.shape[-1]) == 0:
        raise ShapeError(f"query and key must have the same head_dim, at least 1; got {shapes}")
    if key.shape[:2] != value.shape[:2]:
        raise ShapeError(f"key and value must have the same tokens and heads; got {shapes}")
    heads, of_keys = query.shape[1], key.shape[1]
    if heads != of_keys and not enable_gqa:
        raise ShapeError(f"query has {heads} heads, key and value {of_keys}; enable_gqa=True lets groups of query heads share one")
    if of_keys == 0 or heads == 0 or heads % of_keys:
        raise ShapeError(f"query's heads must be a multiple of key's, at least one each; got {heads} and {of_keys}")
    if not query.dtype == key.dtype == value.dtype:
        raise DtypeError(f"query, key and value must have one dtype; got {query.dtype}, {key.dtype} and {value.dtype}")


def _fit_sequences(query: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int) -> None:
    """What the host can tell of the lengths without reading them."""
    for name, t in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor (sequences + 1,) int32; got {type(t).__name__}")
        if t.dim() != 1 or t.shape[0] == 0:
            raise ShapeError(f"{name} must be (sequences + 1,), beginning with 0; got {tuple(t.shape)}")
        if t.dtype != torch.int32:
            raise DtypeError(f"{name} must be int32; got {t.dtype}. Convert it: {name}.to(torch.int32)")
        if t.device != query.device:
            raise DeviceError(f"{name} lies on {t.device}, query on {query.device}; move it there")
    if cu_seq_q.shape != cu_seq_k.shape:
        raise ShapeError(f"cu_seq_q says {cu_seq_q.shape[0] - 1} sequences, cu_seq_k {cu_seq_k.shape[0] - 1}; they must be as many")
    for name, n in (("max_q", max_q), ("max_k", max_k)):
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
            raise TypeError(f"{name} must be an int, the length of the longest sequence, on the host; got {type(n).__name__}")
        if n < 0:
            raise ShapeError(f"{name} must not be negative; got {n}")


def _window(window_size: tuple[int, int]) -> tuple[int, int]:
    if len(window_size) != 2 or any(not isinstance(n, int) or n < -1 for n in window_size):
        raise ShapeError(f"window_size must be two numbers (left, right), each at least -1 (all keys on that side); got {window_size}")
    return window_size[0], window_size[1]


# --- what is left to torch ------------------------------------------------------------------------


def _by_torch(
    reason: str, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, scale: float,
    window: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Unchecked, counted, where torch has such a function for this; NotImplementedError else."""
    named = _torchs_names(window, enable_gqa) if query.device.type == "cuda" else None
    if named is None:
        raise NotImplementedError(f"varlen_attention does not cover this call ({reason}), and torch {torch.__version__} does not either")
    from torch.nn.attention.varlen import varlen_attn

    return bypassed(reason, lambda: varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, **named))


def _torchs_names(window: tuple[int, int], enable_gqa: bool) -> dict[str, Any] | None:
    """The arguments by which this torch's function does the same; None if it cannot. Earlier versions knew causal or not, and no groups."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    named: dict[str, Any] = {"window_size": window, "enable_gqa": enable_gqa}
    if "enable_gqa" not in known and not enable_gqa:
        del named["enable_gqa"]
    if "window_size" not in known and window in ((-1, -1), (-1, 0)):
        del named["window_size"]
        named["is_causal"] = window == (-1, 0)
    return named if named.keys() <= known.keys() else None
