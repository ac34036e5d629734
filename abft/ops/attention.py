"""``torch.ops.abft.attention``: the operators behind checked attention, forward and backward, and their gradients.

    attention(q, k, v, mask, seed, …, weights, ledger, site, policy) -> (out, statistics, weights)
    attention_backward(d_out, d_weights, q, k, v, mask, seed, statistics, …, of_mask, ledger, site, policy, out) -> (dq, dk, dv, d_mask)

q (B, H, G, L, E); k (B, H, S, E); v (B, H, S, D); mask None or five dimensions that broadcast to (B, H, G, L, S); seed 0-d int64 on
a CPU, or None without dropout; statistics (2, B, H, G, L), maxima and sums of the softmax. The … are ``Options``. What is not asked for
(weights, d_mask) is an empty tensor. Opaque, with side effects and an undeclared ledger, as ``abft::product`` is (see there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abft import ledger, plans, redundancy, sites, threshold
from abft.attention import products
from abft.attention.backward import gradients
from abft.attention.forward import attend
from abft.attention.gradients import Given, Gradients
from abft.attention.plain import plain
from abft.attention.problem import Attended, Options, Problem
from abft.attention.tally import Tally
from abft.errors import DeviceError, PolicyError
from abft.ledger import Verdict
from abft.ops import attention_kernels, checked
from abft.ops.checked import LIBRARY, bypass
from abft.ops.watched import nobody_watches
from abft.policy import Policy, decode

_OPTIONS = "float scale, bool causal, int offset, int window, float softcap, float dropout"
LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, {_OPTIONS}, bool weights, "
    "Tensor ledger, Tensor site, str policy) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "attention_backward(Tensor d_out, Tensor? d_weights, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, Tensor statistics, "
    f"{_OPTIONS}, bool of_mask, Tensor ledger, Tensor site, str policy, Tensor? out=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None,
    scale: float, causal: bool, offset: int, window: int, softcap: float, dropout: float,
    weights: bool, ledger_: Tensor, site: Tensor, policy_text: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options, number = Options.read(scale, causal, offset, window, softcap, dropout), sites.index_of(site)
    problem = Problem(q, k, v, mask, _seed(seed), options)
    chosen = plans.now(policy_text, number, "fprop", on_gpu=q.is_cuda)
    _refuse(problem.keys, q.shape[-1], v.shape[-1], problem.wide, chosen)
    if _in_kernels(q, chosen):
        chosen = plans.checked(chosen)
        words = ledger_ if q.device.type != "cpu" else torch.from_numpy(ledger.cpu().words)
        with _plainly(q):
            return *attention_kernels.attend(problem, chosen, site, words), q.new_empty(0)

    def run(tally: Tally) -> Attended:
        return attend(problem, tally, weights)

    def results(a: Attended) -> list[tuple[str, Tensor]]:
        return [("O", a.out), ("O", a.statistics)] + ([] if a.weights is None else [("O", a.weights)])

    with _plainly(q):
        got = _execute(run, results, Tally(chosen, number, "fprop", q.dtype, note=checked.on_strike))
    out, statistics, *rest = got
    return out, statistics, rest[0] if rest else q.new_empty(0)


def _as_operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a result that is contiguous, as tracers are told."""
    out, *rest = _attention(*arguments)
    return out.contiguous(), *rest  # type: ignore[return-value]


