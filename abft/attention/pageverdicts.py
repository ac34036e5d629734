"""What becomes of suspect rows of an attention over pages: computed again, behind pages that hold again what was written.

The rows of a suspect head of a sequence are computed again, in the same order: explained now, they are RECOMPUTED. Before that the
pages that they read are compared with their fingerprints: one changed element of a token is put back (RECONSTRUCTED, cause "weight": a
page is a right operand that lives in memory, as a weight does), more are UNCORRECTED. Pages that hold what was written, with sums that
are not theirs: FALSE_ALARM, cause "panel", and the sums are built anew.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from abft import bits
from abft.attention import decode
from abft.attention.decode import Computed, Judged, Request
from abft.attention.pages import Mended, mend
from abft.attention.tally import Tally
from abft.ledger import Finding, Verdict

#: Product → where its judgement stands.
_OF = {"S": "qk", "O": "pv"}


def settle(request: Request, tally: Tally, first: Computed) -> Tensor:
    """O (B, H, rows, D), repaired as the policy says; findings go to the tally."""
    suspects = {name: ~_judgement(first, name).fine.numpy() for name, role in _OF.items() if tally.checks(role)}
    for name, wrong in suspects.items():
        ratio = _judgement(first, name).ratio.numpy()[~wrong]
        tally.outcome(name).worst = max(tally.outcome(name).worst, float(np.nan_to_num(ratio).max(initial=0.0)))
    units = np.argwhere(np.any([wrong.any(-1) for wrong in suspects.values()], axis=0)).tolist() if suspects else []
    if not units:
        return first.out
    mended = {(b, h): _mend(request, b, h, tally.repairs) for b, h in units}
    again = decode.attend(request) if tally.repairs else first
    out = first.out.clone()
    poisoned = _poisoned(request)
    for (b, h), found in mended.items():
        # An element that was put back changed every row of the unit, those within their bounds, too.
        rows = np.full(request.rows, tally.repairs and found.restored > 0)
        for name in suspects:
            rows |= suspects[name][b, h]
            tally.outcome(name).executions += tally.repairs
        out[b, h, rows] = again.out[b, h, rows]
        _say(request, tally, (b, h), found, suspects, first, again, poisoned)
    return out


def _judgement(computed: Computed, name: str) -> Judged:
    return computed.qk if name == "S" else computed.pv


def _mend(request: Request, b: int, h: int, write: bool) -> Mended:
    return mend(request.pages, request.table[b][decode.used(request)[b]].long(), h, write)


def _poisoned(request: Request) -> dict[str, np.ndarray]:
    """Product → bool (B, H, rows): rows of which an operand was not finite when it was written."""
    live = decode.used(request)
    page = torch.where(live, request.table, 0).long()
    bad_k, bad_v = (
        ((~t[page].isfinite()).flatten(3).any(-1) & live[:, :, None]).any(1) for t in (request.pages.sums, request.pages.columns)
    )
    scores = (~request.q.isfinite()).any(-1).flatten(2) | bad_k[..., None]
    return {"S": scores.numpy(), "O": (scores | bad_v[..., None]).numpy()}


def _say(
    request: Request, tally: Tally, unit: tuple[int, int], found: Mended, suspects: dict[str, np.ndarray], first: Computed,
    again: Computed, poisoned: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """The verdicts of one head of a sequence. Rows of O whose scores were suspect count with these only, once they are right."""
    b, h = unit
    start = (b * request.pages.heads + h) * request.rows
    any_before = np.any([wrong[b, h] for wrong in suspects.values()], axis=0)
    with_scores = np.zeros(request.rows, bool)
    for name, wrong in suspects.items():
        still = ~_judgement(again, name).fine.numpy()[b, h] & any_before
        rows = wrong[b, h] | (still if tally.repairs else False)
        rows &= ~with_scores | still
        if name == "S":
            with_scores = wrong[b, h]
            tally.outcome(name).weight_faults += found.new
        elif "S" not in suspects:
            tally.outcome(name).weight_faults += found.new
        bad = poisoned[name][b, h]
        _find(tally, name, Verdict.INPUT, rows & still & bad, start, _judgement(first, name), unit)
        rows = rows & ~(still & bad)
        cause = "weight" if found.lost or found.restored else "unknown"
        if not tally.repairs:
            _find(tally, name, tally.only_told, rows, start, _judgement(first, name), unit, cause, found)
            continue
        # Sums that were wrong, and rows that come out the same with right ones: the data never were.
        by_sums = rows & ~still & (bits.same(first.out[unit], again.out[unit]).all(-1).numpy() if found.rebuilt else False)
        verdict, why = (Verdict.RECONSTRUCTED, "weight") if found.restored else (Verdict.RECOMPUTED, "transient")
        _find(tally, name, Verdict.FALSE_ALARM, by_sums, start, _judgement(first, name), unit, "panel")
        _find(tally, name, verdict, rows & ~still & ~by_sums, start, _judgement(first, name), unit, why, found)
        _find(tally, name, Verdict.UNCORRECTED, rows & still, start, _judgement(again, name), unit, cause, found)


def _find(
    tally: Tally, name: str, verdict: Verdict, rows: np.ndarray, start: int, judged: Judged, unit: tuple[int, int], cause: str = "unknown",
    mended: Mended | None = None,
) -> None:  # fmt: skip
    where = np.flatnonzero(rows)
    if not len(where):
        return
    residual, bound, ratio = (t[unit].numpy()[where] for t in (judged.residual, judged.bound, judged.ratio))
    worst = int(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).argmax())
    element = mended.element if mended is not None and cause == "weight" else None
    tally.outcome(name).findings.append(
        Finding(verdict, len(where), start + int(where[worst]), None, float(residual[worst]), float(bound[worst]), cause, element)
    )
