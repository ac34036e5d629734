"""Attention in the kernels: fp64 within a derived budget, the reference's counts and dropout, silence on clean data, every fault seen and mended."""

from __future__ import annotations

import math
import warnings

import oracles
import pytest
import torch
from abft.triton_kernels import attention_forward, attention_settle

import abft
from abft import keyweights, ledger
from abft.attend import More, attention_at
from abft.attention import forward as reference
from abft.attention.problem import Options, Problem
from abft.attention.tally import Tally
from abft.backends import triton_attention
from abft.backends.triton_attention import AttentionCall
from abft.faults import BitOperation, Region, Strike

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS, REFERENCE = (abft.Policy(backend=name, on_uncorrected="record") for name in ("triton", "reference"))
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=oracles.name_of)


def operands(dtype=torch.float32, batch=1, heads=1, group=2, length=40, keys=70, e=16, d=12, seed=0):
    """q (B, H G, L, E), k, v (B, H, S, ·)."""
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads * group, length, e), (batch, heads, keys, e), (batch, heads, keys, d)
    return [torch.randn(s, generator=g).to(dtype).to(DEVICE) for s in shapes]


def attend(q, k, v, policy=KERNELS, **kwargs):
    more = More(**{name: kwargs.pop(name) for name in ("offset", "window", "softcap") if name in kwargs})
    options = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | kwargs
    with torch.no_grad():
        return attention_at(None, q, k, v, enable_gqa=True, own=policy, more=more, **options)


def exact(q, k, v, attn_mask=None, is_causal=False, scale=None, offset=0, window=None, softcap=None):
    """(softmax(q kᵀ) v, what fp32 scores, probabilities and outputs of v's dtype may differ from it by), in fp64.

    A score of E products is off by (E + 2) U Σ |q k| at most, its exponent by a few U more, a probability by twice its exponent's error
    relative to itself, and by its rounding; sums of S of them by S U.
    """
    u = 2.0**-24
    u_out = {torch.float32: u, torch.float16: 2.0**-11}[v.dtype]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    x, size = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    position, key = torch.arange(q.shape[-2], device=q.device)[:, None] + offset, torch.arange(k.shape[-2], device=q.device)
    seen = key <= position if is_causal else (key >= 0).expand(q.shape[-2], -1)
    seen = seen if window is None else seen & (key > position - window)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        x = x + attn_mask.double()
    nothing = ~seen.expand(x.shape).any(-1, keepdim=True)
    p = x.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    exponent = (q.shape[-1] + 2) * u * size + 8 * u * (x.abs() + (softcap or 0))
    share = 2 * torch.where(seen, exponent, 0).amax(-1, keepdim=True) + u_out + (k.shape[-2] + 8) * u
    return p @ v, share * (p @ v.abs()) + u_out * (p @ v).abs() + torch.finfo(torch.float16).tiny * (u_out > u)


def report():
    return abft.report(reset=True)


def silent():
    r = report()
    assert (r.detected, r.false_alarms, r.input_rows, r.overflow_rows, r.bypassed) == (0, 0, 0, 0, {}), str(r)
    return r


SEES = {
    "full": {},
    "causal": {"is_causal": True},
    "causal, lower right": {"is_causal": True, "offset": 30},
    "causal, some see nothing": {"is_causal": True, "offset": -7},
    "window": {"is_causal": True, "offset": 30, "window": 20},
    "window to both sides": {"window": 33},
    "capped": {"softcap": 2.0},
    "scaled down and turned round": {"is_causal": True, "scale": -0.4},
    "boolean": {"attn_mask": "boolean"},
    "added": {"attn_mask": "added"},
}  # fmt: skip


def spelt(kwargs, length=33, keys=70):
    """With the masks that were named."""
    g, kwargs = torch.Generator().manual_seed(5), dict(kwargs)
    if kwargs.get("attn_mask") == "boolean":
        kwargs["attn_mask"] = torch.rand(1, 1, length, keys, generator=g) < 0.4
        kwargs["attn_mask"][..., 3, :] = False
    elif kwargs.get("attn_mask") == "added":
        kwargs["attn_mask"] = torch.randn(1, 2, 1, keys, generator=g)
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}


