"""``torch.ops.abft.product``: the one operator behind every checked product.

    product(a, ta, b, tb, bias, ledger, site, role, policy) = op(a) · op(b)ᵀ (+ bias)

with op(x) = xᵀ where the flag says so. The operator receives the *weight itself*, not a cast or a
transposed view of it: its panel is looked up inside, by the object's identity, where no tracer can bake it in. A
weight of another dtype than ``a`` is cast here (autocast).

The operator has a side effect (no compiler may drop it from a graph that would keep it), but its ledger is not declared as
written. Declared so, AOTAutograd carries the ledger's value from a forward to its backward: every other graph in
between (the next compiled layer, the next micro-batch) is then an in-place change of a saved tensor, an error, or is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abft import faults, floating, ledger, panels, plans, policy, redundancy, reporting, sites, threshold
from abft.attention import products
from abft.backends import arbitration, fresh, lane, masked, quick, reference, tolerance
from abft.backends.call import Call
from abft.checksum import Layout, Panel
from abft.errors import DeviceError, PolicyError
from abft.faults import Strike, Target
from abft.ledger import Finding, Outcome, Verdict
from abft.statistics import watches

LIBRARY = torch.library.Library("abft", "DEF")
LIBRARY.define("product(Tensor a, bool ta, Tensor b, bool tb, Tensor? bias, Tensor ledger, Tensor site, str role, str policy) -> Tensor")
LIBRARY.define("bypass(Tensor(a!) ledger, str reason) -> ()")

Execute = Callable[[Call, tuple[Strike, ...]], Tensor]
Check = Callable[[Call, Tensor, Outcome, str], Tensor]
RunOnDevice = Callable[[Call, Tensor, Tensor, str], Tensor]

#: Called with (call, site, clean, struck) when faults strike a product; set by the injector, for its log.
on_strike: Callable[[Call, Target, Tensor, Tensor, tuple[Strike, ...]], None] | None = None


def _product(
    a: Tensor, ta: bool, b: Tensor, tb: bool, bias: Tensor | None, ledger_: Tensor, site: Tensor, role: str, policy_text: str
) -> Tensor:
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _product(a, ta, b, tb, bias, ledger_, site, role, policy_text)
    if torch.is_autocast_enabled(a.device.type):
        # A backward inside autocast: what is computed here has the types it has, and its checks are fp32.
        with torch.autocast(a.device.type, enabled=False):
            return _product(a, ta, b, tb, bias, ledger_, site, role, policy_text)
    chosen = policy.decode(policy_text)
    if chosen.dynamic:
        chosen = plans.now(policy_text, sites.index_of(site), role, on_gpu=a.is_cuda)
    if not ta:
        fitting = lane.find(a, b, tb, bias, role, chosen.text)
        if fitting is not None:
            return take(fitting, a, b, tb, bias, role, sites.index_of(site))
    elif role == "wgrad" and a.is_cpu and (y := _weight_gradient(a.mT, b.mT if tb else b, b, tb, site, chosen.text)) is not None:
        return y
    source = b if role != "wgrad" and isinstance(b, torch.nn.Parameter) else None
    left = a.mT if ta else a
    right = b if b.dtype == a.dtype else b.to(a.dtype)
    offset = bias if bias is None or bias.dtype == a.dtype else bias.to(a.dtype)
    bias_source = bias if isinstance(bias, torch.nn.Parameter) else None
    call = Call(left, right.mT if tb else right, offset, source, tb, role, chosen, sites.index_of(site), bias_source=bias_source)
    if left.numel() == 0 or right.numel() == 0:
        # Nothing is multiplied: zero rows or columns, or a sum over nothing, which is the bias alone.
        return reference.multiply(call.a, call.w, call.bias)
    backend = choose_backend(call)
    if faults.active is not None:
        call = _struck(call, backend)
    words = _device_words(a, ledger_, backend)
    if words is not None:
        # A record on a device does not carry its policy: whoever reads it finds the reaction at the site.
        sites.site_of(call.site).on_uncorrected = chosen.on_uncorrected
        try:
            return product_on_device(call, words, site, backend)
        finally:
            ledger.issued()
    return product_on_host(call, backend)


def take(fitting: lane.Lane, a: Tensor, b: Tensor, tb: bool, bias: Tensor | None, role: str, site: int) -> Tensor:
    """The checked product of a call like an earlier one."""
    dtype = fitting.dtype
    right = b if b.dtype is dtype else b.to(dtype)
    w = right.mT if tb else right
    offset = bias if bias is None or bias.dtype is dtype else bias.to(dtype)
    entry, y = fitting.entry, None
    if not entry.audited or panels.unchanged(entry, w, offset):
        y = reference.multiply(a, w, offset)
        watch = watches.of(site, role, w.shape[0], fitting.depth, dtype) if fitting.watched else None
        worst = quick.worst(y, a, fitting.quick, None if watch is None else watch.address)
        if worst <= 1.0:
            entry.uses += 1
            if watch is not None:
                watch.settle()
            ledger.cpu().count_clean(site, a.shape[0], worst, role == "fprop" and torch._C._current_graph_task_id() != -1)
            return y
    return product_on_host(Call(a, w, offset, b, tb, role, fitting.policy, site, bias_source=bias), fitting.backend, y)


def _weight_gradient(a: Tensor, w: Tensor, b: Tensor, tb: bool, site: Tensor, text: str) -> Tensor | None:
    """a · wᵀ for a gradient under a policy that asks for no more than a check; None: the whole way."""
    plain = fresh.policy_of(text)
    fitting = None if plain is None else fresh.fitting(a, w, plain)
    if plain is None or fitting is None:
        return None
    y = reference.multiply(a, w, None)
    worst, number = fresh.worst(fitting, y, a, w), sites.index_of(site)
    if worst <= 1.0:
        ledger.cpu().count_clean(number, a.shape[0], worst, False)
        return y
    call = Call(a, w, None, None, tb, "wgrad", plain, number)
    return product_on_host(call, "reference" if plain.backend == "auto" else plain.backend, y)


def _struck(call: Call, backend: str) -> Call:
    """The call with the faults that an injector sends; tells the injector what they do to the result."""
    # Remembered before anything strikes: a fault in a weight comes after the weight was loaded.
    panel = _panel_of(call, backend) if call.source is not None else None
    # Of the kernels' accumulators every bit can flip; elsewhere the product arrives rounded to its dtype.
    fused = backend == "triton" or (call.a.device.type != "cpu" and backend == "reference")
    target = Target(
        sites.site_of(call.site).name, call.role, call.a.shape[-2], call.w.shape[-2], call.a.shape[-1], call.a.dtype,
        floating.ACCUMULATOR[call.a.dtype] if fused else call.a.dtype, call.a.shape[0] if call.a.dim() == 3 else 1, call.source,
        None if panel is None else panel.columns, checks=_layout_of(call, backend).columns, check=floating.ACCUMULATOR[call.a.dtype],
    )  # fmt: skip
    in_kernel = masked.execute_in_kernel if backend == "triton" else masked.execute_fused
    execute = in_kernel if fused else reference.execute
    strikes = tuple(faults.strikes(target))
    if not strikes:
        return call
    clean = execute(call, ()) if on_strike is not None else None
    if any(strike.place == "weight" for strike in strikes):
        faults.strike_weights(target, strikes)
        w = call.source.detach().to(call.a.dtype)  # type: ignore[union-attr]
        call = replace(call, w=w.mT if call.transposed else w)
    if on_strike is not None and clean is not None:
        on_strike(call, target, clean, execute(call, strikes), strikes)
    return replace(call, strikes=strikes)


def _layout_of(call: Call, backend: str) -> Layout:
    if backend == "triton":
        from abft.backends import triton

        return triton.plan_for(call).layout
    if call.a.device.type != "cpu":
        return masked.plan_for(call, fused=backend == "reference").layout
    return reference.plan_for(call).layout


def _panel_of(call: Call, backend: str) -> Panel:
    if backend == "triton":
        from abft.backends import triton

        return triton.panel_of(call, triton.plan_for(call))
    if call.a.device.type != "cpu":
        return masked.panel_of(call, masked.plan_for(call, fused=backend == "reference"))
    return _entry(call, reference.plan_for(call)).panel


# --- which backend ------------------------------------------------------------------------------


def choose_backend(call: Call) -> str:
    """The backend of a call: the explicit one or none; auto takes the cheapest that runs here and meets the floor."""
    chosen = call.policy.backend
    if chosen == "auto":
        chosen = "triton" if call.a.device.type == "cuda" and _triton_unavailable(call) is None else "reference"
    if call.policy.detector != "checksum" and call.a.dtype.is_floating_point:  # whole numbers have no residuals
        _require_statistics(call, chosen)
    if call.policy.backend == "triton":
        reason = _triton_unavailable(call)
        if reason is not None:
            raise DeviceError(
                f'backend="triton" cannot run this product: {reason}. Use backend="auto", which says in abft.coverage what it took.'
            )
        return chosen
    if call.policy.max_floor is not None and call.policy.level != "off":
        floor = _expected_floor(call, chosen)
        if floor > call.policy.max_floor:
            raise PolicyError(
                f"max_floor={call.policy.max_floor:g} cannot be met: backend {chosen!r} on {call.a.device.type} reaches {floor:.2g} for "
                f"{str(call.a.dtype)[6:]}, K={call.a.shape[-1]}, N={call.w.shape[-2]}. Use fp32, a smaller group, or a larger max_floor."
            )
    return chosen


def _require_statistics(call: Call, backend: str) -> None:
    """Raise NotImplementedError where a detector other than checksum does not do what it says."""
    detector, device = call.policy.detector, call.a.device.type
    if backend != "triton" and device != "cpu":
        raise NotImplementedError(
            f"Policy.detector={detector!r}: on {device}, statistics of residuals are kept by the triton backend's kernels, and this "
            f"product takes {backend!r}. Use detector=\"checksum\" there."
        )


def _triton_unavailable(call: Call) -> str | None:
    try:
        from abft.backends import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton.available(call.a.device, call.a.dtype, call.a.shape[-1])


def _expected_floor(call: Call, backend: str) -> float:
    p: Any
    if call.a.dtype == torch.int8:
        return 0.0  # whole numbers: no bound, no floor
    if backend == "triton":
        from abft.backends import triton

        p = triton.plan_for(call)
    elif call.a.device.type != "cpu":
        p = masked.plan_for(call, fused=backend == "reference")
    else:
        p = reference.plan_for(call)
    return threshold.expected_floor(p.arithmetic, call.a.shape[-1], p.layout.groups)


# --- on a device the host does not wait for -----------------------------------------------------------


def _device_words(a: Tensor, ledger_: Tensor, backend: str) -> Tensor | None:
    """The ledger that device code writes for this product; None: the host computes it and reads its results."""
    if a.device.type != "cpu":
        return ledger_
    return torch.from_numpy(ledger.cpu().words) if backend == "triton" else None


def _run_on_device(call: Call, words: Tensor, site: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from abft.backends import triton

        return triton.product(call, words, site)
    return masked.product(call, words, site, backend)


def product_on_device(call: Call, words: Tensor, site: Tensor, backend: str, once: RunOnDevice = _run_on_device) -> Tensor:
    """``once``: one checked product; other arithmetic has its own (ops/integer.py)."""

    def run(c: Call, book: Tensor) -> Tensor:
        return once(c, book, site, backend)

    unchecked = call.policy.level == "off" or call.role not in call.policy.roles
    if call.policy.redundancy == "none":
        if unchecked:
            ledger.bypass(plans.why_unchecked(call.policy, call.role))
        return run(call, words)
    # No host decision can save the third execution, so dmr costs here what tmr costs. Replicas keep no books.
    scratch = ledger.scratch(words.device)
    replica = replace(call, strikes=(), policy=products.by_checksum(call.policy))
    x, y, z = run(call, words), run(replica, scratch), run(replica, scratch)
    agreed = redundancy.agreeing_rows(x, y) & redundancy.agreeing_rows(y, z)
    masked.count_votes(words, site, agreed, redundancy.undecided_rows(x, y, z), alone=unchecked)
    return redundancy.vote(x, y, z)


# --- on a host whose memory may be read -------------------------------------------------------------


def product_on_host(
    call: Call, backend: str, y: Tensor | None = None, *, execute: Execute = reference.execute, check: Check | None = None
) -> Tensor:
    """``y``: the product, where it was computed already. ``execute`` and ``check``: other arithmetic's own (ops/integer.py)."""
    outcome = Outcome(checks=call.rows)
    y = _execute(call, outcome, execute) if y is None else y
    checked = call.policy.level != "off" and call.role in call.policy.roles
    if checked:
        y = (check or _check)(call, y, outcome, backend)
    elif call.policy.redundancy == "none":
        ledger.bypass(plans.why_unchecked(call.policy, call.role))
        return y
    repeated = call.role == "fprop" and torch._C._current_graph_task_id() != -1
    book = ledger.cpu()
    book.count(call.site, outcome, repeated)
    if outcome.findings:
        _announce(call, outcome.findings, backend, book)
    return y


