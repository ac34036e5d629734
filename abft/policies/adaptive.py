"""``Adaptive``: every module gets the cheapest protection that keeps escaped faults below a target, chosen again as evidence arrives."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from abft import policy as policies
from abft import reporting, sites
from abft.errors import PolicyError
from abft.ledger import Point, Verdict
from abft.policies import options, planner
from abft.policies.options import BY_NAME, FULL, LADDER, OFF, STATISTICAL, Option
from abft.policies.profile import Profile, counted
from abft.policies.rates import Estimate
from abft.policy import Policy, PolicyLike, Strategy
from abft.reporting import Report

if TYPE_CHECKING:
    from abft.policies.explain import Explanation

BILLION = 1e9
_FAULTS = (Verdict.OBSERVED, Verdict.RECOMPUTED, Verdict.RECONSTRUCTED, Verdict.UNCORRECTED)


@dataclass(frozen=True)
class SiteChoice:
    """A site's option and what speaks for it. cost: share of the model's unprotected time; escape: per 1e9 products of the model."""

    site: str
    option: str
    cost: float
    escape: float
    rate: float  # faults per second of computing
    why: str


@dataclass(frozen=True)
class Plan:
    """One option per site. cost: share of the unprotected time added; escape: expected escaped harmful faults per 1e9 products.

    met: escape <= target. affordable: cost <= budget. gap: what the optimiser could not rule out, relative to the cost.
    """

    sites: tuple[SiteChoice, ...]
    cost: float
    escape: float
    target: float
    budget: float
    gap: float

    @property
    def met(self) -> bool:
        return self.escape <= self.target

    @property
    def affordable(self) -> bool:
        return self.cost <= self.budget

    @property
    def options(self) -> dict[str, str]:
        return {choice.site: choice.option for choice in self.sites}


class Adaptive(Strategy):
    """Give it to ``abft.protect``, and call ``update()`` every so many steps; see docs/explanation/adaptive.md.

    target_escape: expected harmful faults delivered per 1e9 products, at the rate that is not exceeded with probability ``confidence``.
    budget: largest share of the unprotected time that protection may add (0.05: 5 %).
    profile: costs and sensitivities, of ``abft.policies.profile(model, …)``; None: counted costs, every fault harmful.
    policy: everything a plan leaves alone (backend, weights, on_uncorrected, …); its level, redundancy and every are the plan's.
    critical: modules (names or ``"re:…"``) that get correct+tmr whatever it costs (tiers).
    levels: names of the options a plan may use (default: all of ``options.LADDER``); fewer make fixed levels. statistical: only where
        its detection rates are measured (options.STATISTICAL_CAMPAIGNS, GATES), on a GPU with ``backend="triton"``; elsewhere left out, and
        refused by name.
    watch: a site that would be ``off`` is sampled every so-many-th product, so that a rising rate is seen; None: off is off.
    replayed: what is detected is computed again by the caller (``StepGuard``), so ``detect`` lets through no more than ``correct``.
    repeating: the assumed share of faults that strike a replica as they struck the product (``options.REPEATING``).
    infeasible: "raise": ``protect`` raises PolicyError if no plan meets target and budget; "exceed": the target is kept, the budget is not,
    and a warning says so. While running, ``update`` never raises nor weakens: it exceeds the budget, and warns.
    relax: hysteresis. A plan is strengthened as soon as its expected escape exceeds the target; it is relaxed only to one that keeps
    target / relax, saves a tenth of the present cost, and rests on at least ``settle`` products seen since the last change.

    ``plan``: the Plan in force; ``history``: (products seen, Plan) of every change. Changing a plan compiles nothing; a captured CUDA
    graph keeps the plan it was captured under until it is captured again. Sites are those of one process.
    """

    def __init__(
        self, *, target_escape: float, budget: float, profile: Profile | None = None, policy: PolicyLike = None,
        critical: Collection[str] = (), levels: Sequence[str] | None = None, watch: int | None = 256, replayed: bool = False,
        repeating: float = options.REPEATING, confidence: float = 0.9, infeasible: Literal["raise", "exceed"] = "raise",
        relax: float = 2.0, settle: int = 1000, rows: int = 1024,
    ) -> None:  # fmt: skip
        for name, value, low, high in (
            ("target_escape", target_escape, 0, float("inf")), ("budget", budget, 0, float("inf")), ("confidence", confidence, 0, 1),
            ("repeating", repeating, 0, 1.0000001), ("relax", relax, 1 - 1e-9, float("inf")),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not (low < value < high or value == low == 0):
                raise PolicyError(f"Adaptive.{name} must be a number between {low:g} and {high:g}; got {value!r}")
        if infeasible not in ("raise", "exceed"):
            raise PolicyError(f"Adaptive.infeasible must be 'raise' or 'exceed'; got {infeasible!r}")
        if watch is not None and (isinstance(watch, bool) or not isinstance(watch, int) or watch < 2):
            raise PolicyError(f"Adaptive.watch must be a whole number from 2, or None; got {watch!r}")
        self.target, self.budget, self.profile, self.watch = float(target_escape), float(budget), profile, watch
        self.critical = tuple(critical)
        self.levels = _levels(levels, watch)
        self._asked = frozenset(levels or ())
        self.replayed, self.repeating, self.confidence = replayed, repeating, confidence
        self.infeasible, self.relax, self.settle, self.rows = infeasible, relax, settle, rows
        base = Policy() if policy is None else policies.as_policy(policy)
        if base.timing != "immediate":
            raise PolicyError("Adaptive plans repairs, which timing='deferred' does not make; use timing='immediate'")
        if not base.roles >= policies.ROLES or base.panel != "full":
            raise PolicyError(
                "Adaptive plans with detection rates of full panels in all roles, and would promise too much of fewer; "
                f"got panel={base.panel!r}, roles={sorted(base.roles)}. Use panel='full' and roles fprop, dgrad, wgrad."
            )
        self.base = base.replace(level="correct", redundancy="none", every=1)
        self.carried = base.replace(level="planned", redundancy="none", every=1)
        self.plan: Plan | None = None
        self.history: list[tuple[int, Plan]] = []
        self.seen = 0  # products that were looked at
        self.rates: dict[str, Estimate] = {}
        self._modules: dict[str, weakref.ref[nn.Module]] = {}
        self._devices: dict[str, str] = {}
        self._since: Point | None = None
        self._changed_at = 0
        self._warned = False

    # --- what protect() asks for ---------------------------------------------------------------------------

    def choose(self, modules: Mapping[str, Any]) -> Policy:
        """The first plan, from the prior alone; protecting another time forgets the evidence."""
        if not modules:
            raise PolicyError("Adaptive found no module to protect")
        if self.profile is None:
            self.profile = counted(modules, self.rows)
        missing = [name for name in modules if name not in self.profile.sites]
        if missing:
            raise PolicyError(
                f"the profile knows nothing of {missing[:5]}, only of {list(self.profile.sites)[:5]}. Profile the model that is protected, "
                "with inputs that reach all of its modules, or exclude these by filter_fn."
            )
        unmatched = [key for key in self.critical if not any(_matches(key, name) for name in modules)]
        if unmatched:
            raise PolicyError(f"critical {unmatched} match no protected module; there are {list(modules)[:8]}")
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}
        self._devices = {name: _device_of(module) for name, module in modules.items()}
        self.rates = {device: Estimate() for device in set(self._devices.values())}
        self.plan, self.history, self.seen, self._changed_at, self._since, self._warned = None, [], 0, 0, None, False
        without = {name: why for name in modules if (why := self._why_not_statistical(name)) is not None}
        if without and STATISTICAL.name in self._asked:
            name, why = next(iter(without.items()))
            raise PolicyError(
                f"Adaptive.levels asks for 'statistical', which {len(without)} module(s) cannot have: {name}, for {why}. Leave it out, or "
                'give a base policy with detector="both"'
            )
        plan = self._best(self.target)
        if not (plan.met and plan.affordable) and self.infeasible == "raise":
            raise PolicyError(self._why_infeasible(plan))
        self._adopt(plan)
        return self.carried

    def enforce(self) -> None:
        """Let the plan be in force at every module's site, and count evidence from now on."""
        assert self.plan is not None
        for choice in self.plan.sites:
            module = self._modules[choice.site]()
            held = None if module is None else module.__dict__.get("_abft_site")
            if held is None:
                continue  # gone, or unprotected since
            site = sites.site_of(sites.number_of(held))
            if site.index != sites.OVERFLOW:  # shared by many: they stay at what a site without a plan has, correct
                site.plan = self.named(choice.option).policy(self.base)
        if self._since is None:
            self._since = reporting.mark()

    # --- evidence -------------------------------------------------------------------------------------------

    def update(self, report: Report | None = None) -> Plan:
        """Take in what was found since the last call, and plan anew; returns the plan in force.

        report: of everything since the last call, if you have read it yourself; None: it is read here, which waits for the device.
        """
        if self.plan is None:
            raise RuntimeError("Adaptive.update needs a protected model: abft.protect(model, adaptive) first")
        if report is None:
            start, self._since = self._since, reporting.mark()
            reporting.drain()
            report = reporting.between(start, self._since)
        self._learn(report)
        self._replan()
        return self.plan

    def _learn(self, report: Report) -> None:
        counts: dict[str, dict[str, tuple[int, float]]] = {device: {} for device in self.rates}
        assert self.profile is not None and self.plan is not None
        chosen = {choice.site: self.named(choice.option) for choice in self.plan.sites}
        for name, reference in self._modules.items():
            module = reference()
            found = None if module is None else report.sites.get(module.__dict__.get("_abft_name", name))
            if found is None:
                continue
            known = self.profile.sites[name]
            option = chosen[name]
            # Faults that this option cannot see were there, too: the time that was looked at counts by what it sees.
            seconds = found.products * known.seconds / known.products * option.seen(known.dtype)
            counts[self._devices[name]][name] = (_faulty_products(found, report.dropped_events > 0), seconds)
            self.seen += found.products
        for device, estimate in self.rates.items():
            estimate.observe(counts[device])

    def _replan(self) -> None:
        assert self.plan is not None
        now = self._judged(self.plan)
        if not now.met:
            # Some way below the target: at its very edge the next handful of faults would change the plan again.
            best = self._best(self.target / self.relax**0.5)
            if best.escape > self.target / self.relax**0.5:
                best = self._best(self.target)
            if best.options != now.options:
                self._adopt(best)
                self.enforce()
            else:
                self.plan = best
            if not (best.met and best.affordable) and not self._warned:
                self._warned = True  # until a plan is within both again
                warnings.warn(f"abft: {self._why_infeasible(best)}", RuntimeWarning, stacklevel=3)
            return
        self.plan = now
        self._warned = self._warned and not now.affordable
        if self.seen - self._changed_at < self.settle:
            return
        relaxed = self._best(self.target / self.relax)
        if relaxed.met and relaxed.escape <= self.target / self.relax and relaxed.cost < 0.9 * now.cost:
            self._adopt(relaxed)
            self.enforce()

    def _adopt(self, plan: Plan) -> None:
        self.plan = plan
        self._changed_at = self.seen
        self.history.append((self.seen, plan))

    # --- plans ----------------------------------------------------------------------------------------------

    def fixed(self, level: str) -> Plan:
        """What one option everywhere would cost and let through now, critical modules included: what a plan is compared with."""
        return self._plan({name: self.named(level) for name in self._modules}, 0.0)

    def named(self, option: str) -> Option:
        """The option of that name, this policy's watch among them."""
        return next(o for o in (*self.levels, *LADDER) if o.name == option)

    def explain(self) -> Explanation:
        """Why each site has its level and what it costs: a table (``str``) and a picture (``.picture(path)``)."""
        from abft.policies.explain import Explanation

        if self.plan is None:
            raise RuntimeError("Adaptive.explain needs a plan: abft.protect(model, adaptive) first")
        return Explanation.of(self)

    def escape(self, name: str, option: Option) -> float:
        """Expected escapes per 1e9 products of the model through this site under that option."""
        assert self.profile is not None
        known, estimate = self.profile.sites[name], self.rates[self._devices[name]]
        device = estimate.device
        # The sites' uncertainties are mostly their device's: its quantile, not the sum of their own, which no device has at once.
        rate = estimate.site(name).mean * max(1.0, device.quantile(self.confidence) / device.mean)
        return BILLION * rate * known.seconds * known.sensitivity * self.let_through(name, option) / self.profile.products

    def let_through(self, name: str, option: Option) -> float:
        """P(a harmful fault at that site is delivered) under that option."""
        assert self.profile is not None
        kernels = self.base.backend == "triton"
        return option.escape(
            self.profile.sites[name].dtype, self.profile.harm, replayed=self.replayed, repeating=self.repeating, kernels=kernels
        )

    def cost(self, name: str, option: Option) -> float:
        """Share of the model's unprotected time that this option adds at that site."""
        assert self.profile is not None
        return self.profile.sites[name].cost(option) / self.profile.seconds

    def _candidates(self, name: str) -> tuple[Option, ...]:
        if any(_matches(key, name) for key in self.critical):
            return (FULL,)
        return self.levels if self._why_not_statistical(name) is None else tuple(o for o in self.levels if o is not STATISTICAL)

    def _why_not_statistical(self, name: str) -> str | None:
        assert self.profile is not None
        dtype, kernels = self.profile.sites[name].dtype, self.base.backend == "triton"
        if dtype not in (options.GATES if kernels else options.STATISTICAL_CAMPAIGNS):
            return f"its detection rates in {dtype} are not measured"
        if self._devices[name] != "cpu" and not kernels:
            return f"on {self._devices[name]} only a base policy with backend=\"triton\" is sure to keep statistics"
        return None

    def _best(self, target: float) -> Plan:
        """The cheapest plan that meets the target; if none does, the one that lets through least."""
        names = list(self._modules)
        candidates = [self._candidates(name) for name in names]
        costs = [[self.cost(name, option) for option in each] for name, each in zip(names, candidates, strict=True)]
        escapes = [[self.escape(name, option) for option in each] for name, each in zip(names, candidates, strict=True)]
        found = planner.minimise(costs, escapes, target)
        if found is None:
            strongest = [min(range(len(e)), key=lambda j: (e[j], c[j])) for e, c in zip(escapes, costs, strict=True)]
            return self._plan({n: each[j] for n, each, j in zip(names, candidates, strongest, strict=True)}, 0.0)
        return self._plan({n: each[j] for n, each, j in zip(names, candidates, found.chosen, strict=True)}, found.gap)

    def _judged(self, plan: Plan) -> Plan:
        """The same choices, under what is known now."""
        return self._plan({choice.site: self.named(choice.option) for choice in plan.sites}, plan.gap)

    def _plan(self, chosen: Mapping[str, Option], gap: float) -> Plan:
        cost = sum(self.cost(name, option) for name, option in chosen.items())
        escape = sum(self.escape(name, option) for name, option in chosen.items())
        rows = tuple(
            SiteChoice(
                name, option.name, self.cost(name, option), self.escape(name, option),
                self.rates[self._devices[name]].site(name).mean, self._why(name, option, escape),
            )
            for name, option in chosen.items()
        )  # fmt: skip
        return Plan(rows, cost, escape, self.target, self.budget, gap)

    def _why(self, name: str, option: Option, escape: float) -> str:
        """What the next cheaper option would do to the whole plan."""
        candidates = self._candidates(name)
        if len(candidates) == 1:
            return "critical" if candidates[0] is FULL else "the only level allowed"
        own = self.cost(name, option)
        cheaper = [o for o in candidates if self.cost(name, o) < own]
        if not cheaper:
            return "the cheapest there is, and enough" if escape <= self.target else "the cheapest there is"
        nearest = min(cheaper, key=lambda o: self.escape(name, o))
        total = escape - self.escape(name, option) + self.escape(name, nearest)
        if total > self.target:
            return f"{nearest.name} here would let through {total:.3g} in all"
        return f"{nearest.name} would do; kept until that has been so for a while"

    def _why_infeasible(self, plan: Plan) -> str:
        names = list(self._modules)
        candidates = [self._candidates(name) for name in names]
        costs = [[self.cost(name, o) for o in each] for name, each in zip(names, candidates, strict=True)]
        escapes = [[self.escape(name, o) for o in each] for name, each in zip(names, candidates, strict=True)]
        within = planner.minimise(escapes, costs, self.budget)
        best = f"the best within the budget lets through {within.value:.3g}" if within else "no plan at all fits the budget"
        wanted = f"target_escape={self.target:g} per 1e9 products"
        if plan.met:
            said = f"{wanted} costs at least {plan.cost:.1%} of the time, above the budget of {self.budget:.1%}"
        else:
            said = f"no plan meets {wanted}: the strongest lets through {plan.escape:.3g} and costs {plan.cost:.1%}"
        return f"{said}; {best}. Raise the budget or the target, or take a profile whose sensitivities are measured."


