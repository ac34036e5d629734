"""The shortcut for calls like earlier ones: it changes nothing but time, and everything unusual leaves it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

import abft
from abft.backends import lane, reference
from abft.errors import DtypeError, ShapeError
from abft.native import library
from abft.ops import checked


@pytest.fixture
def taken(monkeypatch):
    """How many calls found a lane that fits."""
    found = []
    genuine = lane.find

    def find(*args):
        fitting = genuine(*args)
        if fitting is not None:
            found.append(args[4])
        return fitting

    monkeypatch.setattr(lane, "find", find)
    return found


def _layer(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return abft.Linear(48, 64, dtype=dtype, **kwargs)


def _mark():
    return abft.report(reset=True)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_call_takes_it_and_equals_torch(taken, dtype, shape, grad):
    layer, x = _layer(dtype), torch.randn(shape).to(dtype)
    _mark()
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            y = layer(x)
            assert torch.equal(y, F.linear(x, layer.weight, layer.bias)) and y.requires_grad is grad
    report = abft.report()
    assert len(taken) >= 3
    assert report.products == 4 and report.checks == 4 * x[..., 0].numel() and report.detected == 0
    assert 0 < report.worst < 1


def test_backward_takes_its_own_and_gradients_are_torchs(taken):
    layer, plain = _layer(), torch.nn.Linear(48, 64)
    plain.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(7, 48, requires_grad=True)
        x2 = x.detach().clone().requires_grad_()
        layer(x).square().sum().backward()
        plain(x2).square().sum().backward()
        assert torch.equal(x.grad, x2.grad)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert taken.count("dgrad") == 2 and "wgrad" not in taken


@pytest.mark.parametrize("level", ["detect", "correct"])
def test_a_wrong_product_in_the_lane_is_found_in_that_product(monkeypatch, taken, level):
    layer, x = _layer(policy=abft.Policy(level=level, on_uncorrected="record")), torch.randn(5, 48)
    with torch.no_grad():
        clean = [layer(x) for _ in range(3)][-1]
        _mark()
        genuine, wrong = reference.multiply, []

        def multiply(a, w, bias):
            y = genuine(a, w, bias)
            if not wrong:
                wrong.append(1)
                y[3, 17] += 1.0
            return y

        monkeypatch.setattr(reference, "multiply", multiply)
        before = len(taken)
        y = layer(x)
    report = abft.report()
    assert len(taken) > before and wrong
    assert report.detected == 1 and report.products == 1 and report.checks == 5 and report.events[0].row == 3
    assert torch.equal(y, clean) is (level == "correct")


def _poke(layer):
    with torch.no_grad():
        layer.weight[3, 5] += 100.0


def _poke_data(layer):
    layer.weight.data.mul_(2.0)


def _swap_data(layer):
    layer.weight.data = torch.randn(64, 48)


def _step(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], 1.0).step()


def _new_bias(layer):
    layer.bias = torch.nn.Parameter(torch.randn(64))


def _no_bias(layer):
    layer.bias = None


def _poke_bias(layer):
    with torch.no_grad():
        layer.bias += 7.0


@pytest.mark.parametrize("change", [_new_bias, _no_bias])
def test_a_change_leaves_it(taken, change):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    change(layer)
    _mark()
    before = len(taken)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert len(taken) == before
        for _ in range(3):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert len(taken) > before and report.detected == report.stale == 0 and report.checks == 20


def _remembered(layer):
    """Bits of all that is remembered of a layer's weight and bias, by the way in which the weight is seen."""
    found = {}
    for key, entry in layer.weight.__dict__["_abft_panels"].entries.items():
        tensors = [entry.panel.columns, entry.fingerprint.plain, entry.fingerprint.weighted]
        if entry.bias is not None:
            tensors += [entry.bias.values.float(), *entry.bias.sums, entry.quick.bias[0]]
            torch.testing.assert_close(entry.quick.bias[1].sum(), entry.bias.sums[1].sum())  # … in whatever order
        found[key[1]] = torch.cat([t.flatten().view(torch.int32) for t in tensors]).tolist(), entry.integrity
    return found


