"""Reports and events: what is counted, over which window, by which thread, and what an event says."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
import warnings

import pytest
import torch
import windows
from torch import nn

import abft
from abft import ledger, reporting
from abft.inject import Fault, faults

QUIET = abft.Policy(level="detect", on_uncorrected="record")


def struck(layer, rows=5, what="nan", **more):
    """One forward of ``layer`` hit by one fault."""
    with faults(Fault(what, **({"index": (2, 3)} | more))) as log:
        layer(torch.randn(rows, layer.in_features))
    return log


# --- counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 33), (64, 8)])
def test_a_check_is_a_row_of_a_product(rows, columns):
    layer = abft.protect(nn.Linear(16, columns))
    x = torch.randn(rows, 16, requires_grad=True)
    y = layer(x)
    assert (abft.report().checks, abft.report().products) == (rows, 1)
    y.sum().backward()
    report = abft.report()
    assert (report.checks, report.products, report.executions) == (rows + rows + columns, 3, 3)


def test_checks_repeated_after_a_repair_do_not_count_again():
    layer = abft.protect(nn.Linear(16, 8))
    struck(layer)
    report = abft.report()
    assert (report.checks, report.products, report.executions, report.recomputed) == (5, 1, 2, 1)


def test_a_full_batch_of_faults_counts_every_row():
    layer = abft.protect(nn.Linear(16, 8), QUIET)
    with faults(Fault("nullify", pattern="tile", index=(0, 0))):
        layer(torch.randn(5, 16))
    report = abft.report()
    assert report.detected == report.observed == 5 and len(report.events) == 1 and report.events[0].rows == 5


def test_an_empty_report_is_all_zeros():
    report = abft.report()
    numbers = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.type in ("int", "float")}
    assert set(numbers.values()) == {0}
    assert (report.bypassed, report.events, report.sites, report.detected, report.corrected) == ({}, (), {}, 0, 0)


def test_reports_have_the_fields_of_the_contract_and_are_frozen():
    names = {f.name for f in dataclasses.fields(abft.Report)} | {"detected", "corrected"}
    assert names >= {
        "checks", "products", "detected", "observed", "recomputed", "reconstructed", "uncorrected", "false_alarms", "stale", "input_rows",
        "overflow_rows", "weight_faults", "dropped_events", "bypassed", "worst", "events", "sites", "corrected",
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        abft.report().checks = 3


def test_the_parts_add_up_to_detected():
    x = torch.randn(6, 32)
    for policy in (abft.Policy(), QUIET, abft.Policy(weights="frozen", on_uncorrected="record")):
        layer = abft.protect(nn.Linear(32, 24), policy)
        layer(x)
        for fault in (Fault("nan"), Fault("nullify", pattern="row"), Fault("bitflip", where="weight", bit=29), Fault("bitflip", where="weight", pattern="tile", bit=29)):
            with faults(fault, seed=1), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer(x)
    report = abft.report()
    assert report.detected == report.observed + report.corrected + report.uncorrected > 0
    assert report.corrected == report.recomputed + report.reconstructed
    for site in report.sites.values():
        assert site.detected == site.observed + site.corrected + site.uncorrected


# --- worst -------------------------------------------------------------------------------------------


def test_worst_lies_between_zero_and_one_on_clean_rows():
    layer = abft.protect(nn.Linear(96, 64), name="l")
    layer(torch.randn(50, 96))
    report = abft.report()
    assert 0 < report.worst <= 1 and report.sites["l"].worst == report.worst


def test_worst_belongs_to_its_window():
    """A maximum has no difference: each window must keep its own, however they overlap."""
    windows.check_worst(abft.protect(nn.Linear(96, 64, bias=False)), torch.zeros(4, 96), torch.randn(400, 96))


def test_worst_leaves_suspect_rows_out():
    layer = abft.protect(nn.Linear(96, 64), QUIET)
    struck(layer, what="nullify", pattern="row")
    assert abft.report().worst <= 1


# --- windows -----------------------------------------------------------------------------------------


def test_reset_starts_anew():
    layer = abft.protect(nn.Linear(16, 8))
    struck(layer)
    before = abft.report(reset=True)
    after = abft.report()
    assert (before.checks, before.detected, len(before.events)) == (5, 1, 1)
    assert (after.checks, after.detected, len(after.events), after.sites) == (0, 0, 0, {})
    layer(torch.randn(3, 16))
    assert abft.report().checks == 3


def test_report_alone_changes_nothing():
    struck(abft.protect(nn.Linear(16, 8)))
    assert abft.report() == abft.report()


def test_a_scope_reports_what_happened_inside_it():
    layer = nn.Linear(16, 8)
    checked = abft.protect(nn.Linear(16, 8), name="before")
    struck(checked)
    with abft.protected() as scope:
        layer(torch.randn(3, 16))
        assert scope.report().checks == 3
        with abft.protected() as inner:
            layer(torch.randn(2, 16))
        struck(layer)
    report = scope.report()
    assert (report.checks, report.detected, len(report.events)) == (10, 1, 1)
    assert inner.report().checks == 7  # since its own entry, as the contract says
    assert report.events[0].site == "linear"
    assert abft.report().checks == 15


def test_the_backward_of_what_ran_inside_a_scope_is_checked_after_it():
    layer = nn.Linear(16, 8)
    with abft.protected() as scope:
        loss = layer(torch.randn(3, 16, requires_grad=True)).sum()
    loss.backward()
    assert scope.report().checks == 3 + 3 + 8


def test_a_scope_that_was_never_entered_cannot_report():
    with pytest.raises(RuntimeError, match="entered"):
        abft.protected().report()


def test_wait_false_returns_what_has_been_drained():
    layer = abft.protect(nn.Linear(16, 8))
    layer(torch.randn(3, 16))
    known = abft.report()
    layer(torch.randn(4, 16))
    assert abft.report(wait=False).checks in (known.checks, 7)
    assert abft.report().checks == 7


# --- sites -------------------------------------------------------------------------------------------


def test_every_module_has_its_site():
    model = abft.protect(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), name="net")
    model(torch.randn(5, 16))
    report = abft.report()
    assert {name: site.checks for name, site in report.sites.items()} == {"net.0": 5, "net.2": 5}
    with faults(Fault("nan", site="net.2", index=(1, 1))):
        model(torch.randn(5, 16))
    report = abft.report()
    assert report.sites["net.2"].detected == 1 and report.sites["net.0"].detected == 0
    assert [e.site for e in report.sites["net.2"].events] == ["net.2"]


def test_functions_have_sites_of_their_own():
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    abft.linear(x, w), abft.matmul(x, w), abft.bmm(x[None], w[None]), abft.addmm(x, x, w)
    assert {name: s.checks for name, s in abft.report().sites.items()} == {"linear": 2, "matmul": 2, "bmm": 2, "addmm": 2}


def test_many_short_lived_models_do_not_use_up_the_sites():
    for _ in range(50):
        model = abft.protect(nn.Sequential(*(nn.Linear(2, 2) for _ in range(100))), name="many")
    model[99](torch.randn(3, 2))
    assert set(abft.report().sites) == {"many.99"}


# --- events ------------------------------------------------------------------------------------------


def test_an_event_says_all_there_is_to_know():
    layer = abft.protect(nn.Linear(16, 8), QUIET, name="head")
    started = time.time()
    struck(layer, what="bitflip", bit=29)
    (event,) = abft.report().events
    assert [f.name for f in dataclasses.fields(event)] == [
        "v", "time", "step", "rank", "host", "device", "uuid", "site", "role", "backend", "dtype", "shape", "rows", "row", "col", "residual", "bound",
        "cause", "verdict", "context", "message", "calibration",
    ]  # fmt: skip
    assert started - 1 <= event.time <= time.time() + 1
    assert (event.v, event.step, event.rank, event.host, event.device, event.uuid) == (1, event.step, 0, socket.gethostname(), "cpu", "")
    assert (event.site, event.role, event.backend, event.dtype, event.shape) == ("head", "fprop", "reference", "float32", (5, 8, 16))
    assert (event.rows, event.row, event.col) == (1, 2, 3)
    assert not abs(event.residual) <= event.bound
    assert (event.verdict, event.context) == (abft.Verdict.OBSERVED, {})
    assert event.cause in ("transient", "persistent", "weight", "panel", "unknown")
    assert "head" in event.message and "\n" not in event.message


def test_events_are_json_able():
    struck(abft.protect(nn.Linear(16, 8), QUIET), what="bitflip", bit=20)
    (event,) = abft.report().events
    assert json.loads(json.dumps(event.to_dict()))["verdict"] == "OBSERVED"


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_one_event_per_call_and_role(role):
    layer = abft.protect(nn.Linear(16, 8))
    with faults(Fault("nullify", role=role, pattern="fragment", index=(0, 0))):
        layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    (event,) = abft.report().events
    shape = {"fprop": (5, 8, 16), "dgrad": (5, 16, 8), "wgrad": (8, 16, 5)}[role]
    assert (event.role, event.shape, event.rows) == (role, shape, shape[0])


@pytest.mark.parametrize("dtype, name", [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float64, "float64")])
def test_the_dtype_of_an_event(dtype, name):
    with faults(Fault("nan")):
        abft.linear(torch.randn(3, 16).to(dtype), torch.randn(8, 16).to(dtype))
    assert abft.report().events[-1].dtype == name


def test_context_labels_the_events_inside_it():
    layer = abft.protect(nn.Linear(16, 8))
    struck(layer)
    with abft.context(release="2.1", request="a17"):
        struck(layer)
        with abft.context(request="b2", attempt=3):
            struck(layer)
        struck(layer)
    struck(layer)
    assert [e.context for e in abft.report().events] == [
        {}, {"release": "2.1", "request": "a17"}, {"release": "2.1", "request": "b2", "attempt": "3"}, {"release": "2.1", "request": "a17"}, {},
    ]  # fmt: skip


def test_context_is_left_even_by_an_error():
    with pytest.raises(KeyError), abft.context(request="a"):
        raise KeyError
    struck(abft.protect(nn.Linear(16, 8)))
    assert abft.report().events[-1].context == {}


def test_old_events_make_room_and_are_counted_as_dropped(monkeypatch):
    monkeypatch.setattr("abft.reporting.MAX_EVENTS", 8)
    layer = abft.protect(nn.Linear(16, 8))
    for _ in range(12):
        struck(layer)
    report = abft.report(reset=True)
    assert (report.recomputed, len(report.events), report.dropped_events) == (12, 8, 4)
    struck(layer)
    report = abft.report()
    assert (report.recomputed, len(report.events), report.dropped_events) == (1, 1, 0)


def test_more_events_than_a_ring_holds_are_all_kept():
    finding = ledger.Finding(abft.Verdict.OBSERVED, 1, 0, None, 1.0, 0.5)
    product = {"role": 0, "m": 1, "n": 1, "k": 1, "dtype": 0, "backend": 0}
    for _ in range(ledger.RING + 100):
        reporting.note(ledger.cpu(), 0, finding, product)
    report = abft.report()
    assert (len(report.events), report.dropped_events) == (ledger.RING + 100, 0)


# --- the table -----------------------------------------------------------------------------------------


def test_the_table_reads_aloud():
    layer = abft.protect(nn.Linear(16, 8), name="head")
    struck(layer)
    abft.linear(torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64))
    text = str(abft.report())
    for part in ("5 rows", "detected 1", "recomputed 1", "head", "int64"):
        assert part in text, text


# --- threads -------------------------------------------------------------------------------------------


def test_threads_lose_no_counts_and_share_no_labels():
    """Each thread writes a ledger of its own, and the report sums them."""
    layer = abft.protect(nn.Linear(16, 8), QUIET, name="shared")
    errors = []

    def work(number):
        try:
            x = torch.randn(number + 1, 16)
            with abft.context(thread=number), torch.no_grad():
                for _ in range(100):
                    layer(x)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must tell
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    with faults(Fault("nan", probability=0.1), seed=3) as log:
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            abft.report()  # reading meanwhile must not make or lose an event
        for thread in threads:
            thread.join()
    report = abft.report()
    assert errors == []
    assert (report.checks, report.products) == (100 * (1 + 2 + 3 + 4), 400)
    assert report.observed == len(report.events) == len(log) > 0
    assert all(int(e.context.get("thread", -1)) == e.shape[0] - 1 for e in report.events)


def test_policies_in_force_belong_to_their_thread():
    layer = nn.Linear(16, 8)
    seen = {}

    def other():
        layer(torch.randn(3, 16))
        seen["checks"] = abft.report().checks

    with abft.protected():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen["checks"] == 0


def test_backward_in_another_thread_is_counted():
    layer = abft.protect(nn.Linear(16, 8))
    loss = layer(torch.randn(3, 16, requires_grad=True)).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert abft.report().checks == 3 + 3 + 8
