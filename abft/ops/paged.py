"""``torch.ops.abft.paged_attention`` and ``append_to_pages``: attention of few queries over pages, and writing pages.

    paged_attention(q, k, v, sums, columns, prints, filled, lost, table, lengths, …, ledger, site, policy) -> O (B, H, G, L, D)
    append_to_pages(k, v, sums, columns, prints, filled, lost, new_k, new_v, table, lengths, counts)

The tensors are those of ``attention.pages.Pages``. Opaque, with side effects and an undeclared ledger, as ``abft::product`` is. What an
attention puts back into a page is what was written there, so it is not declared as a change; appending is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abft import faults, ledger, plans, redundancy, sites
from abft.attention import decode, pages, pageverdicts
from abft.attention.decode import Request, Strikes
from abft.attention.pages import Pages
from abft.attention.tally import Tally
from abft.faults import Place, Target
from abft.ledger import Verdict
from abft.ops import checked
from abft.ops.checked import LIBRARY
from abft.policy import Policy

_PAGES = "k", "v", "sums", "columns", "prints", "filled", "lost"
LIBRARY.define(
    f"paged_attention(Tensor q, {', '.join(f'Tensor {name}' for name in _PAGES)}, Tensor table, Tensor lengths, "
    "float scale, int window, float softcap, Tensor ledger, Tensor site, str policy) -> Tensor"
)
LIBRARY.define(
    f"append_to_pages({', '.join(f'Tensor({chr(97 + i)}!) {name}' for i, name in enumerate(_PAGES))}, "
    "Tensor new_k, Tensor new_v, Tensor table, Tensor lengths, Tensor? counts) -> ()"
)

#: Role → places of faults beside the general ones: those of every attention, the pages' contents ("weight") and their sums ("panel").
PLACES: dict[str, tuple[Place, ...]] = {"qk": ("S",), "pv": ("O", "P", "l")}


def _paged_attention(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, columns: Tensor, prints: Tensor, filled: Tensor, lost: Tensor, table: Tensor,
    lengths: Tensor, scale: float, window: int, softcap: float, ledger_: Tensor, site: Tensor, policy_text: str,
) -> Tensor:  # fmt: skip
    request = Request(q, Pages(k, v, sums, columns, prints, filled, lost), table, lengths, scale, window or None, softcap or None)
    chosen = plans.now(policy_text, sites.index_of(site), "fprop", on_gpu=q.is_cuda)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if q.device.type != "cpu" or chosen.backend == "triton":
            words = ledger_ if q.device.type != "cpu" else torch.from_numpy(ledger.cpu().words)
            return _in_kernels(request, chosen, site, words)
        tally = Tally(chosen, sites.index_of(site), "fprop", q.dtype)
        out = _on_host(request, tally)
        return out.unflatten(2, q.shape[2:4]).to(q.dtype)


def _on_host(request: Request, tally: Tally) -> Tensor:
    """O (B, H, rows, D) by the reference."""
    rows, d = request.q.shape[:-1].numel(), request.pages.v.shape[-1]
    tally.expect("S", rows, request.keys, request.q.shape[-1])
    tally.expect("O", rows, d, request.keys)
    strikes = strikes_of(request, tally.site)
    out = pageverdicts.settle(request, tally, decode.attend(request, strikes))
    alone = tally.policy.redundancy != "none"
    if alone:
        out = _voted(request, tally, out)
    tally.close(alone=alone)
    return out


def _voted(request: Request, tally: Tally, x: Tensor) -> Tensor:
    """Two more executions (one, of dmr, where it agrees); transient faults have hit the first."""
    results = [x, decode.attend(request).out]
    if tally.policy.redundancy == "tmr" or not bool(redundancy.agreeing_rows(*results).all()):
        results.append(decode.attend(request).out)
    for product in tally.products.values():
        product.outcome.executions += len(results) - 1
    if len(results) == 2:
        return x
    differ = ~(redundancy.agreeing_rows(*results[:2]) & redundancy.agreeing_rows(*results[1:])).flatten()
    undecided = redundancy.undecided_rows(*results).flatten()
    for verdict, rows in ((Verdict.RECOMPUTED, differ & ~undecided), (Verdict.UNCORRECTED, undecided)):
        tally.find("O", verdict, int(rows.sum()), int(rows.int().argmax()), float("nan"), 0.0, "transient")
    return redundancy.vote(*results)


# --- in the kernels -------------------------------------------------------------------------------


def roles_of(policy: Policy) -> frozenset[str]:
    """The roles that a policy checks."""
    named = policy.roles if policy.level != "off" else frozenset()
    return frozenset(role for role in PLACES if {role, "fprop"} & named)


def _in_kernels(request: Request, policy: Policy, site: Tensor, words: Tensor) -> Tensor:
    from abft.backends import triton_decode

    roles = roles_of(policy)
    call = triton_decode.DecodeCall(
        request.q, request.pages.tensors(), request.table, request.lengths, request.scale, request.window, request.softcap, policy, roles,
        strikes_of(request, sites.index_of(site)),
    )  # fmt: skip
    for role in PLACES.keys() - roles:
        ledger.bypass(plans.why_unchecked(policy, role))
    # A record on a device does not carry its policy: whoever reads it finds the reaction at the site.
    sites.site_of(sites.index_of(site)).on_uncorrected = policy.on_uncorrected
    try:
        first = triton_decode.attend(call, words, site)
        if policy.redundancy == "none":
            return first
        from abft.backends import masked

        quiet, scratch = replace(call, strikes=()), ledger.scratch(words.device)
        second, third = (triton_decode.attend(quiet, scratch, site) for _ in range(2))
        agreed = redundancy.agreeing_rows(first, second) & redundancy.agreeing_rows(second, third)
        masked.count_votes(words, site, agreed, redundancy.undecided_rows(first, second, third), alone=False)
        return redundancy.vote(first, second, third)
    finally:
        ledger.issued()


# --- injection ------------------------------------------------------------------------------------


def strikes_of(request: Request, site: int) -> Strikes:
    """What an injector sends to the two products, of which it is told what they do; faults in pages and their sums happen here."""
    if faults.active is None:
        return ()
    pages_, name, strikes = request.pages, sites.site_of(site).name, []
    (e, d), heads = (request.q.shape[-1], pages_.v.shape[-1]), request.q.shape[0] * request.q.shape[1]
    for role, (columns, depth, contents, remembered, checks) in {
        "qk": (request.keys, e, pages_.k, pages_.sums, 1), "pv": (d, request.keys, pages_.v, pages_.columns, len(pages.KINDS)),
    }.items():  # fmt: skip
        target = Target(
            name, role, request.rows, columns, depth, request.q.dtype, torch.float32, heads, contents.view(-1, contents.shape[2:].numel()),
            remembered.view(-1, remembered.shape[-1]), checks=checks, check=torch.float32, places=PLACES[role],
        )  # fmt: skip
        drawn = tuple(faults.strikes(target))
        if not drawn:
            continue
        before = _aside(request) if checked.on_strike is not None else None
        faults.strike_weights(target, drawn)
        for hit in drawn:
            if hit.place == "panel":
                assert target.panel is not None
                hit.hit(target.panel)
        sent = tuple((role, hit) for hit in drawn)
        if before is not None and checked.on_strike is not None:
            checked.on_strike(None, target, before, _aside(request, sent), drawn)  # type: ignore[arg-type]
        strikes += [(role, hit) for hit in drawn if hit.place not in ("weight", "panel")]
    return tuple(strikes)


def _aside(request: Request, strikes: Strikes = ()) -> Tensor:
    """What the reference delivers where nothing is repaired and nobody counts, (B · H, rows, D)."""
    on_host = replace(
        request, q=request.q.cpu(), pages=Pages(*(t.cpu() for t in request.pages.tensors())), table=request.table.cpu(),
        lengths=request.lengths.cpu(),
    )  # fmt: skip
    return decode.attend(on_host, strikes).out.flatten(0, 1)


# --- appending ------------------------------------------------------------------------------------


def _append(
    k: Tensor, v: Tensor, sums: Tensor, columns: Tensor, prints: Tensor, filled: Tensor, lost: Tensor, new_k: Tensor, new_v: Tensor,
    table: Tensor, lengths: Tensor, counts: Tensor | None,
) -> None:  # fmt: skip
    where = Pages(k, v, sums, columns, prints, filled, lost)
    with torch.no_grad():
        if k.device.type == "cpu":
            pages.append(where, new_k, new_v, table, lengths, counts)
        else:
            from abft.backends import triton_decode

            triton_decode.append(where.tensors(), new_k, new_v, table, lengths, counts)


def _paged_attention_meta(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _append_meta(*_: Any) -> None:
    return None


LIBRARY.impl("paged_attention", _paged_attention, "CPU")
LIBRARY.impl("paged_attention", _paged_attention, "CUDA")
LIBRARY.impl("append_to_pages", _append, "CPU")
LIBRARY.impl("append_to_pages", _append, "CUDA")
torch.library.register_fake("abft::paged_attention", _paged_attention_meta, lib=LIBRARY)
torch.library.register_fake("abft::append_to_pages", _append_meta, lib=LIBRARY)

paged_attention = torch.ops.abft.paged_attention.default
append_to_pages = torch.ops.abft.append_to_pages.default
torch.fx.node.has_side_effect(paged_attention)
