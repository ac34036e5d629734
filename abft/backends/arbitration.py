"""What to do about suspect rows, on a device whose memory the host may read (a CPU): who is wrong, and what is delivered.

    operands not finite                    → INPUT
    beyond the range of the type           → judged again in fp64: clean, OVERFLOW, or still suspect
    few rows                               → recompute; different bits and clean: RECOMPUTED (transient)
    panel's own bits changed               → rebuild it: FALSE_ALARM
    many rows, or the same bits again      → arbitrate: bias and weight against what is remembered of them
        weight changed, elements named     → the product of the restored weight: RECONSTRUCTED
        weight changed, dense, tracked     → STALE: the present weight's product, panel rebuilt
    still suspect                          → an independent fp64 product decides: FALSE_ALARM, or a persistent
                                             unit, whose rows it replaces (RECONSTRUCTED)

At most two recomputations. Nothing is ever written into a weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from abft import bits, checksum, panels, sites, threshold
from abft.backends import reference, tolerance
from abft.backends.call import Call
from abft.backends.reference import Judgement, Plan
from abft.checksum import Layout, Panel, Sums
from abft.ledger import Finding, Outcome, Verdict

RECOMPUTATIONS = 2
#: More suspect rows than this, or an eighth of all: ask who is wrong before computing anything.
MANY_ROWS = 128
#: A memory fault that a tracked weight may be restored from: one element, or a part of one fragment.
FRAGMENT_ROWS, FRAGMENT_COLUMNS = 16, 8
#: Results this close to the largest number of the type may round beyond it.
NEAR_LARGEST = 1.0 - 2.0**-10


#: Elements of a weight, (row, column), or of a bias, (column,), whose bits are not the remembered ones.
Changed = Sequence[tuple[int, ...]]


@dataclass
class Case:
    """One product under suspicion, as it stands."""

    call: Call
    plan: Plan
    y: Tensor
    judgement: Judgement
    panel: Panel
    entry: panels.Entry | None
    bias: tuple[Tensor, Tensor] | None
    compute: Callable[[Call], Tensor]  # a fresh execution
    outcome: Outcome

    def suspects(self) -> np.ndarray:
        return np.flatnonzero(self.judgement.suspects())

    def examine_again(self) -> None:
        self.judgement = self.examine(self.y, self.call)

    def changed(self) -> bool:
        """Whether the bits of the weight or its bias differ from what is remembered."""
        return _changed(self)

    # What depends on the arithmetic; integers have their own (integer.py).

    def examine(self, y: Tensor, call: Call) -> Judgement:
        return reference.examine(y, call, self.panel, self.bias, self.plan)

    def build_panel(self, matrix: Tensor, layout: Layout) -> Panel:
        return reference.build_panel(matrix, layout)

    def explained(self, rows: np.ndarray) -> np.ndarray:
        """bool per row: whether an independent product agrees with what is there."""
        return _judge_exactly(self, rows)[0]

    def independent(self, rows: np.ndarray) -> Tensor:
        """The rows of an independent product, in the result's dtype."""
        return _exact_rows(self, rows).to(self.y.dtype)

    def locate(self, y: Tensor, row: int, group: int) -> int | None:
        """The column of a single error in a suspect row, if one error explains all its sums there."""
        return _locate(self, y, row, group)

    def find(self, verdict: Verdict, rows: np.ndarray, cause: str = "unknown", at: Judgement | None = None, changed: Changed = ()) -> None:
        """Write a finding about ``rows``, with the residual and place of the worst of them."""
        if len(rows):
            self.outcome.findings.append(_finding(verdict, rows, cause, at or self.judgement, self, changed))


@np.errstate(all="ignore")
def settle(case: Case) -> Tensor:
    """Decide about every suspect row; returns what is delivered and leaves the findings in ``case.outcome``."""
    _mend_panel(case)
    left = _set_aside_harmless(case, case.suspects())
    if len(left) == 0:
        if case.entry is not None and not panels.unchanged(case.entry, case.call.w, case.call.bias):
            _settle_hidden_change(case)
        return case.y
    if not _may_repair(case):
        _observe(case, left)
    else:
        left = tolerance.set_aside(case, left)
        if len(left):
            _correct(case, left)
    return case.y


