"""The triton backend's attention: what its checks need of the host, and the three launches of a forward pass.

Sums of K and V, the attention that judges its own rows, and the launch that computes suspect blocks again, which leaves at once when
there are none. Nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abft import checksum, floating, keyweights, ledger, sites, threshold
from abft.backends import triton as products
from abft.checksum import Kind
from abft.faults import Strike
from abft.policy import Policy

#: Kinds of sums of a row of O.
KINDS: tuple[Kind, ...] = ("e", "hi", "lo")
#: Columns of the checks of either product, for an injector.
CHECK_COLUMNS = 16
WIDEST_HEAD = 256
#: (role, place) → the kernels' number of the place (triton_kernels/attention_forward.py).
PLACES = {
    ("qk", "S"): 0, ("qk", "accumulator"): 0, ("pv", "P"): 1, ("pv", "l"): 2, ("pv", "O"): 3, ("pv", "accumulator"): 3,
    ("qk", "checksum"): 6, ("pv", "checksum"): 7, ("qk", "operand"): 8, ("pv", "operand"): 10,
}  # fmt: skip
#: Bits of the roles.
ROLES = {"qk": 1, "pv": 2}


@dataclass(frozen=True)
class Sequences:
    """Packed sequences: cumulative lengths on the device, (sequences + 1,) int32, and the longest."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class AttentionCall:
    """One attention: q (B, H, G, L, E), k (B, H, S, E), v (B, H, S, D), none empty; the mask and the numbers of ``abft::attention``.

    sequences: then B is one, L and S are the tokens of all of them, and the offset is beyond each one's own alignment.

    roles: those that are judged; strikes: with the role of the product they hit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: int
    scale: float
    causal: bool
    offset: int
    window: int | None
    softcap: float | None
    dropout: float
    policy: Policy
    roles: frozenset[str]
    strikes: tuple[tuple[str, Strike], ...] = ()
    sequences: Sequences | None = None

    @property
    def keys(self) -> int:
        """Keys that a query has, at most."""
        return self.k.shape[2] if self.sequences is None else self.sequences.max_k

    @property
    def queries(self) -> int:
        """Queries of a head, at most."""
        return self.q.shape[3] if self.sequences is None else self.sequences.max_q

    def scores(self) -> tuple[Any, bool]:
        """What the kernels know of the scores."""
        from abft.triton_kernels import attention_scores, attention_sequences

        scores, scaled = attention_scores.scores_of(
            self.q, self.k, self.mask, self.scale, self.offset, self.window, self.softcap, self.dropout, self.seed
        )
        s = self.sequences
        return scores if s is None else attention_sequences.packed(scores, s.cu_q, s.cu_k, s.max_q, s.max_k), scaled


def available(device: torch.device, dtype: torch.dtype, e: int, d: int) -> str | None:
    """None if attention over heads of ``e`` columns and values of ``d`` runs here, else the reason in words."""
    if dtype not in products.KIND:
        return f"the kernels of attention compute fp16, bf16 and fp32, not {str(dtype)[6:]}"
    if max(e, d) > WIDEST_HEAD:
        return f"the kernels of attention take heads of up to {WIDEST_HEAD} columns; these have {max(e, d)}"
    reason = products.available(device, dtype)
    if reason is None and device.type == "cuda" and products.family_of(device) >= 100:
        return "Triton does not compile the kernels of attention for this architecture yet"
    return reason


def attend(call: AttentionCall, words: Tensor, site: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, H, G, L, D), statistics (2, B, H, G, L)), checked and, if the policy says so, repaired; nothing is read back."""
    from abft.triton_kernels import attention_forward, attention_settle

    attention, roles = plan(call), sum(ROLES[role] for role in call.roles)
    faults = descriptors(call.strikes, call.q.device)
    repeat = torch._C._current_graph_task_id() != -1
    with products.quiet(), products.host_ledger(words):
        evidence = attention_forward.attend(attention, words, site, roles, repeat, faults)
        attention_settle.settle(attention, evidence, words, site, labels(call), roles, call.policy.level == "correct")
    return by_heads(evidence.out, call), evidence.statistics


def by_heads(rows: Tensor, call: AttentionCall) -> Tensor:
    """A result of queries as (B, H, G, L, ·); of packed sequences it lies as (tokens, heads, ·)."""
    return rows if call.sequences is None else rows.unflatten(1, call.q.shape[1:3]).permute(1, 2, 0, 3).unsqueeze(0)


