"""Laws of the checksums: linear, exact under powers of two, indifferent to the order of rows; location and reconstruction; bits and votes."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import name_of

from abft import bits, checksum, floating, redundancy
from abft.checksum import FORMS, FULL, LEAN, Groups, Layout

KINDS = ("e", "one", "hi", "lo")
WIDTHS = (1, 2, 3, 4, 7, 16, 17, 32, 48, 100, 128, 160, 512, 1000)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 70)


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_numbers(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Small integers: every sum of them is exact, so laws hold to the bit."""
    return torch.randint(-8, 9, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def sums(y: torch.Tensor, width: int = 16) -> torch.Tensor:
    groups = Groups.near_equal(y.shape[-1], width)
    return checksum.actual_sums(y, groups, KINDS, torch.float64)[0]


def layout(columns: int, dtype=torch.float64, width: int = 64, parts: int = 1, form=FULL) -> Layout:
    return Layout(Groups.near_equal(columns, width), form, dtype, parts)


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_signs_are_balanced(width):
    eps = checksum.signs(width)
    assert set(np.unique(eps)) <= {-1.0, 1.0} and eps.shape == (width,)
    if width < checksum.MIN_SIGNED_WIDTH:
        assert (eps == 1).all(), "too narrow to balance: plain ones"
        return
    assert abs(eps.sum()) <= 1
    hi, lo = (checksum.column_weights(k, width) for k in ("hi", "lo"))
    if width % 16 == 0:
        assert eps.sum() == hi.sum() == lo.sum() == 0, "Σε = Σε·hi = Σε·lo = 0"


@pytest.mark.parametrize("width", [32, 128, 512])
def test_signs_do_not_cancel_equal_errors_on_aligned_bursts(width):
    """Alternating or Thue–Morse signs would sum to zero on every aligned pair, quad or octet."""
    eps = checksum.signs(width)
    for burst in (2, 4, 8):
        cancelled = (eps.reshape(-1, burst).sum(1) == 0).mean()
        chance = {2: 1 / 2, 4: 3 / 8, 8: 35 / 128}[burst]
        assert cancelled < chance + 4 * (chance * (1 - chance) / (width / burst)) ** 0.5


def test_signs_are_the_same_in_every_process():
    """A panel that was saved, or built on another rank, must mean the same: fixed seeds, never Python's hash."""
    assert "".join("+" if e > 0 else "-" for e in checksum.signs(32)) == "".join("+" if e > 0 else "-" for e in checksum.signs.__wrapped__(32))
    first = checksum.sketch_coefficients(64, torch.device("cpu"))
    assert torch.equal(first, checksum._sketch_coefficients.__wrapped__(64, torch.device("cpu")))


@pytest.mark.parametrize("width", WIDTHS)
def test_digits_name_every_column(width):
    eps, hi, lo = (checksum.column_weights(k, width) for k in ("e", "hi", "lo"))
    assert len({(h * e, l * e) for e, h, l in zip(eps, hi, lo, strict=True)}) == width
    assert (checksum.column_weights("one", width) == 1).all()


# --- laws of the sums ------------------------------------------------------------------------------------


@given(sizes, sizes, seeds, st.integers(-4, 4), st.integers(-4, 4))
def test_checksums_are_linear(rows, columns, seed, a, b):
    y, z = whole_numbers(rows, columns, seed), whole_numbers(rows, columns, seed + 1)
    assert torch.equal(sums(a * y + b * z), a * sums(y) + b * sums(z))


@given(sizes, sizes, seeds, st.integers(-60, 60))
def test_scaling_by_a_power_of_two_is_exact(rows, columns, seed, power):
    y = matrix(rows, columns, seed)
    assert torch.equal(sums(y * 2.0**power), sums(y) * 2.0**power)


@given(sizes, sizes, seeds)
def test_permuting_rows_permutes_the_sums(rows, columns, seed):
    y = matrix(rows, columns, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(sums(y[order]), sums(y)[order], rtol=0, atol=columns * 2.0**-52 * 50)


@given(sizes, sizes, sizes, seeds)
def test_the_prediction_is_the_sum_of_the_product(rows, depth, columns, seed):
    """A · panel = sums of A Wᵀ, exactly where all numbers are small integers."""
    a, w = whole_numbers(rows, depth, seed), whole_numbers(columns, depth, seed + 1)
    panel = checksum.encode(w, layout(columns))
    predicted, _ = checksum.predicted_sums(a @ panel.columns.T, panel)
    assert torch.equal(predicted, sums(a @ w.T, 64))


@given(sizes, sizes, seeds, seeds)
def test_panels_are_linear_too(columns, depth, seed, other):
    v, w = whole_numbers(columns, depth, seed), whole_numbers(columns, depth, other)
    n = layout(columns).checksum_columns
    encoded = [checksum.encode(m, layout(columns)).columns[:n] for m in (v, w, v + w)]
    assert torch.equal(encoded[0] + encoded[1], encoded[2])


@given(sizes, st.integers(1, 40), seeds, st.integers(-20, 20))
def test_residuals_of_a_bias_are_those_of_one_more_input(columns, depth, seed, value):
    """A bias is one more k with input 1: its sums add to the prediction."""
    a, w = whole_numbers(3, depth, seed), whole_numbers(columns, depth, seed + 1)
    bias = torch.full((columns,), float(value), dtype=torch.float64)
    lay = layout(columns)
    panel = checksum.encode(w, lay)
    predicted = checksum.predicted_sums(a @ panel.columns.T, panel)[0] + checksum.bias_sums(bias, lay)[0]
    assert torch.equal(predicted, sums(a @ w.T + bias, 64))


def test_batches_are_encoded_one_by_one():
    w = whole_numbers(12, 40, 3).view(3, 4, 40).mT.contiguous()
    panel = checksum.encode(w, layout(40))
    for b in range(3):
        assert torch.equal(panel.columns[b], checksum.encode(w[b], layout(40)).columns)


@pytest.mark.parametrize("form", FORMS, ids=FORMS)
@pytest.mark.parametrize("columns", [1, 3, 16, 65, 130])
def test_panels_have_the_size_they_say(form, columns):
    lay = layout(columns, torch.float32, 64, form=FORMS[form])
    panel = checksum.encode(matrix(columns, 24, 1, torch.float32), lay)
    assert panel.columns.shape == (lay.columns, 24) and panel.nbytes == lay.columns * 24 * 4


def test_lean_panels_are_the_smaller_part_of_full_ones():
    w = matrix(130, 24, 1)
    full, lean = (checksum.encode(w, layout(130, form=f)) for f in (FULL, LEAN))
    groups = full.layout.groups.count
    assert torch.equal(full.columns[: 4 * groups : 4], lean.columns[:groups]) and lean.nbytes < full.nbytes


# --- splitting -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-2.0**100, 2.0**100, width=32), min_size=1, max_size=20))
def test_three_bf16_parts_hold_an_fp32_number_exactly(values):
    x = torch.tensor(values, dtype=torch.float32)
    x = torch.where(x.abs() < 2.0**-80, torch.zeros(()), x)  # below, the smallest part would be subnormal
    parts = floating.split(x, torch.bfloat16, 3)
    assert parts.shape == (3, len(values)) and parts.dtype == torch.bfloat16
    assert torch.equal(parts.double().sum(0), x.double())


@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=20))
def test_two_fp16_parts_hold_22_bits(values):
    x = torch.tensor(values, dtype=torch.float32)
    scale = floating.power_of_two_scale(x)
    parts = floating.split(x / scale, torch.float16, 2).double() * scale.double()
    # Two roundings of 2⁻¹¹ each, the second of what the first left; scaled to peak near 2¹², small parts may be subnormal.
    assert ((parts.sum(0) - x.double()).abs() <= 2.0**-22 * x.double().abs() + 2.0**-25 * scale.double()).all()


