"""``abft.coverage``: which products of a model are checked, and which are not; by looking, or by counting one pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abft import attention_interface, panels, plans, protection, scope, sites
from abft import policy as policies
from abft.nn.checked import Checked, InterfacedForward, ScopedForward
from abft.ops.attention import attention, attention_backward
from abft.ops.checked import product
from abft.ops.flops import attention_parts, int_product_flops, paged_parts, varlen_parts
from abft.ops.integer import int_product
from abft.ops.paged import paged_attention
from abft.ops.varlen import varlen_attention, varlen_attention_backward


@dataclass(frozen=True)
class ModuleCoverage:
    """One module that multiplies: whether and how its products are checked, by which backend, or why not."""

    name: str
    type: str
    covered: bool
    how: str
    backend: str
    policy: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """modules; covered of total; flop_share: checked share of the matrix FLOPs of one forward and backward, if counted."""

    modules: tuple[ModuleCoverage, ...]
    covered: int
    total: int
    flop_share: float | None = None

    def __str__(self) -> str:
        share = "" if self.flop_share is None else f"; {100 * self.flop_share:.1f} % of the matrix FLOPs of a forward and backward"
        lines = [f"{self.covered} of {self.total} modules that multiply are checked{share}"]
        width = max((len(m.name) for m in self.modules), default=4)
        for m in self.modules:
            state = f"{m.how}, backend {m.backend}, {m.policy}" if m.covered else f"NOT CHECKED: {m.reason}"
            lines.append(f"{m.name or '(root)':<{width}}  {m.type:<24} {state}")
        return "\n".join(lines)


#: Modules other than nn.Linear that multiply matrices.
_MULTIPLYING = (
    nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)  # fmt: skip


def coverage(model: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Report every module of ``model`` that multiplies matrices. With inputs, one forward and backward is counted.

    The counting pass leaves parameters' ``.grad``, buffers and random states as they were; it does add to the ledger.
    Anything computed by functions rather than modules, other attention included, shows in ``flop_share`` only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"coverage needs a torch.nn.Module; got {type(model).__name__}")
    readers = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    modules = tuple(_describe(name, m, readers.get(m)) for name, m in model.named_modules() if _multiplies(m))
    share = _flop_share(model, args, kwargs) if args or kwargs else None
    return Coverage(modules, sum(m.covered for m in modules), len(modules), share)


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, *_MULTIPLYING)) or attention_interface.multiplies(module):
        return True
    # Layers like GPT-2's Conv1D: a leaf with a matrix that is no embedding and no normalisation.
    weight = module.__dict__.get("_parameters", {}).get("weight")
    return (
        not list(module.children())
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    )


def _describe(name: str, module: nn.Module, reader: nn.Module | None) -> ModuleCoverage:
    """reader: the module above it that reads its weight without calling it, and is covered for it."""
    kind = type(module).__dict__.get("_abft_base", type(module)).__name__
    if reader is not None and isinstance(reader, Checked):
        above = _describe(name, reader, None)
        return replace(above, type=kind, how="in the module above it" if above.covered else "")
    if not isinstance(module, Checked):
        hidden = reader is not None
        reason = "its weight is read by the module above it, not through its forward" if hidden else protection.why_not(module)
        if reason is None:
            reason = "not protected"
        elif reason == "not an nn.Linear":
            reason = f"{kind} is not checked yet"
        return ModuleCoverage(name, kind, False, "", "", "", reason)
    policy = plans.planned(scope.in_force(module._abft_policy), sites.number_of(module._abft_site))
    heads = module if isinstance(module, nn.MultiheadAttention) else None
    weight = getattr(module if heads is None else heads.out_proj, "weight", None)
    if (
        isinstance(weight, Tensor)
        and type(weight) not in (Tensor, nn.Parameter)
        and torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)
        and not panels.is_shard(weight)  # gathered before each product, which then sees a plain weight
    ):
        return ModuleCoverage(name, kind, False, "", "", "", f"its weight is a {type(weight).__name__}, left to its own kernels")
    if policy.level == "off" and policy.redundancy == "none":
        return ModuleCoverage(name, kind, False, "", "", "", "level off")
    how = "products inside its own forward" if isinstance(module, ScopedForward | InterfacedForward) else "its products"
    if isinstance(module, InterfacedForward):
        weight = next(module.parameters(), None)
        if attention_interface.is_on(module):
            how = "attention"
            if isinstance(weight, Tensor) and weight.is_cuda:
                return ModuleCoverage(name, kind, False, "", "", "", "attention left to torch on a GPU")
    if heads is not None:
        how = "projections and attention" if isinstance(weight, Tensor) and not weight.is_cuda else "projections, attention left to torch"
    roles = "" if policy.roles == policies.ROLES else f", roles {'+'.join(sorted(policy.roles))}"
    sampled = "" if policy.every == 1 else f", one of {policy.every}"
    text = f"level {policy.level}{sampled}{roles}" + ("" if policy.redundancy == "none" else f", {policy.redundancy}")
    return ModuleCoverage(name, kind, True, how, _backend(policy, weight), text, "")


def _backend(policy: policies.Policy, weight: Any) -> str:
    if policy.backend != "auto" or not isinstance(weight, Tensor):
        return policy.backend
    if weight.device.type != "cuda":
        return "reference"
    try:
        from abft.backends import triton
    except ImportError:
        return "reference"
    return "triton" if triton.available(weight.device, weight.dtype) is None else "reference"


# --- counting ----------------------------------------------------------------------------------------


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores and their product with the values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """The scores again, and the gradients of queries, keys, values and probabilities."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _int_mm_flops(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return int_product_flops(a.shape, b.shape, True)


