"""Sites: the named places where products are checked, and the numbers by which device code knows them.

A site travels as a 0-d int64 tensor, never as a Python int: an int per layer would give every layer its
own compiled graph. On a GPU the number is read from the tensor's address, without waiting for the device.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from abft.policy import OnUncorrected, Policy

CAPACITY = 4096
#: Everything past the capacity is counted together here.
OVERFLOW = 0


@dataclass
class Site:
    """name as users see it; what to do when a fault there could not be repaired; the policy that a plan has put in force there."""

    index: int
    name: str
    on_uncorrected: OnUncorrected = "warn"
    tenant: int = 0  # how many modules had this number before
    plan: Policy | None = None


_lock = threading.RLock()  # a garbage collection inside it may release sites
_sites: list[Site] = [Site(OVERFLOW, "(other sites)")]
_free: dict[str, set[int]] = {}
_functional: dict[tuple[str, object], Site] = {}
_index_tensors: dict[torch.device, Tensor] = {}
_functional_tensors: dict[int, Tensor] = {}


def register(name: str, on_uncorrected: OnUncorrected = "warn") -> Site:
    """A new site, or the number of one of this name whose module is gone (reports add up by name anyway)."""
    with _lock:
        if _free.get(name):
            site = _sites[_free[name].pop()]
            site.tenant += 1
            site.on_uncorrected, site.plan = on_uncorrected, None
            return site
        if len(_sites) >= CAPACITY:
            return _sites[OVERFLOW]
        site = Site(len(_sites), name, on_uncorrected)
        _sites.append(site)
        return site


def release(site: Site) -> None:
    """The module of this site is gone."""
    if site.index != OVERFLOW:
        with _lock:
            _free.setdefault(site.name, set()).add(site.index)


def functional(name: str, on_uncorrected: OnUncorrected) -> Site:
    """The one site of a function called without a module, per reaction."""
    key = (name, on_uncorrected)
    site = _functional.get(key)
    if site is None:
        site = _functional[key] = register(name, on_uncorrected)
    return site


def functional_tensor(site: Site) -> Tensor:
    """The number of a function's site as a 0-d tensor on a CPU; always the same one."""
    found = _functional_tensors.get(site.index)
    if found is None:
        found = _functional_tensors[site.index] = as_tensor(site, torch.device("cpu"))
    return found


def site_of(index: int) -> Site:
    return _sites[index] if 0 <= index < len(_sites) else _sites[OVERFLOW]


def count() -> int:
    return len(_sites)


def _indices(device: torch.device) -> Tensor:
    if device not in _index_tensors:
        with torch.inference_mode(False), torch.no_grad(), unset_fake_temporarily():
            table = torch.arange(CAPACITY, dtype=torch.int64, device=device)
        if device.type == "cuda":
            # Graphs may bake the address; without this, every replay would copy the number in.
            torch._dynamo.mark_static_address(table)
        _index_tensors[device] = table
    return _index_tensors[device]


def as_tensor(site: Site, device: torch.device) -> Tensor:
    """The site's number as a 0-d tensor on ``device``; outside of any tracer."""
    table = _indices(device)
    with unset_fake_temporarily():
        return table[site.index]


def at(index: int, device: torch.device) -> Tensor:
    """The same inside a tracer, whose graph then holds the table and the number."""
    return _index_tensors[device][index]


def here(tensor: Tensor, device: torch.device) -> Tensor:
    """A module's own site tensor, on another device than it lies."""
    if torch.compiler.is_compiling():
        return at(number_of(tensor), device)
    return as_tensor(site_of(number_of(tensor)), device)


def number_of(tensor: Tensor) -> int:
    """The site's number of a module's own site tensor, on any device, meta included."""
    return int(tensor.storage_offset())


def index_of(tensor: Tensor) -> int:
    """The site's number, without waiting for a device."""
    if tensor.device.type == "cpu":
        return int(tensor.numpy())
    table = _index_tensors.get(tensor.device)
    if table is None:
        return OVERFLOW
    offset = (tensor.data_ptr() - table.data_ptr()) // tensor.element_size()
    return offset if 0 <= offset < CAPACITY else OVERFLOW
