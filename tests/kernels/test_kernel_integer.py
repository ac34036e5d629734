"""int8 kernels: exact products and sums, every bit of an accumulator found, named and repaired; what they leave to the host."""

from __future__ import annotations

import itertools
import warnings
from unittest import mock

import numpy as np
import oracles
import pytest
import torch
from abft.triton_kernels import integer as kernels
from abft.triton_kernels import integer_check
from kernel_harness import DEVICE, NULLIFY, SITE, at, counters_of, fresh_ledger, records_of
from torch import nn

import abft
from abft import digits, ledger
from abft.backends import integer, triton_integer
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.checksum import FORMS, column_weights
from abft.faults import BitOperation, Strike
from abft.inject import Fault, faults

TRITON = abft.Policy(backend="triton", on_uncorrected="record")


def numbers(*shape, seed=0, low=-128, high=128):
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exact(a, w):
    """a wᵀ, in int64."""
    return torch.from_numpy(a.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)


def flip(row, col, bit, place="accumulator"):
    return Strike(place, at(row, col), BitOperation(flip=1 << bit))


class Run:
    """A product through the kernels with a ledger of its own; ``again``: strikes that hit the repetition."""

    def __init__(self, a, w, *strikes, again=(), **policy):
        call = Call(a.to(DEVICE), w.to(DEVICE), None, None, False, "fprop", abft.Policy(**policy), SITE, strikes)
        words = fresh_ledger()
        multiply, check = kernels.multiply, integer_check.check

        def multiplying(*args):
            self.evidence = multiply(*args)
            return self.evidence

        def checking(*args):
            self.status = check(*args, backend.descriptors(tuple(again), DEVICE))

        with mock.patch.object(kernels, "multiply", multiplying), mock.patch.object(integer_check, "check", checking):
            self.y = triton_integer.product(call, words, torch.tensor(SITE, device=DEVICE)).cpu()
        self.plan = triton_integer.plan_for(call)
        self.counters, self.records = counters_of(words, SITE), records_of(words)

    @property
    def suspect_rows(self):
        return self.status.any(0).nonzero().flatten().tolist()

    def said(self):
        (record,) = self.records
        return ledger.VERDICTS[record["verdict"]].name, record["rows"], record["row"], record["col"], ledger.CAUSES[record["cause"]]


SHAPES = [(1, 1, 1), (2, 3, 5), (17, 40, 64), (129, 2, 300), (5, 1500, 40), (40, 2100, 20), (130, 129, 257)]


@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("shape", SHAPES, ids=oracles.name_of)
def test_products_and_sums_are_exact_and_silent(shape, form):
    m, n, k = shape
    a, w = numbers(m, k), numbers(n, k, seed=1)
    result = Run(a, w, panel=form)
    assert result.y.dtype == torch.int32 and torch.equal(result.y.long(), exact(a, w))
    layout, kinds = result.plan.layout, FORMS[form].kinds
    expected = digits.actual_sums(exact(a, w).int(), layout.groups, kinds)  # (M, groups, kinds)
    bn, tiles = result.plan.config.bn, result.plan.tiles_per_group
    assert layout.groups.count == 1 or layout.groups.width == tiles * bn
    parts = result.evidence.partials.cpu()
    parts = torch.nn.functional.pad(parts, (0, 0, 0, layout.groups.count * tiles - parts.shape[1]))
    assert torch.equal(parts.unflatten(1, (-1, tiles)).sum(2).permute(2, 1, 0), expected)
    assert torch.equal(digits.predicted_sums(result.evidence.raw.cpu(), layout), expected)
    assert result.suspect_rows == [] and result.records == []
    assert (result.counters["checks"], result.counters["products"], result.counters["executions"]) == (m, 1, 1)


@pytest.mark.parametrize("fill", [-128, 127])
def test_the_largest_sums_do_not_overflow(fill):
    a, w = torch.full((3, 4096), -128, dtype=torch.int8), torch.full((2816, 4096), fill, dtype=torch.int8)
    result = Run(a, w, group=1408)
    assert result.plan.layout.groups.width == 1408 and (result.y == -128 * fill * 4096).all() and result.suspect_rows == []


def test_the_widest_tile_of_the_heaviest_weights_fits_int32():
    # What store_exact_sums relies on: 2¹⁶ Σ|w| over the columns of one tile.
    for bn in (128, 256):
        width = digits.widest(FORMS["full"].kinds) // bn * bn
        tiles = np.abs(np.stack([column_weights(kind, width) for kind in FORMS["full"].kinds])).reshape(4, -1, bn).sum(-1)
        assert tiles.max() * 2**16 < 2**31


@pytest.mark.slow
def test_every_bit_of_every_accumulator_is_found_and_repaired():
    a, w = numbers(128, 20), numbers(40, 20, seed=1)
    right = exact(a, w)
    for first in range(0, 40, 4):  # a row each for 32 bits of four columns
        strikes = tuple(flip(32 * i + bit, first + i, bit) for i, bit in itertools.product(range(4), range(32)))
        result = Run(a, w, *strikes)
        assert torch.equal(result.y.long(), right) and result.suspect_rows == list(range(128))
        assert result.counters["recomputed"] == 128 and result.counters["executions"] == 2
        assert result.said() == ("RECOMPUTED", 128, 31, first, "transient")  # the worst: the first top bit


@pytest.mark.slow
@pytest.mark.parametrize("col", [0, 127, 128, 299])
def test_every_bit_is_located(col):
    a, w = numbers(3, 20), numbers(300, 20, seed=1)
    right = exact(a, w)
    for bit in range(0, 32, 1 if col == 299 else 6):
        result = Run(a, w, flip(1, col, bit), level="detect", group=128)
        assert result.said() == ("OBSERVED", 1, 1, col, "transient")
        moved = (result.y.long() != right).nonzero().tolist()
        assert moved == [[1, col]] and result.counters["observed"] == 1


