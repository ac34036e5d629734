"""Laws of the mathematics: what must hold whatever the numbers are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abft import bits, checksum, floating, redundancy, threshold
from abft.checksum import FULL, LEAN, Groups, Layout

WIDTHS = [1, 2, 3, 4, 5, 15, 16, 17, 48, 64, 100, 128, 384, 512, 1000, 4096]
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: f"g{w}")
def test_signs_are_balanced_as_well_as_the_width_allows(width):
    eps = checksum.signs(width)
    assert set(np.unique(eps)) <= {-1.0, 1.0}
    if width < checksum.MIN_SIGNED_WIDTH:
        assert (eps == 1).all()
        return
    assert abs(eps.sum()) <= width % 2
    if width % 16 == 0:
        hi, lo = checksum.column_weights("hi", width), checksum.column_weights("lo", width)
        assert eps.sum() == hi.sum() == lo.sum() == 0
    # Neither alternating nor Thue–Morse: no aligned pair pattern may repeat throughout.
    if width >= 64:
        pairs = eps[: width // 2 * 2].reshape(-1, 2).sum(1)
        assert (pairs != 0).any() and (pairs == 0).any()


@pytest.mark.parametrize("columns", [1, 15, 16, 511, 512, 513, 1000, 4096, 5000])
@pytest.mark.parametrize("unit", [16, 128])
def test_groups_cover_every_column_once(columns, unit):
    groups = Groups.near_equal(columns, 512, unit)
    spans = [groups.span(g) for g in range(groups.count)]
    assert [n for start, stop in spans for n in range(start, stop)] == list(range(columns))
    assert columns <= 512 or groups.width % unit == 0
    assert all(stop - start <= max(512, unit) for start, stop in spans)


@given(seeds, st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=40, deadline=None)
def test_an_fp32_number_splits_exactly_into_three_bf16_and_nearly_into_two_fp16(seed, dtype):
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 100
    parts = floating.split(values, dtype, 3)
    assert parts.dtype == dtype and parts.shape == (3, 64)
    total = parts.double().sum(0)
    if dtype == torch.bfloat16:
        assert torch.equal(total, values.double())
    else:
        two = parts[:2].double().sum(0)
        assert ((two - values).abs() <= values.abs() * 2.0**-22 + 2.0**-24).all()


@given(seeds, st.sampled_from([3, 16, 40, 96]), st.sampled_from([FULL, LEAN]))
@settings(max_examples=30, deadline=None)
def test_checksums_are_linear_and_scale_exactly_by_powers_of_two(seed, n, form):
    generator = torch.Generator().manual_seed(seed)
    # Small integers: every sum is exact, so linearity holds to the bit.
    a, b = (torch.randint(-8, 9, (n, 12), generator=generator).double() for _ in range(2))
    layout = Layout(Groups.near_equal(n, 32), form, torch.float64, 1)
    count = layout.checksum_columns
    sums = [checksum.encode(m, layout).columns[:count] for m in (a, b, a + b, 8 * a)]
    assert torch.equal(sums[0] + sums[1], sums[2])
    assert torch.equal(8 * sums[0], sums[3])


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_permuting_rows_permutes_residuals(seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(9, 20, generator=generator).double(), torch.randn(48, 20, generator=generator).double()
    layout = Layout(Groups.near_equal(48, 32), FULL, torch.float64, 1)
    panel = checksum.encode(w, layout)
    order = torch.randperm(9, generator=generator)

    def sums(rows):
        actual, squares = checksum.actual_sums(rows @ w.T, layout.groups, FULL.kinds, torch.float64)
        return actual, squares, *checksum.predicted_sums(rows @ panel.columns.T, panel)

    for whole, permuted in zip(sums(x), sums(x[order]), strict=True):
        torch.testing.assert_close(whole[order], permuted, rtol=1e-12, atol=1e-12)


@given(seeds, st.sampled_from([16, 48, 100, 128, 512]), st.floats(-6, 6))
@settings(max_examples=60, deadline=None)
def test_a_single_error_is_located_and_rebuilt(seed, width, magnitude):
    rng = np.random.default_rng(seed)
    column, error = int(rng.integers(width)), float(10.0**magnitude * rng.choice([-1, 1]))
    d = [float(error * checksum.column_weights(kind, width)[column]) for kind in ("e", "hi", "lo")]
    assert checksum.locate(*d, tolerance=abs(error) / 10, width=width) == column
    row = torch.from_numpy(rng.standard_normal(width))
    predicted = float((checksum.weights(("e",), width, row.device, torch.float64)[0] * row).sum())
    for wrong in (error, float("nan"), float("inf")):
        struck = row.clone()
        struck[column] = wrong
        rebuilt = checksum.reconstruct(struck, predicted, column, Groups(width, width))
        assert abs(float(rebuilt - row[column])) <= 1e-12 * width


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_two_large_errors_are_not_taken_for_one_elsewhere_without_evidence(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.choice(128, 2, replace=False)
    w = {kind: checksum.column_weights(kind, 128) for kind in ("e", "hi", "lo")}
    d = [float(w[k][first] * 1.0 + w[k][second] * 3.7) for k in ("e", "hi", "lo")]
    found = checksum.locate(*d, tolerance=1e-6, width=128)
    assert found is None or abs(w["hi"][found] * w["e"][found] * d[0] - d[1]) <= 1e-6 / 8 * 100


def test_vote_is_the_bitwise_majority():
    x = torch.tensor([1.0, float("nan"), -0.0, 3.0])
    y = torch.tensor([1.0, 7.0, 0.0, 4.0])
    assert bits.same(redundancy.vote(x, x, y), x).all()
    assert bits.same(redundancy.vote(y, x, x), x).all()
    assert bits.same(redundancy.vote(x, y, x), x).all()
    assert redundancy.undecided_rows(x[None], y[None], torch.tensor([[1.0, 8.0, 1.0, 5.0]])).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["actual", "predicted", "squares", "noise2"])
def test_what_is_not_finite_is_suspect(where, value):
    numbers = {
        "actual": torch.ones(2, 1, 1), "predicted": torch.ones(2, 1, 1), "squares": torch.ones(2, 1), "noise2": torch.ones(2, 1),
    }  # fmt: skip
    coefficients = threshold.coefficients(threshold.HOPPER_16, 64, ("e",), 16)

    def judged():
        sums = checksum.Sums(("e",), **numbers)
        return threshold.suspect(sums, threshold.bounds(sums, coefficients), coefficients.largest).flatten()

    assert not judged().any()
    numbers[where][1] = value
    assert judged().tolist() == [False, True]


def test_bounds_grow_with_k_and_are_below_half_an_ulp_of_bf16_for_tensor_cores():
    arithmetic = threshold.HOPPER_16
    kappas = [threshold.kappa(arithmetic, k) for k in (64, 512, 4096, 16384)]
    assert kappas == [16 + k / 32 for k in (64, 512, 4096, 16384)]
    assert threshold.kappa(arithmetic, 4096, "one", width=128) > threshold.kappa(arithmetic, 4096)
    assert threshold.kappa(arithmetic, 4096, softmax_operand=True) == 16 + 2 * 256
    floor = threshold.expected_floor(arithmetic, 4096, Groups(128, 128)) * np.sqrt(128)  # in units of an element
    assert floor < 2.0**-9
    rounded = threshold.rounded(threshold.FMA_32, torch.bfloat16)
    assert threshold.expected_floor(rounded, 4096, Groups(4096, 128)) > 10 * threshold.expected_floor(threshold.FMA_32, 4096, Groups(4096, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_bit_of_a_weight_is_named_and_restored(dtype):
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    then = bits.fingerprint(weight)
    for bit in range(bits.WIDTH[dtype]):
        row, column = (7 * bit) % 40, (5 * bit) % 24
        struck = weight.clone()
        pattern = bits.as_integers(struck)
        pattern[row, column] ^= 1 << bit if bit < bits.WIDTH[dtype] - 1 else torch.iinfo(pattern.dtype).min
        now = bits.fingerprint(struck)
        assert bits.changed_columns(now, then).nonzero().flatten().tolist() == [column]
        found = bits.changed_elements(struck, now, then)
        assert [(e.row, e.column) for e in found] == [(row, column)]
        assert bits.same(bits.restored(struck, found), weight).all()
    two = weight.clone()
    two[3, 5], two[9, 5] = 11.0, -4.0
    assert bits.changed_elements(two, bits.fingerprint(two), then) is None