def _mend_panel(case: Case) -> None:
    """A remembered panel whose own bits changed is rebuilt first: it can make rows suspect, or hide that they are."""
    entry = case.entry
    if entry is None or panels.intact(entry) or _changed(case):
        return
    before, suspects = case.judgement, case.suspects()
    panels.rebuild(entry, case.call.w, entry.validity, case.build_panel)
    case.examine_again()
    cleared = np.setdiff1d(suspects, case.suspects())
    if len(cleared):
        case.find(Verdict.FALSE_ALARM, cleared, "panel", at=before)
    else:
        case.outcome.findings.append(Finding(Verdict.FALSE_ALARM, 0, 0, None, float("nan"), 0.0, "panel"))


# --- rows that are no faults ----------------------------------------------------------------------


def _set_aside_harmless(case: Case, rows: np.ndarray) -> np.ndarray:
    """Remove rows whose operands were not finite, or whose values only outran the arithmetic of the check."""
    call = case.call
    if len(rows) == 0:
        return rows
    finite_row = _flat(torch.isfinite(call.a).all(-1))[rows]
    if not _weight_is_finite(case):
        finite_row = np.zeros_like(finite_row)
    case.find(Verdict.INPUT, rows[~finite_row])
    rows = rows[finite_row]
    j = case.judgement
    with np.errstate(all="ignore"):
        unjudgeable = ~(np.isfinite(j.tau) & np.isfinite(j.sums.actual) & np.isfinite(j.sums.predicted)).all((-1, -2))[rows]
    outran = rows[unjudgeable]
    if len(outran) == 0 or _changed(case):
        # A weight that changed in memory may well overflow: that is no property of the model.
        return rows
    fine, overflowed = _judge_exactly(case, outran)
    case.find(Verdict.OVERFLOW, outran[fine & overflowed])
    _find_failed_checks(case, outran[fine & ~overflowed])
    return np.setdiff1d(rows, outran[fine])


def _find_failed_checks(case: Case, rows: np.ndarray) -> None:
    """Of rows that are right: those whose check went wrong itself, for a second one is content."""
    if len(rows):
        again = case.examine(case.y, case.call).suspects()
        case.find(Verdict.RECOMPUTED if _may_repair(case) else _only_told(case), rows[~again[rows]], "transient")


def _weight_is_finite(case: Case) -> bool:
    """Whether W and the bias are finite, or became infinite only after their panel was built (a fault, not an input)."""
    w, bias = case.call.w, case.call.bias
    if bias is not None and not _all(torch.isfinite(bias)):
        return len(_changed_bias(case)) > 0
    return _all(torch.isfinite(w)) or _changed(case)


