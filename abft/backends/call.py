"""One product to be computed and checked: what the operator hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from abft.faults import Strike
from abft.policy import Policy


@dataclass(frozen=True)
class Call:
    """Y = A Wᵀ (+ bias) with A (M, K) or (B, M, K), W (N, K) or (B, N, K), any strides; bias (N,).

    ``source`` is the tensor W came from and whose panel may be remembered (a weight), or None
    (an activation; its panel is built and dropped); W is ``source`` or, if ``transposed``,
    ``source.mT``, possibly cast to A's dtype.
    """

    a: Tensor
    w: Tensor
    bias: Tensor | None
    source: Tensor | None
    transposed: bool
    role: str
    policy: Policy
    site: int
    strikes: tuple[Strike, ...] = ()
    bias_source: Tensor | None = None  # the parameter the bias came from, if it is one

    @property
    def rows(self) -> int:
        """Rows of the result, over the batch: the number of checks."""
        return self.a.shape[:-1].numel()
