"""Bounds: never below what rounding does, never so wide that they see nothing, and closed against NaN and infinity."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import name_of

from abft import checksum, threshold
from abft.backends import reference
from abft.checksum import Groups, Sums

KINDS = ("e", "one", "hi", "lo")


def sums_of(actual, predicted, squares, noise2=0.0) -> Sums:
    shape = (1, 1, 1)
    return Sums(("e",), np.full(shape, actual), np.full(shape, predicted), np.full((1, 1), squares), np.full((1, 1), noise2))


def judged(actual, predicted, squares=1.0, noise2=0.0) -> bool:
    c = threshold.coefficients(threshold.FMA_32, 96, ("e",), 128)
    s = sums_of(*map(np.float32, (actual, predicted, squares, noise2)))
    with np.errstate(all="ignore"):
        return bool(threshold.suspect(s, threshold.bounds(s, c), c.largest).all())


@pytest.mark.parametrize("actual, predicted, squares", [
    (math.nan, 1, 1), (1, math.nan, 1), (1, 1, math.nan), (math.inf, 1, 1), (1, math.inf, 1), (math.inf, math.inf, 1), (-math.inf, math.inf, 1), (1, 1, math.inf),
    (1e30, 1e30, math.inf), (1, 3e38, 1), (2, 1, 1),
], ids=str)  # fmt: skip
def test_what_cannot_be_judged_is_suspect(actual, predicted, squares):
    assert judged(actual, predicted, squares)


@pytest.mark.parametrize("actual, predicted, squares", [(1, 1, 1), (0, 0, 0), (1, 1 + 1e-6, 1), (1e-30, 0, 0), (1e15, 1e15, 1e30)], ids=str)
def test_what_rounding_explains_is_not(actual, predicted, squares):
    assert not judged(actual, predicted, squares)


def test_tensors_and_arrays_give_the_same_bounds():
    rng = np.random.default_rng(0)
    actual, predicted = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    squares, noise2 = rng.uniform(size=(2, 5, 3)).astype(np.float32)
    c = threshold.coefficients(threshold.rounded(threshold.FMA_32, torch.bfloat16), 96, KINDS, 128)
    host = threshold.bounds(Sums(KINDS, actual, predicted, squares, noise2), c)
    device = threshold.bounds(Sums(KINDS, *map(torch.from_numpy, (actual, predicted, squares, noise2))), c)
    np.testing.assert_allclose(device.numpy(), host, rtol=4 * 2.0**-24)


# --- laws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", threshold.ARITHMETICS.values(), ids=threshold.ARITHMETICS)
def test_the_constants_are_those_of_the_study_or_raised(arithmetic):
    """κ = 16 + T/2, ones 16 + 1.5 T, softmax 16 + 2 T with T = K / L on tensor cores; calibration only ever raises it."""
    exact = not arithmetic.name.startswith("fma")
    for k in (64, 512, 4096):
        steps = k / arithmetic.depth
        study = {"e": 16 + steps / 2, "one": 16 + 1.5 * steps, "hi": 16 + steps / 2, "lo": 16 + steps / 2}
        for kind, expected in study.items():
            kappa = threshold.kappa(arithmetic, k, kind, width=128)
            assert kappa >= expected
            assert kappa == expected or not exact or kind == "one"
        softmax = threshold.kappa(arithmetic, k, width=128, softmax_operand=True)
        assert softmax == 16 + 2 * steps if exact else softmax > 16 + 2 * steps
    steep = {kind: threshold.kappa(arithmetic, 8192, kind) - threshold.kappa(arithmetic, 4096, kind) for kind in KINDS}
    assert steep["e"] == 4096 / arithmetic.depth / 2 and steep["one"] == 3 * steep["e"], "the slopes are the study's"


@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(-20, 20))
def test_bounds_scale_with_the_product(norm, predicted, noise, power):
    """τ without its absolute part is homogeneous: scaled by 2^p with everything it is made of, exactly."""
    c = threshold.coefficients(threshold.FMA_64, 96, ("e",), 128)
    scale = 2.0**power
    one = threshold.bounds(sums_of(0.0, predicted, norm**2, noise**2), c) - c.absolute[0]
    other = threshold.bounds(sums_of(0.0, predicted * scale, norm**2 * scale**2, noise**2 * scale**2), c) - c.absolute[0]
    np.testing.assert_allclose(other, one * scale, rtol=1e-12)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1, 2))
def test_bounds_grow_with_everything_they_are_made_of(norm, predicted, noise, more):
    c = threshold.coefficients(threshold.rounded(threshold.FMA_64, torch.bfloat16), 96, ("e",), 128)
    base = threshold.bounds(sums_of(0.0, predicted, norm**2, noise**2), c)
    for larger in ((predicted * more, norm**2, noise**2), (predicted, (norm * more) ** 2, noise**2), (predicted, norm**2, (noise * more) ** 2)):
        assert threshold.bounds(sums_of(0.0, *larger), c) >= base * (1 - 1e-12)


def test_longer_sums_and_rounded_results_have_wider_bounds():
    def tau(arithmetic, k):
        c = threshold.coefficients(arithmetic, k, ("e",), 128)
        return threshold.bounds(sums_of(0.0, 1.0, 1.0, 1.0), c).item()

    assert tau(threshold.FMA_32, 64) < tau(threshold.FMA_32, 4096) < tau(threshold.rounded(threshold.FMA_32, torch.float16), 4096)
    assert tau(threshold.rounded(threshold.FMA_32, torch.float16), 64) < tau(threshold.rounded(threshold.FMA_32, torch.bfloat16), 64)
    assert threshold.rounded(threshold.FMA_32, torch.float32).output_roundoff == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("k", [1, 64, 512, 2048])
@pytest.mark.parametrize("n", [16, 160, 1024])
def test_rounding_stays_under_the_bound_and_the_bound_near_the_rounding(dtype, n, k):
    """Worst clean |residual| / bound over 200 rows: at most one half, and not so small that the check is for show."""
    x, w = torch.randn(200, k).to(dtype), torch.randn(n, k).to(dtype)
    p = reference.plan(n, k, dtype, "full", None)
    y = reference.multiply(x, w, None)
    s = reference.sums(y, x, reference.build_panel(w, p.layout), None, p)
    assert 2e-4 < reference.judge(y, s, k, p).worst < 0.5 or (k == 1 and dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("dtype, harm", [(torch.float32, 1e-3), (torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)], ids=name_of)
@pytest.mark.parametrize("k", [64, 1024])
def test_the_expected_floor_is_what_a_deviation_meets(dtype, harm, k):
    """A deviation of twice the expected floor is flagged in every row, one of a tenth in none."""
    n = 256
    x, w = torch.randn(100, k).to(dtype), torch.randn(n, k).to(dtype)
    p = reference.plan(n, k, dtype, "full", None)
    panel = reference.build_panel(w, p.layout)
    floor = threshold.expected_floor(p.arithmetic, k, p.layout.groups)
    assert 0 < floor < harm
    y = reference.multiply(x, w, None).to(p.sum_dtype)
    norms = y.norm(dim=1)
    for factor, expected in ((3.0, True), (0.1, False)):
        wrong = y.clone()
        wrong[:, 37] += factor * floor * norms
        judgement = reference.judge(wrong, reference.sums(wrong, x, panel, None, p), k, p)
        assert bool(judgement.suspects().all()) if expected else not judgement.suspects().any()


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 200), st.integers(0, 2**31), st.sampled_from(["gauss", "positive", "sparse", "spread"]))
def test_clean_products_of_any_shape_are_silent(m, k, n, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(s, generator=generator) for s in ((m, k), (n, k)))
    if kind == "positive":
        x, w = x.abs(), w.abs()
    elif kind == "sparse":
        x = x * (torch.rand(m, k, generator=generator) < 0.1)
    elif kind == "spread":
        x = x * 10 ** (6 * torch.rand(m, k, generator=generator) - 3)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), w.to(dtype)
        p = reference.plan(n, k, dtype, "full", None)
        y = reference.multiply(a, b, None)
        judgement = reference.judge(y, reference.sums(y, a, reference.build_panel(b, p.layout), None, p), k, p)
        assert judgement.worst <= 1, (dtype, judgement.worst)


def test_sketches_estimate_the_uncancelled_norm():
    """h² = mean (x·g)² ≈ Σ_k x_k² ν_k², within the spread of four random signs (a chi-square of four)."""
    torch.manual_seed(1)
    x, w = torch.randn(4000, 96, dtype=torch.float64), torch.randn(160, 96, dtype=torch.float64)
    p = reference.plan(160, 96, torch.float64, "full", None)
    panel = reference.build_panel(w, p.layout)
    noise2 = checksum.predicted_sums(torch.nn.functional.linear(x, panel.columns), panel)[1].flatten()
    s = panel.columns[: p.layout.checksum_columns]
    rms = torch.tensor([checksum.weight_rms(k, 160) for k in KINDS], dtype=torch.float64)
    nu2 = (w**2).sum(0) + ((s / rms[:, None]) ** 2).sum(0)
    ratio = noise2 / (x**2 @ nu2)
    # Each is about χ²₄ / 4, mean 1, deviation √½; of 4000 the mean lies within five standard errors.
    assert abs(ratio.mean().item() - 1) < 5 * 0.5**0.5 / 4000**0.5 + 0.01
    assert ratio.min() > 1e-3


def test_groups_are_near_equal_multiples_of_a_fragment():
    for columns in (1, 15, 16, 17, 127, 128, 129, 577, 8192, 8193, 20000):
        for target in (16, 128, 512):
            groups = Groups.near_equal(columns, target)
            spans = [groups.span(g) for g in range(groups.count)]
            assert spans[0][0] == 0 and spans[-1][1] == columns and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert all(stop - start <= max(target, 16) for start, stop in spans)
            assert groups.count == 1 or groups.width % 16 == 0


def test_quick_and_general_judgement_agree():
    from abft.backends import quick

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for bias in (None, torch.randn(160).to(dtype)):
            x, w = torch.randn(33, 96).to(dtype), torch.randn(160, 96).to(dtype)
            p = reference.plan(160, 96, dtype, "full", None)
            y, panel = reference.multiply(x, w, bias), reference.build_panel(w, p.layout)
            extra = None if bias is None else checksum.bias_sums(bias, p.layout)
            general = reference.judge(y, reference.sums(y, x, panel, extra, p), 96, p).worst
            prepared = quick.prepare(panel, extra, 96, p, dtype)
            assert prepared is not None
            fast = quick.worst(y, x, prepared)
            # Both are rounding noise over a bound: equal up to the noise of the sums themselves.
            assert fast == pytest.approx(general, abs=0.1) and fast < 0.5
            y[3, 5] = float("nan")
            assert not quick.worst(y, x, prepared) <= 1


def test_oracles_themselves():
    """The fp64 oracle against exact integers, and the budget against a product that is wrong."""
    a, b = torch.randint(-8, 9, (5, 7)).float(), torch.randint(-8, 9, (7, 3)).float()
    exact = a.long() @ b.long()
    assert torch.equal(oracles.product(a, b), exact.double())
    oracles.assert_within(a @ b, exact.double(), oracles.budget(a, b))
    with pytest.raises(AssertionError, match="at \\(2, 1\\)"):
        wrong = (a @ b).clone()
        wrong[2, 1] += 1e-3
        oracles.assert_within(wrong, exact.double(), oracles.worst_case(a, b) * 0 + 1e-6)
