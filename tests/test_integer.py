"""int8 products: exact sums, every flipped bit found and repaired, silence without a tolerance; what stays unseen, too."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import name_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import abft
from abft import digits, ledger, panels, sites
from abft.backends import integer, masked_integer
from abft.backends.call import Call
from abft.checksum import FORMS, column_weights
from abft.faults import BitOperation, Region, Strike
from abft.inject import Fault, faults
from abft.ledger import Outcome, Verdict

FULL, LEAN = FORMS["full"].kinds, FORMS["lean"].kinds


def numbers(*shape, seed=0, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def weight(n, k, seed=1):
    return nn.Parameter(numbers(n, k, seed=seed), requires_grad=False)


def exact(a, b):
    """a @ b in int64, brought into int32 as hardware would: modulo 2**32."""
    return torch.from_numpy((a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)).astype(np.int32))


def call_of(a, w, *strikes, source=None, **policy):
    site = sites.functional("int_mm", "record")
    return Call(a, w, None, source, False, "fprop", abft.Policy(on_uncorrected="record", **policy), site.index, strikes)


def checked(call):
    """(what is delivered, its findings), of a product that its strikes hit once."""
    outcome = Outcome(checks=call.rows)
    return integer.check(call, integer.execute(call, call.strikes), outcome, "reference"), outcome.findings


# --- three digits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [FULL, LEAN], ids=["full", "lean"])
def test_three_digits_hold_the_widest_group_and_not_the_next(kinds):
    width = digits.widest(kinds)

    def reach(columns):
        return 128 * max(int(np.abs(column_weights(kind, columns)).sum()) for kind in kinds)

    assert width % 16 == 0 and reach(width) <= digits.LARGEST < reach(width + 16)


def test_no_narrower_group_reaches_further():
    # Σ|hi| and Σ|lo| do not depend on the signs.
    widths = np.arange(1, digits.widest(FULL) + 1)
    reaches = [max(abs(d).sum() for d in _digits(int(w))) for w in widths]
    assert 128 * max(reaches) <= digits.LARGEST


def _digits(width):
    n = np.arange(width)
    return 2 * (n // 16) - (-(-width // 16) - 1), 2 * (n % 16) - 15


@given(st.lists(st.integers(-128 * 65793, digits.LARGEST), min_size=1, max_size=20))
def test_digits_are_the_number(values):
    s = torch.tensor([values], dtype=torch.int32)
    d0, d1, d2 = digits.split(s)[0].to(torch.int64)
    assert (d0 + 256 * d1 + 65536 * d2).tolist() == values


@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("n", [1, 3, 16, 17, 100, 1440, 1441, 3000])
@pytest.mark.parametrize("fill", [None, -128, 127])
def test_a_panel_holds_the_exact_sums(n, form, fill):
    w = numbers(n, 5) if fill is None else torch.full((n, 5), fill, dtype=torch.int8)
    layout = digits.layout(n, form, 10**6)
    panel = digits.encode(w, layout)
    assert panel.columns.shape == (layout.columns, 5) and layout.groups.width <= max(digits.widest(layout.form.kinds), n)
    d = panel.columns.to(torch.int64).view(layout.groups.count, len(layout.form.kinds), 3, 5)
    for g, (j, kind) in itertools.product(range(layout.groups.count), enumerate(layout.form.kinds)):
        start, stop = layout.groups.span(g)
        expected = column_weights(kind, stop - start).astype(np.int64) @ w[start:stop].numpy().astype(np.int64)
        assert (d[g, j, 0] + 256 * d[g, j, 1] + 65536 * d[g, j, 2]).tolist() == expected.tolist()


def test_wide_groups_are_split_rather_than_overflow():
    for n, width in ((1440, 1440), (1456, 736), (100_000, 1440)):
        assert integer.plan(n, "full", 10**6 // 16 * 16).layout.groups.width == width


# --- exact, of any shape -----------------------------------------------------------------------------------

SHAPES = [(0, 4, 4), (4, 0, 4), (4, 4, 0), (0, 0, 0), (1, 1, 1), (1, 7, 1), (2, 1, 3), (17, 8, 8), (33, 129, 65), (5, 40, 1500), (3, 9, 4097)]


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_results_are_exact_and_silent(shape):
    m, k, n = shape
    a, b = numbers(m, k), numbers(k, n, seed=1)
    y = abft.int_mm(a, b)
    assert y.dtype == torch.int32 and torch.equal(y, exact(a, b))
    report = abft.report()
    assert (report.detected, report.false_alarms, report.worst) == (0, 0, 0.0)
    assert report.checks == (m if m and k and n else 0) and report.bypassed == {}


@pytest.mark.parametrize("of", ["transposed", "strided", "sliced", "expanded", "one row expanded", "one column expanded", "columns expanded"])
def test_operands_of_any_strides(of):
    a, b = numbers(12, 40), numbers(40, 30, seed=1)
    views = {
        "transposed": (numbers(40, 12).t(), numbers(30, 40).t()), "strided": (numbers(24, 80)[::2, ::2], numbers(40, 60)[:, ::2]),
        "sliced": (numbers(13, 41)[1:, 1:], numbers(41, 31)[1:, 1:]), "expanded": (a[:1].expand(12, 40), b[:, :1].expand(40, 30)),
        "one row expanded": (a[:1].expand(12, 40), b), "one column expanded": (a[:, :1].expand(12, 40), b),
        "columns expanded": (a, b[:, :1].expand(40, 30)),
    }  # fmt: skip
    assert torch.equal(abft.int_mm(*views[of]), exact(*views[of])) and abft.report().detected == 0


@pytest.mark.parametrize("forms", ["nn", "nt", "tn", "tt"])
def test_rows_and_columns_of_any_strides(forms):
    """torch 2.13 on a CPU returns memory it never wrote for some of them."""
    for m, k, n in itertools.product((1, 2, 17), (1, 2, 8), (1, 3, 16)):
        a = numbers(m, k) if forms[0] == "n" else numbers(k, m).t()
        b = numbers(k, n, seed=1) if forms[1] == "n" else numbers(n, k, seed=1).t()
        assert torch.equal(abft.int_mm(a, b), exact(a, b)), (m, k, n)
    assert abft.report().detected == abft.report().false_alarms == 0


SATURATING = """
import torch, abft
from abft.backends import integer, masked_integer
a, b = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((30, 256), (256, 40)))
exact = (a.long() @ b.long()).int()
assert torch.equal(abft.int_mm(a, b), exact)
r = abft.report()
assert (r.checks, r.detected, r.false_alarms) == (30, 0, 0), r
print(integer.cpu_is_exact(), torch.equal(torch._int_mm(a, b), exact))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_where_torchs_own_product_saturates_it_is_not_used(isa):
    out = subprocess.run([sys.executable, "-c", SATURATING], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    probed, right = out.stdout.split()
    assert probed == right


@pytest.mark.parametrize("low, high", [(-128, -127), (127, 128), (-128, -126), (0, 1)], ids=["-128", "127", "-128 or -127", "0"])
def test_extremes_are_exact_and_silent(low, high):
    a, b = numbers(9, 700, low=low, high=high), numbers(700, 2000, seed=1, low=low, high=high)
    assert torch.equal(abft.int_mm(a, b), exact(a, b))
    assert abft.report().checks == 9 and abft.report().detected == 0


@pytest.mark.parametrize("depth", [digits.DEPTH, digits.DEPTH + 1, 140_000])
def test_results_at_and_beyond_the_end_of_int32(depth):
    a, b = torch.full((3, depth), -128, dtype=torch.int8), torch.full((depth, 20), -128, dtype=torch.int8)
    y = abft.int_mm(a, b)
    assert (y == np.int64(depth * 2**14).astype(np.int32)).all()
    assert (y[0, 0] < 0) == (depth > digits.DEPTH)  # wrapped, as torch does
    assert abft.report().checks == 3 and abft.report().detected == 0


def test_a_hundred_thousand_rows_are_silent():
    w, total = weight(1500, 48), 0
    for seed, (low, high) in enumerate([(-128, 128), (0, 128), (-2, 2), (-128, -120), (100, 128)]):
        a = numbers(24_000, 48, seed=seed, low=low, high=high)
        assert torch.equal(abft.int_mm(a, w.t()), torch._int_mm(a, w.t()))
        total += len(a)
    report = abft.report()
    assert report.checks == total >= 100_000
    assert (report.detected, report.false_alarms, report.worst, report.events) == (0, 0, 0.0, ())


# --- every bit ---------------------------------------------------------------------------------------------

BITS = range(32)


@pytest.mark.parametrize("panel", ["full", "lean"])
def test_every_bit_of_every_accumulator_is_found_and_repaired(panel):
    a, w = numbers(2, 40), numbers(40, 40, seed=1)
    right = exact(a, w.t())
    for row, col, bit in itertools.product(range(2), range(40), BITS):
        strike = Strike("accumulator", Region(row, row + 1, col, col + 1), BitOperation(-1, 1 << bit, 0))
        y, (finding,) = checked(call_of(a, w, strike, panel=panel))
        assert torch.equal(y, right)
        assert (finding.verdict, finding.rows, finding.row, finding.col) == (Verdict.RECOMPUTED, 1, row, col)


def test_every_bit_is_located_by_the_sums_alone():
    a, w = numbers(2, 40), numbers(40, 40, seed=1)
    for row, col, bit in itertools.product(range(2), range(40), BITS):
        strike = Strike("accumulator", Region(row, row + 1, col, col + 1), BitOperation(-1, 1 << bit, 0))
        call = call_of(a, w, strike, level="detect", group=32)
        y, (finding,) = checked(call)
        change = int(y[row, col]) - int(exact(a, w.t())[row, col])
        assert abs(change) == 2**bit  # level detect repairs nothing
        assert (finding.verdict, finding.rows, finding.row, finding.col, finding.bound) == (Verdict.OBSERVED, 1, row, col, 0.0)


def test_where_results_wrap_every_bit_is_found_and_all_but_the_top_ones_are_located():
    depth = 140_000
    a, w = torch.full((1, depth), -128, dtype=torch.int8), torch.full((20, depth), -128, dtype=torch.int8)
    a[:, ::3] = numbers(1, len(range(0, depth, 3)))
    clean = integer.multiply(a, w)
    call, p = call_of(a, w), integer.plan(20, "full", None)
    panel = integer.build_panel(w, p.layout)
    predicted = digits.predicted_sums(integer.multiply(a, panel.columns), p.layout)
    assert integer.examine(clean, call, panel).clean
    for col, bit in itertools.product(range(20), BITS):
        y = clean.clone()
        y[0, col] ^= int(np.int64(1 << bit).astype(np.int32))
        d = digits.residuals(digits.actual_sums(y, p.layout.groups, FULL), predicted, depth)[0, 0].numpy()
        assert d.any()
        found = digits.locate(d, FULL, 20, depth)
        assert found == col if bit <= 27 else found in (col, None)


# --- several elements ----------------------------------------------------------------------------------------


@given(st.data())
def test_no_two_changed_elements_of_a_row_cancel(data):
    n = data.draw(st.sampled_from([2, 3, 16, 40, 300]))
    columns = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True))
    first = data.draw(st.integers(-(2**31), 2**31 - 1).filter(bool))
    second = data.draw(st.sampled_from([first, -first, 2 * first, -2 * first]))
    y = torch.zeros(1, n, dtype=torch.int64)
    y[0, columns[0]], y[0, columns[1]] = first, second
    table = np.stack([column_weights(kind, n) for kind in FULL]).astype(np.int64)
    assert (table @ y[0].numpy()).any()


