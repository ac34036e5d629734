"""What a plan says for itself: a table, and a picture (needs matplotlib)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abft.policies.profile import SiteProfile
from abft.policies.rates import HOUR, Gamma

if TYPE_CHECKING:
    from abft.policies.adaptive import Adaptive, Plan

COLUMNS = ("site", "rows × columns × depth", "flop/B", "faults/h", "harmful", "level", "misses", "escapes", "costs", "why")


@dataclass(frozen=True)
class Explanation:
    """plan, what it rests on per site, and what fixed levels would cost: ``str()`` is a table, ``picture(path)`` draws it."""

    plan: Plan
    profiles: dict[str, SiteProfile]
    misses: dict[str, float]
    devices: dict[str, tuple[Gamma, int]]
    confidence: float
    fixed: dict[str, Plan]
    how: str
    harm: float

    @classmethod
    def of(cls, policy: Adaptive) -> Explanation:
        plan, profile = policy.plan, policy.profile
        assert plan is not None and profile is not None
        misses = {c.site: policy.let_through(c.site, policy.named(c.option)) for c in plan.sites}
        return cls(
            plan, {c.site: profile.sites[c.site] for c in plan.sites}, misses,
            {device: (estimate.device, estimate.faults()) for device, estimate in policy.rates.items()}, policy.confidence,
            {o.name: policy.fixed(o.name) for o in policy.levels}, profile.how, profile.harm,
        )  # fmt: skip

    def __str__(self) -> str:
        plan = self.plan
        verdict = "met" if plan.met else "NOT MET"
        afford = "within" if plan.affordable else "ABOVE"
        lines = [
            f"expected escapes {plan.escape:.3g} per 1e9 products, target {plan.target:g}: {verdict}; "
            f"cost {plan.cost:.2%} of the unprotected time ({self.how}), {afford} the budget of {plan.budget:.2%}",
        ]
        for device, (rate, faults) in sorted(self.devices.items()):
            lines.append(
                f"{device}: {faults} faults in this regime; rate {rate.mean * HOUR:.3g} per hour of products, "
                f"below {rate.quantile(self.confidence) * HOUR:.3g} with probability {self.confidence:g}"
            )
        rows = [COLUMNS, *(self._row(i) for i in range(len(plan.sites)))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        fixed = " · ".join(f"{name} {each.cost:.2%}/{each.escape:.3g}" for name, each in self.fixed.items())
        lines.append(f"one level everywhere (cost/escapes): {fixed}")
        return "\n".join(lines)

    def _row(self, i: int) -> tuple[str, ...]:
        choice = self.plan.sites[i]
        known = self.profiles[choice.site]
        harmful = f"{known.sensitivity:.2f}" if known.trials else "1 (not measured)"
        return (
            choice.site, " × ".join(str(n) for n in known.shape), f"{2 * known.intensity:.1f}", f"{choice.rate * HOUR:.2g}", harmful,
            choice.option, f"{self.misses[choice.site]:.2g}", f"{choice.escape:.2g}", f"{choice.cost:.2%}", choice.why,
        )  # fmt: skip

    def picture(self, path: str | Path) -> Path:
        """Per site what its level costs and lets through, and the plan between the fixed levels. Needs matplotlib."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        plan = self.plan
        names = [f"{c.site}: {c.option}" for c in plan.sites]
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.28 * len(names)), width_ratios=(3, 2), layout="constrained")
        left.barh(names, [100 * c.cost for c in plan.sites], color="tab:blue", label="cost")
        left.invert_yaxis()
        left.set_xlabel("cost, % of the unprotected time")
        beside = left.twiny()
        beside.plot([max(c.escape, 1e-12) for c in plan.sites], range(len(names)), "o", color="tab:red", markersize=4)
        beside.set_xscale("log")
        beside.set_xlabel("escapes per 1e9 products", color="tab:red")
        for name, fixed in self.fixed.items():
            right.plot(100 * fixed.cost, max(fixed.escape, 1e-12), "o", color="grey", markersize=4)
            right.annotate(name, (100 * fixed.cost, max(fixed.escape, 1e-12)), fontsize=7, xytext=(3, 3), textcoords="offset points")
        right.plot(100 * plan.cost, max(plan.escape, 1e-12), "*", color="tab:blue", markersize=14, label="this plan")
        right.axhline(plan.target, color="tab:red", linewidth=0.8, label="target")
        right.axvline(100 * plan.budget, color="black", linewidth=0.8, linestyle="--", label="budget")
        right.set_yscale("log")
        right.set_xlabel("cost, % of the unprotected time")
        right.set_ylabel("escapes per 1e9 products")
        right.legend(fontsize=7)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return Path(path)
