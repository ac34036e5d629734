"""The cheapest plan: one option per site, the sum of one quantity minimal, the sum of another within a limit.

A multiple-choice knapsack. Its linear relaxation is solved greedily (Sinha and Zoltners 1979): from every site's cheapest option,
the step that buys most for its price is taken until the limit is kept. That gives a plan, and a bound that no plan can beat; where
the two are too far apart, branch and cut (HiGHS, scipy.optimize.milp) goes on, to the optimum where there are few options.
``gap`` is what could not be ruled out, relative to the value found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Of the limit: what the solver's feasibility tolerance (1e-7 of a row scaled to 1) may take. The sum is added up anew afterwards.
_SLACK = 1e-6
SECONDS = 2.0
#: Options in all up to which the optimum is wanted; above, what may be left on the table.
SMALL, NEAR = 200, 2e-3

Numbers = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Solution:
    """chosen: index of the option of each site; value, used: sums of what was minimised and of what was limited."""

    chosen: tuple[int, ...]
    value: float
    used: float
    gap: float


def minimise(values: Numbers, uses: Numbers, limit: float, *, seconds: float = SECONDS) -> Solution | None:
    """The choice of one option per site that minimises Σ values with Σ uses <= limit; None if there is none.

    values[i][j], uses[i][j]: of option j of site i, finite and not negative. The sum of uses never exceeds the limit, and of plans within
    a millionth of it one may be overlooked. Branch and cut stops after ``seconds``. Raises ValueError for a site without options.
    """
    if any(len(v) == 0 or len(v) != len(u) for v, u in zip(values, uses, strict=True)):
        raise ValueError("every site needs at least one option, and of each option a value and a use")
    fronts = [_front(v, u, limit) for v, u in zip(values, uses, strict=True)]
    if any(not front for front in fronts) or _sum(uses, [front[-1] for front in fronts]) > limit:
        return None  # not even the least use of every site fits
    chosen, bound = _greedy(values, uses, limit, fronts)
    wanted = 0.0 if sum(len(front) for front in fronts) <= SMALL else NEAR
    found = _solution(values, uses, chosen, bound)
    if found.gap > wanted:
        better = _branch_and_cut(values, uses, limit, fronts, wanted, seconds)
        if better is not None and better[0] is not None and _sum(uses, better[0]) <= limit:
            found = min(found, _solution(values, uses, better[0], max(bound, better[1])), key=lambda s: (s.value, s.gap))
    return found


def _front(values: Sequence[float], uses: Sequence[float], limit: float) -> list[int]:
    """The options of a site that no other one beats in both, from the least value to the least use."""
    front: list[int] = []
    for j in sorted(range(len(values)), key=lambda j: (values[j], uses[j])):
        if uses[j] <= limit and (not front or uses[j] < uses[front[-1]]):
            front.append(j)
    return front


def _greedy(values: Numbers, uses: Numbers, limit: float, fronts: list[list[int]]) -> tuple[tuple[int, ...], float]:
    """(a plan that fits, the value of the linear relaxation): steps along the sites' convex hulls, the best bargain first."""
    steps = []  # (price of a unit of use saved, site, from, to)
    for i, front in enumerate(fronts):
        hull = _hull(values[i], uses[i], front)
        steps += [((values[i][b] - values[i][a]) / (uses[i][a] - uses[i][b]), i, a, b) for a, b in zip(hull, hull[1:], strict=False)]
    chosen = [front[0] for front in fronts]
    used, value = _sum(uses, chosen), _sum(values, chosen)
    bound = value
    for price, i, a, b in sorted(steps, key=lambda step: step[0]):
        if used <= limit:
            break
        bound = value + price * min(used - limit, uses[i][a] - uses[i][b])
        chosen[i] = b
        used, value = _sum(uses, chosen), _sum(values, chosen)
    if _sum(uses, chosen) > limit:  # by rounding of the sums alone
        chosen = [front[-1] for front in fronts]
    return _trimmed(values, uses, limit, fronts, chosen), bound


def _hull(values: Sequence[float], uses: Sequence[float], front: list[int]) -> list[int]:
    """The options of a front on its lower convex hull: prices of use rise along it."""
    hull: list[int] = []
    for j in front:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (values[b] - values[a]) * (uses[b] - uses[j]) < (values[j] - values[b]) * (uses[a] - uses[b]):
                break
            hull.pop()
        hull.append(j)
    return hull


def _trimmed(values: Numbers, uses: Numbers, limit: float, fronts: list[list[int]], chosen: list[int]) -> tuple[int, ...]:
    """The plan with what it does not need taken back, the dearest first."""
    spare = limit - _sum(uses, chosen)
    for i in sorted(range(len(fronts)), key=lambda i: -values[i][chosen[i]]):
        cheaper = [j for j in fronts[i] if values[i][j] < values[i][chosen[i]] and uses[i][j] - uses[i][chosen[i]] <= spare]
        if cheaper:
            j = min(cheaper, key=lambda j: values[i][j])
            trial = [*chosen[:i], j, *chosen[i + 1 :]]
            if _sum(uses, trial) <= limit:
                chosen, spare = trial, limit - _sum(uses, trial)
    return tuple(chosen)


def _branch_and_cut(
    values: Numbers, uses: Numbers, limit: float, fronts: list[list[int]], gap: float, seconds: float
) -> tuple[tuple[int, ...] | None, float] | None:
    """(the best plan that was found in time, a bound from below)."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(i, j) for i, front in enumerate(fronts) for j in front]
    cost = np.array([values[i][j] for i, j in pairs])
    scale = max(float(cost.max()), 1e-300)
    use = np.array([uses[i][j] for i, j in pairs]) / (limit or 1.0)
    one_each = sparse.csr_array((np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))), shape=(len(fronts), len(pairs)))
    found = milp(
        cost / scale,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(use[None], -np.inf, 1 - _SLACK)],
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if found.x is None:
        return None
    chosen = tuple(pairs[t][1] for t in np.flatnonzero(found.x > 0.5))
    return (chosen if len(chosen) == len(fronts) else None), float(found.fun) * scale * (1 - float(found.mip_gap or 0.0))


def _sum(numbers: Numbers, chosen: Sequence[int]) -> float:
    return float(sum(row[j] for row, j in zip(numbers, chosen, strict=True)))


def _solution(values: Numbers, uses: Numbers, chosen: tuple[int, ...], bound: float) -> Solution:
    value = _sum(values, chosen)
    return Solution(chosen, value, _sum(uses, chosen), max(0.0, float(value - bound) / value) if value > 0 else 0.0)
