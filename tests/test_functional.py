"""linear, matmul, bmm, addmm: torch's results and gradients, on torch's own samples and on awkward shapes, and every row counted."""

from __future__ import annotations

import warnings

import oracles
import pytest
import torch
from oracles import name_of
from torch import nn
from torch.nn import functional as F

import abft

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OURS = {"nn.functional.linear": abft.linear, "matmul": abft.matmul, "bmm": abft.bmm, "addmm": abft.addmm}
OP_INFOS = [op for op in op_db if op.name in OURS]
#: Where torch takes the same path as abft: the very same bits.
SAME_BITS = ("nn.functional.linear", "bmm")


def operator_name(op) -> str:
    return op.name.split(".")[-1] + (f"-{op.variant_test_name}" if op.variant_test_name else "")


def budget_of(name: str, tensors: list[torch.Tensor], alpha: float = 1, beta: float = 1) -> torch.Tensor:
    """How far an honest result may lie from fp64, from the operands of one sample; a scalar, the sample's largest."""
    unit = oracles.ROUNDOFF[tensors[0].dtype]
    wide = oracles.ROUNDOFF[oracles.WIDE[tensors[0].dtype]]
    if name == "nn.functional.linear":
        left, right, added = tensors[0], tensors[1].mT if tensors[1].dim() > 1 else tensors[1], tensors[2] if len(tensors) > 2 else None
    elif name == "addmm":
        left, right, added = tensors[1], tensors[2], tensors[0]
    else:
        left, right, added = tensors[0], tensors[1], None
    depth = left.shape[-1] + 2
    reach = abs(alpha) * torch.matmul(left.detach().abs().double(), right.detach().abs().double())
    result = reach if added is None else reach + abs(beta) * added.detach().abs().double()
    # Summation in the wide type; one rounding each of the product, of the two scalings, and of the sum.
    bound = depth * wide * result + (4 if name == "addmm" else 1) * unit * result
    return bound.max() if bound.numel() else torch.tensor(0.0)


def sample_id(number: int, sample) -> str:
    return f"sample {number}: " + ", ".join(str(tuple(t.shape)) for t in oracles.tensors_in([sample.input, sample.args]))


def run(function, sample, cotangent: torch.Tensor | None = None):
    """Result and gradients of a function on a sample, the sample's tensors being the leaves."""
    leaves = oracles.tensors_in([sample.input, sample.args, sample.kwargs])
    fresh = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in leaves}

    def take(value):
        return fresh[id(value)] if isinstance(value, torch.Tensor) else value

    out = function(take(sample.input), *map(take, sample.args), **{k: take(v) for k, v in sample.kwargs.items()})
    if cotangent is None:
        cotangent = torch.randn_like(out)
    if out.requires_grad:  # some of torch's samples want no gradients
        out.backward(cotangent)
    return out.detach(), [fresh[id(t)].grad for t in leaves], cotangent


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", OP_INFOS, ids=operator_name)
def test_torchs_own_samples_agree_in_values_and_gradients(op, dtype):
    if not op.supports_dtype(dtype, "cpu"):
        pytest.skip(f"torch has no {name_of(dtype)} {op.name} on this device")
    for number, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
        expected, expected_grads, cotangent = run(op, sample)
        got, grads, _ = run(OURS[op.name], sample, cotangent)
        what = sample_id(number, sample)
        assert got.dtype == expected.dtype and got.shape == expected.shape, what
        leaves = oracles.tensors_in([sample.input, sample.args, sample.kwargs])
        if op.name in SAME_BITS:
            assert oracles.bits_equal(got, expected), what
        else:
            scales = {k: sample.kwargs[k] for k in ("alpha", "beta") if k in sample.kwargs}
            # Both results may err, in opposite directions.
            assert_close(got, expected, 2 * budget_of(op.name, leaves, **scales), what)
        for leaf, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
            if expected_grad is None:
                assert grad is None, what
                continue
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, what
            # A gradient sums over at most the other operands' elements; |g| |operand| bounds what enters each sum.
            reach = cotangent.double().abs().sum() * max((t.detach().double().abs().max().item() if t.numel() else 0.0) for t in leaves)
            assert_close(grad, expected_grad, 8 * oracles.ROUNDOFF[dtype] * max(reach.item(), cotangent.double().abs().sum().item()), what)
    assert abft.report().detected == 0


