"""Bad input of every kind: a clear error, or torch's own result and a counted bypass; never a wrong number, never a crash."""

from __future__ import annotations

import warnings

import oracles
import pytest
import torch
from oracles import name_of
from torch import nn
from torch.nn import functional as F

import abft
from abft.inject import Fault, faults

ones = torch.ones


def outcome(function):
    """A result, or the error's type."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - which one is the question
        return type(error)


# --- shapes ----------------------------------------------------------------------------------------------

WRONG_SHAPES = {
    "linear, features differ": (lambda: abft.linear(ones(2, 96), ones(96, 64)), r"weight has 64 input features but input has 96; did you mean weight\.T\?"),
    "linear, features differ, no hint": (lambda: abft.linear(ones(2, 7), ones(96, 64)), "weight has 64 input features but input has 7$"),
    "linear, scalar input": (lambda: abft.linear(torch.tensor(1.0), ones(3, 4)), "input has no"),
    "linear, weight of three dimensions": (lambda: abft.linear(ones(2, 4), ones(1, 3, 4)), r"weight must be \(out, in\)"),
    "linear, weight a scalar": (lambda: abft.linear(ones(2, 4), torch.tensor(1.0)), r"weight must be \(out, in\)"),
    "linear, bias too long": (lambda: abft.linear(ones(2, 4), ones(3, 4), ones(4)), r"bias must have shape \(3,\)"),
    "matmul, inner sizes": (lambda: abft.matmul(ones(2, 4), ones(3, 4)), "inner sizes 4 and 3 differ"),
    "matmul, vectors": (lambda: abft.matmul(ones(4), ones(3)), "inner sizes 4 and 3 differ"),
    "matmul, batches": (lambda: abft.matmul(ones(2, 3, 4), ones(5, 4, 3)), "cannot broadcast the batches"),
    "matmul, scalar": (lambda: abft.matmul(torch.tensor(1.0), ones(4, 3)), "at least one dimension"),
    "bmm, matrices": (lambda: abft.bmm(ones(2, 4), ones(4, 3)), r"bmm needs input \(B, M, K\)"),
    "bmm, batches": (lambda: abft.bmm(ones(2, 3, 4), ones(3, 4, 3)), "one batch size"),
    "bmm, inner sizes": (lambda: abft.bmm(ones(2, 3, 4), ones(2, 3, 4)), "inner sizes"),
    "addmm, inner sizes": (lambda: abft.addmm(ones(3), ones(2, 4), ones(3, 4)), r"addmm needs mat1 \(M, K\)"),
    "addmm, vector": (lambda: abft.addmm(ones(3), ones(4), ones(4, 3)), r"addmm needs mat1 \(M, K\)"),
    "addmm, input": (lambda: abft.addmm(ones(2, 4), ones(2, 4), ones(4, 3)), "does not broadcast"),
    "addmm, input too large": (lambda: abft.addmm(ones(5, 2, 3), ones(2, 4), ones(4, 3)), "does not broadcast"),
    "module, features differ": (lambda: abft.protect(nn.Linear(4, 3))(ones(2, 5)), "weight has 4 input features but input has 5"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shapes_say_what_was_expected_and_what_came(case):
    function, message = WRONG_SHAPES[case]
    with pytest.raises(abft.ShapeError, match=message):
        function()
    assert issubclass(abft.ShapeError, ValueError) and issubclass(abft.ShapeError, abft.AbftError)
    assert abft.report().products == 0


UNUSUAL = {
    "weight of one dimension": lambda f: f(ones(2, 4), torch.arange(4.0)), "bias of one number": lambda f: f(ones(2, 4), ones(3, 4), ones(1)),
    "bias a scalar": lambda f: f(ones(2, 4), ones(3, 4), torch.tensor(2.0)), "bias a matrix": lambda f: f(ones(2, 4), ones(3, 4), torch.arange(6.0).view(2, 3)),
    "bias a column": lambda f: f(ones(2, 4), ones(3, 4), torch.arange(2.0).view(2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_torch_allows_beside_a_layer_is_torchs_own_and_counted(case):
    expected = UNUSUAL[case](F.linear)
    assert torch.equal(UNUSUAL[case](abft.linear), expected)
    report = abft.report()
    assert sum(report.bypassed.values()) == 1 and report.checks == 0


def test_what_torch_refuses_it_refuses_in_its_own_words_and_nothing_is_counted():
    with pytest.raises(RuntimeError):
        abft.linear(ones(2, 4), ones(3, 4), ones(5, 7, 3))
    assert abft.report().bypassed == {}


# --- dtypes ------------------------------------------------------------------------------------------------

UNCHECKED = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", UNCHECKED, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["linear", "matmul", "bmm", "addmm"])
def test_integers_and_complex_numbers_are_torchs_own_and_counted(name, dtype):
    shapes = {"linear": [(2, 4), (3, 4)], "matmul": [(2, 4), (4, 3)], "bmm": [(1, 2, 4), (1, 4, 3)], "addmm": [(2, 3), (2, 4), (4, 3)]}[name]
    operands = [torch.randint(0, 5, s).to(dtype) for s in shapes]
    torchs = outcome(lambda: (F.linear if name == "linear" else getattr(torch, name))(*operands))
    ours = outcome(lambda: getattr(abft, name)(*operands))
    if isinstance(torchs, type):
        assert ours is torchs and abft.report().bypassed == {}
    else:
        assert ours.dtype == torchs.dtype and torch.equal(ours, torchs)
        assert abft.report().bypassed == {f"dtype {str(dtype)[6:]}": 1} and abft.report().checks == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=lambda d: str(d)[6:])
def test_eight_bit_floats_are_torchs_own_and_counted(dtype):
    a, b = ones(4, 8).to(dtype), ones(8, 4).to(dtype)
    torchs, ours = outcome(lambda: a @ b), outcome(lambda: abft.matmul(a, b))
    if isinstance(torchs, type):
        assert ours is torchs
    else:
        assert torch.equal(ours.float(), torchs.float()) and sum(abft.report().bypassed.values()) == 1


def test_booleans_are_torchs_own_answer():
    a, b = ones(2, 4, dtype=torch.bool), ones(3, 4, dtype=torch.bool)
    torchs, ours = outcome(lambda: F.linear(a, b)), outcome(lambda: abft.linear(a, b))
    assert ours is torchs if isinstance(torchs, type) else torch.equal(ours, torchs)


MIXED = [(torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("left, right", MIXED, ids=name_of)
@pytest.mark.parametrize("name", ["linear", "matmul", "bmm", "addmm"])
def test_mixed_dtypes_are_an_error_that_names_them(name, left, right):
    shapes = {"linear": [(2, 4), (3, 4)], "matmul": [(2, 4), (4, 3)], "bmm": [(1, 2, 4), (1, 4, 3)], "addmm": [(2, 3), (2, 4), (4, 3)]}[name]
    operands = [ones(s, dtype=left) for s in shapes[:-1]] + [ones(shapes[-1], dtype=right)]
    with pytest.raises(abft.DtypeError, match=f"{str(left)[6:]}.*{str(right)[6:]}"):
        getattr(abft, name)(*operands)
    assert issubclass(abft.DtypeError, TypeError)


@pytest.mark.parametrize("call", [
    lambda: abft.linear(ones(2, 4), ones(3, 4), ones(3).half()), lambda: abft.addmm(ones(3).half(), ones(2, 4), ones(4, 3)),
    lambda: abft.addmm(ones(2, 3).double(), ones(2, 4), ones(4, 3)), lambda: abft.addmm(ones(3).half(), ones(2, 4), ones(4, 3), alpha=2),
], ids=["linear's bias", "addmm's vector", "addmm's matrix", "addmm's scaled vector"])  # fmt: skip
def test_what_is_added_must_have_the_dtype_too(call):
    with pytest.raises(abft.DtypeError):
        call()


def test_doubles_and_singles_do_not_mix_under_autocast_either():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(abft.DtypeError):
        abft.linear(ones(2, 4, dtype=torch.float64), ones(3, 4))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(abft.DtypeError):
        abft.linear(ones(2, 4), nn.Parameter(ones(3, 4, dtype=torch.float64)))


# --- devices, layouts, subclasses -----------------------------------------------------------------------------


@pytest.mark.parametrize("call", [
    lambda: abft.linear(ones(2, 4), ones(3, 4, device="meta")), lambda: abft.linear(ones(2, 4), ones(3, 4), ones(3, device="meta")),
    lambda: abft.matmul(ones(2, 4, device="meta"), ones(4, 3)), lambda: abft.protect(nn.Linear(4, 3, device="meta"))(ones(2, 4)),
], ids=["weight", "bias", "input", "module"])  # fmt: skip
def test_different_devices_are_an_error_that_names_them(call):
    with pytest.raises(abft.DeviceError, match="meta"):
        call()


@pytest.mark.parametrize("name", ["linear", "matmul", "bmm", "addmm"])
def test_meta_tensors_give_shapes_and_count_nothing(name):
    shapes = {"linear": [(2, 5, 4), (3, 4), (3,)], "matmul": [(2, 5, 4), (4, 3)], "bmm": [(2, 5, 4), (2, 4, 3)], "addmm": [(5, 3), (5, 4), (4, 3)]}[name]
    operands = [torch.empty(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    y = getattr(abft, name)(*operands)
    expected = (F.linear if name == "linear" else getattr(torch, name))(*operands)
    assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in operands)
    assert abft.report().checks == 0


LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(), "sparse_csr": lambda t: t.to_sparse_csr(), "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((2, 2)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["linear", "matmul", "addmm"])
def test_sparse_operands_are_torchs_own_and_counted(name, layout):
    a, b = torch.eye(4) * 2, torch.randn(4, 4)
    s = LAYOUTS[layout](a)
    torchs = {"linear": lambda: F.linear(b, s), "matmul": lambda: torch.matmul(s, b), "addmm": lambda: torch.addmm(b, s, b)}[name]
    ours = {"linear": lambda: abft.linear(b, s), "matmul": lambda: abft.matmul(s, b), "addmm": lambda: abft.addmm(b, s, b)}[name]
    expected, got = outcome(torchs), outcome(ours)
    if isinstance(expected, type):
        assert got is expected
    else:
        assert torch.equal(got.to_dense(), expected.to_dense()) and abft.report().bypassed == {f"layout {layout}": 1}


def test_sparse_weights_of_a_module():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter((torch.eye(4) * 2).to_sparse_csr(), requires_grad=False)
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = layer(x)
        assert torch.equal(abft.protect(layer)(x), expected)
    assert abft.report().bypassed == {"layout sparse_csr": 1}


def test_nested_tensors_are_torchs_own_and_counted():
    layer = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)], layout=torch.jagged)
        expected = layer(nested)
        got = abft.protect(layer)(nested)
    assert all(torch.equal(a, b) for a, b in zip(got.unbind(), expected.unbind(), strict=True))
    assert sum(abft.report().bypassed.values()) == 1


class Counting(torch.Tensor):
    """A subclass that watches what is done to it."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def test_subclasses_with_their_own_functions_are_torchs_own_and_counted():
    x = torch.randn(2, 4).as_subclass(Counting)
    w = torch.randn(3, 4)
    y = abft.linear(x, w)
    assert isinstance(y, Counting) and torch.equal(y.as_subclass(torch.Tensor), F.linear(x.as_subclass(torch.Tensor), w))
    assert abft.report().bypassed == {"tensor subclass Counting": 1} and "linear" in Counting.seen


