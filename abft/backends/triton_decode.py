"""The triton backend's attention over pages: what its launches need of the host. Lengths, tables and verdicts are the device's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abft import checksum, keyweights, ledger, sites, threshold
from abft.backends import triton as products
from abft.faults import Strike
from abft.policy import Policy

KINDS: tuple[checksum.Kind, ...] = ("e", "hi", "lo")
WIDEST_HEAD = 256
ROLES = {"qk": 1, "pv": 2}
#: (role, place) → the kernels' number of the place (triton_kernels/attention_forward.py).
PLACES = {
    ("qk", "S"): 0, ("qk", "accumulator"): 0, ("pv", "P"): 1, ("pv", "l"): 2, ("pv", "O"): 3, ("pv", "accumulator"): 3,
    ("qk", "checksum"): 6, ("pv", "checksum"): 7, ("qk", "operand"): 8, ("pv", "operand"): 10,
}  # fmt: skip


@dataclass(frozen=True)
class DecodeCall:
    """One attention over pages: the operands of ``abft::paged_attention``. pages: the tensors of ``attention.pages.Pages``.

    roles: those that are judged; strikes: with the role of the product they hit.
    """

    q: Tensor
    pages: tuple[Tensor, ...]
    table: Tensor
    lengths: Tensor
    scale: float
    window: int | None
    softcap: float | None
    policy: Policy
    roles: frozenset[str]
    strikes: tuple[tuple[str, Strike], ...] = ()


def available(device: torch.device, dtype: torch.dtype, e: int, d: int) -> str | None:
    """None if attention over pages with heads of ``e`` columns and values of ``d`` runs here, else the reason in words."""
    if dtype not in products.KIND:
        return f"the kernels of attention compute fp16, bf16 and fp32, not {str(dtype)[6:]}"
    if max(e, d) > WIDEST_HEAD:
        return f"the kernels of attention take heads of up to {WIDEST_HEAD} columns; these have {max(e, d)}"
    return products.available(device, dtype)


def attend(call: DecodeCall, words: Tensor, site: Tensor) -> Tensor:
    """O (B, H, G, L, D), checked and, if the policy says so, repaired; nothing is read back."""
    from abft.triton_kernels import attention_decode

    decoding, roles, q = plan(call), sum(ROLES[role] for role in call.roles), call.q
    with products.quiet(), products.host_ledger(words):
        if not roles and not call.strikes:
            return attention_decode.unchecked(decoding).view(*q.shape[:-1], -1)
        evidence = attention_decode.attend(decoding, words, site, roles, descriptors(call.strikes, q.device))
        if roles:
            correct = call.policy.level == "correct" and call.policy.timing == "immediate"
            attention_decode.settle(decoding, evidence, words, site, labels(call), roles, correct)
    return evidence.out.view(*q.shape[:-1], -1)


def plan(call: DecodeCall) -> Any:
    """The argument of the launches."""
    from abft.triton_kernels import attention_decode, configs
    from abft.triton_kernels.attention_scores import LOG2E

    q, (k, v) = call.q, call.pages[:2]
    (e, d), device, rows = (q.shape[-1], v.shape[-1]), q.device, call.q.shape[2:4].numel()
    c = threshold.decode(_arithmetic(q.dtype, device), e, d, KINDS)
    flat = q.reshape(*q.shape[:2], rows, e).contiguous()
    query = attention_decode.Query(
        flat, rows, q.shape[3], call.scale, call.scale * LOG2E.value, call.window, call.softcap
    )
    splits = configs.decode_splits(flat.shape[0] * flat.shape[1], call.table.shape[1])
    wide = max(e, d) > 64
    return attention_decode.Decoding(
        flat, query, _pages(call.pages), _tables(call.table, call.lengths), weights(k.shape[1], d, device),
        attention_decode.Limits(c.scores, c.slope, c.shift, c.output, c.output_slope, c.sums, c.sums_slope), splits,
        exponentials=call.policy.panel == "full", warps=8 if wide else 4, stages=2,
    )  # fmt: skip


def append(pages: tuple[Tensor, ...], new_k: Tensor, new_v: Tensor, table: Tensor, lengths: Tensor, counts: Tensor | None) -> None:
    """Write tokens behind what the sequences hold, with what is remembered of them: one launch."""
    from abft.triton_kernels import attention_pages

    with products.quiet():
        attention_pages.append(
            _pages(pages), _tables(table, lengths), new_k, new_v, None if counts is None else counts.contiguous(),
            weights(pages[0].shape[1], new_v.shape[-1], new_k.device),
        )  # fmt: skip


def _pages(pages: tuple[Tensor, ...]) -> Any:
    from abft.triton_kernels import attention_pages

    k, v = pages[:2]
    return attention_pages.Pages(*pages, k.shape[2], k.shape[3], v.shape[3])


def _tables(table: Tensor, lengths: Tensor) -> Any:
    from abft.triton_kernels.attention_pages import Tables

    return Tables(table.contiguous(), lengths.contiguous(), table.shape[1])


@lru_cache(maxsize=256)
def _arithmetic(dtype: torch.dtype, device: torch.device) -> threshold.Arithmetic:
    architecture = None if device.type == "cpu" else products.family_of(device)
    return products.ARITHMETIC.get((architecture, products.KIND[dtype]), threshold.FMA_32)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def weights(length: int, d: int, device: torch.device) -> Any:
    """What the sums of pages count; tables of the host's, copied once."""
    from abft.triton_kernels.attention_pages import Weights

    of_keys = torch.from_numpy(keyweights.of_keys(length)).to(device)
    columns = torch.from_numpy(np.stack([checksum.column_weights(kind, d) for kind in KINDS])).to(device)
    return Weights(of_keys, columns, *(checksum.weight_rms(kind, d) for kind in KINDS))


def labels(call: DecodeCall) -> tuple[Any, Any]:
    """What the records of qk and of pv will say."""
    from abft.triton_kernels.record import Labels

    dtype, keys = ledger.DTYPES.index(call.q.dtype), call.table.shape[1] * call.pages[0].shape[1]
    backend, (qk, pv) = ledger.BACKEND_NAMES.index("triton"), (ledger.ROLE_NAMES.index(role) for role in ("qk", "pv"))
    rows, e, d = call.q.shape[:-1].numel(), call.q.shape[-1], call.pages[1].shape[-1]
    return Labels(qk, dtype, backend, rows, keys, e, sites.CAPACITY), Labels(pv, dtype, backend, rows, d, keys, sites.CAPACITY)


def descriptors(strikes: tuple[tuple[str, Strike], ...], device: torch.device) -> Tensor | None:
    """The faults that strike inside the kernels, as ``tiles.strike`` reads them: batches are heads of keys, rows those of their queries."""
    rows = []
    for role, s in strikes:
        place = PLACES.get((role, s.place))
        if place is not None:
            r, op = s.region, s.operation
            words = (place, r.batch, r.row0, r.row1, r.col0, r.col1, r.stride, 0, 2**31 - 1, op.keep, op.flip, op.add)
            rows.append([(word + 2**31) % 2**32 - 2**31 for word in words])
    return torch.tensor(rows, dtype=torch.int32).to(device) if rows else None
