"""The ladder: what a site's protection can be, what each option lets through, and what the campaigns say about that.

A fault at a site lets through its harmful share times the option's ``escape``: the probability that a harmful fault is delivered. Shares
come from committed campaigns; where one saw no miss, the upper end of its 95 % interval is used (Clopper–Pearson).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from abft.policy import Policy

#: Sampling: one of so many products of a site is protected.
SAMPLES = (256, 64, 16, 4)
#: Of harmful faults, those that strike again when the product is repeated at once on the same unit. An assumption, not a
#: measurement: most failures of compute units in fleets are found by repetition elsewhere, few shares are published.
REPEATING = 0.1


@dataclass(frozen=True)
class Campaign:
    """Faults in accumulators, outputs and operands: trials, harmful ones (relative change of a row >= ``harm``), and those missed."""

    file: str
    harm: float
    trials: int
    harmful: int
    harmful_missed: int
    missed: int

    def seen(self) -> float:
        """The share of all faults, harmful or not, that a check finds."""
        return 1 - self.missed / self.trials

    def escape(self, harm: float) -> float:
        """What a check misses of the faults harmful at ``harm``: the upper end of the 95 % interval.

        Below the campaign's own threshold every missed fault is taken for harmful: what it missed is smaller than that, not harmless.
        """
        missed, harmful = (self.harmful_missed, self.harmful) if harm >= self.harm else (self.missed, self.harmful + self.missed)
        return _upper(missed, harmful)


@lru_cache
def _upper(events: int, trials: int) -> float:
    from scipy import stats

    return float(stats.beta.ppf(0.95, events + 1, trials - events))  # Clopper–Pearson, one-sided


#: Sums over accumulator, output and operand of bench/results/<file>.jsonl; tests/test_adaptive.py adds them up again. Of the reference on a
#: CPU, whose results arrive rounded: the kernels' checks, taken before rounding, see more.
CAMPAIGNS = {
    "float32": Campaign("faults-reference-fp32", 1e-3, 14893, 11069, 0, 2210),
    "bfloat16": Campaign("faults-reference-bf16", 1e-2, 14772, 13058, 5, 1108),
    "float16": Campaign("faults-reference-fp16", 1e-2, 14785, 11819, 0, 986),
}


#: The same under ``detector="statistical"`` without its budget: what it lets be on purpose and had better not counts as missed.
STATISTICAL_CAMPAIGNS = {
    "float32": Campaign("faults-statistical-reference-fp32", 1e-3, 3727, 2766, 0, 623),
    "bfloat16": Campaign("faults-statistical-reference-bf16", 1e-2, 3701, 3262, 0, 290),
    "float16": Campaign("faults-statistical-reference-fp16", 1e-2, 3695, 2940, 0, 270),
}


@dataclass(frozen=True)
class Gate:
    """Flips in the kernels' accumulators: rows that were flagged, of these left as they were; harmful ones (≥ 1e-3), of these left."""

    flagged: int
    left: int
    harmful: int
    harmful_left: int

    def escape(self, harm: float) -> float:
        """What it leaves of the faults harmful at ``harm``, as ``Campaign.escape``: below 1e-3 all that it leaves is taken for harmful."""
        return _upper(self.harmful_left, self.harmful) if harm >= 1e-3 else _upper(self.left, self.flagged)


#: What the kernels leave as harmless, without its budget: bench/results/statistics.jsonl, ``weighed``; fp32 interpreted, bf16 and fp16 on
#: emulated tensor cores. It comes on top of what their checks miss. Few trials, so little is promised.
GATES = {
    "float32": Gate(55, 9, 41, 0),
    "bfloat16": Gate(55, 9, 42, 0),
    "float16": Gate(56, 9, 41, 0),
}


def campaign(dtype: str) -> Campaign:
    """The campaign of a dtype; float64, which has none, takes float32's, whose bound is wider."""
    return CAMPAIGNS.get(dtype, CAMPAIGNS["float32"])


@dataclass(frozen=True)
class Option:
    """A rung: level and redundancy, and how often."""

    name: str
    level: str = "off"
    redundancy: str = "none"
    every: int = 1
    detector: str | None = None  # None: the base policy's

    def policy(self, base: Policy) -> Policy:
        detector = base.detector if self.detector is None else self.detector
        return base.replace(level=self.level, redundancy=self.redundancy, every=self.every, detector=detector)

    def escape(self, dtype: str, harm: float, *, replayed: bool, repeating: float = REPEATING, kernels: bool = False) -> float:
        """P(a harmful fault is delivered). replayed: what is only detected is computed again by the caller (StepGuard). kernels: whether
        these judge, of which the statistical detector has measurements of its own."""
        return 1 - (1 - self._escape_where_protected(dtype, harm, replayed, repeating, kernels)) / self.every

    def _escape_where_protected(self, dtype: str, harm: float, replayed: bool, repeating: float, kernels: bool) -> float:
        by_check = 1.0
        if self.level == "correct" or (self.level == "detect" and replayed):
            by_check = self._missed(dtype, harm, kernels)
        # Replicas on one unit repeat its fault and agree on it. The check's misses and a unit's memory are taken to be independent.
        by_vote = 1.0 if self.redundancy == "none" else repeating
        return by_check * by_vote

    def _missed(self, dtype: str, harm: float, kernels: bool) -> float:
        if self.detector == "statistical" and kernels:
            gate = GATES.get(dtype)
            return 1.0 if gate is None else min(1.0, campaign(dtype).escape(harm) + gate.escape(harm))
        measured = self._campaign(dtype)
        return 1.0 if measured is None else measured.escape(harm)

    def seen(self, dtype: str) -> float:
        """The share of all faults in a protected product that is noticed, harmful or not."""
        measured = self._campaign(dtype)
        by_check = measured.seen() if measured is not None and self.level != "off" else 0.0
        by_vote = 1 - REPEATING if self.redundancy != "none" else 0.0
        return 1 - (1 - by_check) * (1 - by_vote)

    def _campaign(self, dtype: str) -> Campaign | None:
        """None: not measured, so nothing is promised."""
        return STATISTICAL_CAMPAIGNS.get(dtype) if self.detector == "statistical" else campaign(dtype)

    @property
    def protects(self) -> bool:
        return self.level != "off" or self.redundancy != "none"


OFF, DETECT, CORRECT = Option("off"), Option("detect", "detect"), Option("correct", "correct")
DMR, TMR = Option("dmr", redundancy="dmr"), Option("tmr", redundancy="tmr")
CORRECT_DMR, CORRECT_TMR = Option("correct+dmr", "correct", "dmr"), Option("correct+tmr", "correct", "tmr")
SAMPLED = tuple(Option(f"1/{n}", "correct", every=n) for n in SAMPLES)
#: Finds what no single check sees, leaves harmless rows as they are, and otherwise corrects; where hosts judge, and kernels if asked for.
STATISTICAL = Option("statistical", "correct", detector="statistical")
#: From the weakest to the strongest.
LADDER = (OFF, *SAMPLED, DETECT, STATISTICAL, CORRECT, DMR, TMR, CORRECT_DMR, CORRECT_TMR)
#: What is measured; the cost of sampling follows from these.
MEASURED = (OFF, DETECT, STATISTICAL, CORRECT, DMR, TMR, CORRECT_DMR, CORRECT_TMR)
#: Of critical modules.
FULL = CORRECT_TMR
BY_NAME = {option.name: option for option in LADDER}
