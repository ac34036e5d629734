"""What attention's backward is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Gradients:
    """Of q, k, v and, where it is wanted, of what the mask adds; each in its operand's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    @property
    def of_operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Given:
    """From above: d_out (B, H, G, L, D), d_weights (B, H, G, L, S) or None; from the forward: its statistics."""

    d_out: Tensor
    d_weights: Tensor | None
    statistics: Tensor
