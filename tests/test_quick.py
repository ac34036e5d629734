"""The fused judgement of clean products says what the specification says."""

from __future__ import annotations

import math

import pytest
import torch

import abft
from abft import checksum
from abft.backends import fresh, judging, quick, reference
from abft.backends.call import Call
from abft.native import library
from abft.policy import Policy


@pytest.fixture(params=["compiled", "torch"])
def how(request, monkeypatch):
    """Both ways to judge quickly: what holds for one has to hold for the other."""
    if request.param == "compiled" and library.why_not():
        pytest.skip(f"nothing compiled: {library.why_not()}")
    if request.param == "torch":
        monkeypatch.setattr(library, "_loaded", library.Library(None, "for a test"))
        _forget()
    yield request.param
    if request.param == "torch":
        _forget()


def _forget():
    judging._judge.cache_clear()
    fresh._of.cache_clear()


def _prepare(how, panel, sums, k, p, dtype):
    return quick.compiled(panel, sums, k, p, dtype) if how == "compiled" else quick.in_torch(panel, sums, k, p)


SHAPES = [(16, 384, 384), (5, 48, 7), (3, 3, 2), (1, 1, 1), (40, 1024, 130), (300, 640, 64)]


def _case(m, n, k, dtype, *, bias, group=None):
    generator = torch.Generator().manual_seed(m * 7 + n)
    a, w = torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, k, generator=generator).to(dtype)
    b = 3 * torch.randn(n, generator=generator).to(dtype) if bias else None
    call = Call(a, w, b, None, False, "fprop", Policy(group=group), 0)
    p = reference.plan_for(call)
    panel = reference.build_panel(w, p.layout)
    sums = None if b is None else checksum.bias_sums(b, p.layout)
    return call, p, panel, sums


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "m{}-n{}-k{}".format(*s))
@pytest.mark.parametrize("group", [None, 16], ids=["table", "g16"])
def test_same_worst_ratio_as_the_specification(how, shape, dtype, bias, group):
    call, p, panel, sums = _case(*shape, dtype, bias=bias, group=group)
    q = _prepare(how, panel, sums, shape[2], p, dtype)
    assert (q is None) == (dtype == torch.float64 if how == "compiled" else bool(p.layout.groups.ragged))
    if q is None:
        return
    y = reference.execute(call)
    specified = reference.examine(y, call, panel, sums, p)
    found = quick.worst(y, call.a, q)
    assert specified.clean
    # The same numbers summed by another call: they differ by rounding, which is what the bound is made of.
    assert found == pytest.approx(specified.worst, abs=0.5 * (1 if dtype.itemsize >= 4 else 0.05))
    assert found <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 0.0], ids=str)
def test_what_the_specification_suspects_is_not_passed(how, dtype, value):
    call, p, panel, sums = _case(16, 384, 384, dtype, bias=True)
    q = _prepare(how, panel, sums, 384, p, dtype)
    if q is None:
        assert dtype == torch.float64 and how == "compiled"  # which is judged in torch
        return
    y = reference.execute(call)
    y[3, 17 : 17 + 64] = value
    assert not reference.examine(y, call, panel, sums, p).clean
    assert not quick.worst(y, call.a, q) <= 1.0


def test_wrong_numbers_whose_squares_alone_overflow_are_not_passed(how):
    """A row of large numbers that cancel in all four sums but for a small rest: only the bound is infinite."""
    call, p, panel, sums = _case(16, 384, 384, torch.float32, bias=True)
    q = _prepare(how, panel, sums, 384, p, call.a.dtype)
    y = reference.execute(call)
    weights = checksum.weights(p.tested, 384, torch.device("cpu"), torch.float64)
    row = 2e18 * torch.randn(384, generator=torch.Generator().manual_seed(0)).double()
    y[3] = row - torch.linalg.pinv(weights) @ (weights @ row)
    y[3, 17] += 1e17
    assert y[3].square().sum().isinf() and ((y[3].double() @ weights.T).square() < 1e38).all() and torch.isfinite(y).all()
    assert not reference.examine(y, call, panel, sums, p).clean
    assert not quick.worst(y, call.a, q) <= 1.0


def test_agrees_with_the_specification_on_a_sweep_of_small_errors(how):
    call, p, panel, sums = _case(16, 384, 384, torch.float32, bias=True)
    q = _prepare(how, panel, sums, 384, p, call.a.dtype)
    clean = reference.execute(call)
    tau = reference.examine(clean, call, panel, sums, p).tau[3, 0, 0]
    passed = []
    for factor in (0.2, 0.5, 2.0, 5.0, 50.0):
        y = clean.clone()
        y[3, 17] += factor * float(tau)
        passed.append(quick.worst(y, call.a, q) <= 1.0)
        assert passed[-1] == reference.examine(y, call, panel, sums, p).clean
    assert passed == [True, True, False, False, False]


@pytest.mark.parametrize("dtype, group, bit", [(torch.float32, None, 18), (torch.float32, 16, 18), (torch.bfloat16, None, 6)], ids=["one group", "groups", "rounded"])
def test_a_bound_that_overflowed_explains_nothing(how, dtype, group, bit):
    """Numbers that are finite, as are all residuals; their squares and the bounds are not."""
    layer = abft.Linear(96, 160, dtype=dtype, policy=abft.Policy(group=group))
    x = (torch.randn(40, 96) * 2e19).to(dtype)
    with torch.no_grad():
        clean = layer(x)
        assert torch.isfinite(clean).all() and (clean.float().abs().amax(1) > 1e19).all()
        with abft.inject.faults(abft.inject.Fault("bitflip", bit=bit, index=(7, 5))) as log:
            y = layer(x)
    report = abft.report()
    assert log[0].effect > 1e-4 and torch.equal(y, clean) and report.recomputed == report.detected == 1