def test_three_errors_on_a_line_are_the_documented_blind_spot():
    a, w = numbers(1, 40), numbers(640, 40, seed=1)
    signs = column_weights("e", 640)
    # Three columns of one sign, one fragment apart: their errors 1, -2, 1 cancel in every kind.
    first = next(n for n in range(600) if signs[n] == signs[n + 16] == signs[n + 32])
    call = call_of(a, w)
    clean = integer.multiply(a, w)
    panel = integer.build_panel(w, integer.plan_for(call).layout)
    for errors, seen in (((1, -2, 1), False), ((1, -2, 2), True), ((1, -1, 1), True)):
        y = clean.clone()
        y[0, first : first + 33 : 16] += torch.tensor(errors, dtype=torch.int32)
        assert integer.examine(y, call, panel).clean is not seen


def test_where_results_wrap_two_top_bits_are_the_documented_blind_spot():
    d = np.array([2**31 * int(column_weights(kind, 64)[[3, 50]].sum()) for kind in FULL])
    assert not digits.residuals(torch.from_numpy(d), torch.zeros(4, dtype=torch.int64), digits.DEPTH + 1).any()
    assert digits.residuals(torch.from_numpy(d), torch.zeros(4, dtype=torch.int64), digits.DEPTH).any()


@pytest.mark.parametrize("what", ["nullify", "bitflip", "carry"])
@pytest.mark.parametrize("where", ["accumulator", "operand", "output"])
@pytest.mark.parametrize("pattern", ["element", "row", "warp4", "fragment", "tile"])
def test_transient_faults_are_repaired_to_the_bit(what, where, pattern):
    a, w = numbers(150, 64), weight(300, 64)
    for seed in range(4):
        with faults(Fault(what, where, pattern=pattern, bits=2 if what == "bitflip" else 1), seed=seed) as log:
            y = abft.int_mm(a, w.t())
        assert torch.equal(y, exact(a, w.t())) and log[0].effect > 0
    report = abft.report()
    assert report.detected == report.recomputed > 0 and report.uncorrected == report.false_alarms == 0
    assert {e.cause for e in report.events} == {"transient"} and {e.dtype for e in report.events} == {"int8"}


