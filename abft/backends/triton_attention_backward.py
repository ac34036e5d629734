"""The triton backend's attention gradient: its plan made on the host, everything else decided on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abft import checksum, floating, keyweights, ledger, sites, threshold
from abft.backends import triton as backend
from abft.backends.triton_attention import AttentionCall, by_heads, laden
from abft.faults import Strike
from abft.ledger import Verdict

#: Bound of sums over the softmax and its gradient, in units of 2⁻²³: the reference's, bench/results/attention.jsonl.
KAPPA_SUMS, UNIT = 48.0, 2.0**-23
PLACES = ("S", "P", "dP", "dS", "dQ", "dK", "dV")  # in the order of the kernels' own numbers
FIRST_PLACE = 16


@dataclass(frozen=True)
class Given:
    """From above, d_out; from the forward its output, both (B, H, G, L, D), and its statistics (2, B, H, G, L)."""

    d_out: Tensor
    out: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class Hit:
    """A strike, and which of the two kernels it hits: S, P, dP and dS are computed by queries (for dQ) and by keys (for dK and dV)."""

    strike: Strike
    by_keys: bool = False


# --- plan -----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _weights(width: int, count: int, device: torch.device) -> Tensor:
    """Fixed random ±U(0.5, 1.5)/1.041, (count, width) fp32, of balanced sign: rms 1, and no two equal as signs alone would be."""
    rng = np.random.default_rng(0xAB47)
    signs = [checksum.signs(width)] + [rng.permutation(checksum.signs(width)) for _ in range(count - 1)]
    return torch.from_numpy((np.stack(signs) * rng.uniform(0.5, 1.5, (count, width)) / 1.041).astype(np.float32)).to(device)


@lru_cache(maxsize=64)
def _of_keys(count: int, device: torch.device) -> Tensor:
    """What the rows of a block count for in its one sum: equal errors of neighbours do not cancel."""
    return torch.from_numpy(keyweights.of_keys(count)).to(device)


@lru_cache(maxsize=1024)
def _bounds(arithmetic: threshold.Arithmetic, dtype: torch.dtype, keys: int, depth: int, e: int, d: int, packed: bool = False) -> Any:
    """The bounds of products of ``depth`` queries and ``keys`` keys, U κ; and of the sums of the softmax. packed: what they are made of,
    for any number of queries and keys."""
    from abft.triton_kernels.attention_backward import Bounds

    def of(k: int, width: int = 1) -> float:
        return arithmetic.unit * threshold.kappa(arithmetic, k, width=width)

    def of_p(k: int, width: int) -> float:
        """Of k probabilities: those of equal keys are equal, and so is what each addition loses."""
        return arithmetic.unit * threshold.kappa(threshold.of_probabilities(arithmetic), k, width=width)

    def of_ds(k: int, width: int) -> float:
        """Of k gradients of scores, of which one may be as large as all others together: each addition loses of that sum, not of a growing
        one. What cuts off loses hardly more; what rounds, U/2 each time."""
        if arithmetic.base == threshold.KAPPA_BASE_FMA:
            return arithmetic.unit * (threshold.kappa(arithmetic, 0, width=width) + k / 2)
        return of_p(k, width)

    # The forward sums the probabilities that multiply V, rounded to half precision; its output is rounded, too.
    rounding = floating.UNIT_ROUNDOFF[dtype] if dtype != torch.float32 else 0.0
    vanishing, of_row = KAPPA_SUMS * UNIT, (KAPPA_SUMS + keys * threshold.KAPPA_PER_KEY) * UNIT
    # Of ‖q‖ ‖k‖. Products that add up coherently: additions round by U/2/√3 of sums that grow to it, so by U √e/6 rms, and two
    # evaluations differ by √2 of it: 1.5 √e U is six of those. A unit that cuts off is wrong by at most U a step.
    of_score = max(1.5 * math.sqrt(e), e / arithmetic.depth)
    sums = vanishing, rounding + of_row, rounding + of_row, arithmetic.unit * of_score, arithmetic.floor_abs
    none, one, whole = ((of_ds(keys, e), of_ds(depth, e), of_p(depth, d)) for keys, depth in ((0, 0), (1, 1), (keys, depth)))
    if packed:
        return Bounds(of(e), of(d), *none, *sums, *(b - a for a, b in zip(none, one, strict=True)))
    return Bounds(of(e), of(d), *whole, *sums)


def _labels(call: AttentionCall) -> Any:
    from abft.triton_kernels.attention_verdicts import Labels

    q, k, v = call.q, call.k, call.v
    queries, keys, depth = q.shape[:-1].numel(), k.shape[:3].numel(), q.shape[2] * call.queries
    qk, pv = (role in call.roles for role in ("qk", "pv"))
    names = ledger.ROLE_NAMES
    return Labels(
        names.index("qk"), names.index("pv"), (2 * queries + keys) * qk, (queries + keys) * pv, ledger.DTYPES.index(q.dtype),
        ledger.BACKEND_NAMES.index("triton"), queries, keys, call.keys, depth, q.shape[-1], v.shape[-1], sites.CAPACITY,
    )  # fmt: skip


def _judge(call: AttentionCall, config: Any, architecture: int | None) -> Any:
    from abft.triton_kernels.attention_gradients import Judge

    q, policy, device, keys = call.q, call.policy, call.q.device, call.keys
    e, d, depth = q.shape[-1], call.v.shape[-1], q.shape[2] * call.queries
    arithmetic = backend.ARITHMETIC.get((architecture, backend.KIND[q.dtype]), threshold.FMA_32)  # type: ignore[arg-type]
    sketch = checksum.sketch_coefficients(max(call.queries, keys), device)
    told = Verdict.OBSERVED if policy.level == "detect" else Verdict.UNCORRECTED
    return Judge(
        _bounds(arithmetic, q.dtype, keys, depth, e, d, call.sequences is not None),
        _of_keys(config.dkv.step, device), _of_keys(config.dq.step, device), _weights(e, 2, device), _weights(d, 2, device), sketch,
        _labels(call), policy.level == "correct" and policy.timing == "immediate", list(Verdict).index(told),
    )  # fmt: skip


# --- the gradient ---------------------------------------------------------------------------------


def on_host(device: torch.device) -> bool:
    """Whether the kernels are interpreted."""
    return device.type == "cpu"


def gradients(
    call: AttentionCall, given: Given, words: Tensor, site: Tensor, hits: tuple[Hit, ...] = (), again: tuple[Hit, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, checked and, if the policy says so, repaired; nothing is read back to the host.

    call.roles: those that are judged in the backward; without any, nothing is. words: the ledger's, on the device of q; site: 0-d int64.
    ``again``: what hits the repetition.
    """
    from abft.triton_kernels import attention_gradients as kernels

    q, device = call.q, call.q.device
    architecture = None if on_host(device) else backend.family_of(device)
    config = kernels.config_for(architecture, q.dtype, max(q.shape[-1], call.v.shape[-1]), laden(call))
    scores, _ = call.scores()
    maxima, sums = given.statistics
    inputs = kernels.Given(q, call.k, call.v, given.d_out, given.out, maxima.contiguous(), sums.contiguous())
    judge = _judge(call, config, architecture) if call.roles else None
    with backend.quiet(), backend.host_ledger(words):
        dq, dk, dv = kernels.gradients(
            inputs, scores, call.causal, config, judge, words, site, descriptors(hits, device), descriptors(again, device)
        )
    if call.sequences is not None:  # (tokens, heads, ·)
        dk, dv = (t.transpose(0, 1).unsqueeze(0) for t in (dk, dv))
    return by_heads(dq, call), dk, dv


