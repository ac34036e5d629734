"""``abft.MultiheadAttention``: multi-head attention that checks its products and what lies between them."""

from __future__ import annotations

from typing import Any

from torch import nn

from abft import policy as policies
from abft.nn.checked import ScopedForward, attach
from abft.policy import PolicyLike


class MultiheadAttention(ScopedForward, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, its projections, its attention and their gradients checked; same parameters, same state dict.

    Torch's fused inference path reads the weights in one kernel that no check sees, and is never taken. policy=None: the policy in
    force where it is called. See ``abft.scaled_dot_product_attention`` for what is and is not detected.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, policy: PolicyLike = None, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        attach(self, f"MultiheadAttention({embed_dim}, {num_heads})", None if policy is None else policies.as_policy(policy))