@pytest.mark.parametrize("pattern", ["element", "row", "fragment"])
def test_a_check_that_goes_wrong_itself_is_repeated(pattern):
    a, w = numbers(40, 64), weight(300, 64)
    with faults(Fault("bitflip", "checksum", pattern=pattern, index=(17, 3))):
        assert torch.equal(abft.int_mm(a, w.t()), exact(a, w.t()))
    report = abft.report()
    assert report.detected == report.recomputed == (16 if pattern == "fragment" else 1) and report.events[0].cause == "transient"


def test_exactly_the_struck_rows_are_suspect():
    a, w = numbers(40, 64), numbers(300, 64, seed=1)
    region = Region(7, 12, 200, 220, 3)
    _, (finding,) = checked(call_of(a, w, Strike("accumulator", region, BitOperation(-1, 1 << 9, 0)), level="detect"))
    assert (finding.rows, 7 <= finding.row < 12, finding.col) == (5, True, None)


@pytest.mark.parametrize("n, group", [(40, None), (64, 16), (1, None), (1024, 512), (100, 48)])
def test_the_short_way_says_what_the_specification_says(n, group):
    a, w = numbers(6, 33), numbers(n, 33, seed=1)
    call = call_of(a, w, group=group)
    panel, clean = integer.build_panel(w, integer.plan_for(call).layout), integer.multiply(a, w)
    ragged = bool(panel.layout.groups.ragged)
    for column in range(-1, n, max(1, n // 8)):
        y = clean.clone()
        if column >= 0:
            y[3, column] += 1
        short = digits.agree(y, 33, lambda columns: integer.multiply(a, columns), panel)
        assert short is (column < 0 and not ragged)
        assert integer.examine(y, call, panel).clean is (column < 0)
    assert not digits.agree(clean, digits.DEPTH + 1, lambda columns: integer.multiply(a, columns), panel)


# --- weights and panels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["inference", None], ids=["frozen", "tracked"])
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_of_a_weight_is_named_and_its_product_restored(bit, policy):
    a, w = numbers(20, 64), weight(300, 64)
    right = abft.int_mm(a, w.t(), policy=policy)
    with faults(Fault("bitflip", "weight", index=(211, 33), bit=bit)):
        y = abft.int_mm(a, w.t(), policy=policy)
        again = abft.int_mm(a, w.t(), policy=policy)
    assert torch.equal(y, right) and torch.equal(again, right)
    report = abft.report()
    assert report.weight_faults == 1 and report.detected == report.reconstructed > 0
    assert {(e.col, e.cause) for e in report.events} == {(211, "weight")} and "(weight element 211, 33)" in report.events[0].message
    assert torch.equal(abft.int_mm(a, w.t(), policy=policy), right) and abft.report().detected == report.detected


def test_a_weight_held_as_k_by_n_is_restored_too():
    a, b = numbers(20, 64), nn.Buffer(numbers(64, 300, seed=1))
    right = abft.int_mm(a, b, policy="inference")
    with faults(Fault("bitflip", "weight", index=(33, 211), bit=3)):
        assert torch.equal(abft.int_mm(a, b, policy="inference"), right)
    assert abft.report().events[0].col == 211 and "(weight element 33, 211)" in abft.report().events[0].message


def test_a_frozen_weight_that_lost_a_fragment_is_uncorrected_and_a_tracked_one_stale():
    a, w = numbers(20, 64), weight(300, 64)
    for policy, verdict in ((abft.Policy(weights="frozen", on_uncorrected="record"), "UNCORRECTED"), (abft.Policy(), "STALE")):
        abft.int_mm(a, w.t(), policy=policy)
        with faults(Fault("nullify", "weight", pattern="fragment")), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            abft.int_mm(a, w.t(), policy=policy)
        assert abft.report(reset=True).events[-1].verdict.name == verdict


def test_a_broken_panel_is_rebuilt_and_no_fault_of_the_data():
    a, w = numbers(20, 64), weight(300, 64)
    right = abft.int_mm(a, w.t())
    with faults(Fault("bitflip", "panel", bit=0, index=(5, 9))):
        assert torch.equal(abft.int_mm(a, w.t()), right)
    report = abft.report()
    assert report.false_alarms > 0 and report.detected == 0 and report.events[0].cause == "panel"
    assert torch.equal(abft.int_mm(a, w.t()), right) and abft.report().false_alarms == report.false_alarms


def test_a_unit_that_is_always_wrong_is_replaced_by_an_independent_product(monkeypatch):
    a, w = numbers(20, 64), weight(300, 64)
    right = exact(a, w.t())
    honest = integer.multiply

    def unit(left, matrix):
        y = honest(left, matrix)
        if len(matrix) == 300:
            y[4, 17] += 1
        return y

    monkeypatch.setattr(integer, "multiply", unit)
    assert torch.equal(abft.int_mm(a, w.t()), right)
    event = abft.report().events[0]
    assert (event.verdict, event.cause, event.row, event.col, event.rows) == (Verdict.RECONSTRUCTED, "persistent", 4, 17, 1)


def test_a_check_that_is_always_wrong_is_a_false_alarm(monkeypatch):
    a, w = numbers(20, 64), weight(300, 64)
    honest = integer.multiply
    monkeypatch.setattr(integer, "multiply", lambda left, m: honest(left, m) + (len(m) < 300))
    assert torch.equal(abft.int_mm(a, w.t()), exact(a, w.t()))
    report = abft.report()
    assert report.false_alarms == 20 and report.detected == 0


# --- whose panel -------------------------------------------------------------------------------------------


def entries(t):
    owner = t.__dict__.get(panels.ATTRIBUTE)
    return 0 if owner is None else len(owner.entries)


@pytest.mark.parametrize("form", ["w.t()", "w.mT", "w itself", "buffer.t()", "buffer"])
def test_panels_of_weights_are_remembered(form, monkeypatch):
    built = []
    monkeypatch.setattr(digits, "encode", lambda *args, encode=digits.encode: built.append(1) or encode(*args))
    w = nn.Buffer(numbers(64, 64)) if "buffer" in form else weight(64, 64)
    b = {"w.t()": w.t, "w.mT": lambda: w.mT, "buffer.t()": w.t}.get(form, lambda: w)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert torch.equal(abft.int_mm(numbers(3, 64), b()), exact(numbers(3, 64), b()))
    assert len(built) == 1 and entries(w) == 1


def test_panels_of_anything_else_are_not():
    w, other = weight(64, 64), numbers(64, 64)
    for b in (other, other.t(), w[:32].t(), w.t()[:, 1:], w.t() + 1):
        assert torch.equal(abft.int_mm(numbers(3, 64), b), exact(numbers(3, 64), b))
        assert entries(w) == entries(other) == entries(b) == 0


def test_an_announced_change_is_followed():
    model = nn.Module()
    model.codes = nn.Buffer(numbers(64, 32))
    a = numbers(3, 32)
    with abft.protected("inference"):
        torch._int_mm(a, model.codes.t())
        model.codes.data.copy_(numbers(64, 32, seed=5))
        abft.refresh(model)
        assert torch.equal(torch._int_mm(a, model.codes.t()), exact(a, model.codes.t()))
    with abft.protected():
        torch._int_mm(a, model.codes.t())
        model.codes.add_(3)
        assert torch.equal(torch._int_mm(a, model.codes.t()), exact(a, model.codes.t()))
    assert abft.report().detected == abft.report().stale == 0 and abft.report().checks == 12


# --- policies, interception, torch's machinery ----------------------------------------------------------------


def test_torchs_own_function_is_intercepted():
    a, b = numbers(20, 64), numbers(64, 30, seed=1)
    with abft.protected() as scope:
        y = torch._int_mm(a, b)
        out = torch.empty(20, 30, dtype=torch.int32)
        torch._int_mm(a, b, out=out)
    assert torch.equal(y, exact(a, b)) and torch.equal(out, y)
    report = scope.report()
    assert (report.checks, report.products, report.bypassed) == (20, 1, {"out=": 1}) and list(report.sites) == ["int_mm"]


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
@pytest.mark.parametrize("level", ["off", "correct"])
def test_redundant_executions_agree_or_vote(redundancy, level):
    a, w = numbers(20, 64), weight(30, 64)
    with faults(Fault("bitflip", bits=3)):
        y = abft.int_mm(a, w.t(), policy=abft.Policy(level=level, redundancy=redundancy))
    assert torch.equal(y, exact(a, w.t()))
    assert abft.report().recomputed == 1 and abft.report().executions == 3


def test_what_a_policy_switches_off_is_counted():
    a, b = numbers(20, 64), numbers(64, 30, seed=1)
    for policy in (abft.Policy(level="off"), abft.Policy(roles=frozenset({"dgrad"}))):
        assert torch.equal(abft.int_mm(a, b, policy=policy), exact(a, b))
    assert abft.report().bypassed == {"level off": 1, "role fprop not in policy": 1} and abft.report().checks == 0


def test_no_floor_is_too_low():
    assert abft.int_mm(numbers(2, 8), numbers(8, 3), policy=abft.Policy(max_floor=1e-30)).shape == (2, 3)


def test_raise_raises_in_the_call():
    with pytest.raises(abft.FaultDetected, match="int_mm"), faults(Fault("bitflip")):
        abft.int_mm(numbers(2, 8), numbers(8, 3), policy=abft.Policy(level="detect", on_uncorrected="raise"))


@pytest.mark.parametrize("what", ["nan", "inf", "nonfinite", "near_inf", "scale"])
def test_faults_that_need_floats_are_refused(what):
    with pytest.raises(abft.PolicyError, match="needs a float.*int32.*nullify"), faults(Fault(what)):
        abft.int_mm(numbers(2, 8), numbers(8, 3))


@pytest.mark.parametrize("a, b", [((2, 8), (7, 3)), ((8,), (8, 3)), ((2, 8), (1, 8, 3))], ids=str)
def test_shapes_that_form_no_product(a, b):
    with pytest.raises(abft.ShapeError, match="int_mm"):
        abft.int_mm(numbers(*a), numbers(*b))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_other_dtypes_are_torchs_own_answer(dtype):
    a, b = numbers(2, 8), numbers(8, 3).to(dtype)
    for call in (abft.int_mm, torch._int_mm):
        with pytest.raises(RuntimeError), abft.protected():
            call(a, b)
    assert abft.report().bypassed == {} and abft.report().checks == 0


def test_two_devices_are_an_error():
    with pytest.raises(abft.DeviceError, match="different devices"):
        abft.int_mm(numbers(2, 8), numbers(8, 3).to("meta"))


def test_meta_tensors_have_a_shape():
    y = abft.int_mm(numbers(2, 8).to("meta"), numbers(8, 3).to("meta"))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3), torch.int32, "meta")


