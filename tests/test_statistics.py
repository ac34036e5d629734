"""The second detector: its sums, thresholds and tests; silent on clean and drifting data, loud on a marginal unit."""

from __future__ import annotations

import copy
import logging
import math
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import abft
from abft import checksum
from abft.backends import quick, reference
from abft.inject import Fault, faults
from abft.ledger import Verdict
from abft.native import library
from abft.statistics import accumulators, cusum, lone, soft_threshold, watches
from abft.statistics.accumulators import BLOCK, BLOCKS, COUNT, FIELDS, KINDS, MAXIMA, MAXIMA2, MOST, SQUARES, SUM, Accumulator
from abft.statistics.baseline import WARM_UP, Baseline
from abft.statistics.monitor import Monitor
from abft.statistics.severity import Budget, Severity, of_suspect

BOTH = abft.Policy(detector="both", on_uncorrected="record")
TOLERANT = abft.Policy(detector="statistical", on_uncorrected="record")
compiled = pytest.mark.skipif(library.functions() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def nothing_known():
    watches.forget()
    abft.report(reset=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of products this small most of the time would be waiting for each other
    yield
    torch.set_num_threads(before)
    watches.forget()


# --- sums ---------------------------------------------------------------------------------------------


def residuals(rows: int, groups: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(5, (rows, groups, len(KINDS))) * 0.02


def test_sums_are_those_of_the_definition():
    x, a = residuals(100), Accumulator()
    sigma, soft = np.full(4, 0.02), np.full(4, 0.1)
    a.scale(sigma, soft)
    a.add(x)
    for j in range(len(KINDS)):
        of_kind = x[..., j]
        cut = np.clip(of_kind, -math.sqrt(50) * 0.02, math.sqrt(50) * 0.02)
        maxima = np.array([np.abs(of_kind[r : r + BLOCK]).max() for r in range(0, 100, BLOCK)])
        above = [(np.abs(of_kind) > level).sum() for level in (0.08, 0.16, 0.24, 0.1)]
        expected = [200, cut.sum(), (cut**2).sum(), np.abs(of_kind).max(), *above, 4, maxima.sum(), (maxima**2).sum()]
        assert np.allclose(a.kept[j], expected, rtol=1e-12), FIELDS


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("rows", [1, 5, 37, 203])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_judge_keeps_the_same_sums(dtype, form, rows, threads):
    torch.manual_seed(0)
    a, w = torch.randn(rows, 96).to(dtype), torch.randn(160, 96).to(dtype)
    p = reference.plan(160, 96, dtype, form, 64)
    panel = reference.build_panel(w, p.layout)
    y = nn.functional.linear(a, w)
    # Deviations far above the rounding of either judge's own sums, far below the bound's 1.
    bound = reference.judge(y, reference.sums(y, a, panel, None, p), 96, p).tau[:, :, 0]
    for g in range(p.layout.groups.count):
        y[:, 64 * g] += (torch.from_numpy(bound[:, g].astype(np.float32)) * 0.3).to(dtype)
    judgement = reference.judge(y, reference.sums(y, a, panel, None, p), 96, p)
    x = (judgement.sums.actual - judgement.sums.predicted) / judgement.tau
    # What the compiled judge divides by: the bound's terms added in quadrature.
    x = x * judgement.tau / quadrature(judgement, p, 96)
    fast, plain = Accumulator(), Accumulator()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert quick.worst(y, a, quick.compiled(panel, None, 96, p, dtype), fast.address) <= 1
    finally:
        torch.set_num_threads(before)
    plain.add(x)
    assert np.array_equal(fast.kept[:, COUNT], plain.kept[:, COUNT])
    if rows >= 16:  # fewer come in blocks of eight
        assert np.array_equal(fast.kept[:, BLOCKS], plain.kept[:, BLOCKS])
        assert np.allclose(fast.kept[:, [MAXIMA, MAXIMA2]], plain.kept[:, [MAXIMA, MAXIMA2]], atol=0.06 * plain.kept[0, BLOCKS])
    n, kinds = fast.kept[0, COUNT], len(p.tested)
    # Two correct evaluations of one residual differ by the rounding of their sums, up to 0.02 of the bound rms in fp32.
    assert np.all(abs(fast.kept[:kinds, SUM] - plain.kept[:kinds, SUM]) <= 0.05 * n)
    assert np.allclose(fast.kept[:kinds, SQUARES], plain.kept[:kinds, SQUARES], rtol=0.1, atol=0.01 * n)
    assert np.allclose(fast.kept[:, MOST], plain.kept[:, MOST], atol=0.06)
    assert not fast.kept[kinds:].any()


def quadrature(j, p, k: int) -> np.ndarray:
    from abft import threshold

    c = threshold.coefficients(p.arithmetic, k, p.tested, p.layout.groups.width)
    squares = j.sums.squares.astype(np.float64)[..., None]
    scale2 = squares + np.square(j.sums.predicted, dtype=np.float64) + j.sums.noise2.astype(np.float64)[..., None]
    return np.sqrt(np.square(c.accumulate) * scale2 + np.square(c.round) * squares + np.square(c.absolute))


@compiled
def test_a_product_that_is_not_clean_is_left_to_the_next_judge():
    a, w = torch.randn(40, 64), torch.randn(48, 64)
    p = reference.plan(48, 64, torch.float32, "full", None)
    panel, kept = reference.build_panel(w, p.layout), Accumulator()
    y = nn.functional.linear(a, w)
    y[3, 4] += 1.0
    assert not quick.worst(y, a, quick.compiled(panel, None, 64, p, torch.float32), kept.address) <= 1
    assert not kept.kept.any()


# --- thresholds ---------------------------------------------------------------------------------------


def test_gumbel_is_scipys():
    found = soft_threshold.gumbel(3.0, 0.4, 128, 1e-6)
    scale = 0.4 * math.sqrt(6) / math.pi
    law = stats.gumbel_r(3.0 - np.euler_gamma * scale, scale)
    # A block of 128 exceeds u with probability 128 p; the tail's −ln F is that to first order.
    assert found == pytest.approx(law.ppf(math.exp(-128e-6)), rel=1e-6)


@pytest.mark.parametrize("law", [stats.norm(), stats.laplace(scale=0.7)], ids=["normal", "laplace"])
def test_the_soft_threshold_keeps_its_rate(law):
    """1e-5 is asked for; the fit to maxima may be off by its own error, but not by ten, and never below a third."""
    x = np.abs(law.rvs((40_000, 128), random_state=0))
    maxima = x.max(1)
    u = soft_threshold.gumbel(float(maxima[:2000].mean()), float(maxima[:2000].std()), 128, 1e-5)
    assert law.sf(u) * 2 <= 1e-4


def test_the_soft_threshold_knows_nothing_from_one_block():
    one, sums = np.ones(4), np.full(4, 0.1)
    assert np.isinf(soft_threshold.soft_threshold(one, one, sums, sums**2, 128 * one)).all()
    least = soft_threshold.soft_threshold(one, 2 * one, 2 * sums, 2 * sums**2, 256 * one)
    assert np.allclose(least, 12.0)


# --- sequential tests ---------------------------------------------------------------------------------


def test_likelihood_ratios_are_scipys():
    u = np.linspace(-3, 6, 19)
    for k in (0.25, 1.0):
        assert np.allclose(cusum.shift(u, k), stats.norm.logpdf(u, 2 * k) - stats.norm.logpdf(u, 0))
    count, n = np.arange(5), np.full(5, 1e4)
    expected = stats.poisson.logpmf(count, 1e4 * 8e-5) - stats.poisson.logpmf(count, 1e4 * 1e-6)
    assert np.allclose(cusum.rate(count, n, 1e-6, 8e-5), expected)


def test_the_mean_time_between_false_alarms_is_at_least_the_exponential_of_the_threshold():
    rng, test = np.random.default_rng(0), cusum.Cusum(4000, threshold=5.0)
    alarms = sum(int(test.step(cusum.shift(rng.standard_normal(4000), 0.25)).sum()) for _ in range(1000))
    # e⁵ = 148 batches at least: 4e6 unit-batches give at most 2.7e4 alarms.
    assert 0 < alarms <= 4e6 / math.exp(5.0)


def batches(rng, units: int, count: int, *, n: int = 1024, bias=None, noise=None, drift: float = 0.0):
    """Batches of heavy-tailed residuals (Student's t, 6 degrees of freedom), summed as units do."""
    for i in range(count):
        scale = 0.02 * math.exp(drift * i / count / 2)
        out = np.zeros((units, len(KINDS), len(FIELDS)))
        x = rng.standard_t(6, (units, len(KINDS), n // 8)) * scale
        x = x * (1.0 if noise is None else noise[:, None, None]) + (0.0 if bias is None else bias[:, None, None] * 0.02)
        out[..., COUNT], out[..., SUM], out[..., SQUARES] = n // 8, x.sum(-1), (x**2).sum(-1)
        out[..., BLOCKS], out[..., MAXIMA], out[..., MAXIMA2] = 1, abs(x).max(-1), (x**2).max(-1)
        yield out


def test_peers_name_the_marginal_unit_and_nobody_else():
    rng, units = np.random.default_rng(1), 16
    clean, off, loud = np.zeros(units), np.zeros(units), np.ones(units)
    off[3], loud[9] = 0.3, 1.1
    m = Monitor(units)
    assert not [s for b in batches(rng, units, WARM_UP + 300, drift=2.0) for s in m.add(b)]
    found = {(s.test, s.unit) for b in batches(rng, units, 400, bias=off) for s in m.add(b)}
    assert found == {("bias", 3)}
    found = {(s.test, s.unit) for b in batches(rng, units, 600, bias=clean, noise=loud) for s in m.add(b)}
    assert found == {("noise", 9)}
    assert all(s.quarantine for b in batches(rng, units, 400, bias=off) for s in m.add(b))


def test_a_lone_unit_is_silent_while_data_drift_and_loud_about_a_bias():
    rng, m = np.random.default_rng(2), Monitor()
    assert not [s for b in batches(rng, 1, WARM_UP + 1500, n=8192, drift=3.0) for s in m.add(b)]
    signs = [s for b in batches(rng, 1, 200, n=8192, drift=0.0, bias=np.array([0.4])) for s in m.add(b)]
    # Its noise fell back to where the drift had begun: no alarm either, for less noise is no fault.
    assert signs and {s.test for s in signs} == {"bias"} and all(s.quarantine for s in signs)


@compiled
@pytest.mark.parametrize("kinds", [len(KINDS), 1], ids=["full", "lean"])
def test_the_compiled_batch_does_what_the_monitor_does(monkeypatch, kinds):
    """Clean data, drift, a bias and outliers: the same sums, baselines, alarms and levels; only what alarms is left to the monitor."""
    passed = []
    passes = lone.Quiet.passes
    monkeypatch.setattr(lone.Quiet, "passes", lambda self: passed.append(passes(self)) or passed[-1])
    watched = [watches.Watch((0, 0, role, 64, 64, torch.float32, watches.HOST), Monitor()) for role in ("fprop", "dgrad")]
    told: dict[str, list[tuple[str, int]]] = {"fprop": [], "dgrad": []}
    monkeypatch.setattr(watches, "tell", lambda key, monitor, signs: told[key[2]].extend((s.test, int(s.checks)) for s in signs))
    for call in range(2 * (WARM_UP + 260)):
        i = call // 2  # two groups, two calls: a batch of 1200, then of 1400
        x = residuals(300 if i < WARM_UP else 350, seed=call)[..., :kinds]
        if i > WARM_UP + 40:
            x = x * 1.15  # drift that nobody shall be told of
        if 120 < i - WARM_UP < 180:
            x = x + 0.3 * 0.026  # σ of these residuals
        if i == WARM_UP + 220:
            x[:60, 0] = 0.9
        for watch in watched:
            if watch.key[2] == "dgrad":
                watch._quiet = None
            watch.add(x)
            watch.settle()
    fast, plain = (watch.monitor for watch in watched)
    assert told["fprop"] == told["dgrad"] and {"bias", "outliers"} <= {test for test, _ in told["fprop"]}
    assert passed.count(True) >= 200 and 0 < passed.count(False) <= len(told["fprop"])
    assert len(passed) == 260, "every batch after the warm-up, none smaller than any other"
    for a, b in ((fast.total, plain.total), (fast.pooled, plain.pooled), (fast.last, plain.last)):
        assert np.allclose(a, b, rtol=1e-12)
    assert np.allclose(fast.baseline.noise, plain.baseline.noise, rtol=1e-12)
    for test in ("bias", "noise", "outliers"):
        for a, b in zip(fast.charts(test), plain.charts(test), strict=True):
            assert all(np.allclose(one, other, rtol=1e-9, atol=1e-9) for one, other in zip(a.state, b.state, strict=True)), test
    one, other = (watch._accumulator for watch in watched)
    assert np.allclose(one.level2, other.level2, rtol=1e-12) and np.allclose(one.cap2, other.cap2, rtol=1e-12)


def test_rare_outliers_alarm():
    rng, m = np.random.default_rng(3), Monitor()
    for b in batches(rng, 1, WARM_UP, n=8192):
        m.add(b)
    signs = []
    for i, b in enumerate(batches(rng, 1, 400, n=8192)):
        b[..., accumulators.ABOVE_8] = b[..., accumulators.ABOVE_12] = 20 * (i % 10 == 0)
        signs += m.add(b)
    assert {s.test for s in signs} == {"outliers"} and not any(s.quarantine for s in signs)


def test_outliers_that_all_units_have_are_the_datas():
    rng, m = np.random.default_rng(3), Monitor(16)
    for b in batches(rng, 16, WARM_UP, n=8192):
        m.add(b)
    signs = []
    for b in batches(rng, 16, 100, n=8192):
        b[..., accumulators.ABOVE_8] = b[..., accumulators.ABOVE_12] = 5
        signs += m.add(b)
    assert not signs
    for b in batches(rng, 16, 100, n=8192):
        b[7, :, accumulators.ABOVE_12] = 5
        signs += m.add(b)
    assert {(s.test, s.unit, s.quarantine) for s in signs} == {("outliers", 7, True)}


def test_what_persists_is_told_when_the_residuals_have_doubled():
    rng, m = np.random.default_rng(4), Monitor()
    for b in batches(rng, 1, WARM_UP, n=8192):
        m.add(b)
    signs = [s for b in batches(rng, 1, 400, n=8192, bias=np.array([1.0])) for s in m.add(b)]
    told = [s for s in signs if m.is_news(s)]
    assert len(signs) > 20 and 1 <= len(told) <= 6


def test_a_baseline_that_learns_is_silent():
    b = Baseline()
    for batch in batches(np.random.default_rng(0), 1, WARM_UP - 1):
        b.learn(batch)
    assert not b.frozen
    b.learn(batch)
    assert b.frozen and np.allclose(b.sigma, 0.02 * math.sqrt(6 / 4), rtol=0.1)  # of Student's t: √(ν / (ν − 2))


# --- severity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, single, severity",
    [(5e-4, True, Severity.S2), (9.9e-4, True, Severity.S3), (2e-3, True, Severity.S3), (5e-4, False, Severity.S4), (math.nan, True, Severity.S4)],
    ids=["small", "within the residual's own noise of harm", "harmful", "several errors", "not finite"],
)
def test_severities(size, single, severity):
    assert of_suspect(np.full((1, 2), size), np.full((1, 2), 1e-4), size if single else np.nan, 1.0) is severity


def test_sums_that_disagree_about_the_size_are_several_errors():
    bound = np.array([[1e-4, 3e-4]] * 2)
    assert of_suspect(np.array([[1e-5, 0.0], [5e-4, -5.5e-4]]), bound, -5e-4, 1.0) is Severity.S2  # noise
    assert of_suspect(np.array([[1e-5, 0.0], [5e-4, 0.0]]), bound, 5e-4, 1.0) is Severity.S4
    assert of_suspect(np.array([[1e-5, 0.0], [5e-4, 5e-4]]), bound, 1e-5, 1.0) is Severity.S4


def test_a_budget_is_used_up_and_fills_again():
    b = Budget(burst=2, rate=1e-3, left=2)
    assert [b.take(0), b.take(0), b.take(0), b.take(500), b.take(1500)] == [True, True, False, False, True]


# --- through the public interface ---------------------------------------------------------------------


def layer(policy=BOTH, size: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return abft.protect(nn.Linear(size, size), policy, name="marginal")


def feed(model, calls: int, rows: int = 512, scale: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(calls):
            model(torch.randn(rows, model.in_features, generator=generator) * scale)


def marginal(monkeypatch, strength: float) -> None:
    """From now on every element of a product is off by a little, by the signs of its checksum."""
    right = reference.multiply

    def wrong(a, w, bias):
        y = right(a, w, bias)
        signs = checksum.weights(("e",), y.shape[-1], torch.device("cpu"))[0]
        return y + signs * (strength * y.norm(dim=-1, keepdim=True)) if y.dim() == 2 else y

    monkeypatch.setattr(reference, "multiply", wrong)


@pytest.mark.parametrize("native", [pytest.param(True, marks=compiled), False], ids=["compiled", "in torch"])
def test_a_marginal_unit_that_no_check_sees_is_found(monkeypatch, native):
    if not native:
        monkeypatch.setattr(quick, "compiled", lambda *_: None)
    model, calls = layer(), WARM_UP * 2
    feed(model, calls * 3)
    clean = abft.report(reset=True)
    assert clean.alarms == () and clean.detected == 0
    (seen,) = clean.statistics
    assert seen.warm and seen.site == "marginal" and seen.role == "fprop" and seen.shape == (64, 64) and seen.residuals >= 2 * 1024 * WARM_UP
    marginal(monkeypatch, 1.5e-8)
    with abft.context(release="2"):
        feed(model, 40, seed=1)
    found = abft.report()
    assert found.detected == 0, "the bound must not see it, or this tests nothing"
    assert {a.test for a in found.alarms if a.quarantine} == {"bias"}
    alarm = next(a for a in found.alarms if a.quarantine)
    assert alarm.site == "marginal" and alarm.context == {"release": "2"} and "quarantine the unit" in alarm.message
    assert str(alarm.message) in str(found) and found.sites["marginal"].alarms == found.alarms


def test_an_alarm_is_told_without_a_lock(monkeypatch):
    """A log's handler may wait for a thread that makes a report, which holds a lock of its own and asks for the alarms."""
    waited = []

    class Handler(logging.Handler):
        def emit(self, record):
            reporter = threading.Thread(target=abft.report, daemon=True)
            reporter.start()
            reporter.join(20)
            waited.append(reporter.is_alive())

    handler, log = Handler(), logging.getLogger("abft")
    log.addHandler(handler)
    try:
        model = layer()
        feed(model, 3 * WARM_UP)
        marginal(monkeypatch, 1.5e-8)
        feed(model, 40, seed=1)
    finally:
        log.removeHandler(handler)
    assert waited and not any(waited)


def test_replicas_are_held_against_each_other():
    """A bias of a fifth of the residuals' deviation: no check sees it, none of the units alone would dare to say, three peers do."""
    base, names = nn.Linear(64, 64), ["left", "middle", "right"]
    models = [abft.protect(copy.deepcopy(base), BOTH, name=f"{name}.layer") for name in names]
    peers, generator = abft.Peers(names, warm_up=24), torch.Generator().manual_seed(0)

    def compare(amount: float) -> list:
        with torch.no_grad():
            for model in models:
                marginal = model is models[2] and amount
                fault = Fault("offset", pattern="column", index=(0, 5), probability=1.0, amount=amount or 1.0)
                with faults(fault) if marginal else nullcontext():
                    model(torch.randn(1024, 64, generator=generator))
        return peers.compare()

    assert not [found for _ in range(40) for found in compare(0.0)]
    assert peers.warm and peers.levels().max() < 0.5
    found = next(found for _ in range(60) if (found := compare(4e-7)))
    assert {(f.unit, f.name, f.alarm.unit, f.alarm.test, f.alarm.quarantine) for f in found} == {(2, "right", 2, "bias", True)}
    assert abs(found[0].alarm.deviation) < 0.6
    assert 24 <= found[0].began <= 42, "an excursion that chance began may have been on its way already; too late it must not be"
    assert found[0].alarm.site == "layer" and "right, beside 2 peers" in found[0].alarm.message
    report = abft.report()
    assert report.detected == 0 and list(report.alarms) == [f.alarm for f in found]
    watches.forget()  # of the units' sums, not of what the peers have learnt
    assert compare(0.0) == [] and compare(0.0) == []


def test_two_units_or_two_of_one_name_are_no_peers():
    for names in (["a", "b"], ["a", "b", "b"]):
        with pytest.raises(ValueError, match="nobody can say which is wrong"):
            abft.Peers(names)


def test_outliers_of_one_peer_may_be_its_datas(monkeypatch):
    rng, peers, sums = np.random.default_rng(3), abft.Peers(["a", "b", "c", "d"]), np.zeros((4, len(KINDS), len(FIELDS)))
    name = ("layer", "fprop", 64, 64, "float32")
    monkeypatch.setattr(peers, "_sums", lambda: [{name: of_unit.copy()} for of_unit in sums])
    found = []
    for i, b in enumerate(batches(rng, 4, WARM_UP + 100, n=8192)):
        b[3, :, accumulators.ABOVE_12] = 5 * (i > WARM_UP)
        sums += b
        found += peers.compare()
    assert {(f.name, f.alarm.test, f.alarm.quarantine) for f in found} == {("d", "outliers", False)}


def test_drifting_data_is_no_marginal_unit():
    model = layer()
    for i in range(40):
        feed(model, 10, scale=1.05**i, seed=i)
        with torch.no_grad():
            model.weight.mul_(1 + 0.1 * torch.randn_like(model.weight))
    report = abft.report()
    assert report.alarms == () and report.detected == 0 and report.statistics[0].residuals > 9e4


def test_nothing_is_kept_for_the_checksums_alone():
    feed(layer(abft.Policy()), 20)
    assert abft.report().statistics == ()


def test_gradients_are_watched_too():
    model = layer()
    for _ in range(8):
        model(torch.randn(512, 64, requires_grad=True)).sum().backward()
    assert {s.role for s in abft.report().statistics} >= {"fprop", "dgrad"}


def test_a_module_that_takes_a_number_over_is_learnt_anew():
    first = layer()
    feed(first, 8)
    site = int(first._abft_site)
    assert abft.report().statistics[0].residuals == 4096
    del first
    second = layer()
    assert int(second._abft_site) == site
    feed(second, 4)
    assert sorted(s.residuals for s in abft.report().statistics) == [2048, 4096]


# --- a harmless row is let be, a harmful one never ------------------------------------------------------


def strike(policy, bit: int, *, rows: int = 32, what: str = "bitflip", pattern: str = "element"):
    """A product of which one element, half of a row's rms, is hit; (report, what was delivered, what is right)."""
    torch.manual_seed(1)
    model, x = layer(policy, 128), torch.randn(rows, 128)
    with torch.no_grad():
        right = nn.functional.linear(x, model.weight, model.bias)
        at = (right[5].abs() - right[5].square().mean().sqrt() / 2).abs().argmin()
        with faults(Fault(what, bit=bit, index=(5, int(at)), pattern=pattern)) as log:
            delivered = model(x)
    return abft.report(reset=True), delivered, right, log[0].effect


def test_a_harmless_deviation_is_tolerated():
    report, delivered, right, effect = strike(TOLERANT, 13)
    assert effect < 1e-3
    assert report.tolerated == 1 and report.detected == 0 and report.recomputed == 0
    assert not torch.equal(delivered, right) and torch.equal(delivered[:5], right[:5])
    (event,) = report.events
    assert event.verdict is Verdict.TOLERATED and event.row == 5
    assert report.statistics == () or report.statistics[0].severities["S2"] == 1


@pytest.mark.parametrize("policy", [BOTH, abft.Policy(on_uncorrected="record")], ids=["both", "checksum"])
def test_other_detectors_repair_it(policy):
    report, delivered, right, _ = strike(policy, 13)
    assert report.recomputed == 1 and report.tolerated == 0 and torch.equal(delivered, right)


@pytest.mark.parametrize("bit", [20, 23, 27, 30, 31])
def test_a_harmful_deviation_is_repaired(bit):
    report, delivered, right, effect = strike(TOLERANT, bit)
    assert effect >= 1e-3
    assert report.recomputed == 1 and report.tolerated == 0 and torch.equal(delivered, right)


@pytest.mark.parametrize("pattern", ["row", "fragment", "warp4"])
def test_several_errors_are_repaired_whatever_their_size(pattern):
    report, delivered, right, _ = strike(TOLERANT, 13, pattern=pattern)
    assert report.tolerated == 0 and report.recomputed >= 1 and torch.equal(delivered, right)


def test_errors_that_look_like_one_small_one_are_repaired(monkeypatch):
    """A, -2 A, A + s, equally far apart and of one sign: e, one, hi and lo are those of s alone, in an element that is off by A + s."""
    torch.manual_seed(1)
    model, x = layer(TOLERANT, 128), torch.randn(32, 128)
    signs = checksum.signs(128)
    first = next(n for n in range(128 - 32) if signs[n] == signs[n + 16] == signs[n + 32])
    with torch.no_grad():
        right = nn.functional.linear(x, model.weight, model.bias)
        norm, multiply, calls = float(right[5].norm()), reference.multiply, []

        def wrong_at_first(*args):
            y = multiply(*args)
            if not calls:
                calls.append(1)
                y[5, first : first + 33 : 16] += norm * torch.tensor([5e-3, -1e-2, 5e-3 + 5e-4])
            return y

        monkeypatch.setattr(reference, "multiply", wrong_at_first)
        delivered = model(x)
    report = abft.report()
    assert report.tolerated == 0 and report.recomputed == 1 and torch.equal(delivered, right)


def test_a_changed_weight_is_not_tolerated():
    model, x = layer(TOLERANT.replace(weights="frozen"), 128), torch.randn(1, 128)
    with torch.no_grad():
        right = model(x)
        with faults(Fault("bitflip", "weight", bit=21, index=(3, 4))):
            delivered = model(x)
    report = abft.report()
    assert report.tolerated == 0 and torch.equal(delivered, right)


def test_the_budget_ends_tolerance():
    model, x = layer(TOLERANT, 128), torch.randn(32, 128)
    with torch.no_grad():
        column = int((model(x)[5].abs() - 0.3).abs().argmin())
        for _ in range(12):
            with faults(Fault("bitflip", bit=13, index=(5, column))):
                model(x)
    report = abft.report()
    assert report.tolerated == 8 and report.recomputed == 4


def test_a_step_with_a_tolerated_row_is_not_replayed():
    model = layer(TOLERANT, 128)
    guard = abft.StepGuard(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, attempts = torch.randn(32, 128), 0
    with faults(Fault("carry", bit=13, index=(5, 7))):
        while guard.attempt():
            attempts += 1
            model(x).square().mean().backward()
        guard.step()
    assert attempts == 1
