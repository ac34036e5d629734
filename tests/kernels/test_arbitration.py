"""Who is wrong, decided on the device: the product, the panel, or the weight."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from abft.triton_kernels import launch, summary, tiles
from kernel_harness import DEVICE, DTYPES, at, fresh_ledger, operands, run
from torch import nn

import abft
from abft import bits, ledger, panels
from abft.backends import triton as backend
from abft.faults import BitOperation, Region, Strike

M, N, K = 150, 700, 90  # two row blocks, two groups of columns of which one is ragged
SIGN = {torch.float32: 31, torch.float16: 15, torch.bfloat16: 15}
#: A row and a column of the weight in each group, and at their edges.
ELEMENTS = [(0, 0), (333, 17), (383, 89), (384, 5), (699, 89)]


def weight(dtype, seed=0):
    """(A, clean W, the parameter that holds it)"""
    a, w = operands(M, N, K, dtype, seed)
    return a, w, nn.Parameter(w.clone().to(DEVICE), requires_grad=False)


def write(parameter, element, value=None, bit=None):
    """Into memory, past every counter."""
    raw = bits.as_integers(parameter.data)
    if bit is not None:
        width = 8 * parameter.element_size()
        raw[element] ^= (1 << bit) - ((1 << width) if bit == width - 1 else 0)
    else:
        parameter.data[element] = value


def call(a, parameter, words, **options):
    return run(a, parameter.detach(), source=parameter, words=words, **options)


def entry_of(parameter):
    (entry,) = panels.panels_of(parameter).entries.values()
    return entry


def element_of(record):
    return record["element_row"], record["element_col"]


# --- fingerprints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (700, 90)], ids=str)
def test_fingerprints_are_integer_sums_of_every_group(shape, dtype):
    w = torch.randn(shape).to(dtype)
    w.view(-1)[0] = float("nan")
    layout = backend.plan(*shape, dtype, None, False, "full", None).layout
    memory = backend.build_panel(w.to(DEVICE), layout, remember=True).memory
    halves = w.contiguous().numpy().view(np.uint16).reshape(*shape, -1).astype(object)  # Python's integers: no width to overflow
    for g in range(layout.groups.count):
        start, stop = layout.groups.span(g)
        block = halves[start:stop]
        index = np.arange(1, stop - start + 1, dtype=object)[:, None, None]
        for half in range(block.shape[-1]):
            for plane, exact in enumerate((block.sum(0), (index * block).sum(0), (index * index * block).sum(0))):
                found = memory.fingerprint[g, 3 * half + plane].cpu().numpy().astype(object) % 2**32
                assert (found == exact[:, half] % 2**32).all()


@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_panel_remembers_the_sums_of_its_own_bits(form, dtype):
    w = torch.randn(700, 90).to(dtype).to(DEVICE)
    panel = backend.build_panel(w, backend.plan(700, 90, dtype, None, False, form, None).layout)
    count = panel.layout.columns - panel.layout.form.ingress
    patterns = bits.as_integers(panel.columns).cpu().long()
    if dtype.itemsize == 2:
        patterns &= 0xFFFF
    block = backend._panel_config().bk
    sums = torch.stack([p.sum(-1) for p in patterns.split(block, -1)], -1)
    sums = (sums & 0xFFFFFFFF) + (sums >> 32)
    if panel.scales is not None:
        sums += bits.as_integers(panel.scales).cpu().long().unsqueeze(-1)
    assert torch.equal(sums[:count].to(torch.int32), panel.memory.integrity[:count].cpu())


# --- one element of the weight ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["frozen", "tracked"])
@pytest.mark.parametrize("what", ["sign", "exponent", "mantissa", "inf", "nan", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_changed_element_is_named_and_the_remembered_weight_multiplied(dtype, what, policy):
    mantissa = {torch.float32: 22, torch.float16: 9, torch.bfloat16: 6}[dtype]
    change = {"sign": {"bit": SIGN[dtype]}, "exponent": {"bit": SIGN[dtype] - 1}, "mantissa": {"bit": mantissa},
              "inf": {"value": float("inf")}, "nan": {"value": float("nan")}, "zero": {"value": 0.0}}[what]  # fmt: skip
    everywhere = what == "exponent" and policy == "frozen"
    for seed, element in enumerate(ELEMENTS if everywhere else ELEMENTS[len(what) % 5 :][:1]):
        a, w, parameter = weight(dtype, seed)
        parameter.data[element] = w[element] = 1.5  # large enough for every change to matter
        words = fresh_ledger()
        clean = call(a, parameter, words, weights=policy)
        assert clean.detected == 0
        write(parameter, element, **change)
        wrong = parameter.detach().clone()
        result = call(a, parameter, words, weights=policy)
        assert oracles.bits_equal(result.y, clean.y)
        assert oracles.bits_equal(parameter.detach(), wrong), "nothing is written into a weight"
        assert result.counters["reconstructed"] == result.detected > 0 and result.counters["weight_faults"] == 1
        record = result.records[-1]
        assert result.verdict() == "RECONSTRUCTED" and ledger.CAUSES[record["cause"]] == "weight"
        assert element_of(record) == element and record["col"] == element[0]
        again = call(a, parameter, words, weights=policy)  # its fault is known by now
        assert oracles.bits_equal(again.y, clean.y) and again.counters["weight_faults"] == 1
        assert again.counters["reconstructed"] == 2 * result.counters["reconstructed"]


def test_an_element_is_named_in_the_weights_own_coordinates():
    """The backward product sees the transpose."""
    g, w = torch.randn(M, 90), torch.randn(90, 700) / 10
    parameter = nn.Parameter(w.clone().to(DEVICE), requires_grad=False)
    words = fresh_ledger()
    options = {"source": parameter, "words": words, "role": "dgrad", "transposed": True, "weights": "frozen"}
    clean = run(g, parameter.detach().mT, **options)
    write(parameter, (17, 333), bit=30)
    result = run(g, parameter.detach().mT, **options)
    assert oracles.bits_equal(result.y, clean.y) and element_of(result.records[-1]) == (17, 333) and result.records[-1]["col"] == 333


@pytest.mark.parametrize("policy", ["frozen", "tracked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_part_of_one_fragment_is_restored(dtype, policy):
    a, w, parameter = weight(dtype)
    words = fresh_ledger()
    clean = call(a, parameter, words, weights=policy)
    for i in range(8):
        write(parameter, (16 + i, 40 + i), bit=SIGN[dtype] - 1)
    result = call(a, parameter, words, weights=policy)
    assert oracles.bits_equal(result.y, clean.y) and result.counters["reconstructed"] == result.detected > 0
    assert result.counters["weight_faults"] == 8 and element_of(result.records[-1]) == (-1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_many_elements_of_a_frozen_weight_are_restored_in_every_group(dtype):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    clean = call(a, parameter, words, weights="frozen")
    for k in range(0, K, 2):
        write(parameter, ((37 * k) % 384, k), bit=SIGN[dtype] - 1)
        write(parameter, (384 + (53 * k) % 316, k), bit=SIGN[dtype])
    result = call(a, parameter, words, weights="frozen")
    assert oracles.bits_equal(result.y, clean.y) and result.counters["weight_faults"] == K
    assert result.counters["reconstructed"] == result.detected == M


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_of_two_changes_in_one_column_of_a_frozen_weight_no_element_can_be_told(dtype):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    call(a, parameter, words, weights="frozen")
    for row in (3, 90):
        write(parameter, (row, 7), bit=SIGN[dtype] - 1)
    present = run(a, parameter.detach())
    result = call(a, parameter, words, weights="frozen")
    assert oracles.bits_equal(result.y, present.y)
    assert result.counters["uncorrected"] == result.detected > M // 2 and result.counters["weight_faults"] == 1
    record = result.records[-1]
    assert result.verdict() == "UNCORRECTED" and ledger.CAUSES[record["cause"]] == "weight" and element_of(record) == (-1, -1)
    assert result.evidence.summary[summary.TAKEN.value] == 0, "a repetition would tell nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_detect_names_the_element_and_changes_nothing(dtype):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    call(a, parameter, words, weights="frozen", level="detect")
    write(parameter, (333, 17), bit=SIGN[dtype] - 1)
    present = run(a, parameter.detach(), level="detect")
    result = call(a, parameter, words, weights="frozen", level="detect")
    assert oracles.bits_equal(result.y, present.y) and result.counters["observed"] == result.detected > 0
    assert element_of(result.records[-1]) == (333, 17) and ledger.CAUSES[result.records[-1]["cause"]] == "weight"


# --- edits --------------------------------------------------------------------------------------------


EDITS = {
    "all": lambda w: w.mul_(1.5),
    "row": lambda w: w[5].add_(1.0),
    "column": lambda w: w[:, 5].zero_(),
    "diagonal": lambda w: w.fill_diagonal_(3.0),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_an_unannounced_edit_is_followed(dtype, edit):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    call(a, parameter, words)
    EDITS[edit](parameter.data)
    present = run(a, parameter.detach())
    result = call(a, parameter, words)
    assert oracles.bits_equal(result.y, present.y)
    assert result.detected == result.counters["weight_faults"] == 0
    assert result.counters["stale"] == 1 and result.verdict() == "STALE"
    entry = entry_of(parameter)
    fresh = backend.build_panel(parameter.detach(), entry.panel.layout, remember=True)
    changed = entry.panel.memory.fingerprint != fresh.memory.fingerprint
    assert not changed.any(), "the groups that changed were rebuilt"
    again = call(a, parameter, words)
    assert again.counters["stale"] == 1 and again.detected == 0 and len(again.records) == 1
    # And is the right one now.
    write(parameter, (333, 17), bit=SIGN[dtype] - 1)
    result = call(a, parameter, words)
    assert oracles.bits_equal(result.y, present.y) and result.counters["weight_faults"] == 1


def test_elements_of_several_groups_are_an_edit_and_no_fault():
    """Seen too late to rebuild a panel in the same call: counted in every call, and the present weight's product delivered."""
    a, _, parameter = weight(torch.float32)
    words = fresh_ledger()
    call(a, parameter, words)
    for element in ((3, 7), (600, 7)):
        write(parameter, element, value=9.0)
    present = run(a, parameter.detach())
    for calls in (1, 2):
        result = call(a, parameter, words)
        assert oracles.bits_equal(result.y, present.y)
        assert result.detected == result.counters["weight_faults"] == 0 and result.counters["stale"] == calls


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_transient_fault_beside_an_edit_is_repaired(dtype):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    call(a, parameter, words)
    parameter.data.mul_(1.5)
    present = run(a, parameter.detach())
    strike = Strike("accumulator", at(77, 333), BitOperation(flip=1 << 30))
    result = call(a, parameter, words, strikes=(strike,))
    assert oracles.bits_equal(result.y, present.y)
    assert result.counters["recomputed"] == result.detected == 1 and result.counters["stale"] == 1


