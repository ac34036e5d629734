"""Failure prediction: how probable is a fault that cannot be repaired on this device, from those that could.

A logistic model of a few features of the last windows of public Reports. A window is a fixed number of steps. The shipped weights were
fitted to simulated fleets (docs/explanation/adaptive.md says what they assume), not to a real one: fit your own once you have records.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from abft.errors import PolicyError
from abft.ledger import Verdict
from abft.reporting import Report

VERSION = 1
#: Of a window: products repaired; those of them whose residual was ``SEVERE`` times its bound, or not finite; those that repeated; the
#: largest share of its bound that a clean residual took.
COUNTS = ("repaired", "severe", "persistent", "worst")
SEVERE = 1e3
#: Windows that features look back.
SHORT, LONG = 5, 20
FEATURES = ("repaired, short", "repaired, long", "trend", "severe", "persistent", "drift")
_REPAIRED = (Verdict.RECOMPUTED, Verdict.RECONSTRUCTED)


def counts_of(report: Report, device: str | None = None) -> tuple[float, ...]:
    """``COUNTS`` of one window's Report; device: of this device's events only."""
    repaired = [e for e in report.events if e.verdict in _REPAIRED and device in (None, e.device)]
    severe = sum(not abs(e.residual) <= SEVERE * e.bound for e in repaired)
    return float(len(repaired)), float(severe), float(sum(e.cause == "persistent" for e in repaired)), report.worst


def features(history: np.ndarray) -> np.ndarray:
    """(..., windows, FEATURES) of (..., windows, COUNTS): at every window, from it and those before. What is not there yet is zero."""
    repaired, severe, persistent, worst = np.moveaxis(np.asarray(history, float), -1, 0)
    short, long = _last(repaired, SHORT), _last(repaired, LONG)
    seen = np.arange(1, repaired.shape[-1] + 1)
    before = np.cumsum(worst, -1) / seen
    drift = np.log((_last(worst, SHORT) / np.minimum(seen, SHORT) + 1e-3) / (before + 1e-3))
    trend = np.log((short / SHORT + 0.05) / (long / LONG + 0.05))
    return np.stack([np.log1p(short), np.log1p(long), trend, np.log1p(_last(severe, LONG)), np.log1p(_last(persistent, LONG)), drift], -1)


def _last(values: np.ndarray, windows: int) -> np.ndarray:
    """Sums over the last so many windows."""
    total = np.cumsum(values, -1)
    out = total.copy()
    out[..., windows:] -= total[..., :-windows]
    return out


@dataclass(frozen=True)
class Weights:
    """A fitted model: score = intercept + Σ coefficients · features; P(uncorrected fault within ``horizon`` steps) of it.

    window: steps of one Report. threshold: probability at which it pays to drain the device. source: what it was fitted to.
    calibration: (score, probability) in rising order, interpolated; without it the probability is the logistic function of the score.
    """

    coefficients: tuple[float, ...]
    intercept: float
    window: int
    horizon: int
    threshold: float
    source: str
    calibration: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(FEATURES):
            raise PolicyError(f"weights of {len(FEATURES)} features are expected ({', '.join(FEATURES)}); got {len(self.coefficients)}")

    def probability(self, x: np.ndarray) -> np.ndarray:
        """Of features (..., FEATURES)."""
        score = self.intercept + x @ np.array(self.coefficients)
        if self.calibration:
            return np.interp(score, *np.array(self.calibration).T)
        return 1 / (1 + np.exp(-np.clip(score, -50, 50)))

    def calibrated(self, history: np.ndarray, fails_within: np.ndarray, *, bins: int = 40) -> Weights:
        """The same score with probabilities as they were on other records than those it was fitted to: isotonic regression.

        Each knot stands for at least 100 windows, and its probability for (failures + 1/2) / (windows + 1).
        """
        score = (self.intercept + features(history) @ np.array(self.coefficients)).reshape(-1)
        y = np.asarray(fails_within, float).reshape(-1)
        score, y = score[~np.isnan(y)], y[~np.isnan(y)]
        order = np.argsort(score)
        score, y = score[order], y[order]
        # Equal numbers of failures per bin, where there are any: the many quiet windows need few bins.
        weight = np.cumsum(y / max(1.0, y.sum()) + 0.2 / len(y))
        edges = np.unique(np.searchsorted(weight, np.linspace(0, weight[-1], bins + 1)[1:-1]))
        parts = zip(np.split(score, edges), np.split(y, edges), strict=True)
        pools = [(len(s), float(s.sum()), float(p.sum())) for s, p in parts if len(s)]
        merged: list[tuple[int, float, float]] = []
        for pool in pools:  # adjacent violators, and bins too small to say anything
            merged.append(pool)
            while len(merged) > 1 and _one_pool(merged[-2], merged[-1]):
                (n, s, k), (m, t, j) = merged[-2], merged[-1]
                merged[-2:] = [(n + m, s + t, k + j)]
        return replace(self, calibration=tuple((s / n, (k + 0.5) / (n + 1)) for n, s, k in merged))

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, "features": FEATURES, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Weights:
        values: dict[str, Any] = json.loads(text)
        version, names = values.pop("version", None), tuple(values.pop("features", ()))
        if version != VERSION or names != FEATURES:
            raise PolicyError(f"these weights are of version {version} and features {names}; {VERSION} and {FEATURES} are read here")
        return cls(**{**values, "coefficients": tuple(values["coefficients"]),
                      "calibration": tuple(tuple(knot) for knot in values["calibration"])})  # fmt: skip

    @classmethod
    def fit(
        cls, history: np.ndarray, fails_within: np.ndarray, *, window: int, horizon: int, source: str, threshold: float = 0.5,
        ridge: float = 1e-6,
    ) -> Weights:  # fmt: skip
        """Penalised maximum likelihood. history: (devices, windows, COUNTS); fails_within: 1, 0 or NaN (not used), of each.

        No coefficient is negative: more trouble never makes a failure less probable, also beyond what the records hold.
        """
        from scipy import optimize, special

        x, y = features(history).reshape(-1, len(FEATURES)), np.asarray(fails_within, float).reshape(-1)
        x, y = x[~np.isnan(y)], y[~np.isnan(y)]
        if not 0 < y.sum() < len(y):
            raise PolicyError("fitting needs windows before failures and others; got only one kind")

        def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
            score = x @ w[:-1] + w[-1]
            off = (special.expit(score) - y) / len(y)
            value = float((np.logaddexp(0, score) - y * score).mean() + ridge / 2 * w[:-1] @ w[:-1])
            return value, np.append(off @ x + ridge * w[:-1], off.sum())

        start = np.append(np.zeros(len(FEATURES)), math.log(y.mean() / (1 - y.mean())))
        bounds = [(0, None)] * len(FEATURES) + [(None, None)]
        w = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-8}).x
        return cls(tuple(float(v) for v in w[:-1]), float(w[-1]), window, horizon, threshold, source)


def _one_pool(low: tuple[int, float, float], high: tuple[int, float, float]) -> bool:
    """Whether two neighbouring pools (windows, sum of scores, failures) tell nothing apart."""
    return low[0] < 100 or low[1] / low[0] >= high[1] / high[0] or low[2] / low[0] >= high[2] / high[0]


class FailurePredictor:
    """Give it the Report of every ``weights.window`` steps: ``probability = predictor.observe(abft.report(reset=True))``.

    ``probability``: of an uncorrected fault on the device within ``weights.horizon`` steps. ``alarm``: whether it reached the threshold.
    device: whose events count, where a process drives several. Blind to what gives no warning: a unit that is fine and then is not.
    """

    def __init__(self, weights: Weights | None = None, *, device: str | None = None) -> None:
        self.weights, self.device = weights or SIMULATED, device
        self.probability, self.alarm = 0.0, False
        self._windows: deque[tuple[float, ...]] = deque(maxlen=LONG)
        self._worst = 0.0  # summed over all windows seen, for what is usual
        self._seen = 0

    def observe(self, report: Report) -> float:
        self._windows.append(counts_of(report, self.device))
        self._worst += self._windows[-1][-1]
        self._seen += 1
        x = features(np.array(self._windows))[-1]
        short = min(SHORT, self._seen)
        x[FEATURES.index("drift")] = math.log(
            (sum(w[-1] for w in list(self._windows)[-short:]) / short + 1e-3) / (self._worst / self._seen + 1e-3)
        )
        self.probability = float(self.weights.probability(x))
        self.alarm = self.probability >= self.weights.threshold
        return self.probability


#: Of the simulated fleets of bench/fleet.py, as bench/results/prediction.jsonl has them (tests/test_prediction.py compares).
SIMULATED = Weights(
    (0.0, 0.3857, 1.0844, 0.9818, 1.1328, 10.978), -4.6534, window=100, horizon=10000, threshold=0.8,
    source="simulated fleets, bench/fleet.py; bench/results/prediction.jsonl",
    calibration=(
        (-4.993, 0.0094349), (-4.556, 0.01034), (-4.487, 0.010359), (-4.362, 0.010534), (-4.221, 0.01173), (-4.12, 0.011774),
        (-4.039, 0.012587), (-3.947, 0.015148), (-3.833, 0.016444), (-3.667, 0.018805), (-3.363, 0.031148), (-2.75, 0.063875),
        (-2.072, 0.11389), (-1.434, 0.1818), (-0.771, 0.30968), (-0.017, 0.51317), (0.932, 0.91498), (1.839, 0.99239),
        (4.425, 0.99979),
    ),
)  # fmt: skip