def _execute(call: Call, outcome: Outcome, execute: Execute) -> Tensor:
    """The product, as often as the redundancy asks; a transient fault hits the first execution only."""
    if call.policy.redundancy == "none":
        return execute(call, call.strikes)

    def run(replica: int) -> Tensor:
        if replica:
            outcome.executions += 1
        return execute(call, call.strikes if replica == 0 else ())

    x, y = run(0), run(1)
    differ = ~redundancy.agreeing_rows(x, y)
    third = call.policy.redundancy == "tmr" or bool(differ.numpy().any())
    if not third:
        return y
    z = run(2)
    differ |= ~redundancy.agreeing_rows(y, z)
    rows = differ.reshape(-1).numpy().nonzero()[0]
    if len(rows):
        undecided = redundancy.undecided_rows(x, y, z).reshape(-1).numpy()[rows]
        for verdict, which in ((Verdict.RECOMPUTED, rows[~undecided]), (Verdict.UNCORRECTED, rows[undecided])):
            if len(which):
                outcome.findings.append(Finding(verdict, len(which), int(which[0]), None, float("nan"), 0.0, "transient"))
    return redundancy.vote(x, y, z)


def _check(call: Call, y: Tensor, outcome: Outcome, backend: str) -> Tensor:
    p = reference.plan_for(call)
    entry = _entry(call, p) if call.source is not None else None
    panel = entry.panel if entry is not None else reference.build_panel(call.w, p.layout)
    for strike in call.strikes:
        if strike.place == "panel":
            strike.hit(panel.columns)
    bias = panels.bias_sums_for(entry, call.bias_source, call.bias, p.layout, frozen=call.policy.weights == "frozen")
    as_remembered = entry is None or panels.unchanged(entry, call.w, call.bias)
    quickly = as_remembered and not faults.in_checksums(call.strikes)  # which the quick judgement computes on its own
    watch = tolerance.watch_of(call)
    if entry is not None:
        judge = _quickly_clean(call, y, entry, bias, p, outcome, watch) if quickly else None
        if judge is not None:
            lane.open_for(call, backend, entry, judge)
            return y
    elif quickly and call.a.dim() == 2:
        fresh = quick.compiled(panel, bias, call.a.shape[-1], p, call.a.dtype)
        if fresh is not None and (worst := quick.worst(y, call.a, fresh, None if watch is None else watch.address)) <= 1.0:
            outcome.worst = worst
            if watch is not None:
                watch.settle()
            return y
    judgement = reference.examine(y, call, panel, bias, p, call.strikes)
    if watch is not None:
        watch.add(tolerance.within_bounds(judgement))
        watch.settle()
    if judgement.clean and as_remembered and (entry is None or entry.uses % lane.PANEL_AUDIT or panels.intact(entry)):
        outcome.worst = judgement.worst
        return y
    case = arbitration.Case(call, p, y, judgement, panel, entry, bias, reference.execute, outcome)
    return arbitration.settle(case)


