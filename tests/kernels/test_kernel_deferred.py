"""Deferred checks of the kernels: the same results and counts as immediate ones, judged together, later, and nothing repaired."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from unittest import mock

import oracles
import pytest
import torch
from abft.triton_kernels import deferred, verify_deferred, workspace
from kernel_harness import DEVICE, DTYPES, INF, NAN, NULLIFY, SITE, at, counters_of, fresh_ledger, operands, records_of, run

import abft
from abft import ledger, pending
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.faults import BitOperation, Strike
from abft.policy import Policy

DEFERRED = abft.Policy(backend="triton", timing="deferred", on_uncorrected="record")
IMMEDIATE = DEFERRED.replace(timing="immediate")
SHAPES = [(1, 577, 300), (64, 140, 96), (70, 300, 33), (5, 1, 1)]


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    """Every test has workspaces of its own, and leaves nothing behind."""
    monkeypatch.setattr(workspace, "_open", {})
    monkeypatch.setattr(workspace, "_full", [])
    yield
    assert workspace.waiting() == 0


def leave(a, w, words, bias=None, *, strikes=(), site=SITE, **policy):
    """One product whose check is deferred, told to a ledger of the test's own."""
    a, w, bias = a.to(DEVICE), w.to(DEVICE), None if bias is None else bias.to(DEVICE)
    call = Call(a, w, bias, None, False, "fprop", Policy(**{"timing": "deferred", **policy}), site, tuple(strikes))
    return backend.product(call, words, torch.tensor(site, device=DEVICE))


@contextmanager
def launches_counted():
    """How many launches there are of each kernel."""
    counts = {}

    kernels = {"product": deferred.deferred_product, "verify": verify_deferred.verify_deferred}
    cls = type(kernels["product"])
    genuine = cls.__getitem__

    def launch(self, grid):
        for name, kernel in kernels.items():
            if self is kernel:
                counts[name] = counts.get(name, 0) + 1
        return genuine(self, grid)

    with mock.patch.object(cls, "__getitem__", launch):
        yield counts


def test_a_slot_begins_with_a_record_of_the_ledger():
    names = {"site": deferred.SITE, "verdict": deferred.VERDICT, "rows": deferred.ROWS, "row": deferred.ROW, "col": deferred.COLUMN,
             "residual": deferred.RESIDUAL, "bound": deferred.BOUND, "m": deferred.ALL_ROWS, "n": deferred.N_WORD, "k": deferred.K_WORD,
             "step": deferred.STEP_WORD}  # fmt: skip
    assert {name: word.value for name, word in names.items()} == {name: ledger.RECORD_NAMES.index(name) for name in names}
    assert deferred.STATE.value == deferred.RECORD_WORDS.value <= ledger.RECORD
    assert ledger.RECORD_NAMES[deferred.RECORD_WORDS.value :] == ("element_row", "element_col", "unit", "repaired_on")  # -1, all of them
    assert deferred.LOST.value == ledger.LOST < ledger.HEADER


# --- clean -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("form", ["full", "lean"])
def test_many_products_are_judged_in_one_launch_with_the_counts_of_immediate_checks(form, dtype):
    words, together = fresh_ledger(), []
    expected = [run(*operands(m, n, k, dtype), panel=form, site=site) for site, (m, n, k) in enumerate(SHAPES, 10)]
    with launches_counted() as counts:
        for site, (m, n, k) in enumerate(SHAPES, 10):
            together.append(leave(*operands(m, n, k, dtype), words, panel=form, site=site))
        assert not words.any() and workspace.waiting() == len(SHAPES)  # nobody has judged anything yet
        pending.flush()
    assert counts == {"product": len(SHAPES), "verify": 1}
    for site, (y, immediate) in enumerate(zip(together, expected, strict=True), 10):
        assert oracles.bits_equal(y, immediate.y)
        assert counters_of(words, site) == immediate.counters  # the worst clean ratio, too
    assert records_of(words) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_batches_bias_and_groups(dtype):
    a, w = torch.randn(3, 21, 70).to(dtype), (torch.randn(3, 90, 70) / 8).to(dtype)
    bias = torch.randn(90).to(dtype)
    for policy in ({}, {"group": 32}, {"panel": "lean", "group": 16}):
        words, immediate = fresh_ledger(), run(a, w, bias, **policy)
        y = leave(a, w, words, bias, **policy)
        pending.flush()
        assert oracles.bits_equal(y, immediate.y) and counters_of(words, SITE) == immediate.counters


def test_judging_again_adds_nothing():
    words = fresh_ledger()
    leave(*operands(9, 140, 64, torch.float32), words)
    pending.flush()
    before = words.clone()
    (page,) = workspace._open.values()
    verify_deferred.judge_slots(page.slots, page.evidence, words, 4, 1, 4096)  # the used slot, and memory nobody wrote
    assert torch.equal(words, before)


