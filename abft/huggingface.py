"""``attn_implementation="abft"``: checked attention for models of Hugging Face's transformers.

Importing this module registers the name, with its masks, in transformers' two registries; ``abft.protect`` imports it by itself
where it finds such a model:

    import abft.huggingface
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="abft")
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from abft.attend import More, attention_or_none
from abft.functional import bypassed
from abft.modes import ProductMode

NAME = "abft"
#: Arguments that change what a model's eager attention computes, and that neither transformers' sdpa path nor this one knows.
_UNCOVERED = ("s_aux", "sinks")


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out (B, L, heads, D), weights (B, heads, L, S) if ``output_attentions``, else None), checked at the module's site.

    query (B, heads, L, E), key (B, key heads, S, E), value (B, key heads, S, D); attention_mask broadcasts to (B, heads, L, S), bool
    (True: seen) or added. Windows, padding and positions in a cache come in the mask, which transformers makes as for "sdpa". Without
    a mask a causal module's query i sees the keys up to i: so it is there, too, and in an empty static cache the keys after the last
    query are not there yet. ``softcap`` is Gemma's. Dropout drops other elements than torch's would.

    What is not covered (sinks; what torch refuses; what ``abft.scaled_dot_product_attention`` leaves to torch) is computed as
    transformers would, its products checked where they can be, and counted in ``Report.bypassed``.
    """
    site, own = getattr(module, "_abft_site", None), getattr(module, "_abft_policy", None)

    def as_transformers(how: str | None) -> tuple[Tensor, Tensor | None]:
        eager = _eager_of(module) if how == "eager" else None
        if eager is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
            )
        mask = _added(module, query, key, attention_mask, is_causal)
        return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)

    def product_by_product(how: str | None) -> tuple[Tensor, Tensor | None]:
        with ProductMode(site, own):
            return as_transformers(how)

    if site is None:
        before = getattr(getattr(getattr(module, "config", None), "_attn_implementation", None), "before", None)
        if before is not None:
            return as_transformers(before)  # protect was told to leave this module out
    elif not torch.compiler.is_compiling():
        module.__dict__["_abft_attended"] = True
    uncovered = next((name for name in _UNCOVERED if kwargs.get(name) is not None), None)
    if uncovered is not None:
        return bypassed(f"attention with {uncovered}", lambda: product_by_product("eager"))  # type: ignore[return-value]
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return product_by_product("sdpa")
    causal = _is_causal(module, query, attention_mask, is_causal)
    k, v = (key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]) if causal and key.shape[2] > query.shape[2] else (key, value)
    weights = bool(kwargs.get("output_attentions"))
    softcap = kwargs.get("softcap")
    found = attention_or_none(
        site, query, k, v, attention_mask, dropout, causal, scaling, query.shape[1] != k.shape[1], own=own, more=More(softcap=softcap),
        weights=weights,
    )  # fmt: skip
    if found is None and softcap is None:
        return product_by_product("sdpa")  # where torch's function says, and counts, why
    if found is None:
        return bypassed("attention with softcap", lambda: product_by_product("eager"))  # type: ignore[return-value]
    return found[0].transpose(1, 2).contiguous(), found[1] if weights else None


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, is_causal: bool | None) -> bool:
    """As transformers' sdpa path decides it: a mask says everything, and one query sees all keys."""
    said = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return bool(mask is None and query.shape[2] > 1 and said)


def _eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The attention in plain torch of the file a module's class is from: transformers' own convention."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _added(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None) -> Tensor | None:
    """The mask as eager attention wants it: to be added, the most negative number where a key is not seen."""
    if mask is None:
        if not _is_causal(module, query, mask, is_causal):
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=query.dtype, device=mask.device), torch.finfo(query.dtype).min)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