@pytest.mark.parametrize("region", [at(5, 0, 1, 300), at(0, 128, 128, 128), at(16, 8, 16, 8), at(3, 1, 1, 200, 4)], ids=["row", "tile", "fragment", "warp"])
@pytest.mark.parametrize("place", ["accumulator", "operand"])
def test_wider_faults_are_repaired_and_have_no_column(place, region):
    a, w = numbers(130, 300), numbers(300, 300, seed=1)
    result = Run(a, w, Strike(place, region, NULLIFY, 0, 128))
    assert torch.equal(result.y.long(), exact(a, w))
    assert result.suspect_rows == list(range(region.row0, region.row1))
    assert result.said()[0] == "RECOMPUTED" and result.said()[1] == region.row1 - region.row0 and result.said()[3] == -1


def test_a_check_that_goes_wrong_itself_is_repeated():
    a, w = numbers(130, 300), numbers(300, 300, seed=1)
    result = Run(a, w, Strike("checksum", at(5, 3, 20, 2), NULLIFY))
    assert torch.equal(result.y.long(), exact(a, w)) and result.suspect_rows == list(range(5, 25))
    assert result.said()[:2] == ("RECOMPUTED", 20) and result.said()[4] == "transient"


def test_a_lean_panel_finds_every_bit_and_names_none():
    a, w = numbers(32, 20), numbers(200, 20, seed=1)
    result = Run(a, w, *(flip(bit, 150, bit) for bit in range(32)), panel="lean")
    assert torch.equal(result.y.long(), exact(a, w)) and result.suspect_rows == list(range(32)) and result.said()[3] == -1


def test_a_fault_that_stays_is_uncorrected_and_named():
    a, w = numbers(3, 20), numbers(300, 20, seed=1)
    result = Run(a, w, flip(1, 170, 9), again=[flip(1, 170, 9)])
    assert result.said() == ("UNCORRECTED", 1, 1, 170, "persistent") and result.counters["uncorrected"] == 1
    other = Run(a, w, flip(1, 170, 9), again=[flip(1, 171, 9)])
    assert other.said()[0] == "UNCORRECTED" and other.said()[4] == "unknown"


def test_what_happens_after_the_sums_were_taken_is_not_seen():
    a, w = numbers(3, 20), numbers(300, 20, seed=1)
    assert Run(a, w, flip(1, 170, 9, "output")).suspect_rows == []  # limits.md says so


def test_behind_int_mm_faults_of_operands_and_panels_are_found():
    a, w = numbers(20, 64).to(DEVICE), nn.Parameter(numbers(300, 64, seed=1).to(DEVICE), requires_grad=False)
    right = abft.int_mm(a, w.t(), policy=TRITON)
    assert torch.equal(right.cpu().long(), exact(a.cpu(), w.detach().cpu())) and abft.report().events == ()
    for where, verdict in (("operand", "RECOMPUTED"), ("weight", "UNCORRECTED"), ("panel", "UNCORRECTED")):
        with faults(Fault("bitflip", where)):
            abft.int_mm(a, w.t(), policy=TRITON)
        assert abft.report(reset=True).events[-1].verdict.name == verdict
    assert torch.equal(abft.int_mm(a, w.t(), policy=TRITON), right) and abft.report().detected == 0


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_redundant_executions_vote(redundancy):
    a, w = numbers(20, 64).to(DEVICE), numbers(300, 64, seed=1).to(DEVICE)
    with faults(Fault("bitflip", bits=3)):
        y = abft.int_mm(a, w.t(), policy=TRITON.replace(redundancy=redundancy, level="off"))
    assert torch.equal(y.cpu().long(), exact(a.cpu(), w.cpu())) and abft.report().recomputed == 1


def test_sums_that_may_leave_int32_are_not_for_the_kernels():
    a, b = numbers(1, digits.DEPTH + 1).to(DEVICE), numbers(digits.DEPTH + 1, 3).to(DEVICE)
    with pytest.raises(abft.DeviceError, match="saturate"):
        abft.int_mm(a, b, policy=TRITON)
    assert abft.int_mm(a, b).shape == (1, 3)


def test_plans_keep_groups_within_three_digits():
    for architecture, group, n in itertools.product((None, 80, 90, 100), (None, 16, 128, 1392, 4096), (1, 100, 1409, 5000)):
        p = triton_integer.plan(n, architecture, "full", group)
        assert p.layout.groups.width <= max(1408, n if n <= 1408 else 0)
        assert p.layout.groups.count == 1 or p.layout.groups.width == p.tiles_per_group * p.config.bn


def test_the_kernels_and_the_specification_say_the_same():
    a, w = numbers(40, 64), numbers(1300, 64, seed=1)
    strikes = [flip(3, 7, 31), flip(9, 1200, 0), Strike("accumulator", at(20, 5, 2, 700, 8), NULLIFY)]
    result = Run(a, w, *strikes, level="detect")
    call = Call(a, w, None, None, False, "fprop", abft.Policy(level="detect"), SITE, tuple(strikes))
    outcome = ledger.Outcome(checks=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = integer.check(call, integer.execute(call, call.strikes), outcome, "reference")
    assert torch.equal(y, result.y)
    assert result.suspect_rows == np.flatnonzero((y.long() != exact(a, w)).any(1)).tolist() == [3, 9, 20, 21]
    assert outcome.findings[0].rows == result.said()[1] == 4