# --- right, and silent ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("which", SEES)
def test_as_fp64_within_what_rounding_allows_and_silent(which, dtype):
    q, k, v = operands(dtype, length=33)
    kwargs = spelt(SEES[which])
    report()
    out = attend(q, k, v, **kwargs)
    r = silent()
    right, budget = exact(q, k, v, **kwargs)
    assert ((out.double() - right).abs() <= budget).all()
    assert (r.checks, r.products) == (2 * 66, 2)
    assert 0 < max(site.worst for site in r.sites.values()) < 0.5


@pytest.mark.parametrize("length, keys, e, d", [(1, 1, 1, 1), (1, 70, 16, 16), (33, 1, 5, 3), (40, 65, 80, 33), (3, 32, 64, 130)])
def test_lengths_and_heads_of_every_size(length, keys, e, d):
    q, k, v = operands(length=length, keys=keys, e=e, d=d)
    report()
    out = attend(q, k, v)
    right, budget = exact(q, k, v)
    assert silent().checks == 4 * length and ((out.double() - right).abs() <= budget).all()


def test_strides_and_heads_that_are_views():
    wide = torch.randn(2, 20, 3, 2, 16, device=DEVICE)
    q, k, v = (wide[:, :, i].transpose(1, 2) for i in range(3))
    right, budget = exact(q, k, v, is_causal=True)
    assert ((attend(q, k, v, is_causal=True).double() - right).abs() <= budget).all()
    silent()


@BOTH
@pytest.mark.parametrize("kwargs", [{"is_causal": True, "offset": -3}, {"dropout_p": 0.4}, {"softcap": 1.5, "window": 9}], ids=str)
def test_out_and_statistics_are_the_references(kwargs, dtype):
    q, k, v = operands(dtype, length=24, keys=40)
    problem = _problem(q, k, v, **kwargs)
    out, statistics = triton_attention.attend(_call(problem), *_book())
    wide = Problem(*(t.float().cpu() for t in (problem.q, problem.k, problem.v)), None, problem.seed, problem.options)
    right = reference.attend(wide, Tally(REFERENCE, 0, "fprop", torch.float32))
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-11
    torch.testing.assert_close(out.float().cpu(), right.out, rtol=2 * u, atol=8 * u)
    # l sums rounded probabilities; m is the largest exponent of base two, and back.
    torch.testing.assert_close(statistics.cpu(), right.statistics, rtol=2 * u + 1e-6, atol=1e-6)


@BOTH
def test_dropout_drops_the_references_elements(dtype):
    """Of one column of ones for every key O says which keys were kept."""
    q, k, _ = operands(dtype, length=16, keys=40)
    v = torch.eye(40, dtype=dtype, device=DEVICE)[None, None]
    kept = []
    for policy in (KERNELS, REFERENCE):
        torch.manual_seed(11)
        kept.append(attend(q, k, v, policy, dropout_p=0.3) > 0)
    assert torch.equal(*kept) and 0.6 < kept[0].float().mean() < 0.8
    silent()


def test_everything_dropped_is_zero():
    assert (attend(*operands(length=3, keys=5), dropout_p=1.0) == 0).all()
    silent()


def test_rows_that_see_nothing_are_zero_and_so_are_their_statistics():
    problem = _problem(*operands(length=24, keys=40), is_causal=True, offset=-4)
    out, statistics = triton_attention.attend(_call(problem), *_book())
    m, l = statistics[..., 4:]
    # l is of the rounded m (attention_scores.natural): of one key it is exp(x - m), half an ulp of m from one.
    assert (out[..., :4, :] == 0).all() and (statistics[..., :4] == 0).all() and (l >= 1 - (1 + m.abs()) * 2.0**-23).all()


def test_peaks_sinks_and_offsets_are_clean():
    q, k, v = operands(group=1, length=20, keys=40)
    k[..., 0, :] += 6.0
    for a, b, c in ((8 * q, k, v), (q, k + 5, v + 30), (q, k, v * 1e-25), (q, k, v * 1e25), (q * 1e3, k, v), (q * 0, k, v)):
        assert attend(a, b, c, is_causal=True).isfinite().all()
        silent()


# --- faults -----------------------------------------------------------------------------------------------

PLACES = {
    "S": attention_forward.S, "P": attention_forward.P, "l": attention_forward.L, "O": attention_forward.O, "alpha": attention_forward.ALPHA,
    "m": attention_forward.M, "queries": attention_forward.QUERIES, "probabilities": attention_forward.PROBABILITIES,
}  # fmt: skip
#: What is struck in columns of keys; at the second block of them, where m and alpha are what the first has left.
AT = {"S": 37, "P": 37, "l": 0, "O": 5, "alpha": 32, "m": 32, "queries": 3, "probabilities": 37}
WHATS = {
    "nullify": BitOperation(keep=0), "flip of bit 30": BitOperation(flip=1 << 30), "flip of bit 22": BitOperation(flip=1 << 22),
    "nan": BitOperation(keep=0, flip=0x7FC00000), "inf": BitOperation(keep=0, flip=0x7F800000), "-inf": BitOperation(keep=0, flip=-0x800000),
    "carry": BitOperation(add=1 << 24),
}  # fmt: skip


