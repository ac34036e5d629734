"""Fault injection: ask for faults in words, and read in a log what they did."""

from abft.injection.fault import Fault
from abft.injection.injector import Injected, faults
from abft.injection.mixture import Mixture

__all__ = ["Fault", "Injected", "Mixture", "faults"]
