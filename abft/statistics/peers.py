"""Units that compute the same products, held against each other: data-parallel ranks, or replicas of a model in one process.

    of every site, role and shape that all units have:   what each has summed since the last comparison → Monitor(units)

What data and weights do to residuals is common to peers and falls out, so a bias of 0.1 σ shows that a unit alone could not tell
from its data, and the unit that stands alone is the one to blame (docs/explanation/statistics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from abft.statistics import watches
from abft.statistics.accumulators import COUNT, MOST
from abft.statistics.baseline import BATCH, WARM_UP, Baseline
from abft.statistics.monitor import Monitor
from abft.statistics.watches import Alarm, Name

#: Two units differ, and nobody can say which of them is wrong.
FEWEST = 3


@dataclass(frozen=True)
class Outlier:
    """A unit that its peers disagree with.

    unit: its number. name. alarm: the test that found it (also in ``Report.alarms``). began: the comparison, counted from
    0, with which the sum that alarmed left zero: the estimate of when the unit changed, so that a caller may go back to before it.
    """

    unit: int
    name: str
    alarm: Alarm
    began: int


class Peers:
    """Compare the residuals of several units; ``detector="both"`` or ``"statistical"`` must be in force in all of them.

    units: names of replicas protected in this process, ``abft.protect(replica, policy, name=NAME)``; or None for the ranks of
    ``group`` (the default group if None too), which must all call ``compare`` together and all learn the same. warm_up: comparisons
    from which is learnt by how much units differ; none of them alarms. A site is compared when each unit has added at
    least 1,024 residuals there. Detects what sets one unit apart: a bias or more noise, which ask for its quarantine, and more outliers,
    which do not: units have data of their own, and a few unusual rows are a unit's own as well. Does not see what all units have
    in common, nor what was there during the warm-up, nor products of a GPU's kernels. Raises ValueError for fewer than three units.
    """

    def __init__(self, units: Sequence[str] | None = None, *, group: dist.ProcessGroup | None = None, warm_up: int = WARM_UP) -> None:
        if units is not None and group is not None:
            raise ValueError("Peers takes the names of replicas in this process, or a group of ranks; got both")
        self.names = [f"rank {rank}" for rank in range(dist.get_world_size(group))] if units is None else list(units)
        if len(set(self.names)) != len(self.names) or len(self.names) < FEWEST:
            raise ValueError(f"Peers needs at least {FEWEST} units of different names, or nobody can say which is wrong; got {self.names}")
        self._replicas, self._group, self._warm_up = units is not None, group, warm_up
        self._monitors: dict[Name, Monitor] = {}
        self._seen: dict[Name, np.ndarray] = {}
        self._when: dict[Name, list[int]] = {}  # which comparison each tested batch belongs to
        self.comparisons = 0

    def compare(self) -> list[Outlier]:
        """Take what was added since the last time; the units that stand out, one entry per site and test that says so."""
        sums, found = self._sums(), []
        for name in sorted(set.intersection(*(set(mine) for mine in sums))):
            now = np.stack([mine[name] for mine in sums])
            batch = now - self._seen.get(name, 0.0)
            if (batch[:, 0, COUNT] < 0).any():  # everything was forgotten meanwhile
                self._seen[name] = now
            elif (batch[:, 0, COUNT] >= BATCH).all():
                batch[..., MOST] = now[..., MOST]
                self._seen[name] = now
                found += self._test(name, batch)
        self.comparisons += 1
        return found

    def _test(self, name: Name, batch: np.ndarray) -> list[Outlier]:
        monitor = self._monitors.get(name)
        if monitor is None:
            monitor = self._monitors[name] = Monitor(len(self.names), Baseline(len(self.names), warm_up=self._warm_up))
        if monitor.baseline.frozen:
            self._when.setdefault(name, []).append(self.comparisons)
        site, role, columns, depth, dtype = name
        found = []
        for sign in monitor.add(batch):
            if monitor.is_news(sign):
                quarantine = sign.quarantine and sign.test != "outliers"
                of = f"{dtype}, N={columns}, K={depth}; {self.names[sign.unit]}, beside {len(self.names) - 1} peers"
                alarm = watches.raise_alarm(site, role, sign.test, sign.deviation, quarantine, sign.checks, unit=sign.unit, of=of)
                began = max(int(chart.began[sign.unit]) for chart in monitor.charts(sign.test))
                found.append(Outlier(sign.unit, self.names[sign.unit], alarm, self._when[name][began]))
        return found

    @property
    def warm(self) -> bool:
        """Whether every site that was compared has been learnt."""
        return bool(self._monitors) and all(monitor.baseline.frozen for monitor in self._monitors.values())

    def levels(self, test: str = "bias") -> np.ndarray:
        """Of every unit (units,) the highest sum of a test over all sites, of its threshold: 1 is an alarm."""
        charts = [chart for monitor in self._monitors.values() for chart in monitor.charts(test)]
        return np.max([chart.levels / chart.threshold for chart in charts], axis=0) if charts else np.zeros(len(self.names))

    def _sums(self) -> list[Mapping[Name, np.ndarray]]:
        mine = _sums()
        if self._replicas:
            return [_of_replica(mine, name + ".") for name in self.names]
        gathered: list[Any] = [None] * len(self.names)
        dist.all_gather_object(gathered, mine, group=self._group)
        return gathered


def _sums() -> dict[Name, np.ndarray]:
    """Of every site, role and shape of this process the sums (kinds, fields) of completed batches."""
    out: dict[Name, np.ndarray] = {}
    for key, monitor in watches.monitors().items():
        if monitor.units == 1:  # a device's multiprocessors are peers of their own
            name, total = watches.name_of(key), monitor.total[0].copy()
            before = out.get(name)
            if before is not None:  # of a module that had this name before
                most = np.maximum(before[:, MOST], total[:, MOST])
                total += before
                total[:, MOST] = most
            out[name] = total
    return out


def _of_replica(sums: Mapping[Name, np.ndarray], prefix: str) -> dict[Name, np.ndarray]:
    return {(name[0][len(prefix) :], *name[1:]): total for name, total in sums.items() if name[0].startswith(prefix)}
