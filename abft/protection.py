"""``protect`` and ``unprotect``: a model's linear layers and attention modules become checked ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from abft import attention_interface, bits, panels
from abft import policy as policies
from abft.errors import AbftError
from abft.nn.checked import ATTRIBUTES, Checked, attach, checked_type, unchecked_type
from abft.policy import Policy, PolicyLike, Strategy

Model = TypeVar("Model", bound=nn.Module)
FilterFn = Callable[[nn.Module, str], bool]

_FAST_PATH = "_abft_fast_path"
#: … of which classes, by which attribute, and its value without them.
_FAST_PATHS: tuple[tuple[type[nn.Module], str, object], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0), (nn.TransformerEncoder, "use_nested_tensor", False),
)  # fmt: skip


def protect(
    model: Model, policy: PolicyLike | Mapping[str, Any] | Strategy = None, *, filter_fn: FilterFn | None = None, name: str | None = None
) -> Model:
    """Check every product of the linear layers and attention modules of ``model``, in place; returns the model.

    Those are nn.Linear and nn.MultiheadAttention; in models of transformers also GPT-2's Conv1D, and attention: where it goes through
    transformers' interface the configuration is switched to ``attn_implementation="abft"`` (see ``abft.huggingface``).

    policy: a Policy, a preset's name, None (the policy in force when a layer runs), a mapping from module names
    to either, where exact names win over ``"re:…"`` keys and a None value means unprotected, or an
    ``abft.policies.Adaptive``, which chooses for every module and may choose again while the model runs.
    filter_fn(module, fqn): True = protect. name: prefix of the sites' names. Idempotent; a second call may change policies.

    Parameters, hooks, tying, state-dict keys and ``isinstance`` stay. Not covered (see ``abft.coverage``):
    attention that other models call as a function (use ``protected``), convolutions, embeddings, and layers whose weights another module
    reads by itself. Raises TypeError for something that is no
    module, or a mapping together with filter_fn; PolicyError (a ValueError) for a mapping key that matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"protect needs a torch.nn.Module; got {type(model).__name__}")
    if isinstance(policy, Mapping) and filter_fn is not None:
        raise TypeError("protect takes a mapping of policies or a filter_fn, not both: a mapping already names its modules")
    found = {fqn: module for fqn, module in model.named_modules() if why_not(module) is None}
    hidden = hidden_linears(model)
    found = {fqn: module for fqn, module in found.items() if module not in hidden}
    if isinstance(policy, Mapping):
        chosen = policies.resolve(policy, list(found))
        unprotected = {fqn for fqn, p in chosen.items() if p is None}
    else:
        unprotected = {fqn for fqn, m in found.items() if filter_fn is not None and not filter_fn(m, fqn)}
        if isinstance(policy, Strategy):
            one: Policy | None = policy.choose({fqn: m for fqn, m in found.items() if fqn not in unprotected})
        else:
            one = None if policy is None else policies.as_policy(policy)
        chosen = dict.fromkeys(found, one)
    prefix = f"{name}." if name else ""
    for fqn, module in found.items():
        if fqn not in unprotected:
            _protect_one(module, f"{prefix}{fqn}" if fqn else (name or _plain_name(module)), chosen[fqn])
        elif isinstance(policy, Mapping):
            _unprotect_one(module)  # None is a wish, also after an earlier protect
    if isinstance(policy, Strategy):
        policy.enforce()
    _switch_fast_paths(model, on=False)
    attention_interface.switch(model, lambda module: isinstance(module, Checked))
    return model


def unprotect(model: Model) -> Model:
    """The exact inverse of ``protect``: classes, attributes and fast paths are as they were. Returns the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unprotect needs a torch.nn.Module; got {type(model).__name__}")
    for module in model.modules():
        _unprotect_one(module)
    _switch_fast_paths(model, on=True)
    attention_interface.restore(model)
    return model


def refresh(model: nn.Module) -> None:
    """Say that the weights changed on purpose: panels (frozen ones too) are rebuilt at their next use."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"refresh needs a torch.nn.Module; got {type(model).__name__}")
    panels.announce(panels.sources_of(model))


def restore(model: nn.Module) -> int:
    """Write the remembered bits back into weights that changed in memory; returns how many elements were restored.

    Elements are named by integer fingerprints and restored bit for bit, whatever their dtype. Compares every weight that has
    been multiplied since it was last edited on purpose; reads the device, and waits for it. Call it between steps or requests,
    when nobody else reads or writes the weights. Raises AbftError, and writes nothing, if a weight changed in a way whose
    elements cannot be named (two in one column of a group): reload that weight. Biases are not restored.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore needs a torch.nn.Module; got {type(model).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    changed = [(source, panels.changed_elements(source)) for source in panels.sources_of(model)]
    lost = [names.get(id(source), "a gathered weight") for source, elements in changed if elements is None]
    if lost:
        raise AbftError(
            f"the bits of {', '.join(lost)} changed in memory, and which elements did cannot be told: nothing was restored. "
            "Load these weights again, or call abft.refresh(model) if they were edited on purpose."
        )
    for source, elements in changed:
        if not elements:
            continue
        integers, width = bits.as_integers(source.data), bits.WIDTH[source.dtype]
        for row, column, pattern in elements:
            integers[row, column] = pattern - (1 << width) if pattern >> (width - 1) else pattern
    return sum(len(elements or ()) for _, elements in changed)


def why_not(module: nn.Module) -> str | None:
    """Why a module cannot be protected by exchanging its class; None if it can."""
    if not isinstance(module, nn.Linear | nn.MultiheadAttention) and not attention_interface.multiplies(module):
        return "not an nn.Linear"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "uninitialised lazy module: run one forward first"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def hidden_linears(model: nn.Module) -> set[nn.Module]:
    """Linear layers whose weights another module reads without calling them: nn.MultiheadAttention's out_proj, checked with it."""
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def _protect_one(module: nn.Module, name: str, policy: Policy | None) -> None:
    if not isinstance(module, Checked):
        module.__class__ = checked_type(module)
    attach(module, name, policy)


def _unprotect_one(module: nn.Module) -> None:
    plain = unchecked_type(module)
    if plain is None:
        return  # never protected, or checked by birth like abft.Linear
    module.__class__ = plain
    for attribute in ATTRIBUTES:
        module.__dict__.pop(attribute, None)
    panels.forget(module.parameters())


def _plain_name(module: nn.Module) -> str:
    return type(module).__dict__.get("_abft_base", type(module)).__name__


def _switch_fast_paths(model: nn.Module, *, on: bool) -> None:
    # nn.TransformerEncoderLayer's inference fast path reads its layers' weights in one fused kernel that no check sees, and
    # nn.TransformerEncoder hands its layers nested tensors, which only that path takes.
    for module in model.modules():
        for kind, attribute, off in _FAST_PATHS:
            if not isinstance(module, kind) or not hasattr(module, attribute):
                continue
            if not on and _FAST_PATH not in module.__dict__:
                module.__dict__[_FAST_PATH] = getattr(module, attribute)
                setattr(module, attribute, off)
            elif on and _FAST_PATH in module.__dict__:
                setattr(module, attribute, module.__dict__.pop(_FAST_PATH))
