"""Simulated fleets: devices that age, and what a checked run on each reports, window by window. Assumptions, all of them; no field data.

A window is 100 steps. Each device of a fleet is one of:

    healthy     repaired faults at a small rate, drawn per device (log-normal around 1e-3 per window)
    burst       healthy, but for one window with 3 to 12 repaired faults (a power or thermal event)
    marginal    a constant rate between 0.02 and 0.5 per window, for ever (weak but stable)
    degrading   from an onset on the rate doubles every so many windows (log-normal around ``doubling``); a fault is beyond repair with a
                probability that grows with the rate, from 1e-4 to 0.2: the unit fails for good, or in more than one place at once
    sudden      healthy until one uncorrected fault, without warning

The first uncorrected fault ends a device's record. Clean residuals (``worst``) drift up as a degrading unit gets noisier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STEPS = 100
KINDS = ("healthy", "burst", "marginal", "degrading", "sudden")


@dataclass(frozen=True)
class Assumptions:
    """shares of kinds; doubling: windows in which a degrading device's rate doubles (median; spread: sigma of its logarithm)."""

    devices: int = 64
    windows: int = 600
    shares: tuple[float, ...] = (0.85, 0.04, 0.03, 0.076, 0.004)
    doubling: float = 6.0
    spread: float = 0.4
    noise: float = 0.1  # of a degrading unit's clean residuals, per tenfold rate


@dataclass(frozen=True)
class Fleet:
    """history: (devices, windows, 4) as abft.prediction.COUNTS; failed: window of the first uncorrected fault, or -1; kind: of KINDS.
    hazard (devices, windows): uncorrected faults expected in a window, sudden ones aside: what nobody sees, and nobody could know better.
    """

    history: np.ndarray
    failed: np.ndarray
    kind: np.ndarray
    hazard: np.ndarray


def simulate(assumptions: Assumptions, seed: int) -> Fleet:
    a, rng = assumptions, np.random.default_rng([seed, 77])
    n, t = a.devices, np.arange(a.windows)[None, :]
    kind = rng.choice(len(KINDS), n, p=a.shares)
    healthy = np.exp(rng.normal(np.log(1e-3), 0.7, n))[:, None]
    rate = np.broadcast_to(healthy, (n, a.windows)).copy()
    rate[kind == 2] = np.exp(rng.uniform(np.log(0.02), np.log(0.5), n))[kind == 2, None]
    onset = rng.integers(30, max(31, a.windows - 60), n)[:, None]
    doubling = np.exp(rng.normal(np.log(a.doubling), a.spread, n))[:, None]
    grown = 0.02 * 2.0 ** np.clip((t - onset) / doubling, None, 14)
    rate = np.where((kind == 3)[:, None] & (t >= onset), np.maximum(rate, np.minimum(grown, 200.0)), rate)
    repaired = rng.poisson(rate).astype(float)
    struck = rng.integers(0, a.windows, n)
    for i in np.flatnonzero(kind == 1):
        repaired[i, struck[i]] += rng.integers(3, 13)
    aging = (kind == 3)[:, None] & (t >= onset)
    beyond = np.where(aging, np.clip(1e-4 * (rate / 0.02) ** 0.9, 1e-4, 0.2), 1e-5)
    uncorrected = rng.binomial(repaired.astype(int), beyond) > 0
    uncorrected[kind == 4, struck[kind == 4]] = True
    failed = np.where(uncorrected.any(1), uncorrected.argmax(1), -1)
    severe = rng.binomial(repaired.astype(int), np.where(aging, 0.5, 0.3))
    persistent = rng.binomial(repaired.astype(int), np.where(aging, 0.25, np.where((kind == 2)[:, None], 0.15, 0.02)))
    louder = 1 + a.noise * np.maximum(0, np.log10(np.maximum(rate, 1e-9) / 0.02)) * aging
    worst = np.minimum(1.0, 0.25 * np.exp(rng.normal(0, 0.1, (n, a.windows))) * louder)
    return Fleet(np.stack([repaired, severe, persistent, worst], -1), failed, kind, rate * beyond)


def foreseeable(fleet: Fleet, horizon: int, lead: int) -> tuple[float, float]:
    """(failures that could be foreseen, failures) expected of the fleet's devices, by somebody who knows the rate of each, now and later.

    Given the rates, what was repaired says nothing of when a fault will be beyond repair, so the best rule of all is to raise each
    device's one alarm in the window t that makes P(alive until t + lead, failed by t + horizon) largest. Nobody foresees a sudden failure.
    """
    total = np.pad(np.cumsum(fleet.hazard, 1), ((0, 0), (0, horizon)), mode="edge")
    alive, length = np.exp(-total), fleet.hazard.shape[1]
    best = (alive[:, lead - 1 : lead - 1 + length] - alive[:, horizon : horizon + length]).max(1)
    sudden = fleet.kind == KINDS.index("sudden")
    return float(best[~sudden].sum()), float((1 - alive[~sudden, length - 1]).sum() + sudden.sum())


def fails_within(fleet: Fleet, windows: int) -> np.ndarray:
    """(devices, windows): 1 if the device fails in the next so many windows, 0 if not, NaN once it failed or if the record ends before."""
    length = fleet.history.shape[1]
    t, failed = np.arange(length)[None, :], fleet.failed[:, None]
    out = ((failed > t) & (failed <= t + windows)).astype(float)
    gone = (failed >= 0) & (t >= failed)
    unknown = (out == 0) & (t + windows >= length)
    return np.where(gone | unknown, np.nan, out)
