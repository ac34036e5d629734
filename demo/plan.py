"""How much the demo does: on two CPU cores under a minute, under three minutes, or the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One size of the demo. Rates are the share of forwards (or of training steps) that a fault strikes."""

    name: str
    questions: int
    passages: int | None  # about; None: every documented object
    rounds: int  # how often all questions are asked again, each time with other faults
    retrieval_rates: tuple[float, ...]
    steps: int
    training_rates: tuple[float, ...]
    training_seeds: int
    marginal_steps: int


QUICK = Plan("quick", 40, 200, 1, (0.2,), 32, (0.2,), 1, 64)
DEFAULT = Plan("default", 104, None, 5, (0.05, 0.1, 0.2), 160, (0.2,), 1, 112)
FULL = Plan("full", 104, None, 20, (0.05, 0.1, 0.2), 300, (0.05, 0.1, 0.2), 3, 120)
