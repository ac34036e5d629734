"""``reference`` and ``vendor`` on a device the host must not wait for: every branch is a mask.

The same sums and bounds as on a CPU, but decisions are arithmetic: under level "correct" the product is *always* computed a
second time, and rows that were suspect take the second result. That doubles the work, and is the price of a repair without a
host decision and without a kernel of our own; the ``triton`` backend recomputes only what is wrong. Under timing "deferred" nothing is
computed again: rows are judged at once, in the same launches, and what is wrong is UNCORRECTED.
Of a changed weight this path says UNCORRECTED (or STALE is not told from it): arbitration needs the host or the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from abft import checksum, floating, ledger, panels, sites, threshold
from abft.backends import reference
from abft.backends.call import Call
from abft.backends.reference import Plan
from abft.checksum import FORMS, Groups, Layout, Panel, Sums
from abft.errors import DeviceError
from abft.faults import Strike, strike_checksums
from abft.ledger import COUNTER, COUNTERS, HEAD, HEADER, RECORD, RECORD_NAMES, RING, WORST, Verdict

GROUP = 512


def product(call: Call, words: Tensor, site: Tensor, backend: str) -> Tensor:
    """The product, judged and repaired without a host decision; counts and one record go into ``words``."""
    if call.policy.level == "off" or call.role not in call.policy.roles:
        return reference.execute(call, call.strikes)
    p = plan_for(call, fused=backend == "reference")
    panel, bias = panel_of(call, p), None
    for strike in call.strikes:
        if strike.place == "panel":
            strike.hit(panel.columns)
    y, wide = _execute(call, p, struck=True)
    s = _sums(wide, call, panel, bias, p, call.strikes)
    tau = _bounds(s, call, p)
    bad = threshold.suspect(s, tau, p.arithmetic.largest).any(-1).any(-1)
    finite = torch.isfinite(call.a).all(-1) & torch.isfinite(call.w).all()
    verdicts = {Verdict.INPUT: bad & ~finite}
    bad = bad & finite
    if call.policy.level == "detect":
        verdicts[Verdict.OBSERVED] = bad
    elif call.policy.timing == "deferred":
        verdicts[Verdict.UNCORRECTED] = bad
    else:
        again, wide_again = _execute(call, p, struck=False)
        s2 = _sums(wide_again, call, panel, bias, p)
        still = threshold.suspect(s2, _bounds(s2, call, p), p.arithmetic.largest).any(-1).any(-1)
        beyond = still & ~torch.isfinite(wide_again).all(-1)
        verdicts |= {
            Verdict.RECOMPUTED: bad & ~still,
            Verdict.OVERFLOW: bad & beyond,
            Verdict.UNCORRECTED: bad & still & ~beyond,
        }
        y = torch.where(bad.unsqueeze(-1), again, y)
    write(words, site, call, backend, s, tau, verdicts)
    return y


@lru_cache(maxsize=8192)
def plan(n: int, k: int, dtype: torch.dtype, form: str, group: int | None, fused: bool, capability: tuple[int, int]) -> Plan:
    """fused: sums are taken from fp32 accumulators before rounding; else from the delivered result."""
    wide = floating.ACCUMULATOR[dtype]
    if dtype in (torch.float16, torch.bfloat16):
        arithmetic = threshold.HOPPER_16 if capability >= (9, 0) else threshold.AMPERE_16
    else:
        arithmetic = threshold.FMA_64 if wide == torch.float64 else threshold.FMA_32
    if not fused:
        arithmetic = threshold.rounded(arithmetic, dtype)
    narrow = arithmetic.output_roundoff > 0
    groups = Groups.near_equal(n, group or (reference.ROUNDED_GROUP if narrow else GROUP))
    layout = Layout(groups, FORMS[form], dtype, floating.PARTS[dtype])
    return Plan(arithmetic, layout, FORMS[form].kinds, wide)


def plan_for(call: Call, *, fused: bool) -> Plan:
    device = call.a.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    if device.type == "cuda" and call.a.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        raise DeviceError(
            "torch.backends.cuda.matmul.allow_tf32 is on: the reference and vendor backends judge fp32 products "
            "as IEEE fp32, which TF32 is not. "
            'Use backend="triton", or switch TF32 off.'
        )
    return plan(call.w.shape[-2], call.a.shape[-1], call.a.dtype, call.policy.panel, call.policy.group, fused, capability)


def panel_of(call: Call, p: Plan) -> Panel:
    """The panel of a call's W, remembered if W is a weight."""
    if call.source is None:
        return reference.build_panel(call.w, p.layout)
    frozen = call.policy.weights == "frozen"
    return panels.entry_for(call.source, call.w, p.layout, transposed=call.transposed, frozen=frozen, build=reference.build_panel).panel


