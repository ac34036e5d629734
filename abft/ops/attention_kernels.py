"""Attention by the triton backend's kernels: whether it can, what an injector does to it, which rows count, and votes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abft import faults, ledger, plans, redundancy, sites
from abft.attention.problem import Problem
from abft.backends import masked
from abft.faults import Place, Strike, Target
from abft.ops import checked
from abft.policy import Policy

if TYPE_CHECKING:
    from abft.backends.triton_attention import AttentionCall, Sequences
    from abft.backends.triton_attention_backward import Given, Hit

#: Role → places of faults beside the general ones.
PLACES: dict[str, tuple[Place, ...]] = {"qk": ("S",), "pv": ("O", "P", "l")}


def unavailable(device: torch.device, dtype: torch.dtype, e: int, d: int) -> str | None:
    """Why no kernel computes attention over heads of ``e`` columns and values of ``d``; None if one does."""
    try:
        from abft.backends import triton_attention
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton_attention.available(device, dtype, e, d)


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see functional._own_site


def roles_of(policy: Policy) -> frozenset[str]:
    """The forward's roles that a policy checks."""
    named = policy.roles if policy.level != "off" else frozenset()
    return frozenset(role for role in PLACES if {role, "fprop"} & named)


def attend(
    problem: Problem, policy: Policy, site: Tensor, words: Tensor, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """(out, statistics) of a problem of which at least one role is checked. words: the ledger that device code writes."""
    from abft.backends import triton_attention

    o, roles = problem.options, roles_of(policy)
    call = triton_attention.AttentionCall(
        problem.q, problem.k, problem.v, problem.mask, problem.seed, o.scale, o.causal, o.offset, o.window, o.softcap, o.dropout,
        policy, roles, sequences=sequences,
    )  # fmt: skip
    for role in PLACES.keys() - roles:
        ledger.bypass(plans.why_unchecked(policy, role))
    if faults.active is not None:
        call = _struck(call, site)
    # A record on a device does not carry its policy: whoever reads it finds the reaction at the site.
    sites.site_of(sites.index_of(site)).on_uncorrected = policy.on_uncorrected
    try:
        return _voted(call, words, site, triton_attention.attend)
    finally:
        ledger.issued()


def _voted(call: AttentionCall, words: Tensor, site: Tensor, run: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As often as the redundancy asks; faults hit the first execution, whose checks are counted."""
    first = run(call, words, site)
    if call.policy.redundancy == "none":
        return first
    # No host decision can save the third execution, so dmr costs here what tmr costs. Replicas keep no books.
    unstruck, scratch = replace(call, strikes=()), ledger.scratch(words.device)
    second, third = run(unstruck, scratch, site), run(unstruck, scratch, site)
    x, y, z = (torch.cat([out.float(), *(s.unsqueeze(-1) for s in statistics)], -1) for out, statistics in (first, second, third))
    agreed = redundancy.agreeing_rows(x, y) & redundancy.agreeing_rows(y, z)
    masked.count_votes(words, site, agreed, redundancy.undecided_rows(x, y, z), alone=False)
    return redundancy.vote(first[0], second[0], third[0]), redundancy.vote(first[1], second[1], third[1])


# --- the gradient ---------------------------------------------------------------------------------


def gradients(
    problem: Problem, d_out: Tensor, out: Tensor, statistics: Tensor, policy: Policy, site: Tensor, words: Tensor,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV of a problem whose forward left ``out`` and ``statistics``; roles that a policy does not name are counted as unchecked."""
    from abft.backends import triton_attention_backward as backend

    given, call = backend.Given(d_out, out, statistics), replace(gradient_call(problem, policy), sequences=sequences)
    for role, products in (("qk", 3), ("pv", 2)):
        if role not in call.roles:
            for _ in range(products):
                ledger.bypass(plans.why_unchecked(policy, role))
    hits = _hits(call, given, site) if faults.active is not None else ()
    sites.site_of(sites.index_of(site)).on_uncorrected = policy.on_uncorrected
    try:
        first = backend.gradients(call, given, words, site, hits)
        if policy.redundancy == "none":
            return first
        scratch = ledger.scratch(words.device)
        second, third = (backend.gradients(call, given, scratch, site) for _ in range(2))
        return tuple(_vote(*results, words, site) for results in zip(first, second, third, strict=True))  # type: ignore[return-value]
    finally:
        ledger.issued()


def _vote(x: Tensor, y: Tensor, z: Tensor, words: Tensor, site: Tensor) -> Tensor:
    agreed = redundancy.agreeing_rows(x, y) & redundancy.agreeing_rows(y, z)
    masked.count_votes(words, site, agreed, redundancy.undecided_rows(x, y, z), alone=False)
    return redundancy.vote(x, y, z)


def gradient_call(problem: Problem, policy: Policy) -> AttentionCall:
    """What the backward's kernels take: the roles are those that a policy checks in it."""
    from abft.backends.triton_attention import AttentionCall

    o, named = problem.options, policy.roles if policy.level != "off" else frozenset()
    return AttentionCall(
        problem.q, problem.k, problem.v, problem.mask, problem.seed, o.scale, o.causal, o.offset, o.window, o.softcap, o.dropout,
        policy, frozenset(role for role in PLACES if {role, "dgrad"} & named),
    )  # fmt: skip


def _hits(call: AttentionCall, given: Given, site: Tensor) -> tuple[Hit, ...]:
    """The faults that an injector sends to the five products, in the order of the reference; it is told what they do to a gradient."""
    from abft.backends import triton_attention_backward as backend

    b, h, group, length, e = call.q.shape
    rows, keys, d = group * length, call.keys, call.v.shape[-1]
    sent: tuple[Hit, ...] = ()
    for role, name, columns, depth, places in (
        ("qk", "S", keys, e, ("S",)), ("pv", "dV", d, rows, ("dV", "P")), ("pv", "dP", keys, d, ("dP", "dS")),
        ("qk", "dQ", e, keys, ("dQ",)), ("qk", "dK", e, rows, ("dK",)),
    ):  # fmt: skip
        height = call.k.shape[2] if name in ("dK", "dV") else rows
        where = sites.site_of(sites.index_of(site)).name
        target = Target(where, role, height, columns, depth, call.q.dtype, torch.float32, b * h, check=torch.float32, places=places)
        drawn = tuple(faults.strikes(target))
        hits = tuple(backend.hit_of(name, strike) for strike in drawn)
        if drawn and checked.on_strike is not None:
            scratch, off = ledger.scratch(call.q.device), replace(call, roles=frozenset())
            clean, struck = (backend.gradients(off, given, scratch, site, some) for some in ((), hits))
            changed = 0 if not hits[0].by_keys and name != "dK" else 2 if hits[0].strike.place in ("P", "dV") else 1
            checked.on_strike(None, target, clean[changed], struck[changed], drawn)  # type: ignore[arg-type]
        sent += hits
    return sent


# --- injection ------------------------------------------------------------------------------------


def _struck(call: AttentionCall, site: Tensor) -> AttentionCall:
    """The call with the faults that an injector sends to its two products; it is told what they do to the output."""
    strikes: tuple[tuple[str, Strike], ...] = ()
    for role, places in PLACES.items():
        target = _target(call, role, places, site)
        drawn = tuple(faults.strikes(target))
        if drawn and checked.on_strike is not None:
            clean, struck = (_aside(replace(call, strikes=tuple((role, s) for s in hits)), site) for hits in ((), drawn))
            checked.on_strike(None, target, clean, struck, drawn)  # type: ignore[arg-type]
        strikes += tuple((role, s) for s in drawn)
    return replace(call, strikes=strikes)


def _target(call: AttentionCall, role: str, places: tuple[Place, ...], site: Tensor) -> Target:
    from abft.backends.triton_attention import CHECK_COLUMNS

    q, k, v = call.q, call.k, call.v
    columns, depth = (call.keys, q.shape[-1]) if role == "qk" else (v.shape[-1], call.keys)
    name = sites.site_of(sites.index_of(site)).name
    return Target(
        name, role, q.shape[2] * q.shape[3], columns, depth, q.dtype, torch.float32, k.shape[0] * k.shape[1], checks=CHECK_COLUMNS,
        check=torch.float32, places=places,
    )  # fmt: skip


def _aside(call: AttentionCall, site: Tensor) -> Tensor:
    """What it delivers where nothing is repaired and nobody counts."""
    from abft.backends import triton_attention

    unrepaired = replace(call, policy=call.policy.replace(level="detect"))
    scratch = torch.zeros(ledger.WORDS, dtype=torch.int64, device=call.q.device)
    return triton_attention.attend(unrepaired, scratch, site)[0]
