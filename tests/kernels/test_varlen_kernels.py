"""Packed sequences in the kernels: the bits of each sequence alone, the counts of real rows, faults found in their row and mended."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import kernel_harness as harness
import oracles
import pytest
import torch

import abft
from abft.attend import More, attention_at
from abft.backends import triton_attention, triton_attention_backward
from abft.backends.triton_attention import AttentionCall, Sequences
from abft.backends.triton_attention_backward import Given, Hit
from abft.faults import BitOperation, Region, Strike

KERNELS = abft.Policy(backend="triton", on_uncorrected="record")
#: Of queries and of keys: more than one block of each, no query, no key, one of both.
LENGTHS = ((3, 0, 33, 2, 1), (5, 4, 40, 0, 1))
BEHIND = 2
FLIP = BitOperation(flip=1 << 30)


def operands(dtype=torch.float32):
    """q, k, v and the gradient above, of two heads that share one of keys; cumulative lengths."""
    g = torch.Generator().manual_seed(0)
    tokens, keys = (sum(n) + BEHIND for n in LENGTHS)
    tensors = [torch.randn(s, generator=g).to(dtype).to(harness.DEVICE) for s in ((tokens, 2, 16), (keys, 1, 16), (keys, 1, 12), (tokens, 2, 12))]
    cu = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device=harness.DEVICE) for n in LENGTHS]
    return *tensors, cu


def run(attend, q, k, v, above):
    """[out, gradients of q, k, v]"""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = attend(*leaves)
    out.backward(above)
    return [out.detach()] + [t.grad for t in leaves]


def attend_packed(cu, window, policy=KERNELS):
    longest = [max(n) for n in LENGTHS]
    return lambda q, k, v: abft.varlen_attention(q, k, v, *cu, *longest, window_size=window, enable_gqa=True, policy=policy)


def attend_alone(cu, window):
    """Each sequence by the dense kernels."""
    left, right = window

    def attend(q, k, v):
        out, (at_q, at_k) = torch.zeros_like(q[..., :12]), (c.tolist() for c in cu)
        for q0, q1, k0, k1 in zip(at_q, at_q[1:], at_k, at_k[1:], strict=False):
            if q1 > q0 and k1 > k0:
                part = (t.transpose(0, 1).unsqueeze(0) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
                more = More(k1 - k0 - (q1 - q0) + max(right, 0), None if left < 0 else left + max(right, 0) + 1)
                o = attention_at(None, *part, is_causal=right >= 0, enable_gqa=True, own=KERNELS, more=more)
                out = torch.cat([out[:q0], o.squeeze(0).transpose(0, 1), out[q1:]])
        return out

    return attend


@pytest.fixture(autouse=True)
def fresh():
    abft.report(reset=True)


@pytest.mark.parametrize("window, dtype", [((-1, 0), torch.float16), ((6, 2), torch.float32)], ids=["causal-fp16", "window-fp32"])
def test_the_bits_of_each_sequence_alone_and_the_counts_of_real_rows(window, dtype):
    *tensors, cu = operands(dtype)
    packed = run(attend_packed(cu, window), *tensors)
    r = abft.report(reset=True)
    rows, keys = 2 * sum(LENGTHS[0]), sum(LENGTHS[1])
    assert (r.checks, r.products, r.executions) == (5 * rows + 2 * keys, 7, 7)
    assert (r.detected, r.input_rows, r.bypassed) == (0, 0, {}) and max(s.worst for s in r.sites.values()) < 0.5
    for got, right in zip(packed, run(attend_alone(cu, window), *tensors), strict=True):
        assert oracles.bits_equal(got.cpu(), right.cpu())
    out, dq, dk, dv = packed
    assert all((t[-BEHIND:] == 0).all() for t in packed) and (out[36:38] == 0).all() and (dq[36:38] == 0).all()
    assert (dk[5:9] == 0).all() and (dv[5:9] == 0).all()


# --- faults ---------------------------------------------------------------------------------------


class Struck:
    """The launches of an attention and of its gradient, with faults."""

    def __init__(self):
        q, k, v, above, cu = operands()
        by_head = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v, above)]
        of_q, above = (by_head[i].unflatten(1, (1, 2)) for i in (0, 3))
        self.tokens, self.keys = q.shape[0], k.shape[0]
        self.call = AttentionCall(of_q, *by_head[1:3], None, 0, 1 / math.sqrt(16), True, 0, None, None, 0.0, KERNELS, frozenset({"qk", "pv"}),
                                  sequences=Sequences(*cu, *(max(n) for n in LENGTHS)))  # fmt: skip
        self.clean, _ = self.forward()
        self.given = Given(above, *self.clean)
        self.clean_gradients, _ = self.backward()

    def forward(self, *strikes):
        words = harness.fresh_ledger()
        results = triton_attention.attend(replace(self.call, strikes=strikes), words, torch.tensor(harness.SITE, device=harness.DEVICE))
        return results, words

    def backward(self, *hits):
        words = harness.fresh_ledger()
        return triton_attention_backward.gradients(self.call, self.given, words, torch.tensor(harness.SITE, device=harness.DEVICE), hits), words


@pytest.fixture(scope="module")
def struck():
    return Struck()


def same(a, b):
    return all(oracles.bits_equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


#: The head and the query, in its sequence, that are struck: the second block of queries of the third sequence, and its first of one.
@pytest.mark.parametrize("place, role, member, token, col", [("S", "qk", 1, 3 + 32, 37), ("O", "pv", 0, 38, 3)])
def test_a_fault_is_found_in_its_row_and_mended_to_the_bits(struck, place, role, member, token, col):
    row = member * struck.tokens + token
    results, words = struck.forward((role, Strike(place, Region(row, row + 1, col, col + 1), FLIP)))
    counters, (record,) = harness.counters_of(words, harness.SITE), harness.records_of(words)
    assert same(results, struck.clean) and counters["recomputed"] == 1 and counters["uncorrected"] == 0
    assert (record["row"], record["rows"], record["k" if role == "pv" else "n"]) == (row, 1, max(LENGTHS[1]))


@pytest.mark.parametrize("place, by_keys, row, col", [("dQ", False, 41 + 3 + 32, 2), ("dK", True, 5 + 4 + 35, 1)])
def test_a_fault_of_the_gradient_is_found_in_its_row_and_mended_to_the_bits(struck, place, by_keys, row, col):
    gradients, words = struck.backward(Hit(Strike(place, Region(row, row + 1, col, col + 1), FLIP), by_keys))
    counters = harness.counters_of(words, harness.SITE)
    assert same(gradients, struck.clean_gradients) and counters["recomputed"] >= 1 and counters["uncorrected"] == 0
    assert [r["row"] for r in harness.records_of(words)] == [row]


# --- through the front door -----------------------------------------------------------------------


def test_an_injector_reaches_them_and_votes_agree():
    *tensors, cu = operands()
    attend = attend_packed(cu, (-1, -1))
    with torch.no_grad():
        clean = attend(*tensors[:3])
        abft.report(reset=True)
        with abft.inject.faults(abft.inject.Fault("nullify", "O", role="pv", pattern="row"), seed=2) as log:
            out = attend(*tensors[:3])
        r = abft.report(reset=True)
        assert torch.equal(out, clean) and r.detected == r.recomputed and (r.detected == 1 or log[0].effect == 0)
        assert torch.equal(attend_packed(cu, (-1, -1), KERNELS.replace(redundancy="tmr"))(*tensors[:3]), clean)
    assert abft.report(reset=True).executions == 2 + 2


def test_in_a_compiled_graph_without_breaks():
    *tensors, cu = operands()
    attend = attend_packed(cu, (-1, 0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*tensors[:3]), attend(*tensors[:3]))


def test_what_has_nothing_to_multiply_is_zero():
    q = torch.randn(3, 2, 16, device=harness.DEVICE, requires_grad=True)
    cu = torch.zeros(2, dtype=torch.int32, device=harness.DEVICE)
    out = abft.varlen_attention(q, q, q, cu, cu, 0, 0, policy=KERNELS)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()
