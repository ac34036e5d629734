"""A weight gradient on a CPU: its panel, of an activation, is made for this product alone, and judges it in the same compiled call.

Like a lane it can only confirm: what it does not like, or does not know, takes the whole way, with the product that is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from abft import bits, encoding, faults, policy
from abft.backends import judging, reference
from abft.policy import Policy


@dataclass(frozen=True, slots=True)
class Fresh:
    """What shapes, dtype and policy say about a panel and the judgement by it."""

    judge: judging.Judge
    encoder: encoding.Encoder
    wide: bool  # worth a second thread: the panel


@lru_cache(maxsize=1024)
def policy_of(text: str) -> Policy | None:
    """The policy of that text, if there is nothing more to a weight gradient under it than its product and one check."""
    chosen = policy.decode(text)
    plain = (
        not chosen.dynamic and chosen.level != "off" and "wgrad" in chosen.roles and chosen.backend != "triton"
        and chosen.redundancy == "none" and chosen.detector == "checksum" and chosen.max_floor is None
    )  # fmt: skip
    return chosen if plain else None


def fitting(a: Tensor, w: Tensor, chosen: Policy) -> Fresh | None:
    """How to judge a · wᵀ with a (M, K) and w (N, K), neither of them remembered; None where that takes the whole way."""
    if faults.active is not None or a.dim() != 2 or w.dim() != 2 or a.dtype is not w.dtype or not (a.is_cpu and 1 in w.stride()):
        return None
    if not a.numel() or not bits.readable(w):
        return None
    return _of(*w.shape, w.dtype, chosen.panel, chosen.group)


@lru_cache(maxsize=4096)
def _of(n: int, k: int, dtype: torch.dtype, form: str, group: int | None) -> Fresh | None:
    if not n or not k or dtype not in encoding.DTYPES:
        return None
    p = reference.plan(n, k, dtype, form, group)
    judge = judging.judge_for(p, k, dtype)
    if judge is None:
        return None
    return Fresh(judge, encoding.encoder_for(p.layout, k, dtype), encoding.wants_threads(n, k))


def worst(f: Fresh, y: Tensor, a: Tensor, w: Tensor) -> float:
    """The largest |residual| / bound over all rows of y (M, N) = a (M, K) wᵀ; NaN if anything is not finite."""
    ld, along_n = encoding.order_of(w)
    threads = torch.get_num_threads() if f.wide else 1
    return judging.worst_of_fresh(f.judge, y, a, f.encoder.address, w.data_ptr(), ld, along_n, threads)
