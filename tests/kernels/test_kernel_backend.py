"""The kernels behind abft's own functions, and what the backend says of itself."""

from __future__ import annotations

from unittest import mock

import oracles
import pytest
import torch
from kernel_harness import DEVICE, DTYPES

import abft
from abft import panels, threshold
from abft.backends import triton as backend

CPU = torch.device("cpu")
TRITON = abft.Policy(backend="triton", on_uncorrected="record")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tells what runs without a GPU")
def test_what_runs_here_and_why_not(monkeypatch):
    assert backend.available(CPU, torch.float32) is None and backend.available(CPU, torch.float16) is None
    assert "bf16" in backend.available(CPU, torch.bfloat16)
    assert "float64" in backend.available(CPU, torch.float64)
    assert "meta" in backend.available(torch.device("meta"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" in backend.available(CPU, torch.float32)
    with pytest.raises(abft.AbftError, match="TRITON_INTERPRET"):
        abft.linear(torch.randn(2, 3), torch.randn(4, 3), policy=TRITON)


def test_plans_follow_the_arithmetic_of_the_device():
    tf32 = backend.plan(4096, 4096, torch.float32, 90, True, "full", None)
    assert tf32.arithmetic is threshold.HOPPER_TF32 and tf32.layout.parts == 2 and tf32.tf32
    ieee = backend.plan(4096, 4096, torch.float32, 90, False, "full", None)
    assert ieee.arithmetic is threshold.FMA_32 and ieee.layout.parts == 1 and not ieee.tf32
    assert backend.plan(4096, 4096, torch.bfloat16, 80, False, "full", None).arithmetic is threshold.AMPERE_16
    bf16 = backend.plan(4096, 4096, torch.bfloat16, 90, False, "full", None)
    assert bf16.layout.columns == 8 * 16 and bf16.layout.columns / 4096 <= 0.033  # of the weight's memory
    for p in (tf32, ieee, bf16):
        assert p.layout.groups.width == p.tiles_per_group * p.config.bn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=oracles.name_of)
def test_forward_and_both_gradients_are_checked(dtype):
    x = torch.randn(5, 9, 48, device=DEVICE).to(dtype).requires_grad_()
    layer = abft.Linear(48, 150, dtype=dtype, device=DEVICE, policy=TRITON)
    g = torch.randn(5, 9, 150, device=DEVICE).to(dtype)
    y = layer(x)
    y.backward(g)
    flat, w = x.detach().flatten(0, 1).cpu(), layer.weight.detach().cpu()
    for actual, a, b, bias in (
        (y.flatten(0, 1), flat, w.mT, layer.bias.detach().cpu()),
        (x.grad.flatten(0, 1), g.flatten(0, 1).cpu(), w, None),
        (layer.weight.grad, g.flatten(0, 1).cpu().mT, flat, None),
    ):
        exact = oracles.product(a, b, bias)
        rounding = oracles.ROUNDOFF[dtype] * exact.abs()
        oracles.assert_within(actual.cpu(), exact, (oracles.budget(a, b, bias) - rounding).amax() + rounding)
    report = abft.report()
    assert (report.checks, report.products, report.detected) == (45 + 45 + 150, 3, 0)


def test_nothing_is_read_back_to_the_host():
    layer = abft.Linear(32, 40, device=DEVICE, policy=TRITON)
    x = torch.randn(6, 32, device=DEVICE)
    layer(x)

    def refuse(self, *args):
        raise AssertionError("a host synchronisation")

    with mock.patch.multiple(torch.Tensor, item=refuse, tolist=refuse, __bool__=refuse, cpu=refuse):
        layer(x)


def test_a_panel_is_remembered_and_follows_announced_edits_in_place():
    layer = abft.Linear(32, 40, device=DEVICE, policy=TRITON)
    x = torch.randn(6, 32, device=DEVICE)
    layer(x)
    (entry,) = panels.panels_of(layer.weight).entries.values()
    columns, address = entry.panel.columns.clone(), entry.panel.columns.data_ptr()
    layer(x)
    assert torch.equal(entry.panel.columns, columns)
    with torch.no_grad():
        layer.weight.mul_(2)
    y = layer(x)
    assert torch.equal(entry.panel.columns, 2 * columns) and entry.panel.columns.data_ptr() == address
    assert torch.allclose(y, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert abft.report().detected == 0


def test_an_injected_fault_is_reported_as_an_event():
    layer = abft.Linear(64, 140, device=DEVICE, policy=TRITON)
    x = torch.randn(6, 64, device=DEVICE)
    clean = layer(x)
    with abft.inject.faults(abft.inject.Fault("bitflip", bit=30), seed=1):
        y = layer(x)
    report = abft.report()
    assert oracles.bits_equal(y, clean) and report.recomputed == report.detected == 1
    (event,) = report.events
    assert event.verdict is abft.Verdict.RECOMPUTED and event.backend == "triton" and event.rows == 1


@pytest.mark.parametrize("place", ["accumulator", "operand", "output"])
def test_the_log_says_what_a_fault_does_to_the_result(place):
    """In every precision the bias joins after an accumulator is struck."""
    torch.manual_seed(3)
    for dtype in (torch.float32, torch.float16):
        layer = abft.Linear(48, 150, dtype=dtype, device=DEVICE, policy=TRITON.replace(level="detect"))
        x = torch.randn(9, 48, device=DEVICE).to(dtype)
        with torch.no_grad():
            clean = layer(x)
            with abft.inject.faults(abft.inject.Fault("nullify", place, pattern="element"), seed=5) as log:
                wrong = layer(x)
        elements = log[0].elements
        assert elements and min((wrong != clean).sum(), 64) == len(elements)  # of many, the first
        for row, column, before, after in elements:
            for value, seen in ((clean, before), (wrong, after)):
                oracles.assert_within(torch.tensor([seen]), value[row, column].cpu().double().reshape(1), torch.tensor([1e-3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("what", ["near_inf", "bit", "inf", "nan"])
def test_a_weight_that_became_huge_in_memory_is_a_fault_and_no_overflow(what, dtype):
    """The panel remembers what the weight was: its sketches say that nothing came near the range."""
    torch.manual_seed(4)
    layer = abft.Linear(48, 150, dtype=dtype, device=DEVICE, policy=TRITON.replace(weights="frozen"))
    x = torch.randn(9, 48, device=DEVICE).to(dtype)
    fault = abft.inject.Fault("bitflip", "weight", bit=dtype.itemsize * 8 - 2) if what == "bit" else abft.inject.Fault(what, "weight")
    with torch.no_grad():
        clean = layer(x)
        abft.report(reset=True)
        remembered = layer.weight.clone()
        with abft.inject.faults(fault, seed=5):
            y = layer(x)
            (element,) = (~abft.bits.same(layer.weight, remembered)).nonzero().tolist()
    report = abft.report()
    assert report.detected == report.reconstructed == 9 and report.overflow_rows == report.input_rows == 0
    assert report.weight_faults == 1 and oracles.bits_equal(y, clean)
    (event,) = report.events
    assert event.cause == "weight" and event.col == element[0] and "weight element {}, {}".format(*element) in event.message