def _attention_backward(
    d_out: Tensor, d_weights: Tensor | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, statistics: Tensor,
    scale: float, causal: bool, offset: int, window: int, softcap: float, dropout: float,
    of_mask: bool, ledger_: Tensor, site: Tensor, policy_text: str, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options.read(scale, causal, offset, window, softcap, dropout)
    problem = Problem(q, k, v, mask, _seed(seed), options)
    chosen = plans.now(policy_text, sites.index_of(site), "dgrad", on_gpu=q.is_cuda)
    if _in_kernels(q, chosen):
        assert out is not None, "the kernels take δ from the forward's output"
        words = ledger_ if q.device.type != "cpu" else torch.from_numpy(ledger.cpu().words)
        with _plainly(q):
            return *attention_kernels.gradients(problem, d_out, out, statistics, chosen, site, words), q.new_empty(0)
    given = Given(d_out, d_weights, statistics)

    def run(tally: Tally) -> Gradients:
        return gradients(problem, given, tally, of_mask)

    def results(g: Gradients) -> list[tuple[str, Tensor]]:
        return [("dQ", g.q), ("dK", g.k), ("dV", g.v)] + ([] if g.mask is None else [("dQ", g.mask)])

    with _plainly(q):
        dq, dk, dv, *rest = _execute(run, results, Tally(chosen, sites.index_of(site), "dgrad", q.dtype, note=checked.on_strike))
    return dq, dk, dv, rest[0] if rest else q.new_empty(0)


@contextmanager
def _without_gradients_and_autocast(device: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _plainly(q: Tensor) -> AbstractContextManager[None]:
    """Neither gradients nor autocast; what is off already is not switched off again, which costs as much as a small attention."""
    device = q.device.type
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
        return _without_gradients_and_autocast(device)
    return nullcontext()


def _in_kernels(q: Tensor, chosen: Policy) -> bool:
    return chosen.backend == "triton" or q.device.type != "cpu"


def _asks_for_kernels(policy_text: str) -> bool:
    return decode(policy_text).backend == "triton"


_asks_for_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see functional._own_site


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed.numpy())


def _execute(run: Callable[[Tally], Any], results: Callable[[Any], list[tuple[str, Tensor]]], tally: Tally) -> list[Tensor]:
    """The whole of it, as often as the redundancy asks; a transient fault hits the first execution only, whose checks are counted."""
    first = run(tally)
    if tally.policy.redundancy == "none":
        tally.close()
        return [t for _, t in results(first)]
    # Replicas are compared with what the checks have left: they need none of their own.
    quiet = tally.policy.replace(level="off")

    def replica() -> list[tuple[str, Tensor]]:
        for product in tally.products.values():
            product.outcome.executions += 1
        return results(run(replace(tally.aside(), policy=quiet)))

    x, y = results(first), replica()
    agree = [bool(redundancy.agreeing_rows(a, b).all().numpy()) for (_, a), (_, b) in zip(x, y, strict=True)]
    if tally.policy.redundancy == "dmr" and all(agree):
        out = [t for _, t in y]
    else:
        z = replica()
        out = [_vote(tally, name, a, b, c) for (name, a), (_, b), (_, c) in zip(x, y, z, strict=True)]
    tally.close(alone=True)
    return out


def _vote(tally: Tally, name: str, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    differ = (~(redundancy.agreeing_rows(x, y) & redundancy.agreeing_rows(y, z))).reshape(-1).numpy()
    undecided = redundancy.undecided_rows(x, y, z).reshape(-1).numpy()
    for verdict, rows in ((Verdict.RECOMPUTED, differ & ~undecided), (Verdict.UNCORRECTED, undecided)):
        tally.find(name, verdict, int(rows.sum()), int(rows.argmax()), float("nan"), 0.0, "transient")
    return redundancy.vote(x, y, z)


def _refuse(keys: int, e: int, d: int, wide: torch.dtype, chosen: Policy) -> None:
    """What cannot be done under this policy is said, never done differently. Of heads of ``e`` columns and values of ``d``."""
    if chosen.max_floor is None or chosen.level == "off":
        return
    for name, n, k in (("qk", keys, e), ("pv", d, keys)):
        p = products.plan(n, k, wide, chosen.panel, chosen.group, name == "pv")
        floor = threshold.expected_floor(p.arithmetic, k, p.layout.groups)
        if floor > chosen.max_floor:
            raise PolicyError(
                f"max_floor={chosen.max_floor:g} cannot be met by attention's {name} product: the reference reaches {floor:.2g} for "
                f"depth {k} and {n} columns. Use fp64 or a larger max_floor."
            )


def _attention_meta(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, seed: Any, scale: Any, causal: Any, offset: Any, window: Any, softcap: Any, dropout: Any,
    weights: bool, ledger_: Any, site: Any, policy_text: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _on_meta_alone(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    full = q.new_empty((*q.shape[:-1], k.shape[2])) if weights else q.new_empty(0)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty((2, *q.shape[:-1]), dtype=wide), full


def _attention_backward_meta(
    d_out: Tensor, d_weights: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Any, statistics: Any,
    scale: Any, causal: Any, offset: Any, window: Any, softcap: Any, dropout: Any, of_mask: bool, ledger_: Any, site: Any, policy_text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _on_meta_alone(q)
    d_mask = torch.zeros_like(mask, memory_format=torch.contiguous_format) if of_mask and mask is not None else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_mask


def _on_meta_alone(q: Tensor) -> None:
    if type(q) is Tensor and q.device.type != "meta":
        raise DeviceError(f"abft::attention has an operand or a site on meta beside real ones on {q.device}; materialise the model first")


LIBRARY.impl("attention", _as_operator, "CPU")
LIBRARY.impl("attention", _as_operator, "CUDA")
LIBRARY.impl("attention_backward", _attention_backward, "CPU")
LIBRARY.impl("attention_backward", _attention_backward, "CUDA")
torch.library.register_fake("abft::attention", _attention_meta, lib=LIBRARY)
torch.library.register_fake("abft::attention_backward", _attention_backward_meta, lib=LIBRARY)

attention = torch.ops.abft.attention.default
attention_backward = torch.ops.abft.attention_backward.default
for _op in (attention, attention_backward):
    torch.fx.node.has_side_effect(_op)


def attention_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The operator, or what it does where nobody could tell: going through it costs as much as a small attention."""
    # Dynamo traces this and knows the first answer; it could not trace the second question.
    operands = (q, k, v) if mask is None else (q, k, v, mask)
    return attention if torch.compiler.is_compiling() or not nobody_watches(*operands) else _attention


class CheckedAttention(torch.autograd.Function):
    """(out, weights or an empty tensor) of an attention; its gradients are checked, too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, options: tuple[Any, ...], weights: bool,
        book: Tensor, site: Tensor, policy_text: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, statistics, full = attention_of(q, k, v, mask)(q, k, v, mask, seed, *options, weights, book, site, policy_text)
        # The reference computes δ from probabilities, the kernels from the output.
        kept = out if q.device.type != "cpu" or _asks_for_kernels(policy_text) else None
        ctx.save_for_backward(q, k, v, mask, seed, kept, statistics)
        ctx.ledger, ctx.site = book, site  # see CheckedProduct
        ctx.options, ctx.weights, ctx.policy = options, weights, policy_text
        if not weights:
            ctx.mark_non_differentiable(full)
        ctx.set_materialize_grads(False)
        return out, full

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, seed, kept, statistics = ctx.saved_tensors
        of_mask = bool(mask is not None and ctx.needs_input_grad[3])
        rest = (None,) * 6
        if d_out is None and d_weights is None:
            return (None,) * 4 + rest
        if torch.is_grad_enabled():
            return (*_differentiable(ctx, q, k, v, mask, seed, d_out, d_weights), *rest)
        if d_out is None:
            d_out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        above = d_weights if ctx.weights else None
        by_operator = torch.compiler.is_compiling() or not nobody_watches(d_out, q, k, v)
        backward_: Callable[..., tuple[Tensor, ...]] = attention_backward if by_operator else _attention_backward
        dq, dk, dv, d_mask = backward_(
            d_out, above, q, k, v, mask, seed, statistics, *ctx.options, of_mask, ctx.ledger, ctx.site, ctx.policy, kept
        )
        return dq, dk, dv, d_mask if of_mask else None, *rest


def _differentiable(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, d_out: Tensor | None, d_weights: Tensor | None
) -> list[Tensor | None]:
    """create_graph=True: gradients that have gradients are torch's business, unchecked and counted."""
    bypass(ctx.ledger, "double backward")
    operands = [q, k, v] + ([mask] if mask is not None else [])
    wanted = [t for t, needs in zip(operands, ctx.needs_input_grad, strict=False) if needs]
    out, weights = plain(Problem(q, k, v, mask, _seed(seed), Options.read(*ctx.options)))
    pairs = [(o, g) for o, g in ((out, d_out), (weights, d_weights if ctx.weights else None)) if g is not None]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    by = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return [by.get(id(t)) if t is not None else None for t in (q, k, v, mask)]
