"""verify_matmul: a product that something else computed is judged, never written."""

from __future__ import annotations

import oracles
import pytest
import torch
from oracles import name_of

import abft

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [((7, 33), (33, 65)), ((1, 1), (1, 1)), ((300, 96), (96, 160)), ((2, 7, 33), (2, 33, 65)), ((2, 7, 33), (33, 65)), ((3, 1, 7, 33), (2, 33, 65))]


def product(shapes, dtype):
    a, b = (torch.randn(s).to(dtype) for s in shapes)
    return a, b, a @ b


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shapes", SHAPES, ids=lambda s: " by ".join(map(name_of, s)))
def test_right_products_are_ok_and_untouched(shapes, dtype):
    a, b, c = product(shapes, dtype)
    before = [t.clone() for t in (a, b, c)]
    result = abft.verify_matmul(a, b, c)
    assert result.ok is True
    assert result.suspect.dtype == torch.bool and result.suspect.shape == c.shape[:-1] and not result.suspect.any()
    assert result.residual.dtype == result.bound.dtype == result.floor.dtype == torch.float32
    assert result.residual.shape == result.bound.shape == (*c.shape[:-1], result.bound.shape[-1]) and result.floor.shape == c.shape[:-1]
    assert (result.residual.abs() <= result.bound).all() and (result.floor > 0).all()
    assert all(oracles.bits_equal(t, u) for t, u in zip((a, b, c), before, strict=True))
    assert abft.report().checks == 0, "somebody else's product is not ours to count"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_deviation_twice_the_floor_is_found_in_its_row_only(dtype):
    a, b, c = product(((40, 96), (96, 160)), dtype)
    floor = abft.verify_matmul(a, b, c).floor
    for row, column in [(0, 0), (13, 77), (39, 159)]:
        wrong = c.clone()
        step = 2 * floor[row] * c[row].double().norm()
        # What the type can hold: the deviation, and not less.
        wrong[row, column] = (c[row, column].double() + step).to(dtype)
        actual = (wrong[row, column].double() - c[row, column].double()).abs()
        assert actual > floor[row] * c[row].double().norm()
        suspect = abft.verify_matmul(a, b, wrong).suspect
        assert suspect.nonzero().tolist() == [[row]]


def test_the_floor_is_fine_for_fp32_and_says_that_it_is_coarse_for_half():
    floors = {}
    for dtype in DTYPES:
        a, b, c = product(((40, 4096), (4096, 256)), dtype)
        floors[dtype] = abft.verify_matmul(a, b, c).floor.median().item()
    assert floors[torch.float64] < 1e-11 and floors[torch.float32] < 1e-3
    # A result rounded to u hides everything below about 8 · 0.43 · u of a segment.
    assert 2.0**-8 / 4 < floors[torch.bfloat16] < 0.1 and floors[torch.float16] < floors[torch.bfloat16]


def test_narrow_groups_lower_the_floor():
    a, b, c = product(((40, 256), (256, 1024)), torch.bfloat16)
    wide, narrow = (abft.verify_matmul(a, b, c, policy=abft.Policy(group=g)) for g in (512, 32))
    assert wide.ok and narrow.ok and narrow.bound.shape[-1] == 32 and wide.bound.shape[-1] == 2
    assert (narrow.floor < wide.floor).all()


def test_without_a_policy_the_one_in_force_is_taken():
    a, b, c = product(((40, 256), (256, 1024)), torch.bfloat16)
    with abft.protected(abft.Policy(group=64)):
        assert abft.verify_matmul(a, b, c).bound.shape[-1] == 16
        assert abft.verify_matmul(a, b, c, policy=abft.Policy(group=32)).bound.shape[-1] == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
def test_extreme_values_fail_closed(value):
    a, b, c = product(((40, 96), (96, 160)), torch.float32)
    c[5, 6] = value
    result = abft.verify_matmul(a, b, c)
    assert not result.ok and result.suspect.nonzero().tolist() == [[5]]


def test_poisoned_operands_make_their_rows_suspect():
    a, b, c = product(((40, 96), (96, 160)), torch.float32)
    a[3, 3] = float("nan")
    assert abft.verify_matmul(a, b, a @ b).suspect.nonzero().tolist() == [[3]]


