"""``profile``: a model's costs and sensitivities, measured on the spot, on the inputs and the device at hand."""

from __future__ import annotations

import copy
import glob
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from abft import injection, ledger, protection, reporting, sites
from abft.errors import NotInjected
from abft.injection import Fault, Mixture
from abft.nn.checked import Checked
from abft.policies import options
from abft.policies.profile import Profile, SiteProfile, complete
from abft.policy import Policy

_QUIET = Policy(on_uncorrected="record")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def profile(
    model: nn.Module, *args: Any, training: bool = False, harm: float = 1e-3, trials: int = 32, rounds: int = 7, seed: int = 0,
    mixture: Mixture | None = None, lap_seconds: float = 2e-3, **kwargs: Any,
) -> Profile:  # fmt: skip
    """Measure what ``abft.policies.Adaptive`` needs to know: ``model(*args, **kwargs)`` is run many times, on a copy of the model.

    Costs: every option of every module that ``protect`` would take, on the inputs it receives in one pass, ``rounds`` times in turn;
    with ``training`` forward and backward. Sensitivity: ``trials`` faults of ``mixture`` (default: ``Mixture.gpu_2026()``) at every such
    module, unprotected, one per pass; harmful are those that change a row of the model's output by more than ``harm`` (relative L2) or
    make it non-finite; with ``training`` likewise a parameter's gradient. The estimate is Jeffreys': (harmful + 1/2) / (trials + 1).

    Takes about (options × rounds + trials) passes per module. Waits for the device: it is no part of the hot path. What it runs is counted
    in the ledger, at sites called "(profile)".
    """
    subject = protection.unprotect(copy.deepcopy(model))
    modules = {
        name: module for name, module in subject.named_modules()
        if protection.why_not(module) is None and module not in protection.hidden_linears(subject)
    }  # fmt: skip
    run = _Run(subject, args, kwargs, training, seed)
    calls = run.recorded(modules)
    modules = {name: module for name, module in modules.items() if calls[name]}
    timing = {name: _times(module, calls[name], training, rounds, lap_seconds) for name, module in modules.items()}
    products = _products(run, modules)
    harms = _sensitivities(run, modules, calls, harm, trials, seed, mixture or Mixture.gpu_2026()) if trials else {}
    sites = {}
    for name, module in modules.items():
        base, costs = timing[name]
        harmful = harms.get(name)
        sensitivity = 1.0 if harmful is None else (harmful + 0.5) / (trials + 1)
        dtype, shape = _shape_of(module, calls[name])
        sites[name] = SiteProfile(products[name] or len(calls[name]), base, costs, dtype, shape, sensitivity, trials)
    device = next((str(p.device) for p in model.parameters()), "cpu")
    whole = statistics.median(_seconds(run.once, device) for _ in range(max(3, rounds)))
    provenance = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads(), "training": training, "seed": seed}
    return Profile(sites, max(whole, sum(s.seconds for s in sites.values())), harm, "measured", provenance)


class _Run:
    """The model with its inputs: one pass, always with the same random numbers, and what it returns."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, seed: int) -> None:
        self.model, self.args, self.kwargs, self.training, self.seed = model, args, kwargs, training, seed
        self.devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def once(self) -> list[Tensor]:
        """The outputs; with training the parameters' gradients, too."""
        with torch.random.fork_rng(devices=self.devices), torch.set_grad_enabled(self.training):
            torch.manual_seed(self.seed)
            out = self.model(*self.args, **self.kwargs)
            leaves = tree_leaves(dict(out) if hasattr(out, "keys") else out)
            outputs = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
            results = [t.detach() for t in outputs]
            if self.training:
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                scalar = torch.stack([t.float().square().mean() for t in outputs if t.requires_grad]).sum()
                results += [g for g in torch.autograd.grad(scalar, parameters, allow_unused=True) if g is not None]
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                b.copy_(self.buffers[name])
        return results

    def recorded(self, modules: Mapping[str, nn.Module]) -> dict[str, list[Call]]:
        """The inputs that each module receives in one pass, call by call."""
        calls: dict[str, list[Call]] = {name: [] for name in modules}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: calls[name].append(tree_map(_detached, (args, kwargs)))

        hooks = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
        try:
            self.once()
        finally:
            for hook in hooks:
                hook.remove()
        return calls


def _detached(t: Any) -> Any:
    return t.detach().clone() if isinstance(t, Tensor) else t


# --- costs ------------------------------------------------------------------------------------------------


