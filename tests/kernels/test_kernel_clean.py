"""Without a fault: right numbers, and silence."""

from __future__ import annotations

import oracles
import pytest
import torch
from kernel_harness import DTYPES, assert_right, operands, run

SHAPES = [(1, 1, 1), (1, 577, 4096), (3, 16, 64), (130, 577, 300), (64, 1100, 96), (257, 40, 33), (7, 3, 1), (2, 2049, 17)]
EMPTY = [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0), (1, 0, 0)]


def shape_id(shape):
    return "m{}-n{}-k{}".format(*shape)


def assert_silent(result, rows):
    c = result.counters
    assert (c["checks"], c["products"], c["executions"]) == (rows, 1, 1)
    assert result.detected == c["input_rows"] == c["overflow_rows"] == 0 and result.records == []
    assert result.suspect_rows == []


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_agrees_with_fp64_and_is_silent(shape, dtype):
    m, n, k = shape
    a, w = operands(m, n, k, dtype)
    bias = torch.randn(n).to(dtype) if n % 2 else None
    result = run(a, w, bias)
    assert_right(result, a, w, bias)
    assert_silent(result, m)
    assert 0 < result.worst < 0.5 or k == 1  # the thresholds' table: clean maxima stay below half a bound


@pytest.mark.parametrize("shape", EMPTY, ids=shape_id)
def test_empty_products_are_those_of_torch(shape):
    m, n, k = shape
    a, w = operands(m, n, k, torch.float32)
    bias = torch.randn(n)
    result = run(a, w, bias)
    assert oracles.bits_equal(result.y.cpu(), torch.nn.functional.linear(a, w, bias))
    assert_silent(result, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_bias_of_any_stride(dtype):
    a, w = operands(5, 140, 30, dtype)
    for bias in (torch.randn(280).to(dtype)[::2], torch.randn(1).to(dtype).expand(140)):
        assert oracles.bits_equal(run(a, w, bias).y, run(a, w, bias.clone(memory_format=torch.contiguous_format)).y)


VIEWS = {
    "a-transposed": (lambda a: a.mT.contiguous().mT, lambda w: w),
    "w-transposed": (lambda a: a, lambda w: w.mT.contiguous().mT),
    "both-transposed": (lambda a: a.mT.contiguous().mT, lambda w: w.mT.contiguous().mT),
    "every-second": (lambda a: torch.stack([a, -a], 1).flatten(0, 1)[::2], lambda w: torch.stack([w, -w], -1).flatten(-2)[:, ::2]),
    "offset": (lambda a: torch.nn.functional.pad(a, (3, 5, 2, 1))[2:-1, 3:-5], lambda w: torch.nn.functional.pad(w, (1, 0, 7, 0))[7:, 1:]),
    "expanded": (lambda a: a[:1].expand_as(a), lambda w: w[:, :1].expand_as(w)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides_have_the_bits_of_a_contiguous_product(view, dtype):
    a, w = operands(70, 140, 90, dtype)
    a, w = VIEWS[view][0](a), VIEWS[view][1](w)
    assert a.shape == (70, 90) and w.shape == (140, 90)
    result, plain = run(a, w), run(a.clone(memory_format=torch.contiguous_format), w.clone(memory_format=torch.contiguous_format))
    assert oracles.bits_equal(result.y, plain.y)
    assert_right(result, a, w)
    assert_silent(result, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize(("form", "group"), [("lean", None), ("full", 128), ("lean", 64), ("full", 48), ("full", 16)])
def test_forms_and_groups(form, group, dtype):
    a, w = operands(20, 200, 128, dtype)
    result = run(a, w, panel=form, group=group)
    assert_silent(result, 20)
    assert result.plan.layout.groups.width < (group or 512) + result.plan.config.bn
    assert_right(result, a, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_batches_are_products_side_by_side(dtype):
    pairs = [operands(33, 150, 70, dtype, seed) for seed in range(3)]
    a, w = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
    result = run(a, w)
    for i, (x, v) in enumerate(pairs):
        assert oracles.bits_equal(result.y[i], run(x, v).y)
    assert_silent(result, 3 * 33)


FAMILIES = {
    "shifted": lambda a: a + 4,
    "lognormal": lambda a: (2 * a.float()).exp(),
    "outlier-channel": lambda a: torch.where(torch.arange(a.shape[1]) % 97 == 5, 100 * a, a),
    "softmax": lambda a: torch.softmax(4 * a.float(), -1),
    "sparse-rows": lambda a: torch.where(torch.arange(a.shape[1]) % 64 == 0, a, 0 * a),
    "gelu": lambda a: torch.nn.functional.gelu(a.float()),
    "zeros": lambda a: 0 * a,
    "denormal": lambda a: a.float() * 1e-41,
    "tiny": lambda a: a.float() * 1e-30,
    "huge": lambda a: a.float() * 1e30,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("family", FAMILIES)
def test_clean_data_of_every_kind_are_silent(family, dtype):
    a, w = operands(128, 130, 700, torch.float32)
    a, w = FAMILIES[family](a).to(dtype), (w.abs() if family in ("gelu", "shifted") else w).to(dtype)
    result = run(a[torch.isfinite(a).all(1)], w)
    assert result.detected == result.counters["input_rows"] == 0


def test_products_beyond_fp32_squares_are_recomputed_and_then_silent():
    a, w = operands(5, 150, 64, torch.float32)
    result = run(a * 1e22, w)
    assert result.suspect_rows == [0, 1, 2, 3, 4]  # an infinite bound never passes
    assert result.detected == 0 and result.records == []


def test_half_precision_overflow_is_delivered_and_counted():
    a, w = operands(6, 150, 64, torch.float16)
    a[2:4], w = 100.0, torch.full_like(w, 30.0)
    result = run(a, w)
    assert torch.isinf(result.y[2:4]).all() and torch.isfinite(result.y[[0, 1, 4, 5]]).all()
    assert result.detected == 0 and result.counters["overflow_rows"] == 2
    assert result.verdict() == "OVERFLOW" and result.records[0]["rows"] == 2


def test_fp32_overflow_of_finite_operands_is_no_fault():
    a, w = operands(4, 150, 64, torch.float32)
    a[1] = 3e38
    result = run(a, w.abs() + 1)
    assert torch.isinf(result.y[1]).all()
    assert result.detected == 0 and result.counters["overflow_rows"] == 1 and result.counters["input_rows"] == 0