# --- the panel ----------------------------------------------------------------------------------------


def columns_of_every_kind(layout):
    """A checksum and a sketch column of each group, and every part."""
    sums = layout.checksum_columns
    return [*range(len(layout.form.kinds) * layout.parts), sums - 1, sums, sums + 3, layout.columns - 1 - layout.form.ingress]


@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_changed_panel_is_rebuilt(dtype, form):
    a, _, parameter = weight(dtype)
    clean = call(a, parameter, fresh_ledger(), panel=form)
    entry = entry_of(parameter)
    columns, memory = entry.panel.columns.clone(), entry.panel.memory.integrity.clone()
    seen = 0
    for column in columns_of_every_kind(entry.panel.layout):
        for operation in (BitOperation(flip=1 << (8 * dtype.itemsize - 2)), BitOperation(keep=0)):
            words = fresh_ledger()
            strike = Strike("panel", Region(column, column + 1, 10, 70), operation)
            result = call(a, parameter, words, strikes=(strike,), panel=form)
            assert oracles.bits_equal(result.y, clean.y) and result.detected == 0
            if result.counters["false_alarms"]:
                seen += 1
                assert result.verdict() == "FALSE_ALARM" and ledger.CAUSES[result.records[-1]["cause"]] == "panel"
                assert torch.equal(entry.panel.memory.integrity, memory) and oracles.bits_equal(entry.panel.columns, columns)
                after = call(a, parameter, fresh_ledger(), panel=form)
                assert after.suspect_rows == [] and after.records == []
            else:  # a sketch that became larger, or lost digits below the bound: nothing was suspect, so nobody asked
                entry.panel.columns.copy_(columns)
    assert seen > len(columns_of_every_kind(entry.panel.layout)) // 2


