"""Marks wait for nothing: what a report starts from is completed by the next reading, and a guarded step has one.

On stand-in devices, whose ledgers can be read in one counted way only (stand_in.py).
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import stand_in
import torch
import windows
from torch import Tensor, nn
from torch.nn import functional as F

import abft
from abft import Policy, StepGuard, UncorrectedFault, ledger, reporting
from abft.inject import Fault, faults

DETECT = Policy(level="detect", on_uncorrected="record")


@pytest.fixture
def device():
    with stand_in.devices() as devices:
        yield devices


def layer(policy: Any = DETECT, name: str = "layer") -> nn.Module:
    torch.manual_seed(3)
    return abft.protect(nn.Linear(24, 10), policy, name=name)


def rows(count: int) -> Tensor:
    return torch.randn(count, 24)


def struck(module: nn.Module, count: int = 5) -> None:
    with faults(Fault("nullify", pattern="row", index=(2, 0))):
        module(rows(count))


# --- what the stand-in is -----------------------------------------------------------------------------------


def test_the_stand_in_keeps_the_books_and_refuses_to_be_looked_at(device):
    module = layer()
    struck(module)
    assert device.transfers == 0
    for look in (Tensor.cpu, Tensor.numpy, Tensor.tolist, lambda words: words[0].item(), lambda words: bool(words[0]), lambda words: words.to("cpu")):
        with pytest.raises(AssertionError, match="the host looked"):
            look(device.present)
    report = abft.report()
    assert device.transfers == 1
    assert (report.checks, report.observed, report.events[0].device) == (5, 1, "xpu:0")


# --- marks --------------------------------------------------------------------------------------------------


def test_marks_wait_for_nothing_and_one_transfer_completes_them_all(device):
    module, marks = layer(), []
    for count in (1, 2, 3, 4):
        marks.append(reporting.mark())
        module(rows(count))
    assert device.transfers == 0
    now = reporting.drain()
    assert device.transfers == 1
    assert [reporting.between(mark, now).checks for mark in marks] == [10, 9, 7, 4]
    assert [reporting.between(a, b).checks for a, b in zip(marks, marks[1:], strict=False)] == [1, 2, 3]
    assert device.transfers == 1


def test_entering_a_scope_reads_nothing(device):
    module = layer()
    with abft.protected() as outer:
        module(rows(2))
        with abft.protected() as inner:
            module(rows(3))
        assert device.transfers == 0
        assert (inner.report().checks, outer.report().checks) == (3, 5)
        assert device.transfers == 2, "one for each report"


def test_events_belong_to_marks_by_their_place(device):
    module = layer()
    struck(module)
    first = reporting.mark()
    struck(module)
    struck(module)
    second = reporting.mark()
    struck(module)
    now = reporting.drain()
    assert [len(reporting.between(start, now).events) for start in (first, second)] == [3, 1]
    report = reporting.between(first, second)
    assert (report.observed, len(report.events), report.dropped_events) == (2, 2, 0)
    assert device.transfers == 1


def test_worst_belongs_to_its_window_on_a_device_too(device):
    windows.check_worst(layer(Policy()), torch.zeros(4, 24), torch.randn(400, 24))


@pytest.mark.parametrize("read_between", [False, True])
def test_dropped_marks_are_forgotten_and_their_maxima_are_not(device, read_between):
    module, hard = layer(Policy()), torch.randn(400, 24)
    module(hard)
    worst = abft.report(reset=True).worst
    gc.collect()
    start = reporting.mark()
    held = len(reporting._windows)  # this one's, and those of marks that other tests left alive
    module(hard)
    for i in range(100):
        reporting.mark()
        module(torch.zeros(1, 24))
        if read_between and i == 50:
            reporting.drain()
    gc.collect()
    middle = reporting.mark()
    module(torch.zeros(1, 24))
    assert len(reporting._windows) <= held + 1 and sum(bool(window.frozen) for window in reporting._windows) <= held + 1
    assert len(reporting._boundaries) <= 1
    assert device.transfers == 1 + read_between
    assert (reporting.since(start).worst, reporting.since(middle).worst) == (worst, 0)
    assert reporting.since(start).checks == 400 + 101
    assert reporting.between(start, middle).worst == worst


def test_a_ledger_made_after_a_mark_counts_from_its_beginning(device):
    module = layer()
    mark = reporting.mark()
    struck(module, 3)
    device.add()
    late = reporting.mark()
    struck(module, 7)
    report = reporting.since(mark)
    assert (report.checks, report.observed, {e.device for e in report.events}) == (10, 2, {"xpu:0", "xpu:1"})
    assert (reporting.since(late).checks, len(reporting.since(late).events)) == (7, 1)
    device.transfers = 0
    reporting.mark()
    reporting.drain()
    assert device.transfers == 2, "one for each device"


def test_a_site_made_after_a_mark_counts_from_its_beginning(device):
    mark = reporting.mark()
    layer(name="late")(rows(6))
    assert {name: site.checks for name, site in reporting.since(mark).sites.items()} == {"late": 6}


def test_a_reset_is_a_mark(device):
    module = layer()
    struck(module)
    before = abft.report(reset=True)
    struck(module, 7)
    assert device.transfers == 1
    after = abft.report()
    assert (before.checks, before.observed, len(before.events)) == (5, 1, 1)
    assert (after.checks, after.observed, len(after.events)) == (7, 1, 1)


def test_a_reset_that_does_not_wait_leaves_behind_what_has_been_drained(device):
    module = layer()
    struck(module)
    abft.report()
    struck(module, 7)
    transfers = device.transfers
    assert abft.report(wait=False).checks == 5
    left = abft.report(reset=True, wait=False)
    assert (left.checks, len(left.events), device.transfers) == (5, 1, transfers)
    after = abft.report()
    assert (after.checks, after.observed, len(after.events)) == (7, 1, 1)


def test_what_a_ring_has_overwritten_is_counted_as_dropped(device):
    mark = reporting.mark()
    device.present[ledger.HEAD] += ledger.RING + 100
    late = reporting.mark()
    device.present[ledger.HEAD] += 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # blank records say OBSERVED, at a site whose policy warns
        now = reporting.drain()
    assert (len(reporting.between(mark, now).events), reporting.between(mark, now).dropped_events) == (ledger.RING, 105)
    assert (len(reporting.between(late, now).events), reporting.between(late, now).dropped_events) == (5, 0)


def test_events_carry_the_labels_that_were_in_force_when_a_mark_followed_them(device):
    module = layer()
    kept = []
    with abft.context(request="a"):
        struck(module)
        kept.append(reporting.mark())
    with abft.context(request="b"):
        struck(module)
        kept.append(reporting.mark())
        struck(module)
        kept.append(reporting.mark())
    struck(module)
    assert device.transfers == 0
    with abft.context(request="c"):
        report = abft.report()
    assert [e.context.get("request") for e in report.events] == ["a", "b", "b", "c"]


def test_a_reaction_comes_with_the_reading(device):
    module = layer(Policy(level="detect", on_uncorrected="raise"))
    with pytest.raises(abft.FaultDetected), abft.protected(Policy(on_uncorrected="raise")):
        struck(module)
    assert abft.report().observed == 1


# --- StepGuard ------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(7)
    return abft.protect(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)), DETECT)


class Loop:
    """The contract's loop over a few steps; transfers are noted at every attempt and every step."""

    def __init__(self, devices: stand_in.Devices, accumulate: int = 1, scaled: bool = False, **options: Any) -> None:
        self.devices, self.accumulate = devices, accumulate
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        self.guard = StepGuard(self.model, self.optimizer, scaler=self.scaler, **options)
        self.at_attempts: list[int] = []

    def attempts(self) -> None:
        x, target = rows(12), torch.randint(10, (12,))
        before = self.devices.transfers
        while self.guard.attempt():
            self.at_attempts.append(self.devices.transfers - before)
            for part, wanted in zip(x.chunk(self.accumulate), target.chunk(self.accumulate), strict=True):
                loss = F.cross_entropy(self.model(part), wanted) / self.accumulate
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.at_attempts.append(self.devices.transfers - before)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def step(self) -> bool:
        before = self.devices.transfers
        taken = self.guard.step()
        assert self.devices.transfers == before, "a step reads nothing"
        self.optimizer.zero_grad()
        return taken