@given(st.lists(st.floats(-2.0**100, 2.0**100, width=32), min_size=1, max_size=20))
def test_scales_are_powers_of_two(values):
    scale = floating.power_of_two_scale(torch.tensor(values, dtype=torch.float32))
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()


@pytest.mark.parametrize("wild", [float("inf"), float("nan"), -float("inf")], ids=str)
def test_what_is_not_finite_stays_so_in_its_first_part(wild):
    parts = floating.split(torch.tensor([wild, 1.0]), torch.bfloat16, 3)
    assert oracles.bits_equal(parts[0, :1].float().nan_to_num(7.0), torch.tensor([wild]).bfloat16().float().nan_to_num(7.0))
    assert torch.isfinite(parts[1:]).all() and parts[:, 1].float().sum() == 1


# --- location and reconstruction -------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([4, 16, 17, 64, 100, 128, 512]), st.floats(1e-3, 1e30), st.booleans(), st.data())
def test_a_single_error_is_located_exactly(width, size, negative, data):
    column = data.draw(st.integers(0, width - 1))
    error = -size if negative else size
    d_e, d_hi, d_lo = (error * float(checksum.column_weights(k, width)[column]) for k in ("e", "hi", "lo"))
    # Noise of a tenth of the tolerance in every sum, and the error three tolerances large.
    noise = [size / 3 / 10 * n for n in data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3))]
    assert checksum.locate(d_e + noise[0], d_hi + noise[1], d_lo + noise[2], size / 3, width) in (column, None)
    assert checksum.locate(d_e, d_hi, d_lo, size / 3, width) == column


@pytest.mark.parametrize("residuals", [(0.0, 1.0, 1.0), (float("nan"), 1, 1), (1, float("inf"), 1), (1.0, 1e3, 1.0), (1.0, 0.5, 0.5), (1.0, -9.0, 1.0)], ids=str)
def test_what_no_single_error_explains_is_not_located(residuals):
    assert checksum.locate(*residuals, 1e-6, 128) is None