def test_swapped_rows_and_columns_are_seen():
    a, b, c = product(((40, 96), (96, 160)), torch.float32)
    rows = abft.verify_matmul(a, b, c.roll(1, 0)).suspect
    columns = abft.verify_matmul(a, b, c.roll(1, 1)).suspect
    assert rows.all() and columns.all()


def test_one_wrong_matrix_of_a_batch_is_named():
    a, b, c = product(((4, 10, 33), (4, 33, 65)), torch.float32)
    c[2] = 0
    suspect = abft.verify_matmul(a, b, c).suspect
    assert suspect[2].all() and suspect.sum() == 10


def test_strides_do_not_matter():
    a, b, c = product(((40, 96), (96, 160)), torch.float32)
    assert abft.verify_matmul(a.mT.contiguous().mT, b.mT.contiguous().mT, c.mT.contiguous().mT).ok


def test_mixed_dtypes_as_quantised_kernels_return_them():
    a, b = torch.randn(40, 96).bfloat16(), torch.randn(96, 160).bfloat16()
    assert abft.verify_matmul(a, b, a.float() @ b.float()).ok
    assert abft.verify_matmul(a, b.float(), (a.float() @ b.float()).bfloat16()).ok


def test_gradients_do_not_flow_and_grad_mode_does_not_matter():
    a, b = torch.randn(5, 9, requires_grad=True), torch.randn(9, 7, requires_grad=True)
    result = abft.verify_matmul(a, b, a @ b)
    assert result.ok and not result.residual.requires_grad
    with torch.inference_mode():
        assert abft.verify_matmul(a, b, a @ b).ok


@pytest.mark.parametrize("shapes", [((0, 9), (9, 7)), ((5, 0), (0, 7)), ((5, 9), (9, 0)), ((0, 5, 9), (9, 7))], ids=lambda s: " by ".join(map(name_of, s)))
def test_empty_products(shapes):
    a, b, c = product(shapes, torch.float32)
    result = abft.verify_matmul(a, b, c)
    assert result.ok and result.suspect.shape == c.shape[:-1]


def test_a_sum_over_nothing_must_be_zero():
    c = torch.zeros(5, 7)
    c[2, 3] = 1e-3
    assert abft.verify_matmul(torch.ones(5, 0), torch.ones(0, 7), c).suspect.nonzero().tolist() == [[2]]


def test_products_of_zeros_are_ok():
    assert abft.verify_matmul(torch.zeros(5, 9), torch.zeros(9, 7), torch.zeros(5, 7)).ok


@pytest.mark.parametrize("wrong, error", [
    (lambda: (torch.ones(5, 9), torch.ones(8, 7), torch.ones(5, 7)), ValueError), (lambda: (torch.ones(5, 9), torch.ones(9, 7), torch.ones(5, 8)), ValueError),
    (lambda: (torch.ones(9), torch.ones(9, 7), torch.ones(7)), ValueError), (lambda: (torch.ones(2, 5, 9), torch.ones(3, 9, 7), torch.ones(2, 5, 7)), ValueError),
    (lambda: (torch.ones(5, 9).int(), torch.ones(9, 7), torch.ones(5, 7)), TypeError), (lambda: (torch.ones(5, 9), torch.ones(9, 7), None), TypeError),
    (lambda: (torch.ones(5, 9), torch.ones(9, 7, device="meta"), torch.ones(5, 7)), RuntimeError), (lambda: (torch.eye(9).to_sparse(), torch.ones(9, 7), torch.ones(9, 7)), TypeError),
    (lambda: (torch.ones(5, 9), torch.ones(9, 7), torch.ones(5, 7).to(torch.float8_e4m3fn)), TypeError),
], ids=["inner sizes", "result shape", "vector", "batches", "integers", "nothing", "devices", "sparse", "fp8"])  # fmt: skip
def test_what_is_no_product_is_an_error(wrong, error):
    with pytest.raises(error, match="verify_matmul"):
        abft.verify_matmul(*wrong())
