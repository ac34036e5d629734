"""What was injected and what was noticed, counted per event (one request, or one training step)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

HARMFUL = 1e-3  # relative L2 change of the worst output row; below it a fault drowns in half-precision rounding


@dataclass
class Tally:
    """Injected faults come from the injector's log, the rest from abft's report: neither knows of the other."""

    injected: int = 0
    harmful: int = 0
    struck: int = 0  # events with at least one injected fault
    detected: int = 0  # struck events in which something was detected
    repaired: int = 0  # … and everything detected was corrected
    uncorrected: int = 0
    missed: int = 0  # struck by a harmful fault, nothing detected
    largest_undetected: float = 0.0  # effect of the worst fault in an event in which nothing was detected
    false_alarms: int = 0  # not struck, yet something was detected
    rows_detected: int = 0
    rows_corrected: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # what, where, pattern, role of each injected fault

    def add(self, injected: Iterable, report) -> None:
        """One event: the log entries that it added, and the report of what was noticed during it."""
        faults = list(injected)
        # "not <": an effect of NaN or Inf is as harmful as can be.
        harmful = sum(not fault.effect < HARMFUL for fault in faults)
        self.injected += len(faults)
        self.harmful += harmful
        self.struck += bool(faults)
        self.detected += bool(faults) and report.detected > 0
        self.repaired += bool(faults) and report.detected > 0 and report.corrected == report.detected
        self.uncorrected += report.uncorrected > 0
        self.missed += harmful > 0 and report.detected == 0
        if report.detected == 0:
            self.largest_undetected = max([self.largest_undetected, *(fault.effect for fault in faults)])
        self.false_alarms += not faults and (report.detected > 0 or report.false_alarms > 0)
        self.rows_detected += report.detected
        self.rows_corrected += report.corrected
        self.kinds.update(f"{fault.what} {fault.where} {fault.pattern} {fault.role}" for fault in faults)

    def record(self) -> dict:
        return {**{key: value for key, value in vars(self).items() if key != "kinds"}, "kinds": dict(self.kinds)}


def describe(fault) -> str:
    """An entry of the injector's log in a few words."""
    return f"{fault.what} ({fault.pattern} of the {fault.where}) in {fault.site}, effect {fault.effect:.0e}"