def assert_close(a: torch.Tensor, b: torch.Tensor, allowed, what: str) -> None:
    if a.numel():
        worst = (a.double() - b.double()).abs().max().item()
        assert worst <= float(allowed), f"{what}: {worst:.3g} apart, {float(allowed):.3g} allowed"


# --- against fp64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows, columns, depth", [(1, 1, 1), (1, 577, 96), (7, 33, 129), (64, 48, 512)])
def test_linear_is_as_right_as_an_independent_product(rows, columns, depth, dtype):
    x, w, b = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype), torch.randn(columns).to(dtype)
    y = abft.linear(x, w, b)
    oracles.assert_within(y, oracles.product(x, w.mT, b), oracles.worst_case(x, w.mT, b))
    assert abft.report().checks == rows and abft.report().detected == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear_gives_the_very_bits_of_torch_forward_and_backward(dtype):
    x, w, b = torch.randn(33, 96).to(dtype), torch.randn(65, 96).to(dtype), torch.randn(65).to(dtype)
    results = []
    for linear in (F.linear, abft.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*leaves)
        y.backward(torch.ones_like(y) / 3)
        results.append([y.detach()] + [t.grad for t in leaves])
    for torchs, ours in zip(*results, strict=True):
        assert oracles.bits_equal(torchs, ours)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second column": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
    "reversed twice": lambda t: t.flip(0).flip(0),
    "offset into storage": lambda t: torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape),
    "overlong rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_linear_takes_any_strides(left, right):
    x, w = torch.randn(12, 40), torch.randn(24, 40)
    strided_x, strided_w = LAYOUTS[left](x), LAYOUTS[right](w)
    assert torch.equal(strided_x, x) and torch.equal(strided_w, w)
    oracles.assert_within(abft.linear(strided_x, strided_w), oracles.product(x, w.mT), oracles.worst_case(x, w.mT))
    assert abft.report().checks == 12 and abft.report().detected == 0


def test_expanded_operands_and_their_gradients():
    x, w = torch.randn(1, 16, requires_grad=True), torch.randn(1, 16, requires_grad=True)
    y = abft.linear(x.expand(6, 16), w.expand(5, 16))
    y.sum().backward()
    oracles.assert_within(y, oracles.product(x.expand(6, 16), w.expand(5, 16).mT), oracles.worst_case(x.expand(6, 16), w.expand(5, 16).mT))
    oracles.assert_within(x.grad, 30 * w.detach().double(), 64 * 2.0**-24 * 30 * w.detach().double().abs())
    assert abft.report().checks == 6 + 6 + 5


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)], ids=name_of)
def test_leading_dimensions_are_rows(leading):
    x, w, b = torch.randn(*leading, 8), torch.randn(5, 8), torch.randn(5)
    y = abft.linear(x, w, b)
    assert oracles.bits_equal(y, F.linear(x, w, b)) or leading == ()
    assert y.shape == (*leading, 5)
    assert abft.report().checks == max(1, torch.Size(leading).numel())


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 0, 8)], ids=name_of)
def test_linear_of_no_rows(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    y = abft.linear(x, w)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5)
    assert x.grad.shape == shape and torch.equal(w.grad, torch.zeros(5, 8))
    assert abft.report().checks == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), (2, 0, 0)], ids=name_of)
