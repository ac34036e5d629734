"""``abft.inject``: the public door to fault injection."""

from abft.injection import Fault, Injected, Mixture, faults

__all__ = ["Fault", "Injected", "Mixture", "faults"]
