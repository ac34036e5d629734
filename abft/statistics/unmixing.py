"""What says that a unit is off, of sums over checks that several units share and over columns that each have an effect of their own.

    x of a check = effect of its group of columns + Σ effects of the units that computed its tiles + noise

From sums alone: with C (units, units) and N (units, groups) how many checks units and groups have in common, n the checks of every
group, and S the sums of x by unit and by group,

    A = C − N n⁻¹ Nᵀ        s = S_units − N n⁻¹ S_groups        s = A β + noise of covariance σ² A

Least squares, A⁺s, would tell the effects β of all units at once. A grid that deals tiles in turn makes A nearly singular, and 24 parts
of 25 of what is known would go into telling apart what hardly ever happens together. If *one* unit u is off, all that the sums say
about it is s_u: its mean s_u / A_uu is as certain as that of A_uu checks of its own, and a partner v shows A_uv / √(A_uu A_vv) of its
deviation. So units are tested by s, and who is to blame among those alike is decided by whose sum grows fastest (monitor.py). The same
holds for x² (variances of tiles add up) and for counts of events. β is still needed for x²: the mean of a unit is no noise of its partners.

A unit with columns to itself has no A_uu, and one that has the same partners in every check is all too like them: not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from abft.statistics.accumulators import ABOVE_8, ABOVE_12, COUNT, SQUARES, SUM

#: Of a unit's checks: a direction in which less is known than this is not known.
LEAST = 1e-3
#: Of a unit's checks, what has to be left of them; and how alike two units may be of whom one can be told.
OWN, ALIKE = 0.05, 0.97


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


def unmixed(batch: Shared) -> tuple[np.ndarray, np.ndarray]:
    """(U, kinds, fields) as if every unit had checks of its own: pooled means plus what sets it apart, not comparable: zero checks;
    and (U, U) which part of the deviation of the second the first shows, with its sign, both held against the median unit."""
    checks, of_group = np.diag(batch.pairs).astype(np.float64), batch.groups[:, 0, COUNT]
    out = np.zeros_like(batch.units)
    if (checks > 0).sum() < 2:
        return out, np.eye(len(checks))
    per_group = np.divide(batch.shares, of_group, where=of_group > 0, out=np.zeros(batch.shares.shape))
    matrix = batch.pairs - per_group @ batch.shares.T
    own = np.maximum(np.diag(matrix), 0.0)
    root = np.sqrt(np.maximum(own, 1.0))
    alike = matrix / root[:, None] / root
    own[(own <= OWN * checks) | (np.abs(alike - np.diag(np.diag(alike))).max(1) > ALIKE)] = 0.0
    comparable = own > 0
    if comparable.any():  # what one unit adds moves the median, too, and so everyone else
        shown = matrix / root[:, None] ** 2
        alike = (shown - np.median(shown[comparable], 0)) * root[:, None] / root
    pooled = batch.pooled()
    kinds = pooled[:, COUNT] > 0
    out[:, kinds, COUNT] = own[:, None]
    beta = _pseudo_inverse(matrix, checks) @ (batch.units[..., SUM] - per_group @ batch.groups[..., SUM])
    squares = _squares_of_means(batch, beta)
    for field in (SUM, SQUARES, ABOVE_8, ABOVE_12):
        of_units, of_groups = batch.units[..., field], batch.groups[..., field]
        if field == SQUARES:  # what scatters about the means just fitted: the mean of one unit is no noise of its partners
            of_units, of_groups = of_units - squares[0], of_groups - squares[1]
        apart = (of_units - per_group @ of_groups) / root[:, None] ** 2
        apart -= np.median(apart[comparable], 0) if comparable.any() else 0.0
        common = pooled[:, field] / np.maximum(pooled[:, COUNT], 1.0)
        value = apart + common
        if field != SUM:
            value = np.maximum(value, common * LEAST)  # what cannot be negative
        out[..., field] = np.where(kinds, own[:, None] * value, 0.0)
    return out, alike


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


def _pseudo_inverse(matrix: np.ndarray, checks: np.ndarray) -> np.ndarray:
    """matrix⁺, without the directions that the data do not tell."""
    scale = 1.0 / np.sqrt(np.maximum(checks, 1.0))
    values, vectors = np.linalg.eigh(matrix * scale[:, None] * scale)
    known = values > LEAST
    return (vectors[:, known] / values[known]) @ vectors[:, known].T * scale[:, None] * scale