def _times(
    module: nn.Module, calls: list[Call], training: bool, rounds: int, lap_seconds: float
) -> tuple[float, dict[str, float]]:
    """(seconds of a pass through the module as torch has it, seconds that each option adds); the shortest of laps taken in turn."""
    device = next((str(p.device) for p in module.parameters()), "cpu")
    plain = copy.deepcopy(module)
    # An abft.Linear was born checked.
    plain.__class__ = next(c for c in type(plain).__mro__ if issubclass(c, nn.Module) and not issubclass(c, Checked))
    copies: dict[str, nn.Module] = {"": plain}
    for option in options.MEASURED:
        if option.detector == "statistical" and not device.startswith("cpu"):
            continue  # backend="auto" may find one that keeps no statistics: counted as ``correct`` (profile.SiteProfile.cost)
        copies[option.name] = subject = protection.protect(copy.deepcopy(module), _QUIET.replace(level="planned"), name="(profile)")
        sites.site_of(sites.number_of(subject._abft_site)).plan = option.policy(_QUIET)  # type: ignore[arg-type]
    laps = {name: _lap(m, calls, training) for name, m in copies.items()}
    for lap in laps.values():
        lap()  # panels are built
    turns = max(1, round(lap_seconds / max(_seconds(laps[""], device), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in laps}
    for number in range(rounds):
        names = list(laps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(_seconds(laps[name], device, turns) / turns)
    # The shortest lap: what else a machine does can only lengthen one.
    base = min(seconds[""])
    return base, complete({name: min(taken) - base for name, taken in seconds.items() if name})


def _lap(module: nn.Module, calls: list[Call], training: bool) -> Callable[[], None]:
    def lap() -> None:
        for args, kwargs in calls:
            if not training:
                with torch.no_grad():
                    module(*args, **kwargs)
                continue
            given = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t, (args, kwargs))
            out = module(*given[0], **given[1])
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            wanted = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad] + list(module.parameters())
            torch.autograd.grad(outputs, [t for t in wanted if t.requires_grad], [torch.ones_like(t) for t in outputs], allow_unused=True)

    return lap


def _seconds(lap: Callable[[], Any], device: str, turns: int = 1) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    # Of a single thread its own time, which does not run while others have the processor.
    clock = time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(turns):
        lap()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - start


def _products(run: _Run, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The products of each module that one pass of the model counts."""
    protection.protect(run.model, _QUIET, name="(profile)")
    start = reporting.mark()
    run.once()
    counted = reporting.since(start).sites
    return {name: counted[site].products if (site := str(module._abft_name)) in counted else 0 for name, module in modules.items()}


# --- sensitivity ------------------------------------------------------------------------------------------


def _sensitivities(
    run: _Run, modules: Mapping[str, nn.Module], calls: Mapping[str, list[Call]], harm: float, trials: int, seed: int, mixture: Mixture
) -> dict[str, int]:
    """How many of ``trials`` faults at each module, unprotected, made a result wrong."""
    protection.protect(run.model, options.OFF.policy(_QUIET), name="(profile)")
    clean = run.once()
    rng = np.random.default_rng([seed, 2])
    out = {}
    for name, module in modules.items():
        site = module._abft_name
        roles = ("fprop", "dgrad", "wgrad") if run.training and any(p.requires_grad for p in module.parameters()) else ("fprop",)
        out[name] = 0
        for trial in range(trials):
            role = roles[trial % len(roles)]
            call = int(rng.integers(len(calls[name]) * _products_of(module)))
            fault: Fault = mixture.draw(rng).replace(site=glob.escape(str(site)), role=role, call=call)
            try:
                with injection.faults(fault, seed=int(rng.integers(2**31))):
                    struck = run.once()
            except NotInjected:
                continue  # the first layer has no dgrad: its faults cannot happen
            out[name] += _differ(clean, struck, harm)
    return out


def _differ(clean: list[Tensor], struck: list[Tensor], harm: float) -> bool:
    """Whether a row of any result changed by more than ``harm``, or is not finite where it was."""
    return any(_row_change(a, b) > harm for a, b in zip(clean, struck, strict=True))


def _row_change(a: Tensor, b: Tensor) -> float:
    x, y = (t.double().reshape(-1, t.shape[-1]) if t.dim() else t.double().reshape(1, 1) for t in (a, b))
    change, size = (y - x).norm(dim=1), x.norm(dim=1)
    ratio = torch.nan_to_num(torch.where(change == 0, 0.0, change / size), nan=float("inf"), posinf=float("inf"))
    return float(ledger.to_host(ratio.amax())) if ratio.numel() else 0.0


def _products_of(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else max(1, sum(p.dim() == 2 for p in module.parameters()))


def _shape_of(module: nn.Module, calls: list[Call]) -> tuple[str, tuple[int, int, int]]:
    weight = next((p for p in module.parameters() if p.dim() == 2), None)
    first = next((t for t in tree_leaves(calls[0]) if isinstance(t, Tensor)), None)
    if weight is None or first is None:
        return "float32", (0, 0, 0)
    dtype = torch.get_autocast_dtype(first.device.type) if torch.is_autocast_enabled(first.device.type) else first.dtype
    return str(dtype)[6:], (first.shape[:-1].numel(), int(weight.shape[0]), int(weight.shape[1]))