def _judge_exactly(case: Case, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(explained, overflowed) per row, against an independent fp64 product of those rows."""
    y, exact, reach = _rows(case.y, rows), _exact_rows(case, rows), _reach_rows(case, rows)
    largest, accumulator = torch.finfo(case.y.dtype).max, torch.finfo(case.plan.arithmetic.dtype).max
    beyond = ~torch.isfinite(y) & ((exact.abs() >= largest * NEAR_LARGEST) | (reach >= accumulator / 2))
    y = torch.where(beyond, exact, y.double())
    s = _exact_sums(case, y, exact, rows)
    coefficients = threshold.coefficients(case.plan.arithmetic, case.call.a.shape[-1], s.kinds, case.plan.layout.groups.width)
    with np.errstate(all="ignore"):
        explained = ~threshold.suspect(s, threshold.bounds(s, coefficients), np.inf).any((-1, -2))
    return explained, _flat(beyond.any(-1))


def _exact_sums(case: Case, y: Tensor, exact: Tensor, rows: np.ndarray) -> Sums:
    groups, kinds = case.plan.layout.groups, case.plan.layout.form.kinds
    actual, squares = checksum.actual_sums(y, groups, kinds, torch.float64)
    predicted, _ = checksum.actual_sums(exact, groups, kinds, torch.float64)
    # The uncancelled norm, exactly: Σ_k x_k² Σ_n W², from the reach of the row's elements.
    noise2 = checksum.actual_sums(_reach_rows(case, rows), groups, ("e",), torch.float64)[1] / max(case.call.a.shape[-1], 1)
    return Sums(kinds, actual.numpy(), predicted.numpy(), squares.numpy(), noise2.numpy())


def _exact_rows(case: Case, rows: np.ndarray) -> Tensor:
    return _product64(case, rows, lambda t: t.double())


def _reach_rows(case: Case, rows: np.ndarray) -> Tensor:
    """Σ_k |a_k| |w_k|: what partial sums of an element can reach."""
    return _product64(case, rows, lambda t: t.double().abs())


def _product64(case: Case, rows: np.ndarray, of: Callable[[Tensor], Tensor]) -> Tensor:
    call = case.call
    if call.a.dim() == 2:
        out = of(call.a[torch.from_numpy(rows)]) @ of(call.w).mT
    else:
        batch, row = rows // call.a.shape[1], rows % call.a.shape[1]
        out = torch.stack([of(call.a[int(b), int(r)]) @ of(call.w[int(b)]).mT for b, r in zip(batch, row, strict=True)])
    return out if call.bias is None else out + of(call.bias)


# --- faults ---------------------------------------------------------------------------------------


def _may_repair(case: Case) -> bool:
    return case.call.policy.level == "correct" and case.call.policy.timing == "immediate"


def _only_told(case: Case) -> Verdict:
    """What a wrong row is that nobody repairs: the policy's wish, or left to the caller, who was to read it long ago."""
    return Verdict.OBSERVED if case.call.policy.level == "detect" else Verdict.UNCORRECTED


def _observe(case: Case, rows: np.ndarray) -> None:
    """Level detect and deferred timing: say what is wrong, change nothing but a stale or broken panel."""
    before = case.judgement
    cause = _arbitrate(case, rows, repair=False)
    rows = _still_wrong(case, rows) if cause == "stale" else rows
    case.find(_only_told(case), rows, "weight" if cause == "weight" else "unknown", at=before)


def _correct(case: Case, rows: np.ndarray) -> None:
    arbitrated = False
    if len(rows) > max(MANY_ROWS, case.call.rows // 8):
        arbitrated = True
        _arbitrate(case, rows, repair=True)
        rows = _still_wrong(case, rows)
    for _ in range(RECOMPUTATIONS):
        if len(rows) == 0:
            return
        before, old = case.judgement, case.y
        case.y = case.compute(case.call)
        case.outcome.executions += 1
        case.examine_again()
        repeated = _flat(bits.same(_rows(old, rows), _rows(case.y, rows)).all(-1))
        left = _set_aside_known(case)
        still = np.intersect1d(rows, left)
        # Other rows that the fresh execution got wrong are not forgotten either.
        new = np.setdiff1d(left, rows)
        done = np.setdiff1d(rows, still)
        case.find(Verdict.RECOMPUTED, done, "transient", at=before)
        if len(still) and not arbitrated and repeated[np.isin(rows, still)].any():
            arbitrated = True
            _arbitrate(case, still, repair=True)
            still = _still_wrong(case, still)
        rows = np.union1d(still, new)
        if len(rows) and repeated.all():
            break
    if len(rows):
        _replace_by_independent(case, rows)


def _set_aside_known(case: Case) -> np.ndarray:
    """Suspect rows now, less those already judged harmless (INPUT, OVERFLOW repeat identically)."""
    rows = case.suspects()
    if len(rows) == 0:
        return rows
    quiet = replace(case, outcome=Outcome())
    return _set_aside_harmless(quiet, rows)


def _still_wrong(case: Case, rows: np.ndarray) -> np.ndarray:
    # Not merely suspect: rows whose squares overflow are so however right they are.
    return np.intersect1d(rows, _set_aside_known(case))


def _replace_by_independent(case: Case, rows: np.ndarray) -> None:
    """The same bits, and still suspect, though neither weight nor panel changed: fp64 decides who is wrong."""
    explained = case.explained(rows)
    case.find(Verdict.FALSE_ALARM, rows[explained])
    wrong = rows[~explained]
    if len(wrong) == 0:
        return
    if _changed(case):
        # The operand itself can no longer be trusted, so no product of it can be either.
        case.find(Verdict.UNCORRECTED, wrong, "weight")
        return
    before = case.judgement
    case.y = _with_rows(case.y, wrong, case.independent(wrong))
    case.outcome.executions += 1
    case.examine_again()
    still = _still_wrong(case, wrong)
    case.find(Verdict.RECONSTRUCTED, np.setdiff1d(wrong, still), "persistent", at=before)
    case.find(Verdict.UNCORRECTED, still, "persistent", at=before)


# --- who is wrong: bias, panel or weight ------------------------------------------------------------


def _changed(case: Case) -> bool:
    """Whether the bits of the weight or its bias differ from what is remembered."""
    if case.entry is None or case.entry.fingerprint is None:
        return False
    if len(_changed_bias(case)):
        return True
    return _any(bits.changed_columns(bits.fingerprint(case.call.w), case.entry.fingerprint))


def _changed_bias(case: Case) -> np.ndarray:
    """Columns in which the bias is not the remembered one."""
    kept = None if case.entry is None else case.entry.bias
    if kept is None or case.call.bias is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(~bits.same(case.call.bias, kept.values).numpy())


def _arbitrate(case: Case, rows: np.ndarray, *, repair: bool) -> str:
    """Compare weight and bias with what is remembered of them; mend what can be mended. Returns who was wrong."""
    change = _change(case)
    if change is None:
        case.examine_again()
        return "unknown"
    y = judgement = None
    if change.restored is not None and (case.call.policy.weights == "frozen" or change.is_small):
        y = case.compute(change.restored)
        case.outcome.executions += 1
        judgement = case.examine(y, change.restored)
        # Many changes together may look like one; what they leave in the checksums does not.
        if judgement.suspects()[rows].any() or (judgement.suspects() & ~case.judgement.suspects()).any():
            if _has_the_remembered_panel(case, change.restored.w):
                judgement = _nothing_suspect(judgement)  # the rows outrun the arithmetic of the checks
            else:
                y = None
    if y is None and case.call.policy.weights == "tracked":
        _accept_edit(case, rows)
        return "stale"
    change.count(case, located=y is not None)
    if not repair:
        return "weight"
    before = case.judgement
    if y is None or judgement is None:
        # Which numbers were there cannot be told: deliver the present product, and say so.
        case.judgement = _nothing_suspect(case.judgement)
        case.find(Verdict.UNCORRECTED, rows, "weight", at=before)
    else:
        case.y, case.judgement = y, judgement
        case.find(Verdict.RECONSTRUCTED, np.setdiff1d(rows, case.suspects()), "weight", at=before, changed=change.elements)
    return "weight"


def _settle_hidden_change(case: Case) -> None:
    """A frozen weight that changed by less than its rounded product shows: rows whose bits differ were wrong."""
    change = _change(case)
    if change is None:
        return
    y = None if change.restored is None else case.compute(change.restored)
    if y is not None and case.examine(y, case.call).suspects().any():
        assert change.restored is not None
        y = y if _has_the_remembered_panel(case, change.restored.w) else None
    change.count(case, located=y is not None)
    rows = np.arange(case.call.rows) if y is None else np.flatnonzero(~_flat(bits.same(case.y, y).all(-1)))
    if not _may_repair(case):
        case.find(_only_told(case), rows, "weight", changed=change.elements)
    elif y is None:
        case.find(Verdict.UNCORRECTED, rows, "weight")
    else:
        case.find(Verdict.RECONSTRUCTED, rows, "weight", changed=change.elements)
        case.y = y
        case.outcome.executions += 1


def _has_the_remembered_panel(case: Case, w: Tensor) -> bool:
    built = case.build_panel(w, case.plan.layout)
    return _all(bits.same(built.columns, case.panel.columns))


@dataclass(frozen=True)
class Change:
    """How a weight and its bias differ from what is remembered of them."""

    now: bits.Fingerprint
    in_weight: Changed  # in the weight's own coordinates, also where the product sees its transpose
    in_bias: Changed
    restored: Call | None  # the call with both as remembered; None: which elements changed cannot be told
    is_small: bool  # as a memory fault would be

    @property
    def elements(self) -> Changed:
        return [*self.in_weight, *self.in_bias]

    def count(self, case: Case, *, located: bool) -> None:
        """Count the changed elements that nobody has counted yet."""
        entry = case.entry
        assert entry is not None
        in_weight = self.in_weight if located else [_summary(self.now)]
        case.outcome.weight_faults += entry.history.new_faults(entry.validity, in_weight)
        if located and entry.bias is not None:
            case.outcome.weight_faults += entry.bias.owner.history.new_faults(entry.bias.validity, self.in_bias)


def _change(case: Case) -> Change | None:
    entry, call = case.entry, case.call
    if entry is None or entry.fingerprint is None:
        return None
    now = bits.fingerprint(call.w)
    in_bias = [(int(n),) for n in _changed_bias(case)]
    if not in_bias and not _any(bits.changed_columns(now, entry.fingerprint)):
        return None
    elements = bits.changed_elements(call.w, now, entry.fingerprint)
    in_weight = [(e.column, e.row) if call.transposed else (e.row, e.column) for e in elements or ()]
    restored = None
    if elements is not None:
        w = bits.restored(call.w, elements) if elements else call.w
        restored = replace(call, w=w, bias=entry.bias.values if in_bias and entry.bias is not None else call.bias)
    size = 1 if call.bias is None else call.bias.numel()
    is_small = _fits_fragment(in_weight, call.w.numel()) and _fits_fragment(in_bias, size)
    return Change(now, in_weight, in_bias, restored, is_small)


def _summary(now: bits.Fingerprint) -> tuple[int, ...]:
    """One state of a weight whose changed elements cannot be named, to be counted once."""
    return -1, int(now.plain.numpy().sum(dtype=np.int64)), int(now.weighted.numpy().sum(dtype=np.int64))


def _fits_fragment(changed: Changed, of: int) -> bool:
    """Whether a memory fault would leave such changes: within one fragment, and no more than half of the ``of`` elements."""
    fragments = {(e[0] // FRAGMENT_ROWS, e[-1] // FRAGMENT_COLUMNS if len(e) > 1 else 0) for e in changed}
    return len(fragments) <= 1 and 2 * len(changed) <= of


def _accept_edit(case: Case, rows: np.ndarray) -> None:
    """The weight changed on purpose, unannounced: what was computed is the present weight's product."""
    entry, before = case.entry, case.judgement
    assert entry is not None
    bias = entry.bias
    panels.rebuild(entry, case.call.w, entry.validity, case.build_panel)
    if bias is not None and case.call.bias is not None:
        panels.remember_bias(entry, bias.owner, bias.validity, case.call.bias)
    if case.call.bias is not None:
        case.bias = checksum.bias_sums(case.call.bias, case.plan.layout)
    case.examine_again()
    left = _set_aside_harmless(case, case.suspects())  # what the present weight itself does: INPUT, OVERFLOW
    case.find(Verdict.STALE, np.setdiff1d(rows, left), "weight", at=before)
    if case.call.site not in entry.history.warned_sites:
        entry.history.warned_sites.add(case.call.site)
        warnings.warn(
            f"abft: the weight or bias at {sites.site_of(case.call.site).name} changed without an announcement abft can see "
            "(a write through .data, numpy or a custom kernel); its panel was rebuilt. Call abft.refresh(model) after such writes.",
            stacklevel=2,
        )


def _nothing_suspect(j: Judgement) -> Judgement:
    zero = np.zeros_like(j.tau)
    return replace(j, tau=zero + 1.0, sums=replace(j.sums, actual=zero, predicted=zero))  # type: ignore[arg-type]


# --- findings ---------------------------------------------------------------------------------------


def _finding(verdict: Verdict, rows: np.ndarray, cause: str, j: Judgement, case: Case, changed: Changed) -> Finding:
    with np.errstate(all="ignore"):
        residual = abs(j.sums.actual[rows] - j.sums.predicted[rows])
        ratio = np.where(residual == 0, 0.0, np.nan_to_num(residual / j.tau[rows], nan=np.inf))  # a bound may be zero
    r, g, kind = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    row = int(rows[r])
    d = j.sums.actual[row, g, kind] - j.sums.predicted[row, g, kind]
    element = changed[0] if len(changed) == 1 else None
    col = None
    if element is not None:
        col = element[-1] if case.call.transposed and len(element) > 1 else element[0]
    elif verdict is Verdict.RECOMPUTED:
        # The repetition tells exactly what the sums only estimate: which elements were wrong.
        moved = np.flatnonzero(~bits.same(_rows(j.y, rows[r : r + 1]), _rows(case.y, rows[r : r + 1])).numpy())
        col = int(moved[0]) if len(moved) == 1 else None
    elif verdict not in (Verdict.INPUT, Verdict.OVERFLOW, Verdict.STALE):
        col = case.locate(j.y, row, int(g))
    return Finding(verdict, len(rows), row, col, float(d), float(j.tau[row, g, kind]), cause, element)


def _locate(case: Case, y: Tensor, row: int, group: int) -> int | None:
    """The column of a single error in a suspect row, if one error explains all its sums there."""
    plan = case.plan
    if plan.layout.form.kinds != checksum.FULL.kinds:
        return None
    everything = replace(plan, tested=plan.layout.form.kinds)
    if case.call.a.dim() == 2:
        one, a, panel = y[row : row + 1], case.call.a[row : row + 1], case.panel
    else:
        b, r = divmod(row, case.call.a.shape[1])
        one, a = y[b, r : r + 1], case.call.a[b, r : r + 1]
        scales = None if case.panel.scales is None else case.panel.scales[b]
        panel = checksum.Panel(case.panel.layout, case.panel.columns[b], scales)
    # What is not finite, or whose square is not, has no ratio of residuals; alone in its row it needs none.
    limit = float(np.sqrt(torch.finfo(plan.sum_dtype).max)) / 2
    wild = np.flatnonzero(~(np.abs(one.double().numpy().ravel()) < limit))
    if len(wild) == 1:
        return int(wild[0])
    j = reference.judge(one, reference.sums(one, a, panel, case.bias, everything), a.shape[-1], everything)
    d = (j.sums.actual - j.sums.predicted)[0, group].astype(np.float64)
    start, stop = plan.layout.groups.span(group)
    column = checksum.locate(d[0], d[2], d[3], float(j.tau[0, group, 0]), stop - start, rounded=plan.rounded)
    return None if column is None else start + column


def _rows(y: Tensor, rows: np.ndarray) -> Tensor:
    return y.reshape(-1, y.shape[-1])[torch.from_numpy(rows)]


def _with_rows(y: Tensor, rows: np.ndarray, values: Tensor) -> Tensor:
    out = y.clone()
    out.view(-1, y.shape[-1])[torch.from_numpy(rows)] = values
    return out


# Reading host memory: numpy, because nothing in this package may call Tensor.item or bool(tensor),
# which on another device would wait for it.


def _flat(mask: Tensor) -> np.ndarray:
    return mask.reshape(-1).numpy()


def _any(mask: Tensor) -> bool:
    return bool(mask.numpy().any())


def _all(mask: Tensor) -> bool:
    return bool(mask.numpy().all())