# --- injection ------------------------------------------------------------------------------------


def hit_of(product: str, strike: Strike) -> Hit:
    """Where a strike on a product lands. An accumulator is the product's own; what both kernels compute is struck in one of them, P where
    it multiplies dO."""
    place = product if strike.place == "accumulator" else strike.place
    by_keys = place in ("P", "dK", "dV") or (place in PLACES[:4] and (strike.region.row0 + strike.region.col0) % 2 == 1)
    return Hit(replace(strike, place=place), by_keys)  # type: ignore[arg-type]


def descriptors(hits: tuple[Hit, ...], device: torch.device) -> Tensor | None:
    """The faults that strike inside the kernels, (count, 12) int32, or None. All act on fp32 patterns.

    Regions lie in matrices of one head of keys: S, P, dP, dS (G·L, S), dQ (G·L, E), dK (S, E), dV (S, D).
    """
    rows = []
    for hit in hits:
        r, op = hit.strike.region, hit.strike.operation
        if hit.strike.place not in PLACES:
            continue  # the operands and the checks of these kernels cannot be struck
        by_keys = hit.by_keys or hit.strike.place in ("dK", "dV")
        place = FIRST_PLACE + PLACES.index(hit.strike.place)
        words = (place, r.batch, r.row0, r.row1, r.col0, r.col1, r.stride, int(by_keys), 0, op.keep, op.flip, op.add)
        rows.append([(word + 2**31) % 2**32 - 2**31 for word in words])
    return torch.tensor(rows, dtype=torch.int32).to(device) if rows else None