@pytest.mark.parametrize("tb", [True, False])
@pytest.mark.parametrize("shape", [(5, 8, 6), (1, 1, 1), (0, 8, 6)], ids=name_of)
def test_opcheck(shape, tb):
    m, k, n = shape
    site = sites.as_tensor(sites.functional("int_mm", "warn"), torch.device("cpu"))
    b = numbers(k, n) if tb else numbers(n, k)
    torch.library.opcheck(
        torch.ops.abft.int_product.default, (numbers(m, k), b, tb, ledger.tensor(torch.device("cpu")), site, abft.Policy().text)
    )


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Buffer(numbers(48, 64))

    def forward(self, a):
        return torch._int_mm(a, self.codes.t()).float() * 0.5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_break(dynamo, backend):
    model, a = Quantised(), numbers(7, 64)

    def step(x):
        with abft.protected():
            return model(x)

    compiled = torch.compile(lambda x: abft.int_mm(x, model.codes.t()).float() * 0.5, fullgraph=True, backend=backend)
    assert torch.equal(compiled(a), model(a)) and torch.equal(step(a), model(a))
    assert abft.report().checks == 14
    with faults(Fault("bitflip", bit=30)):
        assert torch.equal(compiled(a), model(a))
    assert abft.report().recomputed == 1