def plan(call: AttentionCall) -> Any:
    """The argument of the launches."""
    from abft.triton_kernels import attention_forward

    q, k, v, device = call.q, call.k, call.v, call.q.device
    e, d, keys = q.shape[-1], v.shape[-1], call.keys
    config, arithmetic = _choice(e, d, q.dtype, device, laden(call))
    scores, scaled = call.scores()
    return attention_forward.Attention(
        q, k, v, scores, scaled, call.causal, weights(config.bn, e, d, keys, device),
        _limits(arithmetic, e, d, keys, call.sequences is not None), config, floating.PARTS[q.dtype],
        exponentials=call.policy.panel == "full", numbered=products._numbered(device),
    )  # fmt: skip


def laden(call: AttentionCall) -> bool:
    """Whether more happens to a score than its scale, and its being hidden by place: that takes registers from the blocks."""
    return call.mask is not None or call.softcap is not None or call.dropout > 0


@lru_cache(maxsize=1024)
def _limits(arithmetic: threshold.Arithmetic, e: int, d: int, keys: int, packed: bool) -> Any:
    """The bounds' coefficients; of packed sequences those from which the device finds each one's."""
    from abft.triton_kernels.attention_forward import Limits

    c = threshold.attention(arithmetic, e, d, keys, KINDS)
    if not packed:
        return Limits(c.scores, c.shift, c.output, c.sums)
    none, one = (threshold.attention(arithmetic, e, d, n, KINDS) for n in (0, 1))
    slopes = tuple(b - a for a, b in zip(none.output, one.output, strict=True))
    return Limits(c.scores, one.shift, none.output, none.sums, slopes, one.sums - none.sums)


@lru_cache(maxsize=1024)
def _choice(e: int, d: int, dtype: torch.dtype, device: torch.device, laden: bool = False) -> tuple[Any, threshold.Arithmetic]:
    """(blocks, arithmetic) of heads on a device."""
    from abft.triton_kernels import configs
    from abft.triton_kernels.attention_forward import padded

    architecture, kind = None if device.type == "cpu" else products.family_of(device), products.KIND[dtype]
    config = configs.choose_attention(architecture, kind, max(padded(e), padded(d)), laden)
    return config, products.ARITHMETIC.get((architecture, kind), threshold.FMA_32)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def weights(block: int, e: int, d: int, keys: int, device: torch.device) -> Any:
    """What the sums of K and V count; tables of the host's, copied once."""
    from abft.triton_kernels.attention_panel import Weights

    table = keyweights.of_keys(keyweights.PERIOD)
    of_keys, of_blocks = (torch.from_numpy(t).to(device) for t in (table, table.reshape(-1, block).sum(1)))
    columns = torch.from_numpy(np.stack([checksum.column_weights(kind, d) for kind in KINDS])).to(device)
    sketch, keys_sketch = checksum.sketch_coefficients(keys, device), checksum.sketch_coefficients(e, device)
    rms = [checksum.weight_rms(kind, d) for kind in KINDS]
    return Weights(of_keys, of_blocks, columns, sketch, sketch.stride(0), keys_sketch, keys_sketch.stride(0), *rms)


def labels(call: AttentionCall) -> tuple[Any, Any]:
    """What the records of qk and of pv will say."""
    from abft.triton_kernels.record import Labels

    rows, keys, dtype = call.q.shape[:-1].numel(), call.keys, ledger.DTYPES.index(call.q.dtype)
    backend, (qk, pv) = ledger.BACKEND_NAMES.index("triton"), (ledger.ROLE_NAMES.index(role) for role in ("qk", "pv"))
    e, d = call.q.shape[-1], call.v.shape[-1]
    return Labels(qk, dtype, backend, rows, keys, e, sites.CAPACITY), Labels(pv, dtype, backend, rows, d, keys, sites.CAPACITY)


def descriptors(strikes: tuple[tuple[str, Strike], ...], device: torch.device) -> Tensor | None:
    """The faults that strike inside the kernel, as ``tiles.strike`` reads them: batches are heads of keys, rows those of their queries."""
    rows = []
    for role, s in strikes:
        place = PLACES.get((role, s.place))
        if place is not None:
            r, op = s.region, s.operation
            words = (place, r.batch, r.row0, r.row1, r.col0, r.col1, r.stride, 0, 2**31 - 1, op.keep, op.flip, op.add)
            rows.append([(word + 2**31) % 2**32 - 2**31 for word in words])
    return torch.tensor(rows, dtype=torch.int32).to(device) if rows else None