@given(st.integers(4, 200), seeds, st.sampled_from([float("nan"), float("inf"), 1e38, 0.0, -5.5]))
def test_an_element_is_reconstructed_from_its_checksum_whatever_it_became(columns, seed, wrong):
    groups = Groups.near_equal(columns, 64)
    row = matrix(1, columns, seed)[0]
    column = seed % columns
    e = checksum.actual_sums(row[None], groups, ("e",), torch.float64)[0][0, :, 0]
    if groups.span(column // groups.width)[1] - groups.span(column // groups.width)[0] < checksum.MIN_SIGNED_WIDTH:
        return
    broken = row.clone()
    broken[column] = wrong
    value = checksum.reconstruct(broken, float(e[column // groups.width]), column, groups)
    assert abs(value.item() - row[column].item()) <= columns * 2.0**-52 * row.abs().sum().item()


# --- bits ------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_same_means_the_same_bits(dtype):
    nan, zero = torch.tensor([float("nan")]).to(dtype), torch.zeros(1, dtype=dtype)
    assert bits.same(nan, nan).all() and not bits.same(zero, -zero).any() and bits.same(zero, zero).all()


@settings(max_examples=60)
@given(st.sampled_from(FLOATS), st.integers(1, 70), st.integers(1, 50), seeds, st.data())
def test_one_changed_element_is_named_and_its_bits_come_back(dtype, rows, columns, seed, data):
    before = matrix(rows, columns, seed, dtype)
    then = bits.fingerprint(before)
    after = before.clone()
    r, c = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    width = bits.WIDTH[dtype]
    mask = data.draw(st.integers(1, 2**width - 1))
    integers = bits.as_integers(after)
    integers[r, c] ^= mask - 2**width if mask >= 2 ** (width - 1) else mask
    now = bits.fingerprint(after)
    assert bits.changed_columns(now, then).nonzero().flatten().tolist() == [c]
    found = bits.changed_elements(after, now, then)
    assert found is not None and [(e.row, e.column) for e in found] == [(r, c)]
    assert oracles.bits_equal(bits.restored(after, found), before)
    assert not oracles.bits_equal(after, before), "the original is not written"


@given(st.sampled_from(FLOATS), st.integers(1, 70), st.integers(1, 50), seeds)
def test_fingerprints_do_not_depend_on_strides_and_agree_with_the_tensor_form(dtype, rows, columns, seed):
    w = matrix(rows, columns, seed, dtype)
    plain, strided = bits.fingerprint(w), bits.fingerprint(w.mT.contiguous().mT)
    assert torch.equal(plain.plain, strided.plain) and torch.equal(plain.weighted, strided.weighted)
    halves = bits._halves(w).to(torch.int64)  # what a GPU computes
    index = torch.arange(1, rows + 1, dtype=torch.int64)
    assert torch.equal(halves.sum(1).to(torch.int32), plain.plain)
    assert torch.equal((halves * index[:, None]).sum(1).to(torch.int32), plain.weighted)


def test_two_changed_elements_of_a_column_are_not_named_wrongly():
    before = matrix(40, 6, 1, torch.float32)
    then = bits.fingerprint(before)
    after = before.clone()
    after[3, 2], after[9, 2] = 1.5, -2.5
    found = bits.changed_elements(after, bits.fingerprint(after), then)
    assert found is None or not all(e.row in (3, 9) for e in found)


def test_rows_beyond_65536_are_named():
    before = torch.zeros(100_000, 2)
    then = bits.fingerprint(before)
    after = before.clone()
    after[99_999, 1] = 1.0
    found = bits.changed_elements(after, bits.fingerprint(after), then)
    assert found is not None and [(e.row, e.column) for e in found] == [(99_999, 1)]


# --- votes -----------------------------------------------------------------------------------------------


@given(st.sampled_from(FLOATS), sizes, sizes, seeds)
def test_two_equal_results_outvote_a_third(dtype, rows, columns, seed):
    x, y = matrix(rows, columns, seed, dtype), matrix(rows, columns, seed + 1, dtype)
    x[0, 0] = float("nan")
    for three in ((x, x, y), (x, y, x), (y, x, x)):
        assert oracles.bits_equal(redundancy.vote(*three), x)
    assert oracles.bits_equal(redundancy.vote(x, x, x), x)


@given(sizes, sizes, seeds)
def test_votes_are_element_by_element(rows, columns, seed):
    """Three results, each wrong somewhere else: the vote is right everywhere."""
    clean = matrix(rows, columns, seed, torch.float32)
    three = []
    for n in range(3):
        wrong = clean.clone()
        wrong.view(-1)[n::3] += 1
        three.append(wrong)
    assert oracles.bits_equal(redundancy.vote(*three), clean)
    assert not redundancy.undecided_rows(*three).any()


def test_rows_without_a_majority_are_undecided():
    x = torch.zeros(3, 4)
    y, z = x.clone(), x.clone()
    y[1, 2], z[1, 2] = 1, 2
    assert redundancy.undecided_rows(x, y, z).tolist() == [False, True, False]
    assert redundancy.agreeing_rows(x, y).tolist() == [True, False, True]
