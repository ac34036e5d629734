"""Attention of packed sequences: each as fp64 has it and as it is alone, silent on clean data, counted row by row, loud in the right row."""

from __future__ import annotations

import re
import warnings

import oracles
import pytest
import torch

import abft
from abft.attend import More, attention_at

RECORD = abft.Policy(on_uncorrected="record")
#: Of queries and of keys: no query, no key, neither, one of each, and tokens behind the last sequence.
LENGTHS = ((5, 0, 1, 33, 3, 0), (7, 4, 1, 20, 0, 0))
BEHIND = 2
WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "causal window": (4, 0), "both sides": (3, 2), "only left": (3, -1), "only right": (-1, 2)}


class Case:
    """Operands of 4 heads that share 2 of keys, and how to attend with them."""

    def __init__(self, dtype=torch.float32, window=(-1, -1), lengths=LENGTHS, behind=BEHIND, policy=RECORD, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.window, self.policy = lengths, window, policy
        self.cu = [torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in lengths]
        tokens, keys = (sum(n) + behind for n in lengths)
        shapes = (tokens, 4, 16), (keys, 2, 16), (keys, 2, 12)
        self.operands = [torch.randn(s, generator=g).to(dtype) for s in shapes]
        self.above = torch.randn(tokens, 4, 12, generator=g).to(dtype)

    def attend(self, *operands, **kwargs):
        longest = [max(n) for n in self.lengths]
        return abft.varlen_attention(
            *(operands or self.operands), *self.cu, *longest, window_size=self.window, enable_gqa=True, policy=self.policy, **kwargs
        )

    def run(self, attend=None):
        """[out, gradients of q, k, v]"""
        leaves = [t.detach().clone().requires_grad_() for t in self.operands]
        out = (attend or self.attend)(*leaves)
        out.backward(self.above)
        return [out.detach()] + [t.grad for t in leaves]

    def parts(self, q, k, v):
        """Of each sequence: (its queries, q, k, v as (1, heads, tokens, ·))."""
        at_q, at_k = (c.tolist() for c in self.cu)
        for q0, q1, k0, k1 in zip(at_q, at_q[1:], at_k, at_k[1:], strict=False):
            yield (q0, q1), *(t.transpose(0, 1).unsqueeze(0) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))

    def together(self, attention, q, k, v):
        """What ``attention`` makes of each sequence, packed."""
        out = q.new_zeros(q.shape[0], 4, 12)
        for (q0, q1), *part in self.parts(q, k, v):
            if q1 > q0 and part[1].shape[2]:
                out = torch.cat([out[:q0], attention(*part).squeeze(0).transpose(0, 1).to(out.dtype), out[q1:]])
        return out

    def exact(self, q, k, v):
        """softmax(q kᵀ / 4) v of one sequence in fp64, rows that see nothing being zero."""
        q, k, v = (t.double() for t in (q, k, v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        (left, right), x = self.window, q @ k.mT / 4
        behind = torch.arange(k.shape[2]) - (torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2])
        seen = (behind <= right) | (right < 0)
        seen &= (behind >= -left) | (left < 0)
        nothing = ~seen.any(-1, keepdim=True)
        return x.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v

    def alone(self, q, k, v):
        """One sequence by abft's own attention."""
        left, right = self.window
        offset = k.shape[2] - q.shape[2] + max(right, 0)
        more = More(offset, None if left < 0 else left + max(right, 0) + 1)
        return attention_at(None, q, k, v, is_causal=right >= 0, enable_gqa=True, own=self.policy, more=more)


@pytest.fixture(autouse=True)
def fresh():
    abft.report(reset=True)


def silent():
    r = abft.report(reset=True)
    assert (r.detected, r.false_alarms, r.input_rows, r.overflow_rows, r.bypassed) == (0, 0, 0, 0, {}), str(r)
    return r


# --- right, and silent ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, dtype", [(w, torch.float32) for w in WINDOWS] + [("causal", t) for t in (torch.float64, torch.bfloat16, torch.float16)], ids=str
)
def test_each_sequence_is_as_it_is_alone_and_near_fp64(window, dtype):
    case = Case(dtype, WINDOWS[window])
    ours = case.run()
    r = silent()
    rows, keys = 4 * sum(LENGTHS[0]), 2 * sum(LENGTHS[1])
    assert (r.checks, r.products) == (2 * rows + 3 * rows + 2 * keys, 2 + 5)
    for got, expected in zip(ours, case.run(lambda *t: case.together(case.alone, *t)), strict=True):
        assert oracles.bits_equal(got, expected)
    wide = Case(torch.float64, WINDOWS[window])
    wide.operands, wide.above = [t.double() for t in case.operands], case.above.double()
    for got, right in zip(ours, wide.run(lambda *t: wide.together(wide.exact, *t)), strict=True):
        size = right.abs().max()
        assert (got.double() - right).abs().max() <= oracles.ROUNDOFF[dtype] * size + 500 * oracles.ROUNDOFF[oracles.WIDE[dtype]] * size