def test_subclasses_that_change_nothing_are_checked():
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    y = abft.linear(x.as_subclass(Plain), w)
    assert torch.equal(torch.Tensor(y), F.linear(x, w)) and abft.report().checks == 2


def test_buffers_and_parameters_of_any_kind_are_checked():
    x = torch.randn(2, 4)
    for w in (nn.Parameter(torch.randn(3, 4)), nn.Buffer(torch.randn(3, 4)), torch.randn(3, 4)):
        assert oracles.bits_equal(abft.linear(x, w), F.linear(x, w))
    assert abft.report().checks == 6


@pytest.mark.parametrize("value", [None, 3.0, [1.0, 2.0], "weight", "numpy"], ids=str)
def test_what_is_no_tensor_is_a_type_error(value):
    thing = torch.ones(3, 4).numpy() if value == "numpy" else value
    for call in (lambda: abft.linear(ones(2, 4), thing), lambda: abft.linear(thing, ones(3, 4)), lambda: abft.matmul(thing, ones(4, 3)), lambda: abft.bmm(ones(1, 2, 4), thing)):
        with pytest.raises(TypeError, match="must be tensors"):
            call()


def test_missing_and_unknown_arguments_are_type_errors():
    for call in (lambda: abft.linear(ones(2, 4)), lambda: abft.linear(ones(2, 4), ones(3, 4), polcy=None), lambda: abft.matmul(ones(2, 4)), lambda: abft.addmm(ones(3), ones(2, 4))):
        with pytest.raises(TypeError):
            call()