def test_a_changed_scale_is_rebuilt():
    a, _, parameter = weight(torch.float16)
    clean = call(a, parameter, fresh_ledger())
    entry = entry_of(parameter)
    entry.panel.scales[0] *= 4
    result = call(a, parameter, fresh_ledger())
    assert result.counters["false_alarms"] == M and result.detected == 0 and oracles.bits_equal(result.y, clean.y)
    assert call(a, parameter, fresh_ledger()).suspect_rows == []


def test_the_panel_of_an_activation_is_rebuilt_too():
    a, w = operands(M, N, K, torch.float16)
    clean = run(a, w)
    result = run(a, w, strikes=(Strike("panel", Region(0, 1, 10, 40), BitOperation(keep=0)),))
    assert result.counters["false_alarms"] == M and result.detected == 0 and oracles.bits_equal(result.y, clean.y)


def test_panels_of_a_batch_are_rebuilt_one_by_one():
    a, w = (torch.stack(t) for t in zip(*(operands(40, 300, 60, torch.float16, seed) for seed in range(3)), strict=True))
    clean = run(a, w)
    result = run(a, w, strikes=(Strike("panel", Region(0, 1, 10, 40, batch=1), BitOperation(keep=0)),))
    assert result.detected == 0 and oracles.bits_equal(result.y, clean.y)
    assert result.counters["false_alarms"] == 40 and {r // 40 for r in result.suspect_rows} == {1}


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_a_transient_fault_beside_a_changed_panel_is_repaired(dtype):
    a, _, parameter = weight(dtype)
    words = fresh_ledger()
    clean = call(a, parameter, words)
    strikes = (Strike("panel", Region(0, 1, 10, 40), BitOperation(keep=0)), Strike("accumulator", at(77, 33), BitOperation(flip=1 << 30)))
    result = call(a, parameter, words, strikes=strikes)
    assert oracles.bits_equal(result.y, clean.y)
    assert (result.counters["recomputed"], result.counters["false_alarms"]) == (1, M - 1)


# --- work ---------------------------------------------------------------------------------------------


def test_faults_of_the_product_do_not_touch_the_panel_or_blame_the_weight():
    a, _, parameter = weight(torch.float32)
    words = fresh_ledger()
    clean = call(a, parameter, words)
    columns = entry_of(parameter).panel.columns.clone()
    result = call(a, parameter, words, strikes=(Strike("accumulator", at(3, 20, rows=100, cols=300), BitOperation(keep=0)),))
    assert oracles.bits_equal(result.y, clean.y) and result.counters["recomputed"] == result.detected == 100
    assert torch.equal(entry_of(parameter).panel.columns, columns) and result.counters["weight_faults"] == 0


def test_beyond_its_budget_the_repair_leaves_rows_uncorrected(monkeypatch):
    a, w = operands(M, N, K, torch.float32)
    strike = (Strike("accumulator", at(9, 20, rows=3), BitOperation(flip=1 << 29)),)
    needed = int(run(a, w, strikes=strike).evidence.summary[summary.TAKEN.value])
    assert 0 < needed < 12
    monkeypatch.setattr(launch, "REPAIR_BUDGET", (needed - 1) / 12)
    result = run(a, w, strikes=strike)
    assert result.counters["uncorrected"] == result.detected == 3
    monkeypatch.setattr(launch, "REPAIR_BUDGET", needed / 12)
    assert run(a, w, strikes=strike).counters["recomputed"] == 3


LARGE = 8192


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weight", "edit", "check tile", "multiprocessor", "nan", "overflow", "panel"])
def test_extra_work_is_bounded_by_one_product(what):
    """Tiles computed again, of M = 8192 rows: never more than a product has."""
    dtype = torch.float16
    a, w = operands(LARGE, 128, 16, dtype)
    parameter = nn.Parameter(w.to(DEVICE), requires_grad=False)
    words = fresh_ledger()
    clean = call(a, parameter, words)
    data_tiles = LARGE // 128
    strikes = ()
    expected = {
        "weight": data_tiles,
        "edit": data_tiles,
        "check tile": 1,
        "multiprocessor": 2,
        "nan": 0,
        "overflow": 0,
        "panel": data_tiles,
    }
    if what == "weight":
        write(parameter, (77, 5), bit=14)
    elif what == "edit":
        parameter.data.mul_(2)
    elif what == "multiprocessor":
        strikes = tuple(Strike("accumulator", at(r, 0, rows=128, cols=128), BitOperation(keep=0)) for r in (0, 1024))
    elif what == "check tile":
        strikes = (Strike("checksum", at(256, 0, rows=128, cols=64), BitOperation(keep=0)),)
    elif what == "nan":
        a = a.clone()
        a[:, 3] = float("nan")
    elif what == "overflow":
        a = a.clone() * 0 + 600
        parameter = nn.Parameter(torch.full_like(w, 30).to(DEVICE), requires_grad=False)
    elif what == "panel":
        strikes = (Strike("panel", Region(0, 1, 3, 14), BitOperation(keep=0)),)
    result = call(a, parameter, words, strikes=strikes)
    assert int(result.evidence.summary[summary.TAKEN.value]) == expected[what] <= data_tiles
    counted = {"weight": "reconstructed", "edit": "stale", "check tile": "recomputed", "multiprocessor": "recomputed", "nan": "input_rows",
               "overflow": "overflow_rows", "panel": "false_alarms"}[what]  # fmt: skip
    rows = {"check tile": 128, "multiprocessor": 256, "edit": 1}.get(what, LARGE)
    found = result.counters[counted]
    assert 0.9 * rows <= found <= rows and result.detected == (found if counted[:4] == "reco" else 0)
    if what in ("weight", "check tile", "multiprocessor", "panel"):
        assert oracles.bits_equal(result.y, clean.y)


def test_a_group_can_list_a_fragment():
    assert tiles.PATCHED.value == 16 * 8


# --- on request ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["frozen", "tracked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_restore_writes_the_remembered_bits_back(dtype, policy):
    layer = abft.Linear(90, 700, dtype=dtype, device=DEVICE, policy=abft.Policy(backend="triton", weights=policy, on_uncorrected="record"))
    x = torch.randn(20, 90).to(dtype).to(DEVICE).requires_grad_()
    clean = layer(x)
    clean.sum().backward()  # another panel, of the transpose
    loaded = layer.weight.detach().clone()
    assert abft.restore(layer) == 0
    for element in ELEMENTS[:3] if policy == "frozen" else [(0, 0), (3, 7), (15, 2)]:  # more of a tracked weight would be an edit
        write(layer.weight, element, bit=SIGN[dtype] - 1)
    assert abft.restore(layer) == 3 and oracles.bits_equal(layer.weight.detach(), loaded)
    abft.report(reset=True)
    assert oracles.bits_equal(layer(x), clean) and abft.report().detected == 0


def test_restore_refuses_what_it_cannot_name_and_writes_nothing():
    layer = abft.Linear(90, 700, device=DEVICE, policy=abft.Policy(backend="triton", weights="frozen"))
    layer(torch.randn(20, 90, device=DEVICE))
    for element in ((3, 7), (9, 7), (5, 5)):
        write(layer.weight, element, bit=30)
    wrong = layer.weight.detach().clone()
    with pytest.raises(abft.AbftError, match="weight changed in memory"):
        abft.restore(layer)
    assert oracles.bits_equal(layer.weight.detach(), wrong)


def test_a_device_warns_of_an_edit_once_per_site():
    layer = abft.Linear(90, 700, device=DEVICE, policy=abft.Policy(backend="triton"))
    x = torch.randn(20, 90, device=DEVICE)
    layer(x)
    for factor in (2.0, 3.0):
        layer.weight.data.mul_(factor)
        layer(x)
    events = [e for e in abft.report().events if e.verdict is abft.Verdict.STALE]
    assert len(events) == 2 and abft.report().stale == 2


@pytest.mark.parametrize("rows", [(10, 20), (10, 11, 12), (100, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_equal_changes_in_one_column_do_not_look_like_one_between_them(dtype, rows):
    a, _, parameter = weight(dtype)
    parameter.data[:, 5] = 0.5
    words = fresh_ledger()
    call(a, parameter, words, weights="frozen")
    for row in rows:
        write(parameter, (row, 5), bit=SIGN[dtype] - 2)
    present = run(a, parameter.detach())
    result = call(a, parameter, words, weights="frozen")
    assert oracles.bits_equal(result.y, present.y) and result.counters["uncorrected"] == result.detected > 0
    assert element_of(result.records[-1]) == (-1, -1)
    layer = nn.Linear(1, 1)
    layer.weight = parameter
    with pytest.raises(abft.AbftError, match="cannot be told"):
        abft.restore(layer)


def test_an_edit_over_the_border_of_two_groups_is_followed_in_both():
    a, _, parameter = weight(torch.float32)
    words = fresh_ledger()
    call(a, parameter, words)
    parameter.data[383:500, 3] = 2.0  # one row of the first group, many of the second
    present = run(a, parameter.detach())
    result = call(a, parameter, words)
    assert oracles.bits_equal(result.y, present.y)
    assert result.detected == result.counters["weight_faults"] == 0 and result.counters["stale"] == 1


def test_an_edit_that_brings_nan_is_an_edit():
    a, _, parameter = weight(torch.float32)
    words = fresh_ledger()
    call(a, parameter, words)
    parameter.data[5] = float("nan")
    result = call(a, parameter, words)
    assert result.detected == 0 and result.counters["stale"] == 1
    assert call(a, parameter, words).counters["input_rows"] == M


def test_restore_leaves_a_wide_edit_of_a_tracked_weight_alone():
    layer = abft.Linear(90, 700, device=DEVICE, policy=abft.Policy(backend="triton"))
    layer(torch.randn(20, 90, device=DEVICE))
    layer.weight.data[3] = 0.0
    with pytest.raises(abft.AbftError, match="refresh"):
        abft.restore(layer)
    assert (layer.weight[3] == 0).all()