# --- faults ------------------------------------------------------------------------------------------

CLASSES = {"nullify": NULLIFY, "sign": BitOperation(flip=1 << 31), "exponent": BitOperation(flip=1 << 29), "nan": NAN, "inf": INF,
           "beyond-squares": BitOperation(keep=0, flip=0x60000000)}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("level", ["correct", "detect"])
@pytest.mark.parametrize("m", [9, 80])
def test_a_fault_is_found_at_its_place_and_left_as_it_is(m, level, dtype):
    a, w = operands(m, 300, 96, dtype)
    rows = {name: i for i, name in enumerate(CLASSES)}
    strikes = tuple(Strike("accumulator", at(row, 130 + row), CLASSES[name]) for name, row in rows.items())
    seen, words = run(a, w, strikes=strikes, level="detect"), fresh_ledger()
    assert seen.suspect_rows == sorted(rows.values())
    clean = [leave(*operands(5, 40, 24, dtype), words, site=20), leave(a, w, words, site=21)]
    y = leave(a, w, words, strikes=strikes, level=level)
    pending.flush()
    assert oracles.bits_equal(y, seen.y) and not oracles.bits_equal(y, clean[1])
    name = "uncorrected" if level == "correct" else "observed"
    counters = counters_of(words, SITE)
    assert counters[name] == len(rows) and counters["checks"] == m and counters["executions"] == 1
    assert counters["recomputed"] + counters["input_rows"] + counters["overflow_rows"] == 0
    assert all(counters_of(words, site)[name] == 0 for site in (20, 21))
    (record,) = records_of(words)
    assert ledger.VERDICTS[record["verdict"]].name == name.upper() and record["rows"] == len(rows) and record["row"] in rows.values()
    assert (record["site"], record["m"], record["n"], record["k"], record["col"]) == (SITE, m, 300, 96, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_the_record_names_the_worst_row_with_the_residual_and_bound_of_an_immediate_check(dtype):
    a, w = operands(70, 300, 96, dtype)
    strikes = (Strike("accumulator", at(66, 7), BitOperation(flip=1 << 27)), Strike("accumulator", at(3, 7), BitOperation(flip=1 << 23)))
    words = fresh_ledger()
    leave(a, w, words, strikes=strikes, level="detect")
    pending.flush()
    (found,), (expected,) = records_of(words), run(a, w, strikes=strikes, level="detect").records
    for name in ("verdict", "rows", "row", "residual", "bound", "role", "dtype", "backend", "m", "n", "k", "step"):
        assert found[name] == expected[name], name


def test_a_wrong_operand_of_one_tile_and_a_wrong_panel():
    a, w = operands(9, 300, 96, torch.float32)
    words = fresh_ledger()
    leave(a, w, words, strikes=(Strike("operand", at(4, 0, cols=96), NULLIFY, tile0=64, tile1=128),))
    pending.flush()
    assert counters_of(words, SITE)["uncorrected"] == 1 and records_of(words)[0]["row"] == 4
    words = fresh_ledger()
    leave(a, w, words, strikes=(Strike("panel", at(0, 5, cols=4), BitOperation(flip=1 << 29)),))
    pending.flush()
    assert counters_of(words, SITE)["uncorrected"] == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("m", [9, 80])
def test_a_check_that_goes_wrong_itself_is_told(m, dtype):
    a, w = operands(m, 300, 96, dtype)
    words = fresh_ledger()
    y = leave(a, w, words, strikes=(Strike("checksum", at(4, 0, rows=2, cols=300), BitOperation(keep=0)),))
    pending.flush()
    assert oracles.bits_equal(y, run(a, w).y) and counters_of(words, SITE)["uncorrected"] == 2


# --- what is no fault ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_operands_that_are_not_finite_are_input(value, dtype):
    a, w = operands(9, 300, 96, dtype)
    a[5, 17] = value
    immediate, words = run(a, w), fresh_ledger()
    leave(a, w, words)
    pending.flush()
    counters = counters_of(words, SITE)
    assert counters["input_rows"] == immediate.counters["input_rows"] == 1 and counters["uncorrected"] == 0
    assert records_of(words)[0]["row"] == 5


def test_results_beyond_the_type_are_overflow():
    a, w = torch.full((7, 64), 1.0).half(), torch.full((150, 64), 30.0).half()
    a[3] = 100.0
    immediate, words = run(a, w), fresh_ledger()
    y = leave(a, w, words)
    pending.flush()
    assert y[3].isinf().all() and immediate.counters["overflow_rows"] == counters_of(words, SITE)["overflow_rows"] == 1
    assert counters_of(words, SITE)["uncorrected"] == 0


def test_rows_whose_squares_overflow_are_judged_by_the_range_safe_bound():
    a, w = operands(7, 150, 64, torch.float32)
    a[2] *= 1e22
    words = fresh_ledger()
    leave(a, w, words)
    leave(a, w, words, strikes=(Strike("accumulator", at(2, 77), BitOperation(flip=1 << 24)),), site=SITE + 1)
    pending.flush()
    assert counters_of(words, SITE)["uncorrected"] == 0 and counters_of(words, SITE + 1)["uncorrected"] == 1


# --- evidence is not lost --------------------------------------------------------------------------------


def test_a_full_workspace_is_judged_and_used_again(monkeypatch):
    monkeypatch.setattr(workspace, "SLOTS", 3)
    a, w = operands(4, 100, 32, torch.float32)
    words = fresh_ledger()
    with launches_counted() as counts:
        for i in range(8):
            leave(a, w, words, strikes=(Strike("accumulator", at(1, 2), NULLIFY),) if i in (1, 7) else ())
        assert counts["verify"] == 2 and len(workspace._open) == 1
        pending.flush()
    assert counts == {"product": 8, "verify": 3}
    counters = counters_of(words, SITE)
    assert (counters["products"], counters["checks"], counters["uncorrected"]) == (8, 32, 2)
    assert int(words[ledger.LOST]) == 0


def test_evidence_larger_than_the_workspace_is_judged_at_once(monkeypatch):
    monkeypatch.setattr(workspace, "FLOATS", 100)
    words = fresh_ledger()
    leave(*operands(40, 100, 32, torch.float32), words, strikes=(Strike("accumulator", at(1, 2), NULLIFY),))
    assert workspace.waiting() == 0 and counters_of(words, SITE)["uncorrected"] == 1


def test_what_a_replay_overwrites_before_it_was_judged_is_counted():
    """As a captured graph does: the same slot, written twice."""
    a, w = operands(4, 100, 32, torch.float32)
    words = fresh_ledger()
    leave(a, w, words)
    (page,) = workspace._open.values()
    page.used = page.products = 0
    leave(a, w, words)
    pending.flush()
    assert int(words[ledger.LOST]) == 1 and counters_of(words, SITE)["products"] == 1


def test_a_report_names_lost_evidence():
    x, layer = torch.randn(3, 32, device=DEVICE), abft.Linear(32, 40, device=DEVICE, policy=DEFERRED)
    with torch.no_grad():
        layer(x)
        (page,) = workspace._open.values()
        page.used = page.products = 0
        layer(x)
    report = abft.report()
    assert report.products == 1 and report.bypassed[ledger.LOST_EVIDENCE] == 1
    host = torch.from_numpy(ledger.cpu().words) if DEVICE.type == "cpu" else ledger.tensor(DEVICE)
    host[ledger.LOST] = 0


@pytest.mark.skipif(DEVICE.type == "cuda", reason="host threads of one stream share a page")
def test_each_thread_tells_its_own_ledger():
    layer = abft.Linear(32, 40, policy=DEFERRED)
    x = torch.randn(3, 32)

    def work():
        with torch.no_grad():
            layer(x)

    abft.report(reset=True)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert workspace.waiting() == 3
    assert abft.report().products == 3 and workspace.waiting() == 0


# --- the public way --------------------------------------------------------------------------------------


def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(48, 130), torch.nn.GELU(), torch.nn.Linear(130, 40)).to(DEVICE)