def _execute(call: Call, p: Plan, *, struck: bool) -> tuple[Tensor, Tensor]:
    """(result, what is judged): the fp32 accumulators before bias and rounding where the product is fused, else the result."""
    strikes = call.strikes if struck else ()
    if p.rounded or call.a.dtype == p.sum_dtype:
        y = reference.execute(call, strikes)
        return y, y
    wide = _wide_product(call.a, call.w)
    return _finish(wide, call, strikes), wide


def _finish(wide: Tensor, call: Call, strikes: tuple[Strike, ...]) -> Tensor:
    """The result of accumulators: struck in place, then the bias, then one rounding."""
    reference.strike_accumulators(wide, replace(call, bias=None), strikes)
    y = (wide if call.bias is None else wide + call.bias).to(call.a.dtype)
    reference.strike_output(y, strikes)
    return y


def execute_fused(call: Call, strikes: tuple[Strike, ...] = ()) -> Tensor:
    """The result of a fused kernel: struck in its fp32 accumulators, then rounded once."""
    return _execute(replace(call, strikes=strikes), plan_for(call, fused=True), struck=True)[0]


def execute_in_kernel(call: Call, strikes: tuple[Strike, ...] = ()) -> Tensor:
    """The result of our own kernels, which add the bias to what was struck, in every precision."""
    half = call.a.dtype in (torch.float16, torch.bfloat16)
    return _finish(_wide_product(call.a, call.w) if half else torch.matmul(call.a, call.w.mT), call, strikes)


def _wide_product(a: Tensor, w: Tensor) -> Tensor:
    """A Wᵀ of half-precision operands, accumulated and returned in fp32."""
    if a.device.type != "cuda":
        return torch.matmul(a.float(), w.float().mT)
    return torch.mm(a, w.mT, out_dtype=torch.float32) if a.dim() == 2 else torch.bmm(a, w.mT, out_dtype=torch.float32)


def _sums(judged: Tensor, call: Call, panel: Panel, bias: None, p: Plan, strikes: tuple[Strike, ...] = ()) -> Sums:
    actual, squares = checksum.actual_sums(judged, p.layout.groups, p.tested, p.sum_dtype)
    columns = panel.columns
    raw = _wide_product(call.a, columns) if call.a.dtype != p.sum_dtype else torch.matmul(call.a, columns.mT)
    strike_checksums(raw, strikes)
    predicted, noise2 = checksum.predicted_sums(raw, panel)
    predicted = predicted[..., : len(p.tested)]
    # In a fused half-precision product the sums are taken before the bias; elsewhere the result holds it.
    holds_bias = call.bias is not None and (p.rounded or call.a.dtype == p.sum_dtype)
    if holds_bias:
        assert call.bias is not None
        c, extra = checksum.bias_sums(call.bias, p.layout)
        predicted, noise2 = predicted + c[:, : len(p.tested)], noise2 + extra
    return Sums(p.tested, actual, predicted, squares, noise2)


def _bounds(s: Sums, call: Call, p: Plan) -> Tensor:
    return threshold.bounds(s, threshold.coefficients(p.arithmetic, call.a.shape[-1], p.tested, p.layout.groups.width))


def _repairs(call: Call) -> bool:
    return call.policy.level == "correct" and call.policy.timing == "immediate"


# --- the ledger ---------------------------------------------------------------------------------