# --- states of tensors -----------------------------------------------------------------------------------------


def test_inference_tensors_as_weights_and_inputs():
    with torch.inference_mode():
        layer, x = nn.Linear(4, 3), torch.randn(2, 4)
        expected = layer(x)
        abft.protect(layer)
        for _ in range(3):
            assert oracles.bits_equal(layer(x), expected)
    with torch.no_grad():
        assert oracles.bits_equal(layer(x), expected)
    assert abft.report().checks == 8 and abft.report().detected == 0


def test_a_layer_used_in_inference_mode_first_and_trained_later():
    layer = abft.protect(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        with torch.inference_mode():
            layer(torch.randn(2, 4))
        layer(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abft.report().detected == abft.report().stale == 0


def test_conjugated_and_negated_views():
    z = torch.randn(2, 4, dtype=torch.complex64)
    x = z.conj().imag  # a lazily negated real view
    assert x.is_neg()
    w = torch.randn(3, 4)
    oracles.assert_within(abft.linear(x, w), oracles.product(x, w.T), oracles.worst_case(x.clone(), w.T))
    assert abft.report().checks == 2
    assert torch.equal(abft.matmul(z.conj(), z.T), torch.matmul(z.conj(), z.T)) and "dtype complex64" in abft.report().bypassed


def test_deleted_storage_is_torchs_error():
    x = torch.randn(2, 4)
    x.untyped_storage().resize_(0)
    assert isinstance(outcome(lambda: abft.linear(x, torch.randn(3, 4))), type | torch.Tensor)


def test_in_place_use_of_the_result():
    x, w = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    y = abft.linear(x, w)
    y += 1
    y.relu_()
    y.sum().backward()
    assert x.grad is not None and abft.report().checks == 2 + 2 + 3


@pytest.mark.parametrize("rows", [1, 2, 129])
@pytest.mark.parametrize("columns", [1, 2, 15, 129])
@pytest.mark.parametrize("depth", [1, 2, 17])
def test_small_and_ragged_sizes_forward_and_backward(rows, columns, depth):
    layer, twin = abft.protect(nn.Linear(depth, columns)), nn.Linear(depth, columns)
    twin.load_state_dict(layer.state_dict())
    x, g = torch.randn(rows, depth), torch.randn(rows, columns)
    results = []
    for module in (layer, twin):
        z = x.clone().requires_grad_()
        y = module(z)
        y.backward(g)
        results.append([y.detach(), z.grad, module.weight.grad, module.bias.grad])
    # Vectors take another path through torch's library in backward: the same numbers, summed in another order.
    w = layer.weight.detach()
    for ours, torchs, allowed in zip(*results, (None, oracles.worst_case(g, w), oracles.worst_case(g.T, x), None), strict=True):
        if allowed is None:
            assert oracles.bits_equal(ours, torchs)
        else:
            oracles.assert_within(ours, torchs.double(), 2 * allowed)
    report = abft.report()
    assert (report.checks, report.detected) == (rows + rows + columns, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-45], ids=str)
@pytest.mark.parametrize("place", ["input", "weight", "bias", "gradient"])
def test_extreme_numbers_anywhere_give_torchs_numbers_and_no_fault(place, bad):
    layer, twin = abft.protect(nn.Linear(8, 6)), nn.Linear(8, 6)
    x, g = torch.randn(5, 8), torch.randn(5, 6)
    target = {"input": x, "weight": layer.weight.data, "bias": layer.bias.data, "gradient": g}[place]
    target.view(-1)[3] = bad
    twin.load_state_dict(layer.state_dict())
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (layer, twin):
            z = x.clone().requires_grad_()
            y = module(z)
            y.backward(g)
            results.append([y.detach(), z.grad, module.weight.grad, module.bias.grad])
    for ours, torchs in zip(*results, strict=True):
        assert oracles.bits_equal(ours, torchs) or torch.equal(ours.nan_to_num(9.0), torchs.nan_to_num(9.0))
    report = abft.report()
    assert report.detected == report.false_alarms == 0, str(report)


# --- interfaces --------------------------------------------------------------------------------------------------


def test_protect_refuses_nothing_half_done():
    """An error leaves the model as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError):
        abft.protect(model, {"0": abft.Policy(), "nosuch": None})
    with pytest.raises(ValueError):
        abft.protect(model, "nosuch")

    def angry(module, name):
        raise KeyError(name)

    with pytest.raises(KeyError):
        abft.protect(model, filter_fn=angry)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_context_takes_only_labels():
    with pytest.raises(TypeError):
        abft.context("request").__enter__()


def test_names_are_what_the_contract_says():
    names = [
        "protect", "unprotect", "coverage", "protected", "Linear", "linear", "matmul", "bmm", "addmm", "verify_matmul", "report", "refresh", "context",
        "checkpoint_ops", "checkpoint_context", "StepGuard", "inject", "AbftError", "FaultDetected", "UncorrectedFault", "Policy", "Verdict", "Report",
        "FaultEvent", "CheckResult", "Coverage", "ModuleCoverage",
    ]  # fmt: skip
    assert [n for n in names if not hasattr(abft, n)] == []
    assert {n for n in ("Fault", "Mixture", "faults") if hasattr(abft.inject, n)} == {"Fault", "Mixture", "faults"}
    named = {"OBSERVED", "RECOMPUTED", "RECONSTRUCTED", "UNCORRECTED", "FALSE_ALARM", "STALE", "INPUT", "OVERFLOW"}
    assert {v.name for v in abft.Verdict} == named | {"TOLERATED"}  # of detector="statistical" alone: decision 62
    assert all(isinstance(v.value, str) and " " in v.value for v in abft.Verdict)


def test_an_exception_from_an_injected_place_leaves_the_library_usable():
    with pytest.raises(ValueError), faults(Fault("nan", index=(99, 99))):
        abft.linear(ones(2, 4), ones(3, 4))
    assert torch.equal(abft.linear(ones(2, 4), ones(3, 4)), torch.full((2, 3), 4.0))
    assert abft.report().detected == 0


@pytest.mark.parametrize("wrong", [
    {"index": 3}, {"index": (1,)}, {"index": (1, -1)}, {"index": (0.5, 1)}, {"call": 1.5}, {"call": -1}, {"call": True}, {"bits": 0}, {"bit": 2.0},
], ids=str)  # fmt: skip
def test_faults_say_at_once_what_is_wrong_with_them(wrong):
    with pytest.raises(ValueError, match="Fault"):
        abft.inject.Fault("nullify", **wrong)


def test_faults_take_only_what_and_where_by_position():
    with pytest.raises(TypeError):
        abft.inject.Fault("nullify", "accumulator", "*")


@pytest.mark.parametrize("floor", [float("inf"), float("nan"), 0, -1.0, "1e-3", True])
def test_a_floor_is_a_positive_number(floor):
    with pytest.raises(ValueError, match="max_floor"):
        abft.Policy(max_floor=floor)
