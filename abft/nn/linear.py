"""``abft.Linear``: a linear layer that checks its products."""

from __future__ import annotations

from typing import Any

from torch import nn

from abft import policy as policies
from abft.nn.checked import CheckedForward, attach
from abft.policy import PolicyLike


class Linear(CheckedForward, nn.Linear):
    """``torch.nn.Linear`` whose forward and gradient products are checked; same parameters, same state dict, same results.

    policy=None: the policy in force where it is called. See ``abft.linear`` for what is and is not detected.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *, policy: PolicyLike = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        attach(self, f"Linear({in_features}, {out_features})", None if policy is None else policies.as_policy(policy))
