"""Who is watched on a device: sums that kernels add to, per site, role and shape, and the monitors of its multiprocessors.

Device code only ever adds (triton_kernels/residuals.py); the host reads when a ledger is read anyway, and what lies between two
readings is a batch: nothing is waited for in between, and a run that nobody asks for a report is tested when somebody does. The memory
is never freed, for captured graphs hold its addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from abft import ledger, sites
from abft.statistics import watches
from abft.statistics.accumulators import CAP, COUNT, FIELDS, KINDS, LEVELS, MOST
from abft.statistics.monitor import Sign
from abft.statistics.severity import Budget, Severity
from abft.statistics.unmixing import Shared, unmixed
from abft.statistics.watches import Key

#: Words of a record and levels per kind on a device: residuals.FIELDS and residuals.LEVELS.
RECORD, COUNTED = 16, 5
#: Words of a gate, as weigh.py has them: checks counted, budget left in millionths of a row, rows of S2, S3 and S4.
GATE, LEFT, SEVERITIES = 8, 1, 2
#: Checks of a multiprocessor that make a batch: 64 tiles of 128 rows. Fewer wait for the next reading.
BATCH = 8192
#: Of one device: 64 KB to 200 KB for every site, role and shape.
MOST_BYTES = 256 << 20


class Room(NamedTuple):
    """What kernels add to; fp64, but int32 shares and pairs. None where multiprocessors have no numbers."""

    groups: Tensor  # (groups, kinds, RECORD)
    units: Tensor | None  # (units, kinds, RECORD)
    shares: Tensor | None  # (units, groups)
    pairs: Tensor | None  # (units, units)
    levels: Tensor  # (kinds, COUNTED) fp32: squares of what is counted above, and of the cut


@dataclass(eq=False)
class Watch:
    """A site, role and shape on a device."""

    key: Key
    groups: int
    units: int  # 0: they have no numbers
    tiles: int  # data tiles under a check
    device: torch.device
    issued: float = 0.0  # checks since the last batch, as far as the host knows
    captured: bool = False  # by a graph, whose replays the host does not see
    weighs: bool = False  # rows beyond their bound; else nobody knows how grave they were
    generation: int = field(default_factory=watches.generation)

    def __post_init__(self) -> None:
        self.monitor = watches.monitor_of(self.key, max(1, self.units))
        records = (self.groups + self.units) * len(KINDS) * RECORD
        shared = self.units * (self.groups + self.units)
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            self._memory = torch.zeros(8 * records + 4 * shared, dtype=torch.uint8, device=self.device)
            levels = torch.zeros(len(KINDS), COUNTED, dtype=torch.float32, device=self.device)
            self.gate = torch.zeros(GATE, dtype=torch.int64, device=self.device)
            sums, counts = self._memory[: 8 * records].view(torch.float64), self._memory[8 * records :].view(torch.int32)
        parts = _parts(sums, counts, self.groups, self.units)
        of_units = parts[1:] if self.units else (None, None, None)
        self.room = Room(parts[0], of_units[0], of_units[1], of_units[2], levels)
        self._folded = _Sums(*(np.zeros(part.shape, np.float64 if i < 2 else np.int32) for i, part in enumerate(parts)))
        self._refill()
        self._rescale()

    def restart(self) -> None:
        """Everything was forgotten: begin anew, in the order of the current stream."""
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            self._memory.zero_()
        self._folded = _Sums(*(np.zeros_like(part) for part in self._folded))
        self.monitor, self.generation, self.issued = watches.monitor_of(self.key, max(1, self.units)), watches.generation(), 0.0
        self._refill()
        self._rescale()

    @property
    def due(self) -> bool:
        """Whether a batch may have come together."""
        return self.captured or self.issued * self.tiles >= BATCH * max(1, self.units)

    def fold(self) -> list[Sign]:
        """Compare what was added since the last batch with what is normal. Waits for the device."""
        records = 8 * (self.groups + self.units) * len(KINDS) * RECORD
        memory = ledger.to_host(self._memory)
        sums, counts = memory[:records].view(np.float64), memory[records:].view(np.int32)
        now = _Sums(*(part.copy() for part in _parts(sums, counts, self.groups, self.units)))
        old, self.issued = self._folded, 0.0
        batch = _Sums(*(new - before for new, before in zip(now, old, strict=True)))  # int32 runs over, its differences do not
        checks = batch.groups[:, 0, COUNT].sum()
        if self.monitor is None or checks * self.tiles < BATCH * max(1, self.units):
            self.issued = float(checks)
            return []
        self._folded = now
        self._note_severities()
        for part, whole in ((batch.groups, now.groups), (batch.units, now.units)):
            part[..., MOST] = whole[..., MOST]
        shared = Shared(batch.units[..., : len(FIELDS)], batch.groups[..., : len(FIELDS)], batch.shares, batch.pairs)
        pooled = shared.pooled()
        if self.units:
            batch_of_units, alike = unmixed(shared)
            signs = self.monitor.add(batch_of_units, pooled, alike)
        else:
            signs = self.monitor.add(pooled[None], pooled)
        self._rescale()
        return signs

    def _refill(self) -> None:
        """The whole budget of what may be left as it is; kernels take from it, and refill it by what they check (weigh.py)."""
        self._weighed = np.zeros(3, np.int64)
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            self.gate.zero_()
            self.gate[LEFT] = int(Budget().burst / Budget().rate)

    def _note_severities(self) -> None:
        assert self.monitor is not None
        weighed = ledger.to_host(self.gate)[SEVERITIES : SEVERITIES + 3].copy()
        for severity, rows in zip((Severity.S2, Severity.S3, Severity.S4), weighed - self._weighed, strict=True):
            if rows:
                self.monitor.note(severity, int(rows))
        self._weighed = weighed

    def _rescale(self) -> None:
        if self.monitor is None:
            return
        base = self.monitor.baseline
        sigma, soft = base.sigma * base.drifted, base.soft * base.drifted
        levels = np.stack([*(level * sigma for level in LEVELS), soft, np.sqrt(CAP) * sigma], 1)
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            self.room.levels.copy_(torch.from_numpy(np.square(levels).astype(np.float32)))


class _Sums(NamedTuple):
    groups: np.ndarray
    units: np.ndarray
    shares: np.ndarray
    pairs: np.ndarray


def _parts(sums, counts, groups: int, units: int):  # type: ignore[no-untyped-def]  # of tensors and of arrays
    of_groups, share = groups * len(KINDS) * RECORD, units * groups
    return (
        sums[:of_groups].reshape(groups, len(KINDS), RECORD), sums[of_groups:].reshape(units, len(KINDS), RECORD),
        counts[:share].reshape(units, groups), counts[share:].reshape(units, units),
    )  # fmt: skip


_watches: dict[tuple[Key, int, int], Watch] = {}
_bytes: dict[torch.device, int] = {}


def of(
    site: int, role: str, columns: int, depth: int, dtype: torch.dtype, device: torch.device, *, groups: int, tiles: int, units: int,
    rows: int, capturing: bool, weighs: bool = False,
) -> Watch | None:  # fmt: skip
    """Whom a product of so many ``rows`` adds to. groups, tiles: of its columns, and of a group; units: multiprocessors, 0 if not numbered;
    weighs: whether its kernels weigh rows beyond their bound (weigh.py).

    None, and counted as such, where there is no room, or where the first product of its kind is captured by a graph: its replays
    would clear the sums each time.
    """
    key = (site, sites.site_of(site).tenant, role, columns, depth, dtype, f"{device} kernels")
    watch = _watches.get((key, groups, tiles))
    if watch is None:
        watch = _new(key, groups, tiles, units, device, capturing)
        if watch is None:
            return None
    if watch.generation != watches.generation() and not capturing:
        watch.restart()
    watch.captured |= capturing
    watch.weighs |= weighs
    if watch.monitor is not None:
        watch.monitor.weighs = watch.weighs
    watch.issued += rows * groups
    return watch


def _new(key: Key, groups: int, tiles: int, units: int, device: torch.device, capturing: bool) -> Watch | None:
    size = 8 * (groups + units) * len(KINDS) * RECORD + 4 * units * (groups + units)
    with watches._lock:
        found = _watches.get((key, groups, tiles))
        if found is not None:
            return found
        if capturing:
            ledger.bypass("statistics of a site whose first product was captured by a CUDA graph")
            return None
        if _bytes.get(device, 0) + size > MOST_BYTES:
            ledger.bypass(f"statistics of sites and shapes beyond {MOST_BYTES >> 20} MiB on {device}")
            return None
        _bytes[device] = _bytes.get(device, 0) + size
        _watches[key, groups, tiles] = watch = Watch(key, groups, units, tiles, device)
        return watch


def read(most: int | None = None) -> None:
    """Compare complete batches, of at most so many watches, the largest first; waits for the devices."""
    with watches._lock:
        for watch in _watches.values():
            if watch.generation != watches.generation():
                watch.restart()
        due = sorted((w for w in _watches.values() if w.due), key=lambda w: -w.issued)[:most]
        found = [(watch.key, watch.monitor, watch.fold()) for watch in due]
    for key, monitor, signs in found:
        if monitor is not None:
            watches.tell(key, monitor, signs)