def _quickly_clean(
    call: Call, y: Tensor, entry: panels.Entry, bias: Any, p: reference.Plan, outcome: Outcome, watch: watches.Watch | None
) -> quick.Quick | None:
    """The prepared judgement by which the product is clean; None if there is none or if it is not."""
    entry.uses += 1
    if entry.uses % lane.PANEL_AUDIT == 0 and not panels.intact(entry):
        return None
    q = entry.quick
    if q is None:
        q = entry.quick = quick.prepare(entry.panel, bias, call.a.shape[-1], p, call.a.dtype) or False
    if q is False or call.a.dim() != 2 or (watch is not None and type(q) is not quick.Compiled):
        return None
    worst = quick.worst(y, call.a, q, None if watch is None else watch.address)
    if not worst <= 1.0:
        return None
    if watch is not None:
        watch.settle()
    outcome.worst = worst
    return q


def _entry(call: Call, p: reference.Plan) -> panels.Entry:
    assert call.source is not None
    frozen = call.policy.weights == "frozen"
    return panels.entry_for(call.source, call.w, p.layout, transposed=call.transposed, frozen=frozen, build=reference.build_panel)


def _announce(call: Call, findings: list[Finding], backend: str, book: ledger.CpuLedger) -> None:
    product = {
        "role": ledger.ROLE_NAMES.index(call.role),
        "m": call.rows,
        "n": call.w.shape[-2],
        "k": call.a.shape[-1],
        "dtype": ledger.DTYPES.index(call.a.dtype),
        "backend": ledger.BACKEND_NAMES.index(backend),
    }
    # One event per call and role: the gravest finding speaks, the counters know the rest.
    gravest = max(findings, key=lambda f: _GRAVITY.index(f.verdict))
    event = reporting.note(book, call.site, gravest, product)
    reporting.react(call.policy.on_uncorrected, event)


