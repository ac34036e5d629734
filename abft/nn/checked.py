"""What makes an existing module a checked one: a subclass built from the module's own class.

``module.__class__`` is exchanged in place, so Parameters, hooks, tying, optimizer references, ``isinstance`` and wrappers
around the module stay as they are. The state abft keeps on the module is the attributes below; none is a
parameter, a buffer or a key of the state dict.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from abft import attention_interface, ledger, panels, sites
from abft.functional import bypassed, linear_at
from abft.modes import ProductMode
from abft.policy import Policy

ATTRIBUTES = ("_abft_site", "_abft_policy", "_abft_name", "_abft_attended")


class Checked:
    """Mixin before the module's own class: where its products are counted, and by which policy."""

    _abft_site: Tensor
    _abft_policy: Policy | None
    _abft_name: str

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)  # type: ignore[misc]
        attach(self, self._abft_name, self._abft_policy, moved=True)  # type: ignore[arg-type]
        panels.announce(panels.sources_of(self))  # type: ignore[arg-type]
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            _follow(self)  # type: ignore[arg-type]

    def register_parameter(self, name: str, param: Any) -> None:
        super().register_parameter(name, param)  # type: ignore[misc]
        _follow(self)  # type: ignore[arg-type]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        _follow(self)  # type: ignore[arg-type]
        panels.announce(panels.sources_of(self))  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another place where products are checked: it gets a site of its own.
        return {k: v for k, v in self.__dict__.items() if k != "_abft_site"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        attach(self, self._abft_name, self._abft_policy)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_abft_base" in type(self).__dict__:
            return _blank, (type(self)._abft_base,), self.__getstate__()  # type: ignore[attr-defined]
        return super().__reduce_ex__(protocol)


class CheckedForward(Checked):
    """For modules whose forward is nn.Linear's own."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_at(self._abft_site, input, self.weight, self.bias, self._abft_policy)  # type: ignore[attr-defined]


class ScopedForward(Checked):
    """For nn.MultiheadAttention, and other modules with a forward of their own: the products inside it are intercepted."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ProductMode(self._abft_site, self._abft_policy):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class InterfacedForward(Checked):
    """For attention of transformers' models that comes to ``abft.huggingface`` by itself. No mode is on meanwhile: its projections
    are modules of their own, and take the shortest way."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not attention_interface.is_on(self):  # type: ignore[arg-type]  # it was refused, or somebody has set another one since
            with ProductMode(self._abft_site, self._abft_policy):
                out = super().forward(*args, **kwargs)  # type: ignore[misc]
            if getattr(getattr(self, "config", None), "_attn_implementation", None) == "eager":
                _count("the softmax of eager attention")
            return out
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling() and not self.__dict__.pop("_abft_attended", False):
            _count(f"{self._abft_name}: attention beside the interface")
        return out


def _count(reason: str) -> None:
    bypassed(reason, lambda: None)


def attach(module: nn.Module, name: str, policy: Policy | None, *, moved: bool = False) -> None:
    """Give a module its site, on its weight's device; a module that is moved or attached again by its name keeps the number."""
    device = _device_of(module)
    reaction = policy.on_uncorrected if policy is not None else "warn"
    held = module.__dict__.get("_abft_site")
    site = None if held is None else sites.site_of(sites.number_of(held))
    if site is None or (site.name != name and not moved):
        site = sites.register(name, reaction)
        weakref.finalize(module, sites.release, site).atexit = False
    elif not moved:
        site.on_uncorrected = reaction
    ledger.make(device)
    module.__dict__["_abft_site"] = sites.as_tensor(site, device)
    module.__dict__["_abft_policy"] = policy
    module.__dict__["_abft_name"] = name


def _follow(module: nn.Module) -> None:
    """The site of a module lies where its weight lies, also when the weight came without ``_apply`` (assigned, loaded)."""
    held = module.__dict__.get("_abft_site")
    if held is not None and held.device != _device_of(module):
        attach(module, module.__dict__["_abft_name"], module.__dict__["_abft_policy"], moved=True)


def _device_of(module: nn.Module) -> torch.device:
    first = next(iter(module.parameters(recurse=True)), None)
    return torch.device("cpu") if first is None else first.device


@cache
def checked_class(base: type[nn.Module]) -> type[nn.Module]:
    """The checked subclass of a module class; one per class, so that graphs are shared."""
    mixin: type[Checked] = CheckedForward if base.forward is nn.Linear.forward else ScopedForward
    if attention_interface.is_called_by(base):  # type: ignore[arg-type]
        attention_interface.register()  # not only for protect: the class may come out of a pickle
        mixin = InterfacedForward
    return type(f"Checked{base.__name__}", (mixin, base), {"_abft_base": base, "__module__": base.__module__})


def checked_type(module: nn.Module) -> type[nn.Module]:
    """The class that makes ``module`` a checked one."""
    cls = type(module)
    if _is_parametrized(module):
        # torch gave the module a class of its own and, when the parametrization is removed, wants to find its properties on
        # it and the class to go back to right below it.
        return _on(cls, checked_class(cls.__bases__[0]), {"_abft_base": cls})  # type: ignore[arg-type]
    return checked_class(cls)  # type: ignore[arg-type]


def unchecked_type(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` had before it was checked; None if it is not, or was born so."""
    cls = type(module)
    base = cls.__dict__.get("_abft_base")
    if not issubclass(cls, Checked):
        return None
    if not _is_parametrized(module):
        return base if base is not None else _wrapped_since(cls)
    if base is None:  # parametrized after it was protected
        below = cls.__bases__[0].__dict__.get("_abft_base")
        return None if below is None else _on(cls, below, {})
    for name in module.parametrizations:  # type: ignore[union-attr]  # parametrized once more, after it was protected
        if name not in base.__dict__:
            setattr(base, name, cls.__dict__[name])
    return base


def _wrapped_since(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class without abft in it, where somebody (FSDP2's fully_shard) has put a subclass around the checked one."""
    *others, checked = cls.__bases__
    below = checked.__dict__.get("_abft_base")
    if below is None:
        return None
    kept = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace(checked.__name__, below.__name__), (*others, below), kept)


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def _on(cls: type[nn.Module], below: type[nn.Module], more: dict[str, Any]) -> type[nn.Module]:
    kept = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__", "_abft_base")}
    return type(f"Parametrized{below.__name__}", (below,), kept | more)


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = checked_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)