def test_tokens_behind_the_last_sequence_and_rows_without_keys_are_zero():
    out, dq, dk, dv = Case().run()
    assert (out[-BEHIND:] == 0).all() and (dq[-BEHIND:] == 0).all() and (dk[-BEHIND:] == 0).all() and (dv[-BEHIND:] == 0).all()
    assert (out[39:42] == 0).all() and (dq[39:42] == 0).all() and (dk[7:11] == 0).all() and (dv[7:11] == 0).all()


def test_no_sequences_and_no_tokens():
    q = torch.randn(3, 2, 8, requires_grad=True)
    cu = torch.zeros(1, dtype=torch.int32)
    out = abft.varlen_attention(q, q, q, cu, cu, 0, 0)
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()
    empty = q[:0]
    assert abft.varlen_attention(empty, empty, empty, cu, cu, 0, 0).shape == (0, 2, 8)
    assert silent().checks == 0


def test_strided_views_of_one_projection_and_a_contiguous_result():
    wide = torch.randn(20, 3, 2, 8)
    q, k, v = (wide[:, i] for i in range(3))
    cu = torch.tensor([0, 8, 20], dtype=torch.int32)
    out = abft.varlen_attention(q, k, v, cu, cu, 12, 12)
    assert out.is_contiguous() and torch.equal(out, abft.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, 12, 12))


def test_gradients_of_gradients_are_torchs_and_counted():
    case = Case(torch.float64, (-1, 0), lengths=((3, 0, 2), (4, 2, 2)))
    found = []
    for attend in (case.attend, lambda *t: case.together(case.exact, *t)):
        leaves = [t.detach().requires_grad_() for t in case.operands]
        first = torch.autograd.grad((attend(*leaves) * case.above).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9)
    assert abft.report(reset=True).bypassed == {"double backward": 1}


def test_in_a_compiled_graph_without_breaks_forward_and_backward():
    case = Case(window=(-1, 0))
    eager = case.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(case.attend, backend="aot_eager", fullgraph=True)
        for got, expected in zip(case.run(compiled), eager, strict=True):
            assert torch.equal(got, expected)
    silent()


def test_autocast_chooses_the_dtype():
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        assert case.attend().dtype == torch.bfloat16


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where, role", [("S", "qk"), ("P", "pv"), ("l", "pv"), ("O", "pv")])
def test_a_fault_of_the_forward_is_found_in_its_row_and_repaired_to_the_bits(where, role):
    case = Case()
    clean = case.attend()
    abft.report(reset=True)
    # Of the sequences that have both the third is the longest: its products are the third call.
    with abft.inject.faults(abft.inject.Fault("nullify", where, role=role, pattern="row", call=2), seed=3) as log:
        out = case.attend()
    r = abft.report(reset=True)
    assert oracles.bits_equal(out, clean) and r.recomputed == r.detected >= 1 and r.uncorrected == 0
    (event,) = r.events
    head, row = divmod(log[0].elements[0][0], 33)  # the log counts in the struck sequence
    assert event.role == role and event.row == head * 44 + 6 + row and log[0].effect > 1e-3


@pytest.mark.parametrize("where, role", [("dP", "pv"), ("dS", "pv"), ("dQ", "qk"), ("dK", "qk"), ("dV", "pv")])
def test_a_fault_of_the_backward_is_found_and_repaired_to_the_bits(where, role):
    case = Case()
    clean = case.run()
    abft.report(reset=True)
    with abft.inject.faults(abft.inject.Fault("inf", where, role=role, call=2), seed=3) as log:
        struck = case.run()
    r = abft.report(reset=True)
    assert len(log) == 1 and r.recomputed == r.detected >= 1 and r.uncorrected == 0
    assert all(oracles.bits_equal(a, b) for a, b in zip(struck, clean, strict=True))
    tokens, first, last = (29 + BEHIND + 3, 12, 32) if where in ("dK", "dV") else (44, 6, 39)
    assert first <= r.events[0].row % tokens < last