@pytest.mark.compiler
def test_compiled_by_inductor_the_product_is_checked(dynamo):
    w, a = weight(48, 64), numbers(7, 64)
    compiled = torch.compile(lambda x: abft.int_mm(x, w.t()) + 1, fullgraph=True)
    assert torch.equal(compiled(a), exact(a, w.t()) + 1) and abft.report().checks == 7


def test_flops_are_counted_and_covered():
    model, a = Quantised(), numbers(7, 64)
    with FlopCounterMode(display=False) as counter, abft.protected():
        model(a)
    assert counter.get_total_flops() == 2 * 7 * 64 * 48
    assert abft.coverage(model, a).flop_share == 0.0
    with abft.protected():
        assert abft.coverage(model, a).flop_share == 1.0


# --- on a device the host must not wait for, driven on host memory --------------------------------------------


def on_device(call):
    """(result, counters, record or None) of the masked path."""
    words = torch.zeros(ledger.WORDS, dtype=torch.int64)
    site = sites.as_tensor(sites.site_of(call.site), torch.device("cpu"))
    y = masked_integer.product(call, words, site, "reference")
    at = ledger.HEADER + call.site * ledger.COUNTERS
    counts = dict(zip(ledger.COUNTER_NAMES, words[at : at + ledger.COUNTERS].tolist(), strict=False))
    ring = words[ledger.HEADER + sites.CAPACITY * ledger.COUNTERS :][: ledger.RECORD].tolist()
    return y, counts, dict(zip(ledger.RECORD_NAMES, ring, strict=True)) if words[ledger.HEAD] else None


