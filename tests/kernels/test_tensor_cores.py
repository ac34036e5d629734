"""The kernels in bf16 and fp16 on emulated tensor cores of an H100: with the blocks, the rounding and the bounds that they have there."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracles
import pytest
import torch
from torch.nn import functional as F

import abft
from abft import bits
from bench import emulated_units, tensor_core
from bench.emulator import MODELS, EmulatorUnavailable

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes this itself: the other tests of the kernels")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=oracles.name_of)
POLICY = abft.Policy(backend="triton", on_uncorrected="record")


@pytest.fixture(scope="module")
def core() -> tensor_core.TensorCore:
    try:
        return tensor_core.load()
    except EmulatorUnavailable as error:
        pytest.skip(f"no emulated tensor core: {error}")


@pytest.fixture
def hopper(core: tensor_core.TensorCore) -> Iterator[None]:
    with emulated_units.tensor_cores(core, 90):
        yield


# --- the emulated unit ----------------------------------------------------------------------------------------


def exactly(x: np.ndarray, w: np.ndarray, c: float, depth: int, places: int) -> float:
    """The model of bench/tensor_core.c in fractions, of one row and one column."""

    def exponent(v: float) -> int | None:
        return None if v == 0 else max(math.frexp(v)[1] - 1, -126)

    for k in range(0, len(x), depth):
        terms = [(Fraction(float(a)) * Fraction(float(b)), exponent(a), exponent(b)) for a, b in zip(x[k : k + depth], w[k : k + depth], strict=True)]
        aligned = [(value, ea + eb) for value, ea, eb in terms if ea is not None and eb is not None]
        if c:
            aligned.append((Fraction(c), exponent(c) or 0))
        if not aligned:
            continue
        scale = Fraction(2) ** (places - max(e for _, e in aligned))
        total = Fraction(sum(math.trunc(value * scale) for value, _ in aligned)) / scale
        size = abs(total)
        if size:  # toward zero, to 24 bits
            place = size.numerator.bit_length() - size.denominator.bit_length()
            place -= Fraction(2) ** place > size
            unit = Fraction(2) ** (place - 23)
            total = math.trunc(total / unit) * unit
        c = float(total)
    return c


@pytest.mark.parametrize("model", MODELS)
def test_the_unit_computes_as_published(core: tensor_core.TensorCore, model: str) -> None:
    rng, (depth, places) = np.random.default_rng(7), MODELS[model]
    x = (rng.standard_normal((4, 3 * depth)) * np.exp2(rng.integers(-6, 6, (4, 3 * depth)))).astype(np.float16).astype(np.float32)
    w = rng.standard_normal((3 * depth, 8)).astype(np.float16).astype(np.float32)
    x[0, : 2 * depth], w[depth:, 1], start = 0, 0, (rng.standard_normal((4, 8)) * 1e3).astype(np.float32)
    start[0, :4] = 0
    expected = [[exactly(x[m], w[:, n], float(start[m, n]), depth, places) for n in range(8)] for m in range(4)]
    assert core.gemm(x, w, model, start).tolist() == expected
    assert (core.gemm(x, w, model) != x @ w).any(), "it cuts off"


def test_a_depth_that_is_no_step_is_refused(core: tensor_core.TensorCore) -> None:
    with pytest.raises(ValueError, match="K % 16 == 0"):
        core.gemm(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32), "hopper16")


# --- the kernels on it ----------------------------------------------------------------------------------------


def clean_report(checks: int) -> abft.Report:
    report = abft.report(reset=True)
    assert report.checks == checks and not report.bypassed
    assert report.detected == report.false_alarms == report.stale == report.input_rows == report.uncorrected == 0
    assert 0 < report.worst < 0.6
    return report


@HALVES
def test_a_layer_both_ways(hopper: None, dtype: torch.dtype) -> None:
    x, w = torch.randn(70, 192).to(dtype).requires_grad_(), (torch.randn(136, 192) / 14).to(dtype).requires_grad_()
    y = abft.linear(x, w, policy=POLICY)
    clean_report(70)
    assert ((y.double() - oracles.product(x, w.mT)).abs() <= oracles.worst_case(x, w.mT)).all()
    dy = torch.randn(y.shape).to(dtype)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    clean_report(70 + 136)
    assert ((dx.double() - oracles.product(dy, w)).abs() <= oracles.worst_case(dy, w)).all()
    assert ((dw.double() - oracles.product(dy.mT, x)).abs() <= oracles.worst_case(dy.mT, x)).all()
    with abft.inject.faults(abft.inject.Fault("bitflip", bit=27, index=(41, 77))):
        struck = abft.linear(x, w, policy=POLICY)
    report = abft.report(reset=True)
    (event,) = report.events
    assert (event.row, report.recomputed, report.detected) == (41, 1, 1) and bits.same(struck, y).all()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return abft.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, policy=POLICY)


@HALVES
def test_attention_both_ways(hopper: None, dtype: torch.dtype) -> None:
    """As near to fp64 as twice torch's own of the type; a wrong score and a wrong output are repaired to the very bits."""
    q, k, v = (torch.randn(s).to(dtype).requires_grad_() for s in ((1, 2, 80, 64), (1, 1, 80, 64), (1, 1, 80, 64)))
    out = attention(q, k, v)
    clean_report(2 * 160)
    d_out = torch.randn(out.shape).to(dtype)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    clean_report(2 * 160 + 80 + 160 + 80)

    def torchs(wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return y.detach(), *torch.autograd.grad(y, leaves, d_out.to(wide))

    for ours, plain, exact in zip((out.detach(), *gradients), torchs(dtype), torchs(torch.float64), strict=True):
        error, theirs = ((t.double() - exact).norm() / exact.norm() for t in (ours, plain))
        assert error <= 2 * theirs + oracles.ROUNDOFF[dtype]
    for place, role, row in (("S", "qk", 37), ("O", "pv", 61)):
        with abft.inject.faults(abft.inject.Fault("bitflip", place, role=role, bit=29, index=(row, 5))):
            struck = attention(q.detach(), k.detach(), v.detach())
        report = abft.report(reset=True)
        assert report.detected == report.recomputed == 1 and bits.same(struck, out).all(), place


def test_it_is_gone_afterwards(core: tensor_core.TensorCore) -> None:
    from abft.backends import triton as backend

    with emulated_units.tensor_cores(core, 90):
        assert backend.available(torch.device("cpu"), torch.bfloat16) is None
    assert "bf16" in (backend.available(torch.device("cpu"), torch.bfloat16) or "")
    assert (None, "16-bit") not in backend.ARITHMETIC and "triton" in sys.modules


def test_a_clean_campaign_of_attention_ends_in_time_goes_on_and_sums_up(tmp_path, monkeypatch):
    from bench import attention_clean, kernel_rows
    from bench.results import UNFINISHED, read

    monkeypatch.setattr(kernel_rows, "families_of", lambda dtype: ["gauss"])
    command = ["--backend", "interpreted", "--dtype", "fp16", "--out", str(tmp_path)]
    assert attention_clean.main([*command, "--seconds", "0"]) == UNFINISHED
    assert attention_clean.main(command) == 0
    summaries = [r for r in read(tmp_path / "attention-clean-interpreted-fp16.jsonl") if r["kind"] == "summary"]
    # Two shapes of mask, 33 queries and 40 keys: q k and p v of each query; and backward three of a query, two of a key.
    assert {r["part"]: (r["rows"], r["alarms"], r["unchecked"]) for r in summaries} == {
        "forward": (2 * 2 * 33, 0, 0), "backward": (2 * (3 * 33 + 2 * 40), 0, 0),
    }  # fmt: skip
    assert all(0 < r["worst"] < 1 for r in summaries)


def test_a_campaign_of_faults_in_attentions_kernels_ends_in_time_and_goes_on(tmp_path, monkeypatch):
    """What a GPU would run, interpreted: causal attention, forward and backward; a harmful fault is found and repaired."""
    from bench import attention_faults
    from bench.results import UNFINISHED, read

    small = replace(attention_faults.native(torch.float16), q=(1, 1, 20, 16), k=(1, 1, 20, 16), device="cpu")
    assert small.forms == ({"is_causal": True},) and small.policy.backend == "triton"
    monkeypatch.setattr(attention_faults, "interpreted", lambda dtype: small)
    monkeypatch.setattr(attention_faults, "PLACES", {"dK": "qk"})
    command = ["--backend", "interpreted", "--dtype", "fp16", "--trials", "1", "--out", str(tmp_path)]
    assert attention_faults.main([*command, "--seconds", "0"]) == UNFINISHED
    assert attention_faults.main(command) == 0
    (r,) = (r for r in read(tmp_path / "attention-faults-interpreted-fp16.jsonl") if r["kind"] == "place")
    assert (r["key"], r["trials"], r["harmful"], r["harmful_detected"], r["detected"], r["repaired_bit_equal"]) == ("dK", 1, 1, 1, 1, 1)
    assert r["false_alarms"] == 0
    assert attention_faults.main([*command, "--seconds", "0"]) == 0  # nothing is left to begin
    with pytest.raises(SystemExit):
        attention_faults.main([*command, "--decode"])


def test_equal_gradients_of_scores_that_are_all_cut_off_alike_are_clean(hopper: None) -> None:
    """One large product and a thousand small equal ones, each of which the unit cuts at the large one's place: dQ of 1,024 keys, all
    equal but one, is wrong by 58 U of its row where a product of independent numbers was allowed 48."""
    torch.manual_seed(2)

    def equal_but_one(rows: int) -> torch.Tensor:
        x = torch.full((1, 1, rows, 16), 0.37) * (1 + 0.2 * torch.rand(1, 1, 1, 1))
        x[..., :1, :] = 1.1
        return x.half().requires_grad_()

    q, k, v = (equal_but_one(n) for n in (16, 1024, 1024))
    abft.report(reset=True)
    y = abft.scaled_dot_product_attention(q, k, v, policy=POLICY)
    torch.autograd.grad(y, (q, k, v), torch.randn(y.shape).half())
    report = abft.report()
    assert report.checks > 0 and not report.events and report.worst < 1.0
