"""Modules whose products are checked."""

from abft.nn.linear import Linear
from abft.nn.multihead import MultiheadAttention

__all__ = ["Linear", "MultiheadAttention"]
