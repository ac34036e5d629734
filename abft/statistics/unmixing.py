"""What is a unit's own, of sums over checks that several units share and over columns that each have an effect of their own.

    x of a check = effect of its group of columns + Σ effects of the units that computed its tiles + noise

Least squares, from sums alone: with C (units, units) and N (units, groups) how many checks units and groups have in common, n
the checks of every group, and S the sums of x by unit and by group,

    (C − N n⁻¹ Nᵀ) β = S_units − N n⁻¹ S_groups

β is what sets a unit apart from those that compute the same columns: a unit with columns to itself, or with the same partners in
every check, has none, and is not comparable. The same equations hold for x² (variances of tiles add up) and for counts of events.
β is as certain as the mean of 1 / (C − N n⁻¹ Nᵀ)⁺ᵤᵤ checks would be, were they the unit's alone: that is its count from here on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abft.statistics.accumulators import ABOVE_8, ABOVE_12, COUNT, SQUARES, SUM

#: Of a unit's checks: a direction in which less is known than this is not known.
LEAST = 1e-3
#: Of a unit's own direction, what has to be known: of two units that compute the same nobody can tell which is off (1/2), of three one can.
RESOLVED = 0.6


@dataclass(frozen=True)
class Shared:
    """Sums of one batch. units (U, kinds, fields), groups (G, kinds, fields); shares (U, G) and pairs (U, U): checks in common."""

    units: np.ndarray
    groups: np.ndarray
    shares: np.ndarray
    pairs: np.ndarray

    def pooled(self) -> np.ndarray:
        """(kinds, fields) of all checks, each of them once."""
        return self.groups.sum(0)


def unmixed(batch: Shared) -> np.ndarray:
    """(U, kinds, fields) as if every unit had checks of its own: pooled means plus what sets it apart; not comparable: zero checks."""
    checks, of_group = np.diag(batch.pairs).astype(np.float64), batch.groups[:, 0, COUNT]
    out = np.zeros_like(batch.units)
    present = checks > 0
    if present.sum() < 2:
        return out
    per_group = np.divide(batch.shares, of_group, where=of_group > 0, out=np.zeros(batch.shares.shape))
    matrix = batch.pairs - per_group @ batch.shares.T
    inverse, comparable = _pseudo_inverse(matrix, checks)
    own = np.divide(1.0, np.diag(inverse), where=comparable, out=np.zeros(len(checks)))
    pooled = batch.pooled()
    kinds = pooled[:, COUNT] > 0
    out[:, kinds, COUNT] = own[:, None]
    squares = _squares_of_means(batch, inverse @ (batch.units[..., SUM] - per_group @ batch.groups[..., SUM]))
    for field in (SUM, SQUARES, ABOVE_8, ABOVE_12):
        of_units, of_groups = batch.units[..., field], batch.groups[..., field]
        if field == SQUARES:  # what scatters about the means just fitted: the mean of one unit is no noise of its partners
            of_units, of_groups = of_units - squares[0], of_groups - squares[1]
        apart = inverse @ (of_units - per_group @ of_groups)
        apart -= np.median(apart[comparable], 0) if comparable.any() else 0.0
        common = pooled[:, field] / np.maximum(pooled[:, COUNT], 1.0)
        value = apart + common
        if field != SUM:
            value = np.maximum(value, common * LEAST)  # what cannot be negative
        out[..., field] = np.where(kinds, own[:, None] * value, 0.0)
    return out


def _squares_of_means(batch: Shared, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ (effect of the group + Σ effects of units)² over the checks of every unit and group, (U, kinds) and (G, kinds).

    Of three ways, unit by unit by group, only two are counted: partners are taken to be spread over groups as chance would have it.
    """
    checks, shares, pairs = np.maximum(batch.groups[:, :1, COUNT], 1.0), batch.shares.astype(np.float64), batch.pairs
    effects = (batch.groups[..., SUM] - shares.T @ beta) / checks
    chance = (shares / checks[:, 0]) @ shares.T
    out = shares @ effects**2 + pairs @ beta**2
    for kind in range(beta.shape[1]):
        middle = np.divide((shares * (effects[:, kind] / checks[:, 0])) @ shares.T, chance, where=chance > 0, out=np.zeros_like(chance))
        out[:, kind] += 2 * (pairs * middle) @ beta[:, kind]
    return out, checks * effects**2 + 2 * effects * (shares.T @ beta) + shares.T @ beta**2


def _pseudo_inverse(matrix: np.ndarray, checks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(matrix⁺, which units are comparable): those that share no direction with what the data do not tell, but for one common to many."""
    scale = 1.0 / np.sqrt(np.maximum(checks, 1.0))
    values, vectors = np.linalg.eigh(matrix * scale[:, None] * scale)
    known = values > LEAST
    inverse = (vectors[:, known] / values[known]) @ vectors[:, known].T * scale[:, None] * scale
    # How much of a unit's own direction is known: all, but for the shift that it has in common with those it is compared with.
    resolved = (vectors[:, known] ** 2).sum(1)
    return inverse, (checks > 0) & (resolved > RESOLVED)