def _problem(q, k, v, mask=None, seed=77, is_causal=False, offset=0, window=None, softcap=None, dropout_p=0.0):
    q = q.unflatten(1, (k.shape[1], -1))
    return Problem(q, k, v, mask, seed, Options(1 / math.sqrt(q.shape[-1]), is_causal, offset, window, softcap, dropout_p))


def _call(problem, policy=KERNELS):
    o = problem.options
    return AttentionCall(problem.q, problem.k, problem.v, problem.mask, problem.seed, o.scale, o.causal, o.offset, o.window, o.softcap, o.dropout,
                         policy, frozenset({"qk", "pv"}))  # fmt: skip


def _book():
    return torch.zeros(ledger.WORDS, dtype=torch.int64, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)


def _descriptors(place, operation, row, col, rows=1, cols=1, dtype=torch.float32):
    """A strike by the kernels' own number."""
    numbers = triton_attention.PLACES | {("", name): number.value for name, number in PLACES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "PLACES", numbers)
        return triton_attention.descriptors((("", Strike(place, Region(row, row + rows, col, col + cols), operation)),), torch.device(DEVICE))


class Struck:
    """One attention, run with faults by its launches: (out, statistics), and the counters and first record of its ledger."""

    def __init__(self, problem, policy=KERNELS):
        self.call, self.policy = _call(problem, policy), policy
        self.clean, words = self.run(None)
        assert words[ledger.HEAD] == 0

    def run(self, faults, again=None):
        attention, (words, site) = triton_attention.plan(self.call), _book()
        with triton_attention.products.quiet():
            evidence = attention_forward.attend(attention, words, site, 3, False, faults)
            attention_settle.settle(attention, evidence, words, site, triton_attention.labels(self.call), 3, self.policy.level == "correct", again)
        return (evidence.out, evidence.statistics), words.cpu()

    def is_clean(self, results):
        return all(oracles.bits_equal(a, b) for a, b in zip(results, self.clean, strict=True))


def counted(words):
    return {name: int(words[ledger.HEADER + i]) for i, name in enumerate(ledger.COUNTER_NAMES)}


def record(words):
    return dict(zip(ledger.RECORD_NAMES, words[ledger.RING_AT : ledger.RING_AT + ledger.RECORD].tolist(), strict=True))


@pytest.fixture(scope="module")
def struck():
    """Per dtype, of one head."""
    return {dtype: Struck(_problem(*operands(dtype, group=1, length=20, keys=40))) for dtype in (torch.float32, torch.float16)}


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_in_every_place_is_repaired_to_the_very_bits(struck, place, what):
    one, operation = struck[torch.float32], WHATS[what]
    results, words = one.run(_descriptors(place, operation, 13, AT[place]))
    counts, role = counted(words), {"S": "qk", "queries": "qk"}.get(place, "pv")
    assert one.is_clean(results) and counts["uncorrected"] == counts["false_alarms"] == counts["input_rows"] == 0
    assert counts["recomputed"] == 1 and counts["checks"] == 40 and counts["products"] == 2
    entry = record(words)
    assert (entry["row"], entry["rows"], entry["verdict"], entry["cause"]) == (13, 1, ledger.VERDICTS.index(abft.Verdict.RECOMPUTED), 1)
    if place != "m" or what not in ("nan", "inf"):  # then no exponent is one, which the scores' sum tells first
        assert ledger.ROLE_NAMES[entry["role"]] == role
    residual, bound = ledger.bits_float(entry["residual"]), ledger.bits_float(entry["bound"])
    assert not abs(residual) <= bound or not math.isfinite(bound)


@pytest.mark.parametrize("place", ["S", "P", "l", "O", "alpha", "m"])
def test_half_precision_hides_nothing(struck, place):
    one = struck[torch.float16]
    for what in ("nullify", "flip of bit 22", "inf"):
        results, words = one.run(_descriptors(place, WHATS[what], 7, AT[place]))
        assert one.is_clean(results) and counted(words)["recomputed"] == 1