@pytest.mark.parametrize("count", [1, 2], ids=["one device", "two devices"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"scaled": True}, {"scaled": True, "accumulate": 2}], ids=str)
def test_an_attempt_has_one_transfer_per_device(options, count):
    with stand_in.devices(count) as devices:
        loop = Loop(devices, **options)
        for _ in range(3):
            loop.attempts()
            assert loop.step()
        assert loop.at_attempts == [0, count] * 3, "none when an attempt begins, one when it ends"
        assert loop.guard.replays == 0 and loop.guard.last.checks > 0


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"scaled": True}], ids=str)
def test_a_replay_costs_its_own_transfer_and_no_more(device, options):
    loop = Loop(device, **options)
    with faults(Fault("nullify", pattern="row", call=1), Fault("nullify", role="wgrad", pattern="row", call=3 * options.get("accumulate", 1))):
        loop.attempts()
    assert loop.step()
    assert loop.at_attempts == [0, 1, 2, 3] and loop.guard.replays == 2
    assert loop.guard.last.observed == 2 == len(loop.guard.last.events), "the last step's report holds all its attempts"
    loop.attempts()
    assert loop.step() and loop.guard.last.detected == 0
    assert loop.at_attempts[4:] == [0, 1]


def test_giving_up_reads_no_more(device):
    loop = Loop(device, max_replays=1, on_failed="drop")
    with faults(Fault("nullify", pattern="row", probability=1.0)):
        loop.attempts()
    assert loop.at_attempts == [0, 1, 2]
    assert loop.step() is False


