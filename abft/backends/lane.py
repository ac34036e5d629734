"""The call that is like an earlier one: what was decided for it is not decided again.

On a CPU a small layer is bound by Python, not by arithmetic, and nearly every call repeats an earlier one with other rows:
the same weight, bias, policy, dtype. A lane is open for such calls; to find that it fits takes a handful of comparisons. A weight or bias
that was changed on purpose has its panel filled anew on the way (``renewal``). A lane
can only confirm: what is unusual (an injector, a weight that may have changed, the audit of a panel, a row that the quick
judgement does not like) takes the whole way, with the product that is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abft import faults, panels
from abft.backends import renewal
from abft.backends.call import Call
from abft.backends.quick import Quick
from abft.policy import Policy

#: A remembered panel is compared with its own checksum at every so-many-th use: a fault in a sketch column only
#: widens bounds, and no residual would ever tell.
PANEL_AUDIT = 64


@dataclass(frozen=True, slots=True)
class Lane:
    """A product that was clean, and all that must be the same for the next one to be judged as it was."""

    entry: panels.Entry
    quick: Quick
    policy: Policy
    text: str  # of the policy
    backend: str
    transposed: bool
    biased: bool
    frozen: bool
    dtype: torch.dtype
    shape: torch.Size  # of the weight
    depth: int
    watched: bool  # by the second detector


def open_for(call: Call, backend: str, entry: panels.Entry, quick: Quick) -> None:
    """The next call of this kind may take the lane. The call was clean by ``quick``, with nothing repeated and all checks on."""
    if call.policy.redundancy == "none" and call.a.dim() == 2 and (call.bias is None) == (call.bias_source is None):
        owner = panels.panels_of(call.source)  # type: ignore[arg-type]
        owner.lanes[call.role] = Lane(
            entry, quick, call.policy, call.policy.text, backend, call.transposed, call.bias is not None, call.policy.weights == "frozen",
            call.a.dtype, call.source.shape, call.a.shape[1], call.policy.detector != "checksum",  # type: ignore[union-attr]
        )  # fmt: skip


def find(a: Tensor, b: Tensor, transposed: bool, bias: Tensor | None, role: str, policy: str) -> Lane | None:
    """The lane that a · bᵀ (+ bias), or a · b if ``transposed``, may take under the policy of that text."""
    if type(b) is not torch.nn.Parameter or faults.active is not None:
        return None
    owner = b.__dict__.get(panels.ATTRIBUTE)
    if type(owner) is not panels.Panels or owner.source != id(b):
        return None
    lane = owner.lanes.get(role)
    if (
        lane is None
        or lane.transposed is not transposed
        or a.dtype is not lane.dtype
        or not (a.is_cpu and b.is_cpu)
        or lane.text != policy
        or b.shape != lane.shape  # a weight may be cut in place, at the same address
    ):
        return None
    shape = a.shape
    if len(shape) != 2 or shape[1] != lane.depth or not shape[0]:
        return None
    entry = lane.entry
    # A panel or bias that was rebuilt has lost its prepared judgement, or has another.
    if entry.quick is not lane.quick or entry.uses % PANEL_AUDIT == PANEL_AUDIT - 1:
        return None
    now, bias_now = panels.validity(b, owner, lane.frozen), None
    if bias is None:
        if lane.biased:
            return None
        as_remembered = entry.validity == now
    else:
        kept = entry.bias
        if not lane.biased or kept is None or kept.shape != bias.shape or kept.owner.source != id(bias):
            return None
        its_own = bias.__dict__.get(panels.ATTRIBUTE) is kept.owner
        if not its_own:
            return None
        bias_now = panels.validity(bias, kept.owner, lane.frozen)
        as_remembered = entry.validity == now and kept.validity == bias_now
    if as_remembered or (not lane.frozen and renewal.renew(entry, lane.quick, b, transposed, now, bias, bias_now)):
        return lane
    return None