@pytest.mark.parametrize("which", ["causal, lower right", "window to both sides", "capped", "boolean", "added", "dropout"])
def test_nothing_a_mask_does_hides_a_place(which):
    kwargs = {"dropout_p": 0.3} if which == "dropout" else spelt(SEES[which], 20, 40)
    mask = kwargs.pop("attn_mask", None)
    mask = mask if mask is None else (mask.unflatten(1, (1, 2)) if mask.shape[1] == 2 else mask.unsqueeze(2))
    one = Struck(_problem(*operands(length=20, keys=40), mask, **kwargs))
    seen = {}
    for place, col in {"S": 9, "P": 9, "l": 0, "O": 5, "m": 32, "probabilities": 9}.items():
        faults = _descriptors(place, WHATS["flip of bit 30"], 15, col, cols=12 if place in ("S", "P", "probabilities") else 1)
        results, words = one.run(faults)
        seen[place] = counted(words)["recomputed"]
        assert one.is_clean(results) and counted(words)["uncorrected"] == 0
    # m of a row that sees nothing in the first block was none.
    assert all(count == 1 for place, count in seen.items() if place != "m"), seen


@pytest.mark.parametrize("place", ["S", "P", "O", "probabilities"])
def test_rows_fragments_and_whole_blocks(struck, place):
    one = struck[torch.float32]
    for rows, cols in ((1, 40), (8, 16), (16, 40)):
        results, words = one.run(_descriptors(place, WHATS["nullify"], 0, 0, rows, cols))
        assert one.is_clean(results) and counted(words)["recomputed"] == rows


NEAR_INF = BitOperation(keep=0, flip=0x7F7FFFFF)


@pytest.mark.parametrize("value", [NEAR_INF, BitOperation(keep=0, flip=0x40400000)], ids=["near inf", "3"])
def test_equal_scores_of_neighbours_do_not_cancel(struck, value):
    """A run of eight in every row, each from another key on: of signs ±1 such runs cancel once in four."""
    one = struck[torch.float32]
    results, words = one.run(torch.cat([_descriptors("S", value, row, row, cols=8) for row in range(20)]))
    assert one.is_clean(results) and counted(words)["recomputed"] == 20 and counted(words)["uncorrected"] == 0


def test_what_no_score_reaches_is_seen_where_its_weights_cancel(struck):
    """Two scores whose weights are opposite, and a whole row: what shifts a row by so much rounds away what its sum would tell."""
    one, w = struck[torch.float32], keyweights.of_keys(32)
    pair = next((i, j) for i in range(32) for j in range(i) if w[i] == -w[j])
    for faults in ([_descriptors("S", NEAR_INF, 13, key) for key in pair], [_descriptors("S", NEAR_INF, 13, 0, cols=40)]):
        results, words = one.run(torch.cat(faults))
        assert one.is_clean(results) and counted(words)["recomputed"] == 1 and ledger.ROLE_NAMES[record(words)["role"]] == "qk"


@pytest.mark.parametrize("place", ["S", "P", "l", "O", "alpha"])
def test_what_returns_is_not_called_repaired(struck, place):
    one, faults = struck[torch.float32], _descriptors(place, WHATS["flip of bit 30"], 13, AT[place])
    _, words = one.run(faults, again=faults)
    assert counted(words)["uncorrected"] >= 1 and counted(words)["recomputed"] == 0
    assert record(words)["verdict"] == ledger.VERDICTS.index(abft.Verdict.UNCORRECTED)


def test_a_repetition_writes_only_what_was_suspect(struck):
    """A fault that strikes the repetition alone, in a row that was right, reaches nobody."""
    one = struck[torch.float32]
    results, words = one.run(_descriptors("O", WHATS["nan"], 3, 0), again=_descriptors("O", WHATS["nan"], 5, 0))
    assert one.is_clean(results) and counted(words)["recomputed"] == 1 and counted(words)["uncorrected"] == 0


def test_detect_only_tells():
    one = Struck(_problem(*operands(group=1, length=20, keys=40)), KERNELS.replace(level="detect"))
    for place in ("S", "P", "O"):
        results, words = one.run(_descriptors(place, WHATS["flip of bit 30"], 13, AT[place]))
        assert not one.is_clean(results) and counted(words)["observed"] >= 1 and counted(words)["recomputed"] == 0