def _levels(names: Sequence[str] | None, watch: int | None) -> tuple[Option, ...]:
    unknown = [] if names is None else [name for name in names if name not in BY_NAME]
    if unknown or (names is not None and not names):
        raise PolicyError(f"Adaptive.levels must be among {', '.join(BY_NAME)}; got {list(names or ())}")
    chosen = LADDER if names is None else tuple(BY_NAME[name] for name in dict.fromkeys(names))
    if watch is not None and OFF in chosen:
        # Not off but watched: without a single check no rising rate would ever be seen.
        watched = Option(f"1/{watch}", "correct", every=watch)
        chosen = (watched, *(o for o in chosen if o is not OFF and o.name != watched.name and o.every <= watch))
    return chosen


def _matches(key: str, name: str) -> bool:
    return bool(re.compile(key[3:]).fullmatch(name)) if key.startswith("re:") else key == name


def _device_of(module: nn.Module) -> str:
    return next((str(p.device) for p in module.parameters()), "cpu")


def _faulty_products(found: Report, dropped: bool) -> int:
    """Products with a fault: one event each; of events that were dropped only the rows are known, of which a product has at least one."""
    faults = [event for event in found.events if event.verdict in _FAULTS]
    untold = found.detected - sum(event.rows for event in faults) if dropped else 0
    return min(found.products, len(faults) + max(0, untold))
