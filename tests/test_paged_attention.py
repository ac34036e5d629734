"""Attention over pages: as fp64, silent on clean pages, every fault seen and mended, a page that changed named and put back."""

from __future__ import annotations

import math
import warnings

import oracles
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import abft
from abft.attention import decode, pages
from abft.ops import flops

QUIET = abft.Policy(on_uncorrected="record")
LENGTHS = [1, 5, 16, 40, 61]


class Decoding:
    """A cache of a few sequences whose pages lie in disorder, written in two parts, and queries."""

    def __init__(self, dtype=torch.float32, heads=2, group=2, length=2, e=16, d=12, lengths=LENGTHS, page_length=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        make = lambda *s: torch.randn(s, generator=g).to(dtype)  # noqa: E731
        most, batch = max(lengths), len(lengths)
        width = -(-most // page_length) + 1
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.keys, self.values, self.query = make(batch, heads, most, e), make(batch, heads, most, d), make(batch, heads * group, length, e)
        self.table = torch.randperm(batch * width, generator=g).int().view(batch, width)
        self.cache = abft.PagedCache(batch * width, page_length, heads, e, dtype, value_dim=d)
        first = self.lengths // 2
        self.append(torch.zeros_like(self.lengths), first)
        self.append(first, self.lengths - first)

    def append(self, begin, counts):
        most = max(1, int(counts.max()))
        at = (begin.long()[:, None] + torch.arange(most)).clamp(max=self.keys.shape[2] - 1)[:, None, :, None]
        key, value = (t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values))
        self.cache.append(key, value, self.table, begin, counts)

    def __call__(self, policy=QUIET, **kwargs):
        return abft.paged_attention(self.query, self.cache, self.table, self.lengths, policy=policy, **kwargs)

    def exact(self, scale=None, window=None, softcap=None):
        """(the same in fp64, what fp32 and the rounding of the result may differ from it by)"""
        u, u_out = 2.0**-24, {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[self.query.dtype]
        group, length = self.query.shape[1] // self.keys.shape[1], self.query.shape[2]
        q, (k, v) = self.query.double(), (t.double().repeat_interleave(group, 1) for t in (self.keys, self.values))
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        x, size = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        position = self.lengths[:, None, None, None] - length + torch.arange(length)[:, None]
        key = torch.arange(k.shape[2])
        seen = (key <= position) & (key > position - (window or 10**6))
        nothing = ~seen.any(-1, keepdim=True)
        p = x.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        exponent = (q.shape[-1] + 2) * u * size + 8 * u * (x.abs() + (softcap or 0))
        share = 2 * torch.where(seen, exponent, 0).amax(-1, keepdim=True) + u_out + (k.shape[2] + 8) * u
        return p @ v, share * (p @ v.abs()) + u_out * (p @ v).abs() + torch.finfo(torch.float16).tiny * (u_out > u)


def silent():
    r = abft.report(reset=True)
    assert (r.detected, r.false_alarms, r.input_rows, r.weight_faults, r.bypassed) == (0, 0, 0, 0, {}), str(r)
    return r


@pytest.fixture(autouse=True)
def fresh_report():
    abft.report(reset=True)


@pytest.mark.parametrize("kwargs", [{}, {"window": 7}, {"softcap": 2.0}, {"scale": -0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=oracles.name_of)
def test_as_fp64_within_what_rounding_allows_and_silent(dtype, kwargs):
    one = Decoding(dtype)
    right, budget = one.exact(**kwargs)
    out = one(**kwargs)
    r = silent()
    assert ((out.double() - right).abs() <= budget).all() and out.dtype == dtype
    assert (r.checks, r.products) == (2 * 5 * 4 * 2, 2) and 0 < r.worst < 0.5
    assert (out[0, :, 0] == 0).all(), "of a sequence of one token the first of two queries sees nothing"


@pytest.mark.parametrize("heads, group, length, page_length", [(1, 1, 1, 16), (2, 4, 1, 32), (1, 8, 3, 128)])
def test_heads_groups_and_pages_of_every_size(heads, group, length, page_length):
    one = Decoding(heads=heads, group=group, length=length, page_length=page_length, lengths=[length, 130])
    right, budget = one.exact()
    assert ((one().double() - right).abs() <= budget).all()
    silent()


def test_pages_in_order_are_a_contiguous_cache():
    g = torch.Generator().manual_seed(1)
    k, v, q = torch.randn(2, 2, 50, 16, generator=g), torch.randn(2, 2, 50, 16, generator=g), torch.randn(2, 4, 1, 16, generator=g)
    cache = abft.PagedCache.of(k, v, 16, room=20)
    assert torch.equal(cache.k.view(2, -1, 2, 16)[:, :50].transpose(1, 2), k)
    out = abft.paged_attention(q, cache, cache.table(2), torch.tensor([50, 50]), policy=QUIET)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    silent()


def test_one_token_after_the_other_leaves_what_one_prompt_leaves():
    one, other = Decoding(lengths=[40]), Decoding(lengths=[40])
    for t in range(40):
        other.append(torch.tensor([t], dtype=torch.int32), torch.tensor([1]))
    for a, b in zip(one.cache.pages.tensors(), other.cache.pages.tensors(), strict=True):
        assert oracles.bits_equal(a, b)
    assert not one.cache.changed().any()


def test_a_sequence_may_be_rewound_and_a_page_given_to_another():
    one = Decoding(lengths=[40])
    one.append(torch.tensor([21], dtype=torch.int32), torch.tensor([3]))  # the same tokens again, and the rest of the page is gone
    one.lengths = torch.tensor([24], dtype=torch.int32)
    right, budget = one.exact()
    assert ((one().double() - right).abs() <= budget).all()
    one.append(torch.tensor([0], dtype=torch.int32), torch.tensor([2]))
    one.lengths = torch.tensor([2], dtype=torch.int32)
    right, budget = one.exact()
    assert ((one().double() - right).abs() <= budget).all() and not one.cache.changed().any()
    silent()


def test_tokens_that_were_never_appended_are_not_read_as_zeros():
    one = Decoding(lengths=[20])
    one.lengths += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one()
    assert abft.report(reset=True).uncorrected == 8


def test_what_is_remembered_by_its_definition():
    one = Decoding(torch.float16)
    p, eps = one.cache.pages, pages.weights(16)
    page = int(one.table[4, 1])
    k, v = one.keys[4, :, 16:32].double(), one.values[4, :, 16:32].double()
    torch.testing.assert_close(p.sums[page, :, 0].double(), (k * eps[:, None]).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.sums[page, :, 1].double(), k.square().sum(1), rtol=1e-5, atol=1e-5)
    w = torch.stack([torch.from_numpy(abft.checksum.column_weights(kind, 12).copy()) for kind in ("e", "hi", "lo")])
    torch.testing.assert_close(p.columns[page, :, :3].double(), w.double() @ v.mT, rtol=1e-5, atol=1e-5)
    h = one.keys[4, :, 16:32].contiguous().view(torch.int16).long() & 0xFFFF
    assert torch.equal(p.prints[page, :, 0, 1].long(), (h * torch.arange(1, 17)).sum(-1))


# --- faults -----------------------------------------------------------------------------------------------

PLACES = {"S": "qk", "P": "pv", "l": "pv", "O": "pv"}
WHATS = {
    "nullify": {}, "flip of bit 30": {"what": "bitflip", "bit": 30}, "flip of bit 22": {"what": "bitflip", "bit": 22}, "nan": {}, "inf": {}, "-inf": {},
    "scale": {}, "carry": {"bit": 24},
}  # fmt: skip


@pytest.fixture(scope="module")
def one():
    return Decoding()


def struck(one, fault, seed=0, policy=QUIET):
    """(clean, out, report, log)"""
    clean = one(policy=abft.Policy(level="off"))
    abft.report(reset=True)
    with abft.inject.faults(fault, seed=seed) as log:
        out = one(policy=policy)
    return clean, out, abft.report(reset=True), log


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("where", PLACES)
def test_a_fault_in_every_place_is_repaired_to_the_very_bits(one, where, what):
    options = {"what": what, **WHATS[what]}
    for seed in range(4):
        clean, out, r, log = struck(one, abft.inject.Fault(options["what"], where, role=PLACES[where], bit=options.get("bit")), seed)
        assert torch.equal(out, clean) and r.recomputed == r.detected and r.input_rows == r.false_alarms == r.uncorrected == 0
        assert r.detected >= 1 or log[0].effect < 1e-5, f"effect {log[0].effect:.3g} was not seen"
        if r.detected:
            assert (r.events[0].site, r.events[0].cause) == ("paged_attention", "transient")
        if log[0].effect > 1e-3:
            assert r.events[0].row == log[0].elements[0][0]


@pytest.mark.parametrize("where", ["accumulator", "operand", "checksum"])
@pytest.mark.parametrize("role", ["qk", "pv"])
def test_the_general_places(one, role, where):
    clean, out, r, _ = struck(one, abft.inject.Fault("bitflip", where, role=role, bit=30, pattern="row"), 3)
    assert torch.equal(out, clean) and r.recomputed == r.detected >= 1 and r.events[0].role == role


def _position(one, b=4, token=37):
    return int(one.table[b, token // 16]) * 16 + token % 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=oracles.name_of)
@pytest.mark.parametrize("role", ["qk", "pv"])
def test_an_element_of_a_page_that_changed_is_named_and_put_back(role, dtype):
    one = Decoding(dtype)
    before, column = (one.cache.k if role == "qk" else one.cache.v).clone(), 3
    fault = abft.inject.Fault("bitflip", "weight", role=role, bit=14 if dtype == torch.float16 else 30, index=(_position(one), column))
    clean, out, r, log = struck(one, fault)
    assert torch.equal(out, clean) and r.reconstructed == r.detected >= 1 and r.weight_faults == 1
    event = r.events[-1]
    assert (event.role, event.cause, event.verdict.name) == (role, "weight", "RECONSTRUCTED")
    assert f"weight element {_position(one)}, {column}" in event.message and log[0].where == "weight"
    assert oracles.bits_equal(one.cache.k if role == "qk" else one.cache.v, before), "in the page itself"
    one()
    silent()


def test_an_element_put_back_mends_rows_that_were_within_their_bounds_too():
    one = Decoding(heads=1, length=1, lengths=[40])
    one.query[0, :, 0] = one.keys[0, 0, 37] * torch.tensor([[3.0], [-0.7]])  # one looks there, the other away from there
    fault = abft.inject.Fault("bitflip", "weight", role="pv", bit=23, index=(_position(one, 0), 3))
    told = struck(one, fault, policy=QUIET.replace(level="detect"))
    assert [(e.row, e.rows) for e in told[2].events] == [(0, 1)] and (told[1] != told[0]).any(-1).all()
    clean, out, r, _ = struck(one, fault)
    assert torch.equal(out, clean) and r.reconstructed == r.detected == 1


def test_two_elements_of_a_token_cannot_be_put_back_and_are_said():
    one = Decoding()
    one.cache.k.view(torch.int32)[_position(one) // 16, 37 % 16, 1, 2:4] ^= 1 << 29
    for times in range(2):
        one()
        r = abft.report(reset=True)
        assert r.uncorrected == r.detected >= 1 and r.events[0].cause == "weight"
        assert r.weight_faults == (1 if times == 0 else 0), "a fault in memory is counted once"
    assert one.cache.changed().sum() == 1 and one.cache.pages.lost.sum() == 1


def test_a_small_change_is_found_by_whoever_looks_at_everything():
    one = Decoding()
    one.cache.v.view(torch.int32)[_position(one) // 16, 37 % 16, 0, 5] ^= 1
    one()
    silent()
    found = one.cache.changed()
    assert found.sum() == 1 and found[_position(one) // 16, 0]


@pytest.mark.parametrize("role", ["qk", "pv"])
def test_sums_that_changed_are_built_anew_and_no_fault_of_the_data(role):
    one = Decoding()
    page = int(one.table[4, 2])
    sums = one.cache.pages.sums if role == "qk" else one.cache.pages.columns
    before = sums.clone()
    index = (page * 2 * 2, 3) if role == "qk" else (page * 2 * 4, 5)
    clean, out, r, _ = struck(one, abft.inject.Fault("bitflip", "panel", role=role, bit=30, index=index))
    assert torch.equal(out, clean) and r.detected == r.weight_faults == 0 and r.false_alarms >= 1
    assert (r.events[0].role, r.events[0].cause) == (role, "panel") and oracles.bits_equal(sums, before)


def test_detect_tells_and_writes_nothing():
    one = Decoding()
    for fault in (abft.inject.Fault("inf", "O", role="pv"), abft.inject.Fault("bitflip", "weight", role="qk", bit=30, index=(_position(one), 3))):
        clean, out, r, _ = struck(one, fault, policy=QUIET.replace(level="detect"))
        assert not torch.equal(out, clean) and r.observed == r.detected >= 1
    assert not one.cache.changed().any(), "the injector has put it back"


def test_what_is_not_checked_is_counted(one):
    one(QUIET.replace(level="off"))
    assert abft.report(reset=True).bypassed == {"level off": 2}
    one(QUIET.replace(roles=frozenset({"pv"})))
    r = abft.report(reset=True)
    assert (r.products, r.bypassed) == (1, {"role qk not in policy": 1})


@pytest.mark.parametrize("redundancy, executions", [("dmr", 2), ("tmr", 3)])
def test_votes(one, redundancy, executions):
    policy = QUIET.replace(redundancy=redundancy)
    one(policy)
    assert silent().executions == 2 * executions
    clean, out, r, _ = struck(one, abft.inject.Fault("inf", "O", role="pv"), policy=policy.replace(level="off"))
    assert torch.equal(out, clean) and r.recomputed == 1


def test_operands_that_hold_nan_are_inputs():
    one = Decoding()
    one.query[2, 1, 0, 3] = torch.nan
    out = one()
    r = abft.report(reset=True)
    assert r.detected == 0 and r.input_rows == 2 and out[2, 1, 0].isnan().all() and out.isnan().sum() == 12


def test_the_reaction_is_the_policys(one):
    with pytest.raises(abft.FaultDetected, match="paged_attention"), abft.inject.faults(abft.inject.Fault("inf", "O", role="pv")):
        one(abft.Policy(level="detect", on_uncorrected="raise"))
    abft.report(reset=True)


def test_in_a_compiled_graph_without_breaks():
    one, again = Decoding(lengths=[20]), Decoding(lengths=[20])

    def step(q, k, v, cache, table, lengths):
        cache.append(k, v, table, lengths)
        return abft.paged_attention(q, cache, table, lengths + 1, policy=QUIET)

    args = one.query, one.keys[:, :, :1], one.values[:, :, :1]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(*args, one.cache, one.table, one.lengths)
        want = step(*args, again.cache, again.table, again.lengths)
    assert torch.equal(got, want)
    assert all(oracles.bits_equal(a, b) for a, b in zip(one.cache.pages.tensors(), again.cache.pages.tensors(), strict=True))
    silent()


def test_what_does_not_fit_is_said(one):
    with pytest.raises(abft.ShapeError, match="page_length"):
        abft.PagedCache(4, 24, 1, 16)
    with pytest.raises(abft.DtypeError):
        abft.PagedCache(4, 16, 1, 16, torch.float64)
    with pytest.raises(abft.ShapeError, match="heads a multiple of 2"):
        abft.paged_attention(one.query[:, :3], one.cache, one.table, one.lengths)
    with pytest.raises(abft.DtypeError, match="convert the query"):
        abft.paged_attention(one.query.half(), one.cache, one.table, one.lengths)
    with pytest.raises(NotImplementedError, match="no gradient"):
        abft.paged_attention(one.query.clone().requires_grad_(), one.cache, one.table, one.lengths)
    with pytest.raises(abft.ShapeError, match="append needs"):
        one.cache.append(one.keys[:1], one.values, one.table, one.lengths)


def test_clean_residuals_stay_far_below_their_bounds():
    """Of every kind of data: peaks, an offset, tiny and huge values, nothing at all."""
    g = torch.Generator().manual_seed(3)
    for q, k, v in ((8.0, 1.0, 1.0), (1.0, 1.0, 1e-20), (1.0, 1.0, 1e15), (1e3, 1.0, 1.0), (0.0, 1.0, 1.0)):
        many = Decoding(lengths=[300, 299], page_length=32)
        cache = abft.PagedCache.of(torch.randn(2, 2, 300, 16, generator=g) * k, (torch.randn(2, 2, 300, 12, generator=g) + 3) * v, 32)
        request = decode.Request((many.query * q).unflatten(1, (2, 2)), cache.pages, cache.table(2), many.lengths, 0.25)
        computed = decode.attend(request)
        assert computed.qk.fine.all() and computed.pv.fine.all() and max(computed.qk.ratio.max(), computed.pv.ratio.max()) < 0.5


# --- counting ---------------------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    """Attention over pages, and attention of torch's that nobody checks."""

    def __init__(self, one, policy):
        super().__init__()
        self.one, self.policy, self.weight = one, policy, torch.nn.Parameter(torch.zeros(()))

    def forward(self, q):
        return self.one(self.policy), torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_flops_are_those_of_the_tokens_that_are_there_and_coverage_knows_which_are_checked(one):
    rows, tokens, apart = 2 * 2 * 2, sum(LENGTHS), torch.randn(1, 1, 8, 16)
    qk, pv, beside = 2 * rows * tokens * 16, 2 * rows * tokens * 12, 2 * 2 * 8 * 8 * 16
    with FlopCounterMode(display=False) as counter:
        one()
    assert counter.get_total_flops() == qk + pv
    for policy, checked in (
        (QUIET, qk + pv), (QUIET.replace(roles=frozenset({"qk"})), qk), (QUIET.replace(level="off"), 0),
        (QUIET.replace(level="off", redundancy="dmr"), qk + pv),
    ):  # fmt: skip
        assert abft.coverage(Decoder(one, policy), apart).flop_share == checked / (qk + pv + beside)


def test_lengths_that_cannot_be_read_count_as_what_the_table_has_room_for():
    on_meta = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    k = on_meta(20, 16, 2, 16)
    parts = flops.paged_parts(on_meta(4, 2, 2, 1, 16), k, k, on_meta(4, 5), on_meta(4))
    assert parts == {"qk": 2 * 4 * (2 * 2) * (5 * 16) * 16, "pv": 2 * 4 * (2 * 2) * (5 * 16) * 16}