_GRAVITY = (
    Verdict.INPUT, Verdict.OVERFLOW, Verdict.FALSE_ALARM, Verdict.STALE, Verdict.TOLERATED,
    Verdict.RECOMPUTED, Verdict.RECONSTRUCTED, Verdict.OBSERVED, Verdict.UNCORRECTED,
)  # fmt: skip


def _product_meta(
    a: Tensor, ta: bool, b: Tensor, tb: bool, bias: Tensor | None, ledger_: Tensor, site: Tensor, role: str, policy_text: str
) -> Tensor:
    if type(a) is Tensor and a.device.type != "meta":
        # An operand on meta sends the whole call here; real numbers must not turn into uninitialised memory.
        raise DeviceError(f"abft::product has an operand or a site on meta beside real ones on {a.device}; materialise the model first")
    rows, columns = a.shape[-1 if ta else -2], b.shape[-1 if tb else -2]
    return a.new_empty((*a.shape[:-2], rows, columns))


def _bypass(ledger_: Tensor, reason: str) -> None:
    ledger.bypass(reason)


for key in ("CPU", "CUDA"):
    LIBRARY.impl("product", _product, key)
    LIBRARY.impl("bypass", _bypass, key)
torch.library.register_fake("abft::product", _product_meta, lib=LIBRARY)
torch.library.register_fake("abft::bypass", lambda ledger_, reason: None, lib=LIBRARY)

product = torch.ops.abft.product.default
directly = _product  # … without being an operator, for callers who know that nobody watches those
torch.fx.node.has_side_effect(product)  # see the top of this file
bypass = torch.ops.abft.bypass.default
__all__ = ["bypass", "directly", "product", "take"]