def test_redundancy_votes_and_roles_decide():
    case = Case(policy=RECORD.replace(redundancy="tmr"))
    assert oracles.bits_equal(case.attend(), Case().attend())
    r = abft.report(reset=True)
    assert r.executions == 2 * 3 + 2
    Case(policy=RECORD.replace(roles=frozenset({"qk"}))).attend()
    r = abft.report(reset=True)
    assert r.checks == 4 * 42 and r.bypassed == {"role pv not in policy": 1}


def test_flops_are_those_of_the_sequences():
    from torch.utils.flop_counter import FlopCounterMode

    pairs = sum(a * b for a, b in zip(*LENGTHS, strict=True))
    with FlopCounterMode(display=False) as counter:
        Case().run()
    assert counter.get_total_flops() == 2 * 4 * pairs * ((16 + 12) + (3 * 16 + 2 * 12))


def test_coverage_counts_its_share():
    class Packed(torch.nn.Module):
        def forward(self, x):
            cu = torch.tensor([0, 2, 6], dtype=torch.int32)
            return abft.varlen_attention(x, x, x, cu, cu, 4, 4)

    x = torch.randn(6, 2, 8, requires_grad=True)
    model = Packed()
    model.weight = torch.nn.Parameter(torch.ones(()))
    assert abft.coverage(model, x).flop_share == 1.0
    with abft.protected(abft.Policy(roles=frozenset({"qk"}))):
        assert abft.coverage(model, x).flop_share == pytest.approx(4 / 7)  # of seven products


# --- what is refused ------------------------------------------------------------------------------


def _call(**changes):
    q = torch.randn(6, 2, 8)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    arguments = {"query": q, "key": q, "value": q, "cu_seq_q": cu, "cu_seq_k": cu, "max_q": 4, "max_k": 4} | changes
    return abft.varlen_attention(**arguments)


@pytest.mark.parametrize("changes, error, says", [
    ({"query": torch.randn(1, 6, 2, 8)}, abft.ShapeError, "(tokens, heads, head_dim)"),
    ({"query": torch.randn(6, 2, 7)}, abft.ShapeError, "same head_dim"),
    ({"value": torch.randn(5, 2, 8)}, abft.ShapeError, "same tokens and heads"),
    ({"query": torch.randn(6, 4, 8)}, abft.ShapeError, "enable_gqa=True"),
    ({"query": torch.randn(6, 3, 8), "enable_gqa": True}, abft.ShapeError, "a multiple of key's"),
    ({"query": torch.randn(6, 2, 8).double()}, abft.DtypeError, "one dtype"),
    ({"cu_seq_q": [0, 2, 6]}, TypeError, "cu_seq_q must be a tensor"),
    ({"cu_seq_k": torch.tensor([0, 2, 6])}, abft.DtypeError, "cu_seq_k.to(torch.int32)"),
    ({"cu_seq_k": torch.tensor([[0, 2, 6]], dtype=torch.int32)}, abft.ShapeError, "(sequences + 1,)"),
    ({"cu_seq_k": torch.tensor([0, 6], dtype=torch.int32)}, abft.ShapeError, "2 sequences, cu_seq_k 1"),
    ({"cu_seq_k": torch.tensor([0, 2, 6], dtype=torch.int32, device="meta")}, abft.DeviceError, "move it there"),
    ({"cu_seq_q": torch.tensor([1, 2, 6], dtype=torch.int32)}, abft.ShapeError, "begin with 0"),
    ({"cu_seq_q": torch.tensor([0, 4, 3], dtype=torch.int32)}, abft.ShapeError, "must not decrease; cu_seq_q[2] = 3 follows 4"),
    ({"cu_seq_q": torch.tensor([0, 4, 7], dtype=torch.int32)}, abft.ShapeError, "ends with 7, but there are 6 tokens"),
    ({"max_k": 3}, abft.ShapeError, "max_k = 3, but sequence 1 has 4"),
    ({"max_q": torch.tensor(4)}, TypeError, "max_q must be an int"),
    ({"max_q": -1}, abft.ShapeError, "max_q must not be negative"),
    ({"window_size": (-2, 0)}, abft.ShapeError, "(left, right)"),
    ({"window_size": (1,)}, abft.ShapeError, "(left, right)"),
    ({name: torch.ones(6, 2, 8, dtype=torch.int32) for name in ("query", "key", "value")}, NotImplementedError, "dtype int32"),
    ({"policy": abft.Policy(max_floor=1e-30)}, abft.PolicyError, "cannot be met"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(changes, error, says):
    with pytest.raises(error, match=re.escape(says)):
        _call(**changes)
