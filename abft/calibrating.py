"""``calibrate``: learn what is normal for a model from batches that are trusted."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from abft import events, reporting, scope
from abft.calibration import Calibration, identity, of_baseline
from abft.errors import CalibrationError
from abft.nn.checked import Checked
from abft.statistics import devices, envelope, watches
from abft.statistics.accumulators import COUNT, MOST
from abft.watching import watch


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None, every: int = 1,
    false_alarm: float = envelope.FALSE_ALARM,
) -> Calibration:  # fmt: skip
    """Run ``model`` over ``batches`` and return what its residuals and outputs look like.

    forward(model, batch): one step, gradients included if it takes them; by default ``model(batch)`` (``model(*batch)`` of a
    tuple or list, ``model(**batch)`` of a mapping) without gradients. every, false_alarm: as in ``abft.watch``. Modules made
    checked by ``abft.protect`` get the detector "both" meanwhile; a site's baseline needs 64 batches of 1024 rows, and where there
    were fewer the site is in ``Calibration.incomplete``. Statistics kept before are forgotten.

    Raises CalibrationError if there is no batch, or if a check found a fault: what is normal cannot be learnt from it.
    """
    checked = [m for m in model.modules() if isinstance(m, Checked)]
    own = [m._abft_policy for m in checked]
    step = forward or _forward
    watches.forget()
    start, count = reporting.mark(), 0
    try:
        for module, policy in zip(checked, own, strict=True):
            module.__dict__["_abft_policy"] = scope.in_force(policy).replace(detector="both")
        with watch(model, every=every, false_alarm=false_alarm) as watcher:
            watcher._learning = False  # from all samples together
            for batch in batches:
                step(model, batch)
                devices.read()  # what lies between two readings is a batch of a baseline
                count += 1
    finally:
        for module, policy in zip(checked, own, strict=True):
            module.__dict__["_abft_policy"] = policy
    if not count:
        raise CalibrationError("calibrate needs at least one batch; got none (an iterator that was used up?)")
    seen = reporting.since(start)
    if seen.detected:
        raise CalibrationError(f"{seen.detected} row(s) disagreed with their checksums during the calibration; repair the cause first")
    sites, incomplete = {}, []
    for key, monitor in watches.monitors().items():
        name, total = watches.name_of(key), monitor.pooled
        if monitor.baseline.frozen:
            sites[name] = of_baseline(monitor.baseline, total[0, COUNT], float(total[:, MOST].max()))
        else:
            incomplete.append(f"{name[0]} ({name[1]}): {total[0, COUNT]:,.0f} rows")
    envelopes = {name: e for name, taken in watcher.samples.items() if (e := envelope.learn(np.array(taken), false_alarm)) is not None}
    incomplete += [f"envelope of {name}: {len(taken)} samples" for name, taken in watcher.samples.items() if name not in envelopes]
    return Calibration(_provenance(model, count), sites, envelopes, tuple(sorted(incomplete)))


def _forward(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, tuple | list):
            model(*batch)
        else:
            model(batch)


def _provenance(model: nn.Module, batches: int) -> dict[str, Any]:
    return identity(model) | {
        "torch": torch.__version__, "batches": batches, "labels": dict(events.labels.get({})),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
