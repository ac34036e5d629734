"""The matrix products of a tile: computed, judged and repaired as every other product of the ``reference`` backend.

    S = (scale · Q) Kᵀ    O = P V    dP = dO Vᵀ    dV = Pᵀ dO    dQ = dS K    dK = dSᵀ (scale · Q)

The panel is that of the right operand, built for the tile and dropped. P multiplies with the bound for softmax probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from abft import threshold
from abft.attention import steps
from abft.attention.tally import ROLES, Tally
from abft.backends import arbitration, reference
from abft.backends.call import Call
from abft.backends.reference import Judgement, Plan
from abft.checksum import Panel
from abft.faults import Strike
from abft.ledger import Outcome
from abft.policy import Policy

#: Products that add up what is equal for equal keys or queries, P or dX: rounded alike, their errors add up, too.
COHERENT = ("O", "dV", "dQ", "dK")
#: Products that are added up over tiles.
SUMMED = ("dK", "dV")

Strikes = tuple[Strike, ...]


@lru_cache(maxsize=4096)
def plan(n: int, k: int, dtype: torch.dtype, form: str, group: int | None, probabilities: bool) -> Plan:
    """The plan of a product of ``n`` columns and depth ``k``; in fp32 or fp64, nothing arrives rounded."""
    p = reference.plan(n, k, dtype, form, group)
    return replace(p, arithmetic=threshold.of_probabilities(p.arithmetic)) if probabilities else p


@dataclass(frozen=True)
class Multiplied:
    """A product that nobody has judged yet: y = a · wᵀ, a (heads, M, K), w (heads, N, K)."""

    name: str
    call: Call
    y: Tensor


def strikes(tally: Tally, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, places: tuple[str, ...] = ()) -> Strikes:
    """What an injector sends to a product of (heads, rows, columns, depth), and to the softmax beside it, in ``places``."""
    if not tally.may_be_struck:
        return ()
    layout = plan(shape[2], shape[3], dtype, tally.policy.panel, tally.policy.group, name in COHERENT).layout
    drawn = tally.strikes(ROLES[name], shape, dtype, (name, *places), layout.columns)
    # dK and dV are sums over tiles: there the place is the sum, and the product's own accumulators are "accumulator".
    return tuple(replace(s, place="accumulator") if s.place == name and name not in SUMMED else s for s in drawn)


@lru_cache(maxsize=256)
def by_checksum(policy: Policy) -> Policy:
    """What judges a product inside an attention: no statistics, for what is small among scores need not be so behind the softmax."""
    return policy if policy.detector == "checksum" else policy.replace(detector="checksum")


def multiply(tally: Tally, name: str, a: Tensor, w: Tensor, hits: Strikes | None = None, clean: Tensor | None = None) -> Multiplied:
    """Compute it. hits: already drawn. clean: ``a`` as it was before they struck, where they lie in the softmax.

    The injector is told of hits whose effect shows here; dK, dV and dS are told where they strike.
    """
    if hits is None:
        hits = strikes(tally, name, (a.shape[0], a.shape[1], w.shape[1], a.shape[2]), a.dtype)
    call = Call(a, w, None, None, False, ROLES[name], by_checksum(tally.policy), tally.site, hits)
    y = _execute(name, call, hits)
    if any(hit.place not in (name, "dS") for hit in hits):
        tally.struck_by(hits, _product(name, a if clean is None else clean, w), y)
    return Multiplied(name, call, y)


def anew(tally: Tally, product: Multiplied, a: Tensor) -> Multiplied:
    """The same product of another left operand."""
    tally.outcome(product.name).executions += 1
    call = replace(product.call, a=a, strikes=())
    return Multiplied(product.name, call, _execute(product.name, call))


def _product(_name: str, a: Tensor, w: Tensor) -> Tensor:
    return steps.multiply(a, w)


def _execute(name: str, call: Call, hits: Strikes = ()) -> Tensor:
    y = _product(name, call.a, call.w)
    reference.strike_accumulators(y, call, hits)
    reference.strike_output(y, hits)
    return y


def judge(tally: Tally, product: Multiplied, row_of: Callable[[int], int], panel: Panel | None = None) -> tuple[Tensor, Judgement | None]:
    """(what is delivered, its judgement); findings go to the tally, their rows numbered by ``row_of``. None: the role is not checked."""
    call, name = product.call, product.name
    if not tally.checks(call.role):
        return product.y, None
    p = plan_for(call, name)
    panel = panel if panel is not None else reference.build_panel(call.w, p.layout)
    j = reference.examine(product.y, call, panel, None, p, call.strikes)
    outcome = tally.outcome(name)
    if j.clean:
        outcome.worst = max(outcome.worst, j.worst)
        return product.y, j
    here = Outcome()
    case = arbitration.Case(call, p, product.y, j, panel, None, None, partial(_execute, name), here)
    y = arbitration.settle(case)
    outcome.executions += here.executions - 1
    outcome.findings += [replace(f, row=row_of(f.row)) for f in here.findings]
    return y, case.judgement


class Panels:
    """The panels of what a plane's tiles multiply by; one for all tiles that see the same keys."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._keys: dict[str, slice] = {}
        self._panels: dict[str, Panel] = {}

    def of(self, name: str, w: Tensor, keys: slice) -> Panel | None:
        """The panel of w, the right operand of a product over these keys; None if the product is not checked."""
        if not self._tally.checks(ROLES[name]):
            return None
        if self._keys.get(name) != keys:
            policy = self._tally.policy
            p = plan(w.shape[1], w.shape[2], w.dtype, policy.panel, policy.group, name in COHERENT)
            self._keys[name], self._panels[name] = keys, reference.build_panel(w, p.layout)
        return self._panels[name]


def plan_for(call: Call, name: str) -> Plan:
    """The plan of a product of this name."""
    policy = call.policy
    return plan(call.w.shape[1], call.a.shape[2], call.a.dtype, policy.panel, policy.group, name in COHERENT)