@pytest.mark.parametrize("panel", ["full", "lean"])
def test_the_masked_path_is_exact_and_silent(panel):
    a, w = numbers(40, 64), numbers(1500, 64, seed=1)
    y, counts, record = on_device(call_of(a, w, panel=panel))
    assert torch.equal(y, exact(a, w.t())) and record is None
    assert (counts["checks"], counts["products"], counts["executions"], counts["worst"]) == (40, 1, 2, 0)


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_the_masked_path_repairs_what_was_struck(bit):
    a, w = numbers(40, 64), numbers(1500, 64, seed=1)
    strike = Strike("accumulator", Region(7, 9, 1400, 1401), BitOperation(-1, 1 << bit, 0))
    y, counts, record = on_device(call_of(a, w, strike))
    assert torch.equal(y, exact(a, w.t())) and counts["recomputed"] == 2
    assert (record["rows"], record["row"] in (7, 8), ledger.bits_float(record["bound"])) == (2, True, 0.0)
    y, counts, _ = on_device(call_of(a, w, strike, level="detect"))
    assert (y != exact(a, w.t())).sum() == 2 and (counts["observed"], counts["executions"]) == (2, 1)


def test_the_masked_path_repeats_a_check_that_goes_wrong():
    a, w = numbers(40, 64), numbers(1500, 64, seed=1)
    y, counts, _ = on_device(call_of(a, w, Strike("checksum", Region(7, 9, 2, 3), BitOperation(-1, 1 << 3, 0))))
    assert torch.equal(y, exact(a, w.t())) and (counts["recomputed"], counts["uncorrected"]) == (2, 0)


def test_the_masked_path_does_not_believe_a_broken_panel():
    a, w = numbers(40, 64), numbers(1500, 64, seed=1)
    _, counts, record = on_device(call_of(a, w, Strike("panel", Region(0, 1, 0, 64), BitOperation(-1, 1, 0))))
    assert counts["uncorrected"] == 40 and record["rows"] == 40


def test_padding_for_cuda_changes_no_number():
    for m, k, n in ((1, 1, 1), (3, 7, 5), (33, 16, 8), (40, 24, 31)):
        a, w = numbers(m, k), numbers(n, k, seed=1)
        assert torch.equal(integer._multiply_on_cuda(a, w), exact(a, w.t()))