def test_a_scope_judges_at_its_end_and_the_replay_is_right():
    net, x = model(), torch.randn(5, 48, device=DEVICE)
    with torch.no_grad():
        with abft.protected(IMMEDIATE) as immediate:
            clean = net(x)
        theirs = immediate.report()
        with abft.inject.faults(abft.inject.Fault("nullify", pattern="row"), seed=3), abft.protected(DEFERRED) as scope:
            wrong = net(x)
        assert workspace.waiting() == 0  # judged at exit
        found = scope.report()
        assert found.uncorrected == found.detected == 1 and len(found.events) == 1 and not oracles.bits_equal(wrong, clean)
        assert found.events[0].verdict is abft.Verdict.UNCORRECTED
        with abft.protected(DEFERRED) as again:
            assert oracles.bits_equal(net(x), clean)
    ours = again.report()
    assert ours.detected == 0 and (ours.checks, ours.products, ours.worst) == (theirs.checks, theirs.products, theirs.worst) == (10, 2, ours.worst)


def test_a_scope_judges_after_an_exception_too():
    net, x = model(), torch.randn(5, 48, device=DEVICE)
    with torch.no_grad(), pytest.raises(KeyError), abft.protected(DEFERRED) as scope:
        net(x)
        raise KeyError
    assert workspace.waiting() == 0 and scope.report().products == 2


