"""What the second detector has to do with one product: whom it adds to, and which suspect rows it lets be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from abft import checksum
from abft.backends.call import Call
from abft.backends.reference import Judgement
from abft.ledger import Verdict
from abft.statistics import watches
from abft.statistics.accumulators import COUNT
from abft.statistics.severity import Severity, of_suspect

if TYPE_CHECKING:
    from abft.backends.arbitration import Case


#: Fragments on either side of where an error was located in which it may lie.
NEAR = 4


def watch_of(call: Call) -> watches.Watch | None:
    """Whom a product adds to, if its policy asks for statistics."""
    if call.policy.detector == "checksum" or not call.a.dtype.is_floating_point:
        return None
    return watches.of(call.site, call.role, call.w.shape[-2], call.a.shape[-1], call.a.dtype)


def within_bounds(j: Judgement) -> NDArray[np.float64]:
    """Residual over bound (rows, groups, kinds) of the rows within theirs; the others are the checksums' business."""
    with np.errstate(all="ignore"):
        x = (j.sums.actual.astype(np.float64) - j.sums.predicted) / j.tau  # type: ignore[union-attr]
    return x[~j.suspects()]


def set_aside(case: Case, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Weigh suspect rows; under ``detector="statistical"`` one that harms nobody is left as it is. Returns those to be repaired.

    Only the one suspect row of a product is ever left, only if one located element explains all its sums, if weight and panel are
    what they were, and while the site's budget lasts (abft/statistics/severity.py).
    """
    watch = watch_of(case.call)
    if watch is None:
        return rows
    monitor = watch.monitor
    if len(rows) > 1 or case.changed():
        monitor.note(Severity.S4 if len(rows) > 1 else Severity.S3, len(rows))
        return rows
    severity = _severity(case, int(rows[0]))
    monitor.note(severity)
    if severity is not Severity.S2 or case.call.policy.detector != "statistical":
        return rows
    if not monitor.budget.take(float(monitor.pooled[0, COUNT])):
        return rows
    case.find(Verdict.TOLERATED, rows)
    return rows[:0]


def _severity(case: Case, row: int) -> Severity:
    j = case.judgement
    residual = j.sums.actual[row].astype(np.float64) - j.sums.predicted[row]
    bound = j.tau[row].astype(np.float64)
    beyond = np.flatnonzero((np.abs(residual) > bound).any(-1))
    column = case.locate(case.y, row, int(beyond[0])) if len(beyond) == 1 else None
    # What is weighted by a column's place tells where, and e and one how much: a single error weighs 1 in both.
    kinds = [i for i, kind in enumerate(j.sums.kinds) if kind in ("e", "one")]
    error = float("nan")
    if column is not None:
        # Of an error near its bound hi tells the place only nearly; lo does.
        start, stop = case.plan.layout.groups.span(int(beyond[0]))
        near = range(column - NEAR * checksum.FRAGMENT, column + NEAR * checksum.FRAGMENT + 1, checksum.FRAGMENT)
        errors = [_error_at(case, row, n) for n in near if start <= n < stop]
        error = min(errors, key=lambda e: abs(abs(e) - abs(residual[beyond[0], kinds[0]])))
    return of_suspect(residual[:, kinds], bound[:, kinds], error, float(j.sums.squares[row].astype(np.float64).sum()))


def _error_at(case: Case, row: int, column: int) -> float:
    """What one element is off by, from its fp64 product: the only way to know that the sums are not those of several others."""
    call, y = case.call, case.y
    bias = 0.0 if call.bias is None else call.bias[column].double()
    if call.a.dim() == 2:
        error = y[row, column].double() - (torch.dot(call.a[row].double(), call.w[column].double()) + bias)
    else:
        batch, r = divmod(row, call.a.shape[1])
        error = y[batch, r, column].double() - (torch.dot(call.a[batch, r].double(), call.w[batch, column].double()) + bias)
    return float(error.numpy())