needs_compiler = pytest.mark.skipif(library.functions() is None, reason=f"NO COMPILED PASSES: {library.why_not()}")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [_poke, _swap_data, _step, _poke_bias])
def test_what_changed_on_purpose_is_remembered_anew_in_it(monkeypatch, taken, change, dtype):
    layer = _layer(dtype)
    x = torch.randn(5, 48).to(dtype).requires_grad_()
    for _ in range(3):
        layer(x).sum().backward()
    if change is _swap_data and dtype == torch.bfloat16:
        layer.weight.data = torch.randn(64, 48).to(dtype)
    else:
        change(layer)
    _mark()
    before, held = len(taken), [e.panel.columns.data_ptr() for e in layer.weight.__dict__["_abft_panels"].entries.values()]
    whole_way, genuine = [], checked.product_on_host
    with monkeypatch.context() as patch:
        patch.setattr(checked, "product_on_host", lambda *args: whole_way.append(1) or genuine(*args))
        y = layer(x)
        y.sum().backward()
    assert taken[before:] == ["fprop", "dgrad"] and not whole_way and torch.equal(y, F.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert report.detected == report.stale == 0 and report.products == 3
    assert held == [e.panel.columns.data_ptr() for e in layer.weight.__dict__["_abft_panels"].entries.values()]
    fresh = copy.deepcopy(layer)  # which has nothing remembered, and goes the whole way
    fresh(x).sum().backward()
    assert _remembered(layer) == _remembered(fresh)


@needs_compiler
def test_a_new_version_of_the_bias_alone_takes_no_fault_of_the_weight_for_right(taken):
    layer, x = _layer(policy=abft.Policy(on_uncorrected="record")), torch.randn(5, 48)
    with torch.no_grad():
        clean = [layer(x) for _ in range(3)][-1]
        _mark()
        layer.weight.data[3, 5] += 100.0  # nobody is told
        layer.bias += 0.0
        before = len(taken)
        assert torch.equal(layer(x), clean)
    report = abft.report()
    assert len(taken) == before + 1 and report.detected and report.weight_faults == 1


def test_an_unannounced_change_is_seen_by_the_judgement(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            layer(x)
        _poke_data(layer)
        _mark()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert abft.report().stale == 1


def test_a_frozen_half_weight_is_compared_bit_by_bit(taken):
    layer, x = _layer(torch.bfloat16, policy=abft.Policy(weights="frozen", on_uncorrected="record")), torch.randn(5, 48).bfloat16()
    with torch.no_grad():
        clean = [layer(x) for _ in range(3)][-1]
        _mark()
        layer.weight.data.view(torch.int16)[3, 5] ^= 1  # far below what its rounded product could show
        assert torch.equal(layer(x), clean)
    assert len(taken) == 3  # what it found sent it the whole way
    assert abft.report().weight_faults == 1


def test_the_panel_is_audited_inside_the_lane_too(taken):
    layer, x = _layer(policy=abft.Policy(on_uncorrected="record")), torch.randn(5, 48)
    with torch.no_grad():
        layer(x)
        entry = layer.weight.__dict__["_abft_panels"].latest[3]
        entry.panel.columns[-1, 3] *= 4.0  # a sketch: it widens bounds and nothing else would tell
        _mark()
        for _ in range(2 * lane.PANEL_AUDIT):
            layer(x)
    report = abft.report()
    assert report.events and report.events[0].cause == "panel" and report.detected == 0
    assert len(taken) > lane.PANEL_AUDIT


def test_injection_leaves_it(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        clean = [layer(x) for _ in range(3)][-1]
        before = len(taken)
        with abft.inject.faults(abft.inject.Fault("nullify", pattern="row")):
            assert torch.equal(layer(x), clean)
        assert len(taken) == before
        layer(x)
        assert len(taken) == before + 1


def test_another_policy_leaves_it(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        before = len(taken)
        with abft.protected(abft.Policy(level="off")):
            _mark()
            layer(x)
        assert len(taken) == before and abft.report().bypassed == {"level off": 1}
        layer(x)
        assert len(taken) == before + 1
        abft.linear(x, layer.weight, layer.bias, policy=abft.Policy(redundancy="dmr"))
        assert len(taken) == before + 1


def test_bad_input_is_told_as_ever(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        with pytest.raises(ShapeError, match="48 input features but input has 47"):
            layer(torch.randn(5, 47))
        with pytest.raises(ShapeError):
            layer(torch.tensor(1.0))
        with pytest.raises(DtypeError):
            layer(x.double())
        with pytest.raises(TypeError):
            abft.linear(x, [1.0], layer.bias)
        with pytest.raises(TypeError):
            abft.linear(x, layer.weight, 3.0)
        assert layer(torch.randn(0, 48)).shape == (0, 64)
    assert len(taken) == 2


def test_a_lane_opened_under_autocast_is_none_outside_of_it(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(taken) == 2
    with torch.no_grad(), pytest.raises(DtypeError):
        layer(x.bfloat16())


def test_who_watches_operators_sees_the_operator(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)
        assert any(event.key == "abft::product" for event in profile.key_averages())

        from torch.utils._python_dispatch import TorchDispatchMode

        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Watch():
            layer(x)
        assert "abft.product.default" in seen


def test_nested_scopes_count_once(taken):
    layer, x = torch.nn.Linear(48, 64), torch.randn(5, 48)
    with torch.no_grad(), abft.protected() as outer, abft.protected() as inner:
        for _ in range(3):
            layer(x)
    assert outer.report().products == inner.report().products == 3


def _cut(layer):
    layer.weight.data, layer.bias.data = layer.weight.data[:32], layer.bias.data[:32]


def _cut_features(layer):
    layer.weight.data = layer.weight.data[:, :24]


def _grow(layer):
    layer.weight.data, layer.bias.data = torch.randn(80, 48), torch.randn(80)


@pytest.mark.parametrize("weights", ["tracked", "frozen"])
@pytest.mark.parametrize("change", [_cut, _cut_features, _grow])
def test_a_weight_of_another_shape_leaves_it(taken, change, weights):
    layer = _layer(policy=abft.Policy(weights=weights))
    for _ in range(3):
        layer(torch.randn(5, 48)).sum().backward()
    change(layer)
    layer.zero_grad()
    x = torch.randn(5, layer.weight.shape[1], requires_grad=True)
    before = len(taken)
    y = layer(x)
    y.sum().backward()
    assert len(taken) == before and torch.equal(y, F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ShapeError):
        layer(torch.randn(5, 33))


def test_a_bias_of_another_shape_leaves_it(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.bias.data = layer.bias.data[:32]
        with pytest.raises(ShapeError):
            layer(x)
        layer.bias.data = layer.bias.data[:1]
        _mark()
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert abft.report().bypassed == {"bias of another shape": 1}


def test_wrappers_of_functorch_leave_it(taken):
    layer, x, leaked = _layer(), torch.randn(5, 48), []
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    before = len(taken)

    def leak(t):
        leaked.append(t * 1)
        return t.sum()

    torch.func.grad(leak)(x)
    layer(leaked[0]).sum().backward()
    layer(leaked[0]).sum().backward()  # a graph of its own
    assert len(taken) == before + 2  # inside the operator, where they are unwrapped

    class Implicit(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return F.pad(t, (0, 16))

        @staticmethod
        def backward(ctx, g):
            return layer(g[:, :48])[:, :48]

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(Implicit.apply(x), x, torch.randn(3, 5, 64), is_grads_batched=True)
    assert gradient.shape == (3, 5, 48)


def test_another_thread_that_forgets_the_judgement_breaks_nothing(monkeypatch):
    layer, x = _layer(), torch.randn(5, 48)
    genuine = lane.open_for

    def open_for(call, backend, entry, quick):
        entry.quick = None  # as a thread with another bias of the same weight would
        genuine(call, backend, entry, quick)

    monkeypatch.setattr(lane, "open_for", open_for)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_lanes_hold_no_panel_that_was_dropped(taken):
    layer = _layer()
    for _ in range(3):
        layer(torch.randn(5, 48)).sum().backward()
    layer.to(torch.bfloat16)
    layer(torch.randn(5, 48).bfloat16())
    panels = layer.weight.__dict__["_abft_panels"]
    held = {id(entry) for entry in panels.entries.values()}
    assert all(id(found.entry) in held for found in panels.lanes.values())


def test_copies_have_their_own(taken):
    layer, x = _layer(), torch.randn(5, 48)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        other = copy.deepcopy(layer)
        other.weight.data.mul_(3.0)
        _mark()
        for _ in range(3):
            assert torch.equal(other(x), F.linear(x, other.weight, other.bias))
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        torch.utils.swap_tensors(layer.weight, torch.nn.Parameter(torch.randn(64, 48)))
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert report.detected == report.stale == 0