def test_evidence_from_before_a_scope_or_a_reset_is_not_counted_to_it():
    net, x = abft.protect(model(), DEFERRED), torch.randn(5, 48, device=DEVICE)
    with torch.no_grad():
        net(x)
        with abft.protected(DEFERRED) as scope:
            pass
        assert scope.report().products == 0
        net(x)
        assert abft.report(reset=True).products >= 2 and abft.report().products == 0


@pytest.mark.parametrize("how", ["raise", "callable", "warn"])
def test_reactions_come_when_it_is_judged(how):
    seen = []
    policy = DEFERRED.replace(on_uncorrected=seen.append if how == "callable" else how)
    net, x = model(), torch.randn(5, 48, device=DEVICE)
    with torch.no_grad(), abft.inject.faults(abft.inject.Fault("nullify", pattern="row"), seed=3):
        if how == "raise":
            with pytest.raises(abft.UncorrectedFault, match="UNCORRECTED"), abft.protected(policy):
                net(x)
        else:
            with abft.protected(policy) as scope:
                net(x)
            if how == "warn":
                with pytest.warns(RuntimeWarning, match="UNCORRECTED"):
                    scope.report()
            else:
                scope.report()
                assert [event.verdict for event in seen] == [abft.Verdict.UNCORRECTED]


def test_a_step_is_replayed():
    net = abft.protect(model(), DEFERRED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    guard = abft.StepGuard(net, optimizer, DEFERRED)
    x = torch.randn(5, 48, device=DEVICE)
    grads, attempts = [], 0
    for fault in (None, abft.inject.Fault("nullify", role="dgrad", pattern="row"), abft.inject.Fault("nullify", role="wgrad", pattern="row")):
        before = guard.replays
        with abft.inject.faults(fault, seed=2) if fault else nullcontext():
            while guard.attempt():
                attempts += 1
                net(x).square().mean().backward()
        assert guard.replays - before == (fault is not None)
        grads.append([p.grad.clone() for p in net.parameters()])
        optimizer.zero_grad(set_to_none=True)
    assert attempts == 5 and guard.last.uncorrected == 1
    for other in grads[1:]:
        assert all(oracles.bits_equal(g, h) for g, h in zip(grads[0], other, strict=True))


def test_nothing_is_read_back_to_the_host():
    layer, x = abft.Linear(32, 40, device=DEVICE, policy=DEFERRED), torch.randn(6, 32, device=DEVICE)
    layer(x)
    abft.verify_deferred()

    def refuse(self, *args):
        raise AssertionError("a host synchronisation")

    with mock.patch.multiple(torch.Tensor, item=refuse, tolist=refuse, __bool__=refuse, cpu=refuse):
        layer(x)
        abft.verify_deferred()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a process of its own that interprets")
def test_what_waits_when_the_process_ends_is_judged_and_said():
    code = (
        "import torch, abft; x = torch.randn(3, 32); layer = abft.Linear(32, 40, policy=abft.Policy(backend='triton', timing='deferred'))\n"
        "with torch.no_grad(), abft.inject.faults(abft.inject.Fault('nullify', pattern='row'), seed=1): layer(x)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0 and "1 product(s) with deferred checks were computed after the last report: 1 wrong row(s)" in done.stderr


# --- CUDA graphs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA graphs")
@pytest.mark.parametrize("inside", [True, False], ids=["judged-inside", "judged-outside"])
def test_replays_of_a_graph_are_judged_or_counted_as_lost(inside):
    layer, x = abft.Linear(64, 140, device=DEVICE, policy=DEFERRED), torch.randn(6, 64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = layer(x)
        abft.report(reset=True)
        with torch.cuda.graph(graph):
            y = layer(x)
            if inside:
                abft.verify_deferred()
        assert abft.report(reset=True).products == 0  # captured, not run
        for _ in range(3):
            graph.replay()
    report = abft.report()
    assert oracles.bits_equal(y, expected) and report.detected == 0
    assert (report.products, report.bypassed.get(ledger.LOST_EVIDENCE, 0)) == ((3, 0) if inside else (1, 2))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs streams")
def test_evidence_of_another_stream_is_judged_there_and_read_here():
    layer, x = abft.Linear(64, 140, device=DEVICE, policy=DEFERRED), torch.randn(6, 64, device=DEVICE)
    side = torch.cuda.Stream()
    with torch.no_grad():
        layer(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
    assert len(workspace._open) == 2 and abft.report().products == 2
