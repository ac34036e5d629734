"""``torch.ops.abft.int_product``: the operator behind every checked int8 product.

    int_product(a, b, tb, ledger, site, policy) = a · bᵀ, or a · b if ``tb``; int8 → int32

Like ``abft::product`` (see there: why it receives the weight itself, why it is opaque), without bias, batch and gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abft import faults, ledger, plans, sites
from abft.backends import integer, masked_integer
from abft.backends.call import Call
from abft.checksum import Panel
from abft.errors import DeviceError
from abft.faults import Target
from abft.ops import checked
from abft.ops.checked import LIBRARY

LIBRARY.define("int_product(Tensor a, Tensor b, bool tb, Tensor ledger, Tensor site, str policy) -> Tensor")

#: Tensors that live as long as their module: the only ones whose panels are remembered.
WEIGHTS = (torch.nn.Parameter, torch.nn.Buffer)


def _int_product(a: Tensor, b: Tensor, tb: bool, ledger_: Tensor, site: Tensor, policy_text: str) -> Tensor:
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _int_product(a, b, tb, ledger_, site, policy_text)
    chosen = plans.now(policy_text, sites.index_of(site), "fprop", on_gpu=a.is_cuda)
    source = b if isinstance(b, WEIGHTS) else None
    call = Call(a, b.mT if tb else b, None, source, tb, "fprop", chosen, sites.index_of(site))
    if a.numel() == 0 or b.numel() == 0:
        return integer.multiply(call.a, call.w)
    backend = checked.choose_backend(call)
    if faults.active is not None:
        call = _struck(call, backend)
    if backend == "triton" or a.device.type != "cpu":
        words = torch.from_numpy(ledger.cpu().words) if a.device.type == "cpu" else ledger_
        sites.site_of(call.site).on_uncorrected = chosen.on_uncorrected
        try:
            return checked.product_on_device(call, words, site, backend, _run_on_device)
        finally:
            ledger.issued()
    return checked.product_on_host(call, backend, execute=integer.execute, check=integer.check)


def _struck(call: Call, backend: str) -> Call:
    """The call with the faults that an injector sends; tells the injector what they do to the result."""
    panel = _panel_of(call, backend) if call.source is not None else None
    rows, columns, depth = call.rows, call.w.shape[0], call.a.shape[1]
    target = Target(
        sites.site_of(call.site).name, call.role, rows, columns, depth, torch.int8, torch.int32,
        weight=call.source, panel=None if panel is None else panel.columns, output=torch.int32,
        checks=_plan_of(call, backend).layout.columns, check=torch.int32,
    )  # fmt: skip
    strikes = tuple(faults.strikes(target))
    if not strikes:
        return call
    note = checked.on_strike
    clean = integer.execute(call) if note is not None else None
    faults.strike_weights(target, strikes)
    if note is not None and clean is not None:
        note(call, target, clean, integer.execute(call, strikes), strikes)
    return replace(call, strikes=strikes)


def _plan_of(call: Call, backend: str) -> Any:
    if backend == "triton":
        from abft.backends import triton_integer

        return triton_integer.plan_for(call)
    return integer.plan_for(call)


def _panel_of(call: Call, backend: str) -> Panel:
    if backend == "triton":
        from abft.backends import triton_integer

        return triton_integer.panel_of(call, triton_integer.plan_for(call))
    return integer.panel_of(call, integer.plan_for(call))


def _run_on_device(call: Call, words: Tensor, site: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from abft.backends import triton_integer

        return triton_integer.product(call, words, site)
    return masked_integer.product(call, words, site, backend)


def _int_product_meta(a: Tensor, b: Tensor, tb: bool, ledger_: Tensor, site: Tensor, policy_text: str) -> Tensor:
    if type(a) is Tensor and a.device.type != "meta":
        raise DeviceError(f"abft::int_product has an operand or a site on meta beside real ones on {a.device}; materialise the model first")
    return a.new_empty((a.shape[0], b.shape[1 if tb else 0]), dtype=torch.int32)


for key in ("CPU", "CUDA"):
    LIBRARY.impl("int_product", _int_product, key)
torch.library.register_fake("abft::int_product", _int_product_meta, lib=LIBRARY)

int_product = torch.ops.abft.int_product.default
torch.fx.node.has_side_effect(int_product)
