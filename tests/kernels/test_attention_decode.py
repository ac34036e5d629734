"""Attention over pages in the kernels: what the reference remembers of a page, its outputs and verdicts; every fault seen and mended."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from abft.triton_kernels import attention_decode, attention_forward, configs

import abft
from abft import keyweights, ledger
from abft.attention import decode as reference
from abft.attention import pages
from abft.attention.decode import Request
from abft.attention.pages import Pages
from abft.backends import triton_decode
from abft.backends.triton_decode import DecodeCall
from abft.faults import BitOperation, Region, Strike

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = abft.Policy(backend="triton", on_uncorrected="record")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=oracles.name_of)
LENGTHS = [1, 40]
ROLES = frozenset({"qk", "pv"})


class Decoding:
    """Sequences whose pages lie in disorder, written in two parts, and queries, of which the first may see nothing.

    On a CPU the reference writes them, which takes the interpreter ten times as long; ``test_pages_are_the_references`` compares.
    """

    def __init__(self, dtype=torch.float32, heads=2, group=2, length=2, e=16, d=12, lengths=LENGTHS, page_length=16, seed=0, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        make = lambda *s: (torch.randn(s, generator=g) * scale).to(dtype).to(DEVICE)  # noqa: E731
        most, batch, width = max(lengths), len(lengths), -(-max(lengths) // page_length) + 1
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.keys, self.values, self.query = make(batch, heads, most, e), make(batch, heads, most, d), make(batch, heads * group, length, e)
        self.table = torch.randperm(batch * width, generator=g).int().view(batch, width).to(DEVICE)
        self.cache = abft.PagedCache(batch * width, page_length, heads, e, dtype, DEVICE, value_dim=d)
        self.append(torch.zeros_like(self.lengths), self.lengths // 2)
        self.append(self.lengths // 2, self.lengths - self.lengths // 2)

    def append(self, begin, counts, through=None):
        most = max(1, int(counts.max()))
        at = (begin.long()[:, None] + torch.arange(most, device=DEVICE)).clamp(max=self.keys.shape[2] - 1)[:, None, :, None]
        key, value = (t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values))
        (through or self.cache.append)(key, value, self.table, begin, counts)

    def by_kernel(self, *args):
        triton_decode.append(self.cache.pages.tensors(), *args)

    def __call__(self, policy=KERNELS, **kwargs):
        return abft.paged_attention(self.query, self.cache, self.table, self.lengths, policy=policy, **kwargs)

    def request(self, window=None, softcap=None):
        q = self.query.unflatten(1, (self.keys.shape[1], -1))
        on_host = Pages(*(t.cpu() for t in self.cache.pages.tensors()))
        return Request(q.cpu(), on_host, self.table.cpu(), self.lengths.cpu(), q.shape[-1] ** -0.5, window, softcap)

    def call(self, policy=KERNELS, **kwargs):
        r = self.request(**kwargs)
        q = self.query.unflatten(1, (self.keys.shape[1], -1))
        return DecodeCall(q, self.cache.pages.tensors(), self.table, self.lengths, r.scale, r.window, r.softcap, policy, ROLES)


def silent():
    r = abft.report(reset=True)
    assert (r.detected, r.false_alarms, r.input_rows, r.weight_faults, r.bypassed) == (0, 0, 0, 0, {}), str(r)
    return r


@pytest.fixture(autouse=True)
def fresh_report():
    abft.report(reset=True)


# --- pages ------------------------------------------------------------------------------------------------


@BOTH
def test_pages_are_the_references(dtype):
    """Written at once, in part once more from an earlier place, and token by token."""
    one, on_host = Decoding(dtype, lengths=[1, 21]), Pages.empty(6, 16, 2, 16, 12, dtype, torch.device("cpu"))
    one.cache = abft.PagedCache(6, 16, 2, 16, dtype, DEVICE, value_dim=12)

    def both(*args):
        one.by_kernel(*args)
        pages.append(on_host, *(t.cpu() for t in args))

    number = lambda *n: torch.tensor(n, dtype=torch.int32, device=DEVICE)  # noqa: E731
    for begin, counts in ((number(0, 0), number(1, 18)), (number(1, 7), number(0, 4)), *((number(1, t), number(0, 1)) for t in range(11, 14))):
        one.append(begin, counts, both)
    for name, ours, right in zip(("k", "v", "sums", "columns", "prints", "filled", "lost"), one.cache.pages.tensors(), on_host.tensors(), strict=True):
        if name in ("sums", "columns"):
            torch.testing.assert_close(ours.cpu(), right, rtol=1e-5, atol=1e-4)
        else:
            assert oracles.bits_equal(ours.cpu(), right), name


# --- right, and silent ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kwargs", [{}, {"window": 7}, {"softcap": 2.0}], ids=str)
def test_out_is_the_references_and_silent(dtype, kwargs):
    one = Decoding(dtype)
    right = reference.attend(one.request(**kwargs)).out.view(2, 4, 2, 12)
    out = one(**kwargs)
    r = silent()
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-11
    torch.testing.assert_close(out.float().cpu(), right, rtol=2 * u, atol=8 * u)
    assert (r.checks, r.products) == (2 * 16, 2) and 0 < r.worst < 0.5
    assert (out[0, :, 0] == 0).all(), "the first of two queries stands before the only token"


@pytest.mark.parametrize("heads, group, length, page_length", [(1, 1, 1, 16), (2, 8, 1, 32), (1, 4, 5, 64)])
def test_heads_groups_pages_and_splits_of_every_size(heads, group, length, page_length, monkeypatch):
    one = Decoding(heads=heads, group=group, length=length, page_length=page_length, lengths=[length, 4 * page_length + 5], e=20)
    right = reference.attend(one.request()).out.view(2, heads * group, length, 12)
    for splits in (1, 4):
        monkeypatch.setattr(configs, "decode_splits", lambda *_, n=splits: n)
        torch.testing.assert_close(one().cpu(), right, rtol=1e-6, atol=1e-6)
    silent()


@pytest.mark.parametrize("scales", [(8, 1, 1), (1, 1, 1e-25), (1, 1, 1e25), (1e3, 1, 1), (0, 1, 1)], ids=str)
def test_peaks_and_magnitudes_are_clean(scales):
    one = Decoding(lengths=[61])
    one.query, one.keys, one.values = one.query * scales[0], one.keys * scales[1], (one.values + 3) * scales[2]
    one.append(torch.zeros_like(one.lengths), one.lengths)
    assert one().isfinite().all()
    silent()


# --- faults -----------------------------------------------------------------------------------------------

PLACES = {
    "S": attention_forward.S, "P": attention_forward.P, "l": attention_forward.L, "O": attention_forward.O, "alpha": attention_forward.ALPHA,
    "m": attention_forward.M, "queries": attention_forward.QUERIES, "probabilities": attention_forward.PROBABILITIES,
}  # fmt: skip
#: Columns that are keys lie in the second page, also of its part.
AT = {"S": 21, "P": 21, "l": 0, "O": 5, "alpha": 16, "m": 16, "queries": 3, "probabilities": 21}
WHATS = {
    "nullify": BitOperation(keep=0), "flip of bit 30": BitOperation(flip=1 << 30), "flip of bit 22": BitOperation(flip=1 << 22),
    "nan": BitOperation(keep=0, flip=0x7FC00000),
}  # fmt: skip


class Struck:
    """One attention, run with faults by its launches: out, and the counters and first record of its ledger."""

    def __init__(self, dtype=torch.float32, policy=KERNELS):
        self.one = Decoding(dtype, heads=1, length=1, lengths=[40])
        self.call, self.policy = self.one.call(policy), policy
        self.clean, words = self.run(None)
        assert words[ledger.HEAD] == 0

    def run(self, faults, again=None, between=None):
        decoding = triton_decode.plan(self.call)
        words, site = torch.zeros(ledger.WORDS, dtype=torch.int64, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
        with triton_decode.products.quiet(), pytest.MonkeyPatch.context() as patch:
            if between is not None:
                right = attention_decode.parts_of

                def parts_of(decoding):
                    self.parts = right(decoding)
                    return self.parts

                patch.setattr(attention_decode, "parts_of", parts_of)
                launch = attention_decode.combine_parts

                class Late:
                    def __getitem__(_, grid):  # noqa: N805
                        between(self.parts)
                        return launch[grid]

                patch.setattr(attention_decode, "combine_parts", Late())
            evidence = attention_decode.attend(decoding, words, site, 3, faults)
            attention_decode.settle(decoding, evidence, words, site, triton_decode.labels(self.call), 3, self.policy.level == "correct", again)
        return evidence.out, words.cpu()


def descriptors(place, operation, row, col, rows=1, cols=1):
    numbers = {("", name): number.value for name, number in PLACES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "PLACES", numbers)
        return triton_decode.descriptors((("", Strike(place, Region(row, row + rows, col, col + cols), operation)),), DEVICE)


def counted(words):
    return {name: int(words[ledger.HEADER + i]) for i, name in enumerate(ledger.COUNTER_NAMES)}


def record(words):
    return dict(zip(ledger.RECORD_NAMES, words[ledger.RING_AT : ledger.RING_AT + ledger.RECORD].tolist(), strict=True))


@pytest.fixture(scope="module")
def one():
    return Struck()


@pytest.mark.slow
@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_in_every_place_is_repaired_to_the_very_bits(one, place, what):
    out, words = one.run(descriptors(place, WHATS[what], 1, AT[place]))
    counts = counted(words)
    assert oracles.bits_equal(out, one.clean) and counts["uncorrected"] == counts["false_alarms"] == counts["input_rows"] == 0
    assert counts["recomputed"] == 1 and counts["checks"] == 4 and counts["products"] == 2 and counts["weight_faults"] == 0
    entry = record(words)
    assert (entry["row"], entry["rows"], entry["verdict"], entry["cause"]) == (1, 1, ledger.VERDICTS.index(abft.Verdict.RECOMPUTED), 1)


def test_what_no_score_reaches_is_seen_where_its_weights_cancel(one):
    """Two scores of 2⁴⁹ whose weights are opposite: what shifts a row by so much rounds away what its sum would tell."""
    w, huge = keyweights.of_keys(16), BitOperation(keep=0, flip=0x58000000)
    pair = next((i, j) for i in range(16) for j in range(i) if w[i] == -w[j])
    out, words = one.run(torch.cat([descriptors("S", huge, 1, key) for key in pair]))
    assert oracles.bits_equal(out, one.clean) and counted(words)["recomputed"] == 1 and counted(words)["uncorrected"] == 0
    assert ledger.ROLE_NAMES[record(words)["role"]] == "qk"


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_score_as_large_as_its_vectors_allow_is_clean(softcap):
    """One key along its query, as |m| reaches ‖q‖ ‖K‖, and beside it keys of no length."""
    one = Decoding(heads=1, group=1, length=1, lengths=[20], scale=30.0)
    one.keys *= torch.arange(20, device=DEVICE)[:, None] == 7
    one.keys[:, :, 7] = one.query[:, :, 0]
    one.append(torch.zeros_like(one.lengths), one.lengths)
    assert one(softcap=softcap).isfinite().all()
    silent()


@pytest.mark.parametrize("field", [0, 1, 2, 3, 4, None], ids=["m", "m's copy", "l", "l's copy", "a sum", "the accumulator"])
def test_what_changed_between_the_launches_is_seen(one, field):
    def change(parts):
        if field is None:
            parts.acc[0, 1, 1, 5] *= 3.0
        else:
            parts.numbers[0, 0, field, 1] += 1.0

    out, words = one.run(None, between=change)
    assert oracles.bits_equal(out, one.clean) and counted(words)["recomputed"] == 1


def test_half_precision_hides_nothing():
    half = Struck(torch.float16)
    for place in ("S", "P", "l", "O", "alpha"):
        out, words = half.run(descriptors(place, WHATS["flip of bit 30" if place == "S" else "nullify"], 1, AT[place]))
        assert oracles.bits_equal(out, half.clean) and counted(words)["recomputed"] == 1, place


@pytest.mark.parametrize("place", ["S", "O"])
def test_what_returns_is_not_called_repaired(one, place):
    faults = descriptors(place, WHATS["flip of bit 30"], 1, AT[place])
    _, words = one.run(faults, again=faults)
    assert counted(words)["uncorrected"] >= 1 and counted(words)["recomputed"] == 0


def test_detect_only_tells():
    one = Struck(policy=KERNELS.replace(level="detect"))
    out, words = one.run(descriptors("O", WHATS["flip of bit 30"], 1, 5))
    assert not oracles.bits_equal(out, one.clean) and counted(words)["observed"] == 1 and counted(words)["recomputed"] == 0


# --- pages that changed -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("which", ["k", "v"])
def test_an_element_of_a_page_that_changed_is_put_back(dtype, which):
    one = Decoding(dtype, heads=1, lengths=[40])
    clean, before = one(), getattr(one.cache, which).clone()
    bits = getattr(one.cache, which).view(torch.int16 if dtype == torch.float16 else torch.int32)
    bits[one.table[0, 1], 5, 0, 3] ^= 1 << (14 if dtype == torch.float16 else 30)
    silent()
    out = one()
    r = abft.report(reset=True)
    assert oracles.bits_equal(out, clean) and oracles.bits_equal(getattr(one.cache, which), before)
    assert r.reconstructed == r.detected >= 1 and r.weight_faults == 1
    assert r.events[-1].cause == "weight" and r.events[-1].backend == "triton"
    one()
    silent()


def test_an_element_put_back_mends_rows_that_were_within_their_bounds_too():
    one = Decoding(heads=1, length=1, lengths=[40])
    one.query[0, :, 0] = one.keys[0, 0, 21] * torch.tensor([[3.0], [-0.7]], device=DEVICE)  # one looks there, the other away from there
    clean, place = one(), (int(one.table[0, 1]), 5, 0, 3)
    for policy, equal in ((KERNELS.replace(level="detect"), [False, False]), (KERNELS, [True, True])):
        one.cache.v.view(torch.int32)[place] ^= 1 << 23
        silent()
        out = one(policy)
        r = abft.report(reset=True)
        assert (r.events[0].row, r.detected) == (0, 1) and (out == clean).all(-1).flatten().tolist() == equal
        if policy is not KERNELS:
            one.cache.v.view(torch.int32)[place] ^= 1 << 23


def test_two_elements_of_a_token_are_lost_and_said_and_counted_once():
    one = Decoding(heads=1, lengths=[40])
    one.cache.k.view(torch.int32)[one.table[0, 1], 5, 0, 2:4] ^= 1 << 29
    for times in range(2):
        one()
        r = abft.report(reset=True)
        assert r.uncorrected == r.detected >= 1 and r.events[0].cause == "weight" and r.weight_faults == (1 if times == 0 else 0)
    assert one.cache.pages.lost.sum() == 1


@pytest.mark.parametrize("which", ["sums", "columns"])
def test_sums_that_changed_are_built_anew(which):
    one = Decoding(heads=1, lengths=[40])
    clean, sums = one(), getattr(one.cache.pages, which)
    before = sums.clone()
    sums[one.table[0, 1], 0, 0, 3] += 100.0
    silent()
    out = one()
    r = abft.report(reset=True)
    assert oracles.bits_equal(out, clean)
    torch.testing.assert_close(sums, before, rtol=1e-5, atol=1e-5)  # the reference wrote them
    assert r.detected == r.weight_faults == 0 and r.false_alarms >= 1 and r.events[0].cause == "panel"


def test_values_that_held_nan_are_inputs():
    one = Decoding(heads=1, lengths=[40])
    one.values[0, 0, 20, 4] = torch.nan
    one.append(torch.zeros_like(one.lengths), one.lengths)
    out = one()
    r = abft.report(reset=True)
    assert r.detected == 0 and r.input_rows == 4 and out[0, :, :, 4].isnan().all() and out.isnan().sum() == 4


def test_tokens_that_were_never_appended_are_not_read_as_zeros():
    one = Decoding(heads=1, lengths=[20])
    one.lengths += 1
    one()
    assert abft.report(reset=True).uncorrected == 4


# --- through the front door -------------------------------------------------------------------------------


@pytest.mark.parametrize("where, role", [("S", "qk"), ("P", "pv"), ("l", "pv"), ("O", "pv"), ("operand", "qk"), ("checksum", "pv"), ("weight", "qk"), ("panel", "pv")])
def test_an_injectors_faults_strike_as_they_do_in_the_reference(where, role):
    verdicts, worst = [], []
    for policy in (KERNELS, KERNELS.replace(backend="reference")) if DEVICE.type == "cpu" else (KERNELS,):
        one = Decoding(heads=1, lengths=[40])
        index = {"weight": (int(one.table[0, 1]) * 16 + 5, 3), "panel": (int(one.table[0, 1]) * 4, 5)}.get(where)
        clean = one(KERNELS.replace(level="off"))
        abft.report(reset=True)
        with abft.inject.faults(abft.inject.Fault("bitflip", where, role=role, bit=30, index=index), seed=2) as log:
            out = one(policy)
        r = abft.report(reset=True)
        torch.testing.assert_close(out, clean, rtol=1e-6, atol=1e-6)
        assert (log[0].role, log[0].where) == (role, where)
        mine = [e for e in r.events if e.role == role]
        verdicts.append([(e.role, e.rows, e.cause, e.verdict) for e in mine])
        worst.append([(e.row, math.isfinite(e.bound)) for e in mine])
    assert verdicts[0] and all(v == verdicts[0] for v in verdicts)
    # Beside a bound that is not finite no row is worse than another; the kernels have (1') for such rows.
    for others in worst[1:]:
        assert all(one == other for (one, _), (other, known) in zip(worst[0], others, strict=True) if known)


def test_roles_level_off_and_votes():
    one = Decoding(lengths=[5])
    right = one()
    abft.report(reset=True)
    assert torch.equal(one(KERNELS.replace(roles=frozenset({"qk"}))), right)
    r = abft.report(reset=True)
    assert (r.checks, r.products) == (8, 1) and r.bypassed == {"role pv not in policy": 1}
    torch.testing.assert_close(one(KERNELS.replace(level="off")), right, rtol=1e-6, atol=1e-6)
    assert abft.report(reset=True).bypassed == {"level off": 2}
    assert torch.equal(one(KERNELS.replace(redundancy="tmr")), right)
    silent()


def test_more_rows_than_a_tile_holds_are_refused():
    one = Decoding(length=40, lengths=[40])
    with pytest.raises(abft.DeviceError, match="64 rows"):
        one()
