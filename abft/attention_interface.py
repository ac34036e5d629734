"""Which modules of Hugging Face's models multiply by themselves, and how their attention is switched to ``abft.huggingface``.

Nothing here imports transformers: where it has not been imported, no model is from it. A configuration is switched by one string on
it, which equals "abft" and remembers what was there; transformers neither saves nor prints it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

NAME = "abft"
_ATTRIBUTE = "_attn_implementation_internal"


class Switched(str):
    """The name "abft", put on a configuration by ``protect``; before: the implementation it had."""

    before: str | None

    def __new__(cls, before: str | None = None) -> Switched:
        self = super().__new__(cls, NAME)
        self.before = before
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Switched, (self.before,)


def register() -> None:
    """Make ``attn_implementation="abft"`` known to transformers."""
    from abft import huggingface  # noqa: F401


@cache
def is_called_by(kind: type) -> bool:
    """Whether a class calls its attention through transformers' ``AttentionInterface``."""
    base = _pretrained()
    if base is None or issubclass(kind, base):  # models look into it for other reasons
        return False
    return any("ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in _methods(kind))


@cache
def is_attention(kind: type) -> bool:
    """Whether a class, of a file with transformers' models, is by its name attention that does not go through the interface."""
    base = _pretrained()
    if base is None or "Attention" not in kind.__name__ or is_called_by(kind):
        return False
    values = vars(sys.modules.get(kind.__module__, sys)).values()
    return any(isinstance(v, type) and issubclass(v, base) for v in values)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (in, out)."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and isinstance(module, kind)


def multiplies(module: nn.Module) -> bool:
    """Whether a module is one of transformers' own that multiply in their forward."""
    kind = type(module).__dict__.get("_abft_base", type(module))
    if is_conv1d(module) or is_called_by(kind):
        return True
    # Of nested ones only the innermost: those around it merely add layers.
    return is_attention(kind) and not any(
        m is not module and ("Attention" in type(m).__name__) and not isinstance(m, nn.Linear) for m in module.modules()
    )


def is_on(module: nn.Module) -> bool:
    """Whether a module's attention is that of ``abft.huggingface``."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME


def switch(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> None:
    """Have the ``chosen`` modules' attention computed by ``abft.huggingface``, and none of which nothing is chosen.

    Models whose attention is not torch's (neither ``sdpa`` nor soft-capped: sinks, for one), or whose configuration asks for all attention
    weights, keep their implementation.
    """
    if _pretrained() is None:
        return
    wanted: dict[int, Any] = {}
    refused: set[int] = set()
    for module, around in _with_models(model):
        if not is_called_by(type(module).__dict__.get("_abft_base", type(module))) or not hasattr(module, "config") or not chosen(module):
            continue
        configs = [module.config, *(m.config for m in around)]
        if _is_torchs(module, around):
            wanted.update({id(c): c for c in configs})
        else:
            refused.update(id(c) for c in configs[:2])
    for config in _configs(model):
        now = getattr(config, _ATTRIBUTE, None)
        if id(config) in wanted and id(config) not in refused:
            if now != NAME:
                register()
                setattr(config, _ATTRIBUTE, Switched(now))
        elif isinstance(now, Switched):
            setattr(config, _ATTRIBUTE, now.before)


def restore(model: nn.Module) -> None:
    """Undo ``switch``."""
    switch(model, lambda module: False)


def _is_torchs(module: nn.Module, around: list[Any]) -> bool:
    """Whether what a module asks of its attention is what ``abft.huggingface`` computes."""
    if getattr(module.config, "output_attentions", False):
        return False  # transformers refuses it, even to save the configuration, unless the implementation is "eager"
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    softcapped = eager is not None and "softcap" in inspect.signature(eager).parameters
    return softcapped or not around or bool(getattr(around[0], "_supports_sdpa", False))


def _with_models(module: nn.Module, around: tuple[Any, ...] = ()) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Every module with the pretrained models around it, the nearest first."""
    base = _pretrained()
    if base is not None and isinstance(module, base):
        around = (module, *around)
    yield module, list(around)
    for child in module.children():
        yield from _with_models(child, around)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that a module of ``model`` holds."""
    held = [getattr(m, "config", None) for m in model.modules()]
    return list({id(c): c for c in held if hasattr(c, _ATTRIBUTE)}.values())


def _pretrained() -> Any:
    return getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)


def _methods(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for value in vars(base).values():
            f = inspect.unwrap(value) if callable(value) else None
            if hasattr(f, "__code__"):
                yield f