@pytest.mark.parametrize("place", ["S", "l", "O", "alpha", "m", "probabilities"])
def test_the_lean_form_sees_all_but_exponentials(place):
    one = Struck(_problem(*operands(group=1, length=20, keys=40)), KERNELS.replace(panel="lean"))
    results, words = one.run(_descriptors(place, WHATS["flip of bit 22"], 13, AT[place]))
    assert one.is_clean(results) and counted(words)["recomputed"] == 1
    results, words = one.run(_descriptors("P", WHATS["flip of bit 22"], 13, AT["P"]))
    assert not one.is_clean(results) and counted(words)["recomputed"] == 0, "the documented gap of the lean form"


@pytest.mark.parametrize("panel", ["full", "lean"])
def test_what_is_no_probability_is_seen_and_what_rounding_explains_is_not(panel):
    """In place of a one: 1 + 2⁻²¹; 1 + 2⁻¹⁹, which no other check tells from it; what is larger; what is negative."""
    one = Struck(_problem(*operands(group=1, length=20, keys=40)), KERNELS.replace(panel=panel))
    key = int((one.call.q[0, 0, 0, 13] @ one.call.k[0, 0, :32].mT).argmax())  # the largest of the first block
    for pattern, seen in ((0x3F800004, 0), (0x3F800010, 1), (0x3FC00000, 1), (0xBE800000, 1)):
        faults = _descriptors("P", BitOperation(keep=0, flip=pattern - (pattern >> 31 << 32)), 13, key)
        results, words = one.run(faults)
        assert counted(words)["recomputed"] == seen and counted(words)["uncorrected"] == 0, hex(pattern)
        assert not seen or one.is_clean(results)


def test_operands_that_hold_nan_are_inputs_and_torch_would_deliver_nan():
    for struck_operand in range(3):
        q, k, v = operands(group=1, length=5, keys=40)
        (q, k, v)[struck_operand][0, 0, 2, 1] = torch.nan
        report()
        out = attend(q, k, v)
        r = report()
        assert r.detected == 0 and r.input_rows > 0
        assert torch.equal(out.isnan(), torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).isnan())


# --- through the front door ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where, role", [("S", "qk"), ("P", "pv"), ("l", "pv"), ("O", "pv"), ("operand", "qk"), ("operand", "pv"), ("accumulator", "qk")])
def test_an_injectors_faults_strike_and_the_event_names_the_row(where, role):
    q, k, v = operands(length=20, keys=40)
    clean = attend(q, k, v)
    report()
    with abft.inject.faults(abft.inject.Fault("nullify", where, role=role, pattern="row"), seed=2) as log:
        out = attend(q, k, v)
    r = report()
    assert torch.equal(out, clean) and r.recomputed == r.detected == 1
    (event,) = r.events
    assert (event.role, event.backend, event.site) == (role, "triton", "scaled_dot_product_attention") and (log[0].role, log[0].where) == (role, where)
    assert event.row == log[0].elements[0][0]


def test_roles_decide_what_is_judged_and_counted():
    q, k, v = operands(length=5, keys=9)
    report()
    attend(q, k, v, KERNELS.replace(roles=frozenset({"qk"})))
    r = report()
    assert (r.checks, r.products) == (10, 1) and r.bypassed == {"role pv not in policy": 1}


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_votes_agree(redundancy):
    q, k, v = operands(length=5, keys=9)
    report()
    assert torch.equal(attend(q, k, v, KERNELS.replace(redundancy=redundancy)), attend(q, k, v))
    assert report().executions == 2 * 2 + 2


def test_what_kernels_do_not_cover_is_said_and_not_done_otherwise():
    q, k, v = operands(length=5, keys=9)
    with pytest.raises(abft.errors.DeviceError, match="no gradient of a mask"):
        added = torch.zeros(q.shape[-2], k.shape[-2], requires_grad=True)
        abft.scaled_dot_product_attention(q, k, v, added, enable_gqa=True, policy=KERNELS)
    with pytest.raises(abft.errors.DeviceError, match="up to 256 columns"):
        attend(*operands(length=2, keys=3, e=257))
    with pytest.raises(abft.errors.DeviceError, match="float64"):
        attend(*operands(torch.float64, length=2, keys=3))


def test_in_a_compiled_graph_without_breaks():
    q, k, v = operands(length=5, keys=9)
    compiled = torch.compile(lambda *t: abft.scaled_dot_product_attention(*t, enable_gqa=True, policy=KERNELS), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert torch.equal(compiled(q, k, v), attend(q, k, v))
    report()