def test_linear_over_no_features_is_the_bias(shape):
    x, w, b = torch.randn(shape, requires_grad=True), torch.randn(5, 0, requires_grad=True), torch.randn(5, requires_grad=True)
    y = abft.linear(x, w, b)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, w, b)) and y.shape == (*shape[:-1], 5)
    assert x.grad.shape == shape and w.grad.shape == (5, 0)
    assert torch.equal(b.grad, torch.full((5,), float(torch.Size(shape[:-1]).numel())))


def test_linear_to_no_features():
    x, w = torch.randn(2, 3, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    y = abft.linear(x, w)
    y.sum().backward()
    assert y.shape == (2, 3, 0) and torch.equal(x.grad, torch.zeros(2, 3, 4)) and w.grad.shape == (0, 4)


MATMULS = [
    ((7,), (7,)), ((7,), (7, 3)), ((5, 7), (7,)), ((5, 7), (7, 3)), ((2, 5, 7), (7, 3)), ((2, 5, 7), (7,)), ((7,), (2, 7, 3)), ((5, 7), (2, 7, 3)),
    ((2, 5, 7), (2, 7, 3)), ((2, 1, 5, 7), (4, 7, 3)), ((1, 5, 7), (6, 7, 3)), ((0, 5, 7), (0, 7, 3)), ((2, 5, 0), (2, 0, 3)), ((2, 0, 0), (2, 0, 3)),
    ((5, 5, 0), (0, 5)), ((0, 0), (5, 0, 0)), ((0, 5, 0), (0, 4)), ((1, 5, 7), (0, 7, 3)), ((2, 5, 7), (2, 7, 0)), ((0,), (0,)),
]  # fmt: skip


@pytest.mark.parametrize("left, right", MATMULS, ids=name_of)
def test_matmul_broadcasts_as_torch_does(left, right):
    a, b = torch.randn(left, requires_grad=True), torch.randn(right, requires_grad=True)
    y = abft.matmul(a, b)
    expected = torch.matmul(a, b)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    cotangent = torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, (a, b), cotangent), torch.autograd.grad(expected, (a, b), cotangent)
    size = 2 * max(a.numel(), b.numel(), 1)
    for ours, torchs, reach in [(y, expected, size), (got[0], wanted[0], size), (got[1], wanted[1], size)]:
        assert ours.shape == torchs.shape
        scale = 3.0**3 * reach  # standard normal factors; no element of them is larger than 3 here but by chance
        assert_close(ours, torchs, 2.0**-24 * scale, f"{left} @ {right}")


