"""``faults``: the scope in which faults strike checked products, and the log of what they did."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from abft import bits
from abft import faults as active_faults
from abft.backends.call import Call
from abft.errors import NotInjected, PolicyError
from abft.faults import Strike, Target
from abft.injection.fault import Fault, strike_of
from abft.injection.mixture import Mixture
from abft.ops import checked as product_op

MAX_ELEMENTS = 64


@dataclass(frozen=True)
class Injected:
    """One fault that struck: where, what, up to 64 of the result's elements before and after, and the relative L2
    change of the worst row against a clean recomputation (before any repair)."""

    site: str
    role: str
    call: int
    what: str
    where: str
    pattern: str
    elements: tuple[tuple[int, int, float, float], ...]
    effect: float


class faults:
    """``with abft.inject.faults(*specs, rate=None, seed=0) as log:`` — strike the checked products inside.

    specs: Fault or Mixture. Without ``rate`` every Fault fires once, at its ``call``-th matching product (a Mixture draws one
    Fault and does the same), or with its own probability at each. With ``rate``: each outermost module forward, or each
    StepGuard attempt, is hit with that probability, by one spec drawn at one of its products. Draws depend on ``seed`` and
    the number of the event only. ``log`` is a list of ``Injected``. Raises NotInjected at exit for a Fault that never fired.

    Products must pass through abft (a protected module, a ``protected()`` scope, or level "off" of either).
    """

    def __init__(self, *specs: Fault | Mixture, rate: float | None = None, seed: int = 0) -> None:
        if not specs or not all(isinstance(s, Fault | Mixture) for s in specs):
            raise TypeError("inject.faults needs at least one Fault or Mixture")
        if rate is not None and not 0 <= rate <= 1:
            raise PolicyError(f"rate must lie in [0, 1]; got {rate}")
        self._specs, self._rate, self._seed = specs, rate, seed
        self.log: list[Injected] = []

    def __enter__(self) -> list[Injected]:
        if active_faults.active is not None:
            raise RuntimeError("inject.faults cannot be nested: one injector at a time")
        rng = np.random.default_rng([self._seed, 0])
        drawn = [s.draw(rng) if isinstance(s, Mixture) and self._rate is None else s for s in self._specs]
        self._plan: _Schedule = _PerProduct(drawn, rng) if self._rate is None else _PerEvent(self._specs, self._rate, self._seed)
        self._undo: list[tuple[Tensor, Tensor, Tensor]] = []
        self._broken_panels: list[tuple[Tensor, Tensor, Tensor]] = []
        self._calls: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()  # products of several threads draw from one generator
        self._pending = threading.local()
        active_faults.active = self._hits
        active_faults.on_weight = self._strike_weight
        product_op.on_strike = self._record
        self._hooks = self._plan.watch()
        return self.log

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        active_faults.active = active_faults.on_weight = product_op.on_strike = active_faults.on_attempt = None
        for hook in self._hooks:
            hook.remove()
        for weight, place, before in reversed(self._undo):
            _put_back(weight, place, before)
        for panel, before, struck in reversed(self._broken_panels):
            # What still holds the fault; a panel rebuilt since is left alone.
            panel.copy_(torch.where(bits.same(panel, struck), before, panel))
        missing = self._plan.never_fired()
        if kind is None and missing:
            raise NotInjected(
                f"{len(missing)} fault(s) never fired, first {missing[0]}: no product matched its site, role and call inside the scope. "
                f"Products seen: {sorted({f'{s} ({r})' for s, r in self._calls})[:10] or 'none'}"
            )

    def _hits(self, target: Target) -> list[Strike]:
        with self._lock:
            return self._draw(target)

    def _draw(self, target: Target) -> list[Strike]:
        key = (target.site, target.role)
        self._calls[key] = self._calls.get(key, -1) + 1
        strikes: list[Strike] = []
        drawn = []
        for fault, rng in self._plan.due(target):
            strike = strike_of(fault, target, rng)
            if strike.place == "panel":
                self._remember_panel(target, strike)
            drawn.append((fault, strike, self._calls[key]))
            strikes.append(strike)
        self._pending.faults = drawn
        return strikes

    def _strike_weight(self, target: Target, strike: Strike) -> None:
        assert target.weight is not None
        part = strike.region.of(target.weight.detach())
        self._undo.append((target.weight, torch.tensor([*_region_tuple(strike)]), part.clone()))
        # Past the version counter, as a particle would.
        raw = strike.region.of(bits.as_integers(target.weight.data))
        raw.copy_(bits.as_integers(strike.operation.apply(part)))

    def _remember_panel(self, target: Target, strike: Strike) -> None:
        assert target.panel is not None
        before, struck = target.panel.clone(), target.panel.clone()
        strike.hit(struck)
        self._broken_panels.append((target.panel, before, struck))

    def _record(self, call: Call, target: Target, clean: Tensor, struck: Tensor, strikes: tuple[Strike, ...]) -> None:
        clean, struck = clean.cpu(), struck.cpu()
        changed = ~bits.same(clean, struck)
        flat_clean, flat_struck = (t.reshape(-1, t.shape[-1]).double().numpy() for t in (clean, struck))
        where = np.argwhere(changed.reshape(flat_clean.shape).numpy())[:MAX_ELEMENTS]
        elements = tuple((int(r), int(c), float(flat_clean[r, c]), float(flat_struck[r, c])) for r, c in where)
        effect = _effect(flat_clean, flat_struck)
        for fault, strike, call_number in self._pending.faults:
            self.log.append(Injected(target.site, target.role, call_number, fault.what, strike.place, fault.pattern, elements, effect))


def _effect(clean: np.ndarray, struck: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        change = np.linalg.norm(struck - clean, axis=1)
        size = np.linalg.norm(clean, axis=1)
        ratio = np.where(change == 0, 0.0, change / size)
    return float(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _region_tuple(strike: Strike) -> tuple[int, ...]:
    r = strike.region
    return r.row0, r.row1, r.col0, r.col1, r.stride


def _put_back(weight: Tensor, place: Tensor, before: Tensor) -> None:
    r0, r1, c0, c1, stride = (int(v) for v in place.numpy())
    bits.as_integers(weight.data)[r0:r1, c0:c1:stride].copy_(bits.as_integers(before))


# --- when faults fire -----------------------------------------------------------------------------------


class _Schedule:
    def due(self, target: Target) -> Iterable[tuple[Fault, np.random.Generator]]:
        raise NotImplementedError

    def watch(self) -> list[Any]:
        return []

    def never_fired(self) -> list[Fault]:
        return []


class _PerProduct(_Schedule):
    """Each fault at its call-th matching product, or with its probability at each."""

    def __init__(self, specs: list[Any], rng: np.random.Generator) -> None:
        self._specs, self._rng = specs, rng
        self._seen = [0] * len(specs)
        self._fired = [False] * len(specs)

    def due(self, target: Target) -> Iterable[tuple[Fault, np.random.Generator]]:
        for i, fault in enumerate(self._specs):
            if not fault.matches(target):
                continue
            number, self._seen[i] = self._seen[i], self._seen[i] + 1
            hit = number == fault.call if fault.probability is None else self._rng.random() < fault.probability
            if hit:
                self._fired[i] = True
                yield fault, self._rng

    def never_fired(self) -> list[Fault]:
        return [f for f, fired in zip(self._specs, self._fired, strict=True) if not fired and f.probability is None]


class _PerEvent(_Schedule):
    """One fault in each event (outermost forward, or StepGuard attempt) that the rate selects.

    An event lasts until the next one begins, so a forward's backward belongs to it. Which of an event's products is hit is drawn
    from those that the fault matched in the last event of the same kind; in the first, the first one that matches.
    """

    def __init__(self, specs: tuple[Fault | Mixture, ...], rate: float, seed: int) -> None:
        self._specs, self._rate, self._seed = specs, rate, seed
        self._event = -1
        self._depth = 0
        self._attempts = False
        self._within = False  # an event; never between the attempts of a StepGuard
        self._kind: tuple[object, ...] = ()
        self._products: dict[tuple[object, ...], list[tuple[str, str, bool, tuple[str, ...]]]] = {}  # of the last event of each kind
        self._now: list[tuple[str, str, bool, tuple[str, ...]]] = []
        self._fault: Fault | None = None
        self._at = self._matched = 0
        self._drawn: list[Fault] = []
        self._fired = 0
        self._rng = np.random.default_rng([seed, 1])

    def watch(self) -> list[Any]:
        active_faults.on_attempt = self._attempt
        return [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def _attempt(self, begins: bool) -> None:
        self._attempts = True
        if begins:
            self._begin(("attempt",))
        else:
            self._within = False

    def _enter(self, module: Any, args: Any) -> None:
        if _recomputing():
            return
        if self._depth == 0 and not self._attempts:
            self._begin((id(module), module.training, torch.is_grad_enabled()))
        self._depth += 1

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if not _recomputing():
            self._depth = max(0, self._depth - 1)

    def _begin(self, kind: tuple[object, ...]) -> None:
        if self._now:
            self._products[self._kind] = self._now
        self._kind, self._now, self._within = kind, [], True
        self._event += 1
        self._matched = 0
        self._rng = np.random.default_rng([self._seed, 1, self._event])
        hit, place, which = self._rng.random(3)
        self._fault = None
        if hit < self._rate:
            spec = self._specs[int(which * len(self._specs))]
            self._fault = fault = spec.draw(self._rng) if isinstance(spec, Mixture) else spec
            self._drawn.append(fault)
            self._at = int(place * sum(fault.matches_one(*product) for product in self._products.get(kind, ())))

    def due(self, target: Target) -> Iterable[tuple[Fault, np.random.Generator]]:
        if not self._within:
            return
        self._now.append((target.site, target.role, target.weight is not None, target.places))
        if self._fault is not None and self._fault.matches(target):
            number, self._matched = self._matched, self._matched + 1
            if number >= self._at:
                fault, self._fault = self._fault, None
                self._fired += 1
                yield fault, self._rng

    def never_fired(self) -> list[Fault]:
        return [] if self._fired else self._drawn[:1]


def _recomputing() -> bool:
    # Activation checkpointing runs forwards inside backward: those are no new events.
    return bool(torch._C._current_graph_task_id() != -1)
