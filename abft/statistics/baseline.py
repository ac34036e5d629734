"""What is normal at a site and role: learnt from the first batches, then frozen; what is compared with it.

A batch is what every unit has added between two looks, (units, kinds, fields); without checks where a unit cannot be compared.

    peers (several units)   mean and ln variance of x against the median of all units in the same batch
    alone (one unit)        mean, in units of the σ of now, against the frozen μ, beyond 0.2 σ;
                            ln variance against its own slow average, beyond a factor of 1.6

What data do to residuals is common to peers. A lone unit has none: over a training run the variance drifts by a factor of 1.5, the
mean hardly (the random signs of the columns leave little that is systematic; bench/results/statistics.jsonl has both), except where
all rows are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from abft.statistics import soft_threshold
from abft.statistics.accumulators import ABOVE_8, ABOVE_12, BLOCKS, COUNT, FIELDS, KINDS, MAXIMA, MAXIMA2, PRIOR_SIGMA, SQUARES, SUM

#: Batches before the baseline is frozen, and checks in each.
WARM_UP = 64
BATCH = 1024
#: Deviations that are no matter: of the mean, in σ̂, and of the logarithm of the variance, where no peer tells what the data do.
SAME_MEAN = 0.2
SAME_NOISE = 0.5
#: Batches over which a lone unit's variance is followed.
MEMORY = 32
#: k of the tests of shifts: half of what they are tuned to find, in deviations of a batch.
REFERENCE = 0.25
#: Expected and suspected rates per check above 8 σ̂ and 12 σ̂; expected ones may be raised by what the warm-up shows.
RATES = ((1e-6, 8e-5), (2.3e-9, 8e-7))
#: A suspected rate is at least so many times the expected one.
RATIO = 30.0
#: What is left of x², at least, when a mean is taken out that was estimated apart from it.
LEFT = 0.1
#: A square that is nothing.
TINY = 1e-300


@dataclass
class Baseline:
    """σ̂ (kinds,) of x, what batches look like, and the soft threshold. Grows by ``learn`` until ``frozen``."""

    units: int = 1
    batches: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros((len(KINDS), len(FIELDS))))
    sigma: np.ndarray = field(default_factory=lambda: np.full(len(KINDS), PRIOR_SIGMA))
    soft: np.ndarray = field(default_factory=lambda: np.full(len(KINDS), np.inf))
    mean: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS)))  # of x
    mean_deviation: np.ndarray = field(default_factory=lambda: np.full(len(KINDS), np.inf))  # of a batch's mean
    noise: np.ndarray = field(default_factory=lambda: np.zeros(len(KINDS)))  # of ln of a batch's mean square; follows where alone
    noise_deviation: np.ndarray = field(default_factory=lambda: np.full(len(KINDS), np.inf))
    together: float = np.inf  # of the mean of all kinds' ln mean squares, each in its own deviations; of peers
    rates: tuple[tuple[float, float], ...] = RATES
    size: float = BATCH  # checks that make a batch
    frozen: bool = False
    warm_up: int = WARM_UP
    _means: list[np.ndarray] = field(default_factory=list)
    _noises: list[np.ndarray] = field(default_factory=list)
    _sizes: list[float] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        return self.units == 1

    def learn(self, batch: np.ndarray, pooled: np.ndarray | None = None) -> None:
        """One more batch of the warm-up. pooled (kinds, fields): of all checks, each once; by default the units' sum."""
        mean, noise = moments(batch) if self.alone else moments_of_peers(batch)
        if not self.alone:
            mean, noise = _against_peers(mean, batch), _against_peers(noise, batch)
        self.batches += 1
        self.total += batch.sum(0) if pooled is None else pooled
        self._means.append(mean)
        self._noises.append(noise)
        checks = batch[:, 0, COUNT]
        self._sizes.append(float(checks[checks > 0].mean()) if checks.any() else 0.0)
        count = np.maximum(self.total[:, COUNT], 1.0)
        # Kinds that nobody judges (a lean panel) keep the prior.
        self.sigma = np.where(self.total[:, SQUARES] > 0, np.sqrt(self.total[:, SQUARES] / count), PRIOR_SIGMA)
        if self.batches >= self.warm_up:
            self._freeze()

    def _freeze(self) -> None:
        total, means, noises = self.total, np.array(self._means), np.array(self._noises)
        count = np.maximum(total[:, COUNT], 1.0)
        self.mean = total[:, SUM] / count
        self.noise = np.median(noises[-MEMORY // 2 :], (0, 1)) if self.alone else np.zeros(len(KINDS))
        self.size = max(BATCH if self.alone else 0.0, float(np.median(self._sizes)))
        if not self.alone:
            means, noises = means / np.sqrt(max(self.size, 1.0)), noises / np.sqrt(max(self.size, 1.0))
        least = 1.0 / np.sqrt(max(self.size, 1.0))
        self.mean_deviation = np.maximum(_deviation(self._scatter(means)), self.sigma * least)
        self.noise_deviation = np.maximum(_deviation(self._scatter(noises)), np.sqrt(2.0) * least)
        if not self.alone:
            of_kinds = self._scatter(noises) / self.noise_deviation
            self.together = max(float(_deviation(of_kinds.mean(1, keepdims=True))[0]), 1.0 / len(KINDS))  # at least that of one kind
        self.soft = soft_threshold.soft_threshold(self.sigma, total[:, BLOCKS], total[:, MAXIMA], total[:, MAXIMA2], total[:, COUNT])
        self.rates = tuple(
            (low := max(expected, float(total[:, at].max() + 3.0) / float(count.max())), max(suspected, RATIO * low))
            for (expected, suspected), at in zip(RATES, (ABOVE_8, ABOVE_12), strict=True)
        )
        self._means, self._noises, self._sizes = [], [], []
        self.frozen = True

    def _scatter(self, values: np.ndarray) -> np.ndarray:
        """What batches (batches, units, kinds) deviate by; where alone, of neighbours: drift during the warm-up is no deviation."""
        if self.alone:
            return np.diff(values[:, 0], axis=0) / np.sqrt(2.0)
        flat = values.reshape(-1, len(KINDS))
        return flat[~np.isnan(flat).any(1)]

    def shifts(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(u of the mean, u of the ln variance) of a batch, (units, kinds) each, in deviations of a batch."""
        mean, noise = moments(batch) if self.alone else moments_of_peers(batch)
        if self.alone:
            # In units of what σ is now: means of noisier data scatter more.
            now = np.exp(np.maximum(noise, self.noise) / 2) / self.sigma
            u = (mean / now - self.mean) / self.mean_deviation, (noise - self.noise) / self.noise_deviation
            # One batch moves it up no further than a batch may deviate; less noise is no fault, and followed as it comes.
            self.noise += np.minimum(noise[0] - self.noise, 3 * self.noise_deviation) / MEMORY
            return u
        scale = np.sqrt(max(self.size, 1.0))
        u, v = _against_peers(mean, batch) / (scale * self.mean_deviation), _against_peers(noise, batch) / (scale * self.noise_deviation)
        return np.nan_to_num(u), np.nan_to_num(v)

    def of_all_kinds(self, shifts: np.ndarray) -> np.ndarray:
        """u (units,) of the noise of all kinds, from that of each (units, kinds): noise of the arithmetic is in all of them."""
        return shifts.mean(1) / self.together

    @property
    def drifted(self) -> np.ndarray:
        """By what factor σ is now above σ̂ (kinds,): what a lone unit's levels follow, so that more noise is not also more outliers."""
        if not (self.frozen and self.alone):
            return np.ones(len(KINDS))
        return np.where(self.noise > np.log(TINY), np.exp(self.noise / 2) / self.sigma, 1.0)

    def references(self) -> tuple[np.ndarray, np.ndarray]:
        """k (kinds,) of the two tests."""
        if not self.alone:
            return np.full(len(KINDS), REFERENCE), np.full(len(KINDS), REFERENCE)
        return REFERENCE + SAME_MEAN * self.sigma / self.mean_deviation, REFERENCE + SAME_NOISE / self.noise_deviation


def moments(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean of x, ln of the mean of x²) of batches (…, kinds, fields)."""
    count = np.maximum(batch[..., COUNT], 1.0)
    return batch[..., SUM] / count, np.log(np.maximum(batch[..., SQUARES] / count, TINY))


def moments_of_peers(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """… of units (units, kinds, fields), without what a unit's own mean adds to its x²: a bias is no noise."""
    mean, _ = moments(batch)
    checks = batch[:, 0, COUNT]
    apart = mean - np.median(mean[checks > 0], 0) if checks.any() else 0.0 * mean
    squares = batch[..., SQUARES] / np.maximum(batch[..., COUNT], 1.0)
    return mean, np.log(np.maximum(np.maximum(squares - apart**2, LEFT * squares), TINY))


def _against_peers(values: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """What sets (units, kinds) apart from their median, times the root of each unit's checks; NaN of units without any."""
    checks = batch[:, :1, COUNT]
    if not checks.any():
        return np.full_like(values, np.nan)
    return np.where(checks > 0, (values - np.median(values[checks[:, 0] > 0], 0)) * np.sqrt(checks), np.nan)


def _deviation(values: np.ndarray) -> np.ndarray:
    """The standard deviation of each column, but for its wildest hundredth."""
    if not len(values):
        return np.full(len(KINDS), np.inf)  # nothing was ever comparable
    low, high = np.quantile(values, (0.005, 0.995), axis=0)
    return np.clip(values, low, high).std(0)