#: Torch has no formula for attention on a CPU, nor for int8 products; without one, unchecked ones would not lower the share.
_UNREGISTERED: dict[Any, Any] = {
    torch.ops.aten._int_mm: _int_mm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _FlopShare(TorchDispatchMode):
    """FLOPs of every matrix operator that runs, and of the checked ones among them."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # imports Triton

        self.formulas = {**_UNREGISTERED, **flop_registry}
        self.checked = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.total += flops
            self.checked += sum(_shares(func, args, flops))
        return out


def _shares(func: Any, args: tuple[Any, ...], flops: int) -> list[int]:
    """The checked parts of a checked operator's FLOPs."""
    if func not in (product, int_product, attention, attention_backward, varlen_attention, varlen_attention_backward, paged_attention):
        return []
    last = max(i for i, a in enumerate(args) if isinstance(a, str))  # of a backward an output of the forward may follow
    policy = plans.planned(policies.decode(args[last]), sites.index_of(args[last - 1 if func is not product else last - 2]))
    flops = flops // policy.every
    if policy.redundancy != "none":
        return [flops]
    if policy.level == "off":
        return []
    if func in (product, int_product):
        return [flops] if (args[-2] if func is product else "fprop") in policy.roles else []
    direction = "fprop" if func in (attention, varlen_attention, paged_attention) else "dgrad"
    parts = _parts(func, args, direction == "dgrad")
    return [part // policy.every for role, part in parts.items() if policy.roles & {role, direction}]


def _parts(func: Any, args: tuple[Any, ...], backward: bool) -> dict[str, int]:
    """FLOPs of an attention's roles."""
    if func is varlen_attention:
        return varlen_parts(*args[:7], backward=backward)
    if func is varlen_attention_backward:
        return varlen_parts(*args[1:6], *args[7:9], backward=backward)  # between them: the forward's statistics
    if func is paged_attention:
        return paged_parts(*args[:3], *args[8:10])
    query, key, value = args[2:5] if backward else args[:3]
    return attention_parts(query.shape, key.shape, value.shape, backward=backward)


def _flop_share(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    counter = _FlopShare()
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), counter:
        outputs = [t for t in tree_leaves(_tensors_of(model(*args, **kwargs))) if isinstance(t, Tensor) and t.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if outputs and parameters:
            loss = torch.stack([t.float().sum() for t in outputs]).sum()
            torch.autograd.grad(loss, parameters + inputs, allow_unused=True)
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name in buffers and not b.is_meta:
                b.copy_(buffers[name])
    return counter.checked / counter.total if counter.total else None


def _tensors_of(output: Any) -> Any:
    # Hugging Face outputs are ordered dicts of their own class.
    return dict(output) if hasattr(output, "keys") else output