def test_a_fault_on_a_device_after_the_last_attempt_keeps_the_step_back(device):
    loop = Loop(device)
    loop.attempts()
    transfers = device.transfers
    struck(layer(name="penalty"))
    with pytest.raises(UncorrectedFault, match="pending.*OBSERVED at penalty"):
        loop.guard.step()
    assert device.transfers == transfers + 1
    with pytest.raises(UncorrectedFault, match="pending.*OBSERVED at penalty"):
        loop.optimizer.step()
    assert device.transfers == transfers + 1, "nothing was issued since: what was read holds"
    loop.guard.abandon()
    loop.optimizer.step()


def test_a_clean_or_repaired_product_after_the_last_attempt_costs_one_transfer(device):
    loop = Loop(device)
    loop.attempts()
    transfers = device.transfers
    struck(layer(Policy(on_uncorrected="record"), "repairs"))
    layer("audit", "other")(rows(4))
    assert loop.guard.step()
    assert device.transfers == transfers + 1
    assert abft.report().recomputed == 1


def test_a_fault_that_python_did_not_issue_waits_for_the_next_report(device):
    """As of a CUDA graph replayed between attempt and step: said in StepGuard's docstring."""
    loop = Loop(device)
    loop.attempts()
    words, issued = device.present, ledger._unread
    struck(layer(name="replayed"))
    ledger._unread = issued
    assert words is device.present and loop.step()
    assert abft.report().sites["replayed"].observed == 1


def test_while_a_graph_is_captured_no_mark_is_taken_and_a_step_reads_nothing(device, monkeypatch):
    loop = Loop(device)
    loop.attempts()
    layer()(rows(3))
    before, transfers = device.present.clone(), device.transfers
    with monkeypatch.context() as capture:
        capture.setattr(ledger, "_capturing", lambda words: True)
        with pytest.raises(RuntimeError, match="before the capture"):
            abft.protected().__enter__()
        assert torch.Tensor.equal(before, device.present), "maxima were not begun anew"
        loop.optimizer.step()
    assert device.transfers == transfers
    struck(layer(name="later"))
    with pytest.raises(UncorrectedFault, match="later"):
        loop.optimizer.step()


def test_an_attempt_sees_what_python_did_not_issue(device):
    loop = Loop(device, max_replays=0, on_failed="drop")
    assert loop.guard.attempt()
    issued = ledger._unread
    struck(layer(name="replayed"))
    ledger._unread = issued
    assert not loop.guard.attempt()
    assert not loop.step() and loop.guard.last.observed == 1
