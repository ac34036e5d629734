"""The path of ``reference`` and ``vendor`` on a device the host must not wait for, driven on host memory.

It holds no host decision, so what it does on a CPU tensor is what it does on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import abft
from abft import ledger, sites
from abft.backends import masked
from abft.backends.call import Call
from abft.faults import BitOperation, Region, Strike

NULLIFY = BitOperation(0, 0, 0)


@pytest.fixture
def place():
    site = sites.register("masked")
    return site, torch.zeros(ledger.WORDS, dtype=torch.int64), sites.as_tensor(site, torch.device("cpu"))


def _call(dtype, site, *, m=40, n=700, k=300, **policy):
    generator = torch.Generator().manual_seed(1)
    a, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (n, k), (n,)))
    weight = torch.nn.Parameter(w)
    return Call(a, weight.detach(), b, weight, False, "fprop", abft.Policy(**policy), site.index)


def _counts(words, site):
    at = ledger.HEADER + site.index * ledger.COUNTERS
    return dict(zip(ledger.COUNTER_NAMES, words[at : at + ledger.COUNTERS].numpy().tolist(), strict=False))


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_clean_is_silent_and_right(place, dtype, backend):
    site, words, tensor = place
    call = _call(dtype, site)
    y = masked.product(call, words, tensor, backend)
    exact = call.a.double() @ call.w.double().mT + call.bias.double()
    naive = (call.a.float() @ call.w.float().mT + call.bias.float()).to(dtype)
    roundoff = torch.finfo(dtype).eps * exact.abs()
    assert ((y.double() - exact).abs() <= 2 * (naive.double() - exact).abs() + roundoff + 1e-4).all()
    counts = _counts(words, site)
    assert (counts["checks"], counts["products"], counts["executions"]) == (40, 1, 2)
    assert not any(counts[n] for n in ("observed", "recomputed", "uncorrected", "input_rows", "overflow_rows"))
    assert 0 < ledger.bits_float(counts["worst"]) < 1
    assert words[ledger.HEAD] == 0


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_struck_row_is_recomputed_and_recorded(place, dtype, backend):
    site, words, tensor = place
    call = _call(dtype, site)
    clean = masked.product(call, words, tensor, backend)
    strike = Strike("accumulator", Region(3, 5, 10, 200, 2), NULLIFY)
    repaired = masked.product(replace(call, strikes=(strike,)), words, tensor, backend)
    assert torch.equal(clean, repaired)
    assert _counts(words, site)["recomputed"] == 2
    record = words[ledger.HEADER + sites.CAPACITY * ledger.COUNTERS :][: ledger.RECORD].numpy()
    record = dict(zip(ledger.RECORD_NAMES, record.tolist(), strict=True))
    assert words[ledger.HEAD] == 1 and record["sequence"] == 1
    assert record["row"] in (3, 4) and record["rows"] == 2 and record["site"] == site.index
    assert ledger.VERDICTS[record["verdict"]] is ledger.Verdict.RECOMPUTED
    assert abs(ledger.bits_float(record["residual"])) > ledger.bits_float(record["bound"])


@pytest.mark.parametrize("backend", ["reference", "vendor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_check_that_goes_wrong_itself_is_repeated(place, dtype, backend):
    site, words, tensor = place
    call = _call(dtype, site)
    clean = masked.product(call, words, tensor, backend)
    struck = replace(call, strikes=(Strike("checksum", Region(3, 5, 0, 4), NULLIFY),))
    assert torch.equal(clean, masked.product(struck, words, tensor, backend))
    assert _counts(words, site)["recomputed"] == 2 and _counts(words, site)["uncorrected"] == 0


def test_level_detect_reports_and_changes_nothing(place):
    site, words, tensor = place
    call = replace(_call(torch.float32, site, level="detect"), strikes=(Strike("accumulator", Region(7, 8, 0, 700), NULLIFY),))
    y = masked.product(call, words, tensor, "reference")
    assert (y[7] == 0).all()
    counts = _counts(words, site)
    assert (counts["observed"], counts["recomputed"], counts["executions"]) == (1, 0, 1)


def test_nan_operands_are_input_and_a_changed_panel_is_not_believed(place):
    site, words, tensor = place
    call = _call(torch.float32, site)
    poisoned = call.a.clone()
    poisoned[5, 7] = float("nan")
    masked.product(replace(call, a=poisoned), words, tensor, "reference")
    counts = _counts(words, site)
    assert counts["input_rows"] == 1 and counts["recomputed"] == counts["uncorrected"] == 0
    struck = Strike("panel", Region(0, 1, 0, 300), BitOperation(0, 0x7F800000, 0))
    masked.product(replace(call, strikes=(struck,)), words, tensor, "reference")
    assert _counts(words, site)["uncorrected"] == 40  # infinite bounds and sums fail closed
