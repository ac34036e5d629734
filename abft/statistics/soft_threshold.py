"""The soft threshold: what a check's |x| exceeds with a stated probability p, from the maxima of blocks of checks.

    β = s √6 / π,   μ = m − 0.5772 β,   u_p = μ + β ln(1 / (b p))            b checks in a block, m and s of their maxima

Gumbel's law of maxima, fitted by its moments. Maxima over blocks decluster rows that are alike; a generalised Pareto fitted to
the excesses was not reliable at these sample sizes. Below it is what a residual looks like; between it and the bound is what no
clean residual looks like, though rounding could still explain it.
"""

from __future__ import annotations

import math

import numpy as np

EULER = 0.57721566490153286  # γ: the mean of the standard Gumbel law
#: Probability of a clean check above the soft threshold.
FALSE_ALARM = 1e-12
#: … and never below so many σ̂: a fit to few blocks knows little of its tail.
LEAST_SIGMAS = 12.0


def gumbel(mean: float, deviation: float, checks: float, p: float) -> float:
    """u_p: exceeded by one check with probability ``p``. mean, deviation: of the maxima of blocks of ``checks`` checks."""
    beta = deviation * math.sqrt(6.0) / math.pi
    return mean - EULER * beta + beta * math.log(1.0 / (checks * p))


def soft_threshold(
    sigma: np.ndarray, blocks: np.ndarray, maxima: np.ndarray, maxima2: np.ndarray, checks: np.ndarray, p: float = FALSE_ALARM
) -> np.ndarray:
    """u (…,): max(12 σ̂, u_p) from sums over ``blocks`` of their maxima and the squares of these; ``checks`` in all of them.

    Infinite where there are fewer than two blocks: nothing is known of a tail then.
    """
    out = np.full(np.shape(sigma), np.inf)
    for i in np.ndindex(np.shape(sigma)):
        if blocks[i] >= 2:
            mean = maxima[i] / blocks[i]
            variance = max(0.0, (maxima2[i] - blocks[i] * mean * mean) / (blocks[i] - 1))
            out[i] = max(LEAST_SIGMAS * sigma[i], gumbel(mean, math.sqrt(variance), checks[i] / blocks[i], p))
    return out