def write(words: Tensor, site: Tensor, call: Call, backend: str, s: Sums, tau: Tensor, verdicts: dict[Verdict, Tensor]) -> None:
    device = words.device
    place = _place(site, device)
    at = HEADER + place * COUNTERS + _arange(COUNTERS, device)
    counts = {ledger.COUNTER_OF[v]: rows.sum() for v, rows in verdicts.items()}
    repeated = call.role == "fprop" and torch._C._current_graph_task_id() != -1
    rows = _constant(call.rows, device)
    counts["repeated_checks" if repeated else "checks"] = rows
    counts["products"] = _constant(1, device)
    counts["executions"] = _constant(2 if _repairs(call) else 1, device)
    zero = _constant(0, device)
    words.index_add_(0, at, torch.stack([counts.get(name, zero) for name in COUNTER] + [zero] * (COUNTERS - len(COUNTER))))
    ratio = ((s.actual - s.predicted).abs() / tau).flatten(-2).amax(-1)
    bad = torch.stack(list(verdicts.values())).any(0)
    clean_worst = torch.where(bad, torch.zeros_like(ratio), ratio).amax().float().view(torch.int32).long()
    words.scatter_reduce_(0, at[WORST : WORST + 1], clean_worst.reshape(1), "amax")
    _record(words, place, call, backend, s, tau, ratio, bad, verdicts)


def count_votes(words: Tensor, site: Tensor, agreed: Tensor, undecided: Tensor, *, alone: bool) -> None:
    """Count the rows that a vote decided (RECOMPUTED) or could not (UNCORRECTED), and the executions.

    ``alone``: nothing else checked this product, so the vote is its check.
    """
    device = words.device
    counts = {
        "recomputed": (~agreed & ~undecided).sum(),
        "uncorrected": undecided.sum(),
        "executions": _constant(3 if alone else 2, device),
        "products": _constant(int(alone), device),
        "checks": _constant(agreed.numel() if alone else 0, device),
    }
    at = HEADER + _place(site, device) * COUNTERS + torch.stack([_constant(COUNTER[name], device) for name in counts])
    words.index_add_(0, at, torch.stack(list(counts.values())))


def _place(site: Tensor, device: torch.device) -> Tensor:
    """The site's number on the ledger's device, wherever the module's own tensor lies."""
    return sites.as_tensor(sites.site_of(sites.index_of(site)), device)


def _record(
    words: Tensor,
    place: Tensor,
    call: Call,
    backend: str,
    s: Sums,
    tau: Tensor,
    ratio: Tensor,
    bad: Tensor,
    verdicts: dict[Verdict, Tensor],
) -> None:
    device = words.device
    faults = [Verdict.UNCORRECTED, Verdict.OBSERVED, Verdict.RECOMPUTED, Verdict.OVERFLOW, Verdict.INPUT]
    present = [(v, verdicts[v].any()) for v in faults if v in verdicts]
    verdict = _constant(ledger.VERDICTS.index(present[-1][0]), device)
    for v, there in reversed(present):  # the gravest is written last, and stays
        verdict = torch.where(there, _constant(ledger.VERDICTS.index(v), device), verdict)
    row = torch.where(bad, torch.nan_to_num(ratio, nan=torch.inf), -torch.ones_like(ratio)).flatten().argmax()
    residual = (s.actual - s.predicted).flatten(0, -3)[row].flatten()
    bound = tau.flatten(0, -3)[row].flatten()
    kind = torch.nan_to_num(residual.abs() / bound, nan=torch.inf).argmax()
    values = {
        "sequence": words[HEAD] + 1, "site": place, "role": _constant(ledger.ROLE_NAMES.index(call.role), device),
        "verdict": verdict, "cause": _constant(0, device), "rows": bad.sum(), "row": row, "col": _constant(-1, device),
        "residual": residual[kind].float().view(torch.int32).long(), "bound": bound[kind].float().view(torch.int32).long(),
        "m": _constant(call.rows, device), "n": _constant(call.w.shape[-2], device), "k": _constant(call.a.shape[-1], device),
        "dtype": _constant(ledger.DTYPES.index(call.a.dtype), device),
        "backend": _constant(ledger.BACKEND_NAMES.index(backend), device), "step": words[ledger.STEP],
        **dict.fromkeys(("element_row", "element_col", "unit", "repaired_on"), _constant(-1, device)),
    }  # fmt: skip
    slot = HEADER + sites.CAPACITY * COUNTERS + (words[HEAD] % RING) * RECORD + _arange(RECORD, device)
    anything = bad.any()
    new = torch.stack([values[name].reshape(()) for name in RECORD_NAMES])
    words.index_copy_(0, slot, torch.where(anything, new, words[slot]))
    words[HEAD] += anything


@lru_cache(maxsize=65536)
def _constant(value: int, device: torch.device) -> Tensor:
    # Filled on the device: a copy from pageable host memory would wait, and could not be captured.
    return torch.full((), value, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _arange(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device=device)
