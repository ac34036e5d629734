"""``F.multi_head_attention_forward``, its projections and its attention checked: what ``nn.MultiheadAttention`` computes.

Unusual calls (static keys, nested tensors, shapes that do not fit) are left to torch, which refuses them or is counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from abft.attend import attention_with_weights_at
from abft.functional import linear_at, why_not
from abft.policy import Policy

NAME = "multi_head_attention_forward"


def attend_or_none(
    site: Tensor | None, own: Policy | None,
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool,
    dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
    """(output, weights or None) of torch's signature, at a site; None where the call is torch's to refuse or to compute."""
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    weights = (in_proj_weight,) if separate is None else separate
    if static_k is not None or static_v is not None or (bias_k is None) is not (bias_v is None) or any(w is None for w in weights):
        return None
    if not _fits(query, key, value, embed_dim_to_check, num_heads, use_separate_proj_weight):
        return None
    batched = query.dim() == 3
    length, batch = query.shape[0], query.shape[1] if batched else 1
    if not _masks_fit(attn_mask, key_padding_mask, (batch if batched else None, num_heads, length, key.shape[0]), is_causal):
        return None
    if not batched:
        same = key is query, value is key
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    causal = is_causal and key_padding_mask is None and not need_weights

    def project(x: Tensor, w: Any, b: Tensor | None) -> Tensor:
        return linear_at(site, x, w, b, own, NAME)

    q, k, v = _projected(project, query, key, value, in_proj_weight, separate, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in (k, v))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
    mask = None if causal else _merged(attn_mask, key_padding_mask, batch, num_heads, k.shape[2] - key.shape[0], q)
    out, full = attention_with_weights_at(
        site, q, k, v, mask, dropout_p if training else 0.0, causal, own=own, name=NAME, weights=need_weights
    )
    y = project(out.permute(2, 0, 1, 3).flatten(-2), out_proj_weight, out_proj_bias)
    if not need_weights:
        return (y if batched else y.squeeze(1)), None
    full = full.mean(dim=1) if average_attn_weights else full
    return (y, full) if batched else (y.squeeze(1), full.squeeze(0))


def _projected(
    project: Any, query: Tensor, key: Tensor, value: Tensor, packed: Tensor | None, separate: tuple[Any, ...] | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (length, batch, width): one product where they come from one tensor, as torch does."""
    if separate is not None:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (project(x, w, b) for x, w, b in zip((query, key, value), separate, biases, strict=True))
        return q, k, v
    assert packed is not None
    if query is key and key is value:
        q, k, v = project(query, packed, bias).chunk(3, dim=-1)
        return q, k, v
    width = query.shape[-1]
    if key is value:
        w_q, w_kv = packed.split([width, 2 * width])
        b_q, b_kv = (None, None) if bias is None else bias.split([width, 2 * width])
        return (project(query, w_q, b_q), *project(key, w_kv, b_kv).chunk(2, dim=-1))
    return _projected(project, query, key, value, None, packed.chunk(3), bias)


def _merged(attn: Tensor | None, padding: Tensor | None, batch: int, heads: int, added: int, like: Tensor) -> Tensor | None:
    """Both masks as one that broadcasts to (batch, heads, length, keys), for ``added`` keys more; torch's True means: not seen."""
    if attn is not None:
        attn = attn.view(batch, heads, *attn.shape[1:]) if attn.dim() == 3 else attn[None, None]
    masks = [m for m in (attn, None if padding is None else padding[:, None, None]) if m is not None]
    if not masks:
        return None
    if all(m.dtype == torch.bool for m in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~F.pad(hidden, (0, added))
    floats = [m if m.dtype != torch.bool else torch.zeros_like(m, dtype=like.dtype).masked_fill(m, -torch.inf) for m in masks]
    total = floats[0] if len(floats) == 1 else floats[0] + floats[1]
    return F.pad(total, (0, added)).to(like.dtype)


def _fits(query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, separate: bool) -> bool:
    try:
        if why_not(query, key, value) is not None:
            return False
    except (TypeError, RuntimeError):
        return False
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3) or query.shape[-1] != width or width % heads:
        return False
    if key.shape[:-1] != value.shape[:-1] or query.shape[1:-1] != key.shape[1:-1] or not separate and key.shape != value.shape:
        return False
    return query.numel() > 0 and key.numel() > 0


def _masks_fit(attn: Tensor | None, padding: Tensor | None, shape: tuple[int | None, int, int, int], is_causal: bool) -> bool:
    batch, heads, length, keys = shape
    if is_causal and attn is None:
        return False
    for mask in (attn, padding):
        if mask is not None and not (type(mask) is Tensor and (mask.dtype == torch.bool or mask.is_floating_point())):
            return False
    fits = padding is None or tuple(padding.shape) == ((keys,) if batch is None else (batch, keys))
    return fits and (attn is None or tuple(attn.shape) in ((length, keys), ((batch or 1) * heads, length, keys)))
