"""Modules whose products are checked."""

from abft.nn.linear import Linear

__all__ = ["Linear"]
