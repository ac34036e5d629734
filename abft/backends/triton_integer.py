"""The triton backend of int8 products: plan on the host, product and repair on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abft import checksum, digits
from abft.backends import integer, triton
from abft.backends.call import Call
from abft.checksum import Groups, Layout, Panel

if TYPE_CHECKING:
    from abft.triton_kernels.configs import Config


@dataclass(frozen=True)
class Plan:
    """Everything about a product's checks that its shape, device and policy decide."""

    config: Config
    layout: Layout
    tiles_per_group: int


@lru_cache(maxsize=8192)
def plan(n: int, architecture: int | None, form: str, group: int | None) -> Plan:
    """The plan of a product; ``architecture`` as in the table of configs, None: interpreted."""
    from abft.triton_kernels import configs

    layout = digits.layout(n, form, group or integer.GROUP, unit=configs.unit(architecture, "int8", group))
    width = layout.groups.width
    # K does not matter for what many rows take.
    config = configs.choose(architecture, "int8", group, n, digits.DEPTH, width, layout.columns)
    return Plan(config, layout, -(-width // config.bn))


def plan_for(call: Call) -> Plan:
    """The plan of a call on its own device."""
    architecture = None if call.a.device.type == "cpu" else triton.family_of(call.a.device)
    return plan(call.w.shape[0], architecture, call.policy.panel, call.policy.group)


def panel_of(call: Call, p: Plan) -> Panel:
    """The panel of a call's W, remembered if W is a weight."""
    build = integer.build_panel
    return build(call.w, p.layout) if call.source is None else triton.remembered_panel(call, p.layout, build)


@lru_cache(maxsize=1024)
def column_weights(groups: Groups, kinds: tuple[checksum.Kind, ...], device: torch.device) -> Tensor:
    """w_kind[n] of every column, (kinds, N) int32."""
    return triton.column_weights(groups, kinds, device).to(torch.int32)


def product(call: Call, words: Tensor, site: Tensor) -> Tensor:
    """Y = A Wᵀ in int32, checked and, if the policy says so, repaired; nothing is read back to the host.

    words: the ledger's int64 words, on the device of ``call.a``; site: 0-d int64 tensor, read on the device.
    """
    if call.policy.level == "off" or call.role not in call.policy.roles:
        return integer.execute(call, call.strikes)
    from abft.triton_kernels import gemm, integer_check
    from abft.triton_kernels import integer as kernels

    p = plan_for(call)
    panel = panel_of(call, p)
    triton.strike_panel(call, panel)
    weights = column_weights(p.layout.groups, p.layout.form.kinds, call.a.device)
    operands = gemm.Product(call.a, call.w, None, panel.columns, weights, p.layout.groups.count, p.config, numbered=False)
    judge = integer_check.ExactJudge(
        p.layout.groups.count, p.tiles_per_group, call.policy.level == "correct", triton.is_repeated(call)
    )
    with triton.quiet(), triton.host_ledger(words):
        evidence = kernels.multiply(operands, triton.descriptors(call.strikes, call.a.device))
        integer_check.check(operands, evidence, judge, words, site, triton.labels_of(call))
    return evidence.y

