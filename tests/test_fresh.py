"""Weight gradients judged by a panel made for them alone, in one compiled call: it changes nothing but time."""

from __future__ import annotations

import pytest
import torch

import abft
from abft.backends import fresh, reference
from abft.native import library

pytestmark = pytest.mark.skipif(library.functions() is None, reason=f"NO COMPILED PASSES: {library.why_not()}")


@pytest.fixture
def judged(monkeypatch):
    """The ratios that fresh panels gave."""
    found = []
    genuine = fresh.worst

    def worst(*args):
        found.append(genuine(*args))
        return found[-1]

    monkeypatch.setattr(fresh, "worst", worst)
    return found


def _operands(dtype, rows=70, out=64, into=48):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, n, generator=generator).to(dtype) for n in (out, into))


@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("order", ["rows", "columns", "view"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_says_what_the_specification_says(dtype, order, form):
    g, x = _operands(dtype)
    if order == "columns":
        x = x.mT.contiguous().mT
    elif order == "view":
        x = torch.cat([x, x], 1)[:, :48]
    a, w = g.mT, x.mT
    chosen = abft.Policy(panel=form)
    f = fresh.fitting(a, w, chosen)
    y = reference.multiply(a, w, None)
    p = reference.plan(48, 70, dtype, form, None)
    panel = reference.build_panel(w, p.layout)
    expected = reference.judge(y, reference.sums(y, a, panel, None, p, torch.float64), 70, p).worst
    found = fresh.worst(f, y, a, w)
    assert 0.0 < found < 1.0 and abs(found - expected) <= 0.05  # of the bound: both round, and the bound is made of that
    y[3, 5] += 4.0 * y.float().abs().max()
    assert fresh.worst(f, y, a, w) > 1.0
    y[3, 5] = float("nan")
    assert not fresh.worst(f, y, a, w) <= 1.0


@pytest.mark.parametrize("value", [1e3, float("inf"), float("nan")])
@pytest.mark.parametrize("level", ["detect", "correct"])
def test_a_wrong_gradient_is_found_in_that_product(monkeypatch, judged, level, value):
    torch.manual_seed(0)
    layer, x = abft.Linear(48, 64, policy=abft.Policy(level=level, on_uncorrected="record")), torch.randn(70, 48)
    layer(x).square().sum().backward()
    clean, layer.weight.grad = layer.weight.grad, None
    y = layer(x).square().sum()
    abft.report(reset=True)
    genuine, wrong = reference.multiply, []

    def multiply(a, w, bias):
        out = genuine(a, w, bias)
        if out.shape == (64, 48) and not wrong:
            wrong.append(1)
            out[3, 17] = value
        return out

    monkeypatch.setattr(reference, "multiply", multiply)
    y.backward()
    report = abft.report()
    assert wrong and len(judged) == 2 and judged[0] <= 1.0
    assert report.detected == 1 and report.products == 1 and report.checks == 64
    assert report.events[0].row == 3 and report.events[0].role == "wgrad"
    assert torch.equal(layer.weight.grad, clean) is (level == "correct")


@pytest.mark.parametrize(
    "policy",
    [
        abft.Policy(roles=frozenset({"fprop"})), abft.Policy(level="off"), abft.Policy(redundancy="dmr"), abft.Policy(detector="both"),
        abft.Policy(max_floor=1.0),
    ],
    ids=["role", "off", "dmr", "both", "floor"],
)  # fmt: skip
def test_other_policies_take_the_whole_way(judged, policy):
    torch.manual_seed(0)
    layer, x = abft.Linear(48, 64, policy=policy), torch.randn(70, 48)
    layer(x).sum().backward()
    assert not judged


def test_counts_what_the_whole_way_counts(monkeypatch, judged):
    torch.manual_seed(0)
    layer, x = abft.Linear(48, 64), torch.randn(2, 35, 48)
    counted = []
    for _ in range(2):
        abft.report(reset=True)
        layer(x).sum().backward()
        report = abft.report(reset=True)
        counted.append((report.products, report.checks, report.executions, report.detected, report.bypassed))
        monkeypatch.setattr(fresh, "policy_of", lambda text: None)
    assert counted[0] == counted[1] and len(judged) == 1 and counted[0][1] == 70 + 64