def test_matmul_counts_every_row_of_every_batch():
    a, b = torch.randn(2, 1, 5, 7, requires_grad=True), torch.randn(4, 7, 3, requires_grad=True)
    abft.matmul(a, b).sum().backward()
    report = abft.report()
    # 2 · 4 products of 5 rows; their dgrad likewise; wgrad has a row per k of each b.
    assert (report.checks, report.products) == (8 * 5 + 8 * 5 + 8 * 7, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bmm_gives_the_very_bits_of_torch(dtype):
    a, b = torch.randn(3, 17, 32).to(dtype), torch.randn(3, 32, 24).to(dtype)
    assert oracles.bits_equal(abft.bmm(a, b), torch.bmm(a, b))
    assert abft.report().checks == 3 * 17


@pytest.mark.parametrize("added", [(6,), (1,), (), (5, 6), (5, 1), (1, 6)], ids=name_of)
@pytest.mark.parametrize("alpha, beta", [(1, 1), (0.5, 1), (1, 2), (-0.25, 3.0), (1, 0), (0, 1), (2, 3)])
def test_addmm_scales_and_adds(added, alpha, beta):
    c, a, b = torch.randn(added), torch.randn(5, 9), torch.randn(9, 6)
    y = abft.addmm(c, a, b, beta=beta, alpha=alpha)
    exact = beta * c.double() + alpha * oracles.product(a, b)
    allowed = (11 + 4) * 2.0**-24 * (abs(beta) * c.double().abs() + abs(alpha) * oracles.product(a.abs(), b.abs())) + 1e-30
    oracles.assert_within(y, exact.expand(5, 6), allowed.expand(5, 6))
    assert y.dtype == torch.float32 and abft.report().checks == 5


def test_addmm_with_beta_zero_ignores_a_poisoned_input():
    c = torch.full((5, 6), float("nan"))
    a, b = torch.randn(5, 9), torch.randn(9, 6)
    oracles.assert_within(abft.addmm(c, a, b, beta=0), oracles.product(a, b), oracles.worst_case(a, b))


@pytest.mark.parametrize("name, shapes", [("matmul", [(5, 9), (9, 6)]), ("bmm", [(2, 5, 9), (2, 9, 6)]), ("addmm", [(5, 6), (5, 9), (9, 6)])])
def test_out_is_torchs_own_and_counted(name, shapes):
    operands = [torch.randn(s) for s in shapes]
    expected = getattr(torch, name)(*operands)
    out = torch.empty_like(expected)
    assert getattr(abft, name)(*operands, out=out) is out
    assert torch.equal(out, expected)
    assert abft.report().bypassed == {"out=": 1}


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, shapes", [
    ("linear", [(3, 5), (4, 5), (4,)]), ("linear", [(2, 3, 5), (4, 5)]), ("matmul", [(2, 3, 5), (2, 5, 4)]), ("matmul", [(5,), (5,)]),
    ("matmul", [(2, 1, 3, 5), (2, 5, 4)]), ("bmm", [(2, 3, 5), (2, 5, 4)]), ("addmm", [(4,), (3, 5), (5, 4)]), ("addmm", [(3, 1), (3, 5), (5, 4)]),
], ids=lambda v: v if isinstance(v, str) else "-".join(name_of(s) for s in v))  # fmt: skip
def test_gradcheck_in_fp64(name, shapes):
    operands = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(getattr(abft, name), operands)
    assert abft.report().detected == 0


@pytest.mark.parametrize("name, shapes", [("linear", [(3, 5), (4, 5), (4,)]), ("bmm", [(2, 3, 5), (2, 5, 4)]), ("addmm", [(3, 4), (3, 5), (5, 4)])])
def test_second_derivatives_are_torchs_own_and_counted(name, shapes):
    operands = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradgradcheck(getattr(abft, name), operands)
    report = abft.report()
    assert report.bypassed["double backward"] > 0 and report.detected == 0


def test_without_double_backward_nothing_is_bypassed():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.autograd.grad(abft.linear(x, w).sum(), (x, w))
    assert abft.report().bypassed == {}


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "none"])
def test_only_the_gradients_that_are_wanted_are_computed(wanted):
    x, w, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    {"input": x, "weight": w, "bias": b}.get(wanted, torch.zeros(1)).requires_grad_()
    y = abft.linear(x, w, b)
    if wanted != "none":
        y.sum().backward()
    assert abft.report().checks == 3 + {"input": 3, "weight": 4}.get(wanted, 0)


def test_gradients_accumulate_into_grad():
    layer, twin = abft.Linear(8, 6), nn.Linear(8, 6)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 8)
    for module in (layer, twin):
        for _ in range(3):
            module(x).square().sum().backward()
    assert oracles.bits_equal(layer.weight.grad, twin.weight.grad) and oracles.bits_equal(layer.bias.grad, twin.bias.grad)


# --- autocast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name, shapes", [
    ("linear", [(3, 5), (4, 5), (4,)]), ("matmul", [(2, 3, 5), (5, 4)]), ("bmm", [(2, 3, 5), (2, 5, 4)]), ("addmm", [(4,), (3, 5), (5, 4)]),
    ("addmm", [(3, 4), (3, 5), (5, 4)]),
], ids=lambda v: v if isinstance(v, str) else "-".join(name_of(s) for s in v))  # fmt: skip
def test_autocast_casts_as_torch_does(name, shapes, dtype):
    torchs = F.linear if name == "linear" else getattr(torch, name)
    results = []
    values = [torch.randn(s) for s in shapes]
    for function in (torchs, getattr(abft, name)):
        operands = [v.clone().requires_grad_() for v in values]
        with torch.autocast("cpu", dtype):
            y = function(*operands)
            assert torch.is_autocast_enabled("cpu")
        y.sum().backward()
        results.append((y.detach(), [t.grad for t in operands]))
    (torchs_y, torchs_grads), (y, grads) = results
    assert y.dtype == torchs_y.dtype == dtype
    scale = torchs_y.double().abs().max() + sum(v.abs().max() for v in values)
    assert_close(y, torchs_y, 4 * oracles.ROUNDOFF[dtype] * scale, name)
    for ours, torchs_grad in zip(grads, torchs_grads, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, torchs_grad, 4 * oracles.ROUNDOFF[dtype] * 8 * scale, name)
    assert abft.report().detected == 0 and abft.report().checks > 0


def test_autocast_of_a_parameter_gives_the_very_bits_of_torch_over_many_steps():
    layer = nn.Linear(32, 24)
    checked = abft.Linear(32, 24)
    checked.load_state_dict(layer.state_dict())
    for _ in range(4):
        x = torch.randn(6, 32)
        with torch.autocast("cpu", torch.bfloat16):
            y, z = layer(x), checked(x)
        assert oracles.bits_equal(y, z)
        y.sum().backward()
        z.sum().backward()
        assert oracles.bits_equal(layer.weight.grad, checked.weight.grad)
    assert abft.report().checks == 4 * (6 + 24)


def test_autocast_leaves_fp64_alone():
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert abft.linear(x, w).dtype == F.linear(x, w).dtype


def test_disabled_autocast_inside_autocast_is_obeyed():
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert abft.linear(x, w).dtype == torch.float32


# --- silence -------------------------------------------------------------------------------------------

CLEAN = {
    "zero-mean": lambda *s: torch.randn(s),
    "shifted": lambda *s: torch.randn(s) + 3,
    "lognormal": lambda *s: torch.randn(s).exp(),
    "outlier columns": lambda *s: torch.randn(s) * torch.where(torch.arange(s[-1]) % 17 == 0, 100.0, 1.0),
    "relu": lambda *s: torch.randn(s).relu(),
    "sparse rows": lambda *s: torch.randn(s) * (torch.rand(s) < 0.02),
    "zeros": lambda *s: torch.zeros(s),
    "some rows zero": lambda *s: torch.randn(s) * (torch.arange(s[0]) % 2)[:, None],
    "denormal": lambda *s: torch.randn(s) * 1e-41,
    "tiny": lambda *s: torch.randn(s) * 1e-18,
    "huge": lambda *s: torch.randn(s) * 1e15,
    "near the largest": lambda *s: torch.randn(s).sign() * 1e18,
    "one-hot": lambda *s: torch.eye(s[-1])[torch.arange(s[0]) % s[-1]],
    "cancelling": lambda *s: torch.cat([torch.ones(s[0], s[1] // 2), -torch.ones(s[0], s[1] - s[1] // 2)], 1) * 1e3,
    "softmax": lambda *s: torch.randn(s).mul(4).softmax(-1),
}


BEYOND_FP16 = ("huge", "near the largest")


@pytest.mark.parametrize("kind, dtype", [
    (kind, dtype) for kind in CLEAN for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (dtype == torch.float16 and kind in BEYOND_FP16)
], ids=name_of)  # fmt: skip
def test_clean_data_is_silent(kind, dtype):
    x = CLEAN[kind](256, 192).to(dtype)
    w = torch.randn(160, 192).to(dtype)
    b = torch.randn(160).to(dtype)
    for weight in (w, w.abs(), torch.cat([w[:, :96], w[:, :96]], 1)):
        y = abft.linear(x, weight, b)
        assert oracles.bits_equal(y, F.linear(x, weight, b))
    report = abft.report()
    assert (report.detected, report.false_alarms, report.input_rows) == (0, 0, 0), str(report)
