"""StepGuard, and what surrounds training: rates of injection, activation checkpointing, models of Hugging Face.

A guarded run with faults must end exactly where the fault-free, unprotected run ends: same losses, weights, buffers,
optimizer and scaler, bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import abft
from abft import Policy, StepGuard, UncorrectedFault
from abft.inject import Fault, Mixture

DETECT = Policy(level="detect", on_uncorrected="record")
STEPS = 20


class Smoothed(nn.Module):
    """Keeps a running mean in a buffer that it replaces at every forward, and one that it writes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().float().mean(0)
            self.calls += 1
        return x - self.mean.to(x.dtype)


def net() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(24, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2), Smoothed(32), nn.Linear(32, 32, bias=False),
        nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(steps: int = STEPS, rows: int = 12) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield torch.randn(rows, 24, generator=generator), torch.randint(10, (rows,), generator=generator)


@dataclass(frozen=True)
class Recipe:
    """How a run trains: micro-batches per step, a GradScaler's first scale, a gradient norm to clip to."""

    accumulate: int = 1
    scale: float | None = None
    clip: float | None = None
    keep_grads: bool = False  # zero_grad(set_to_none=False)

    def scaler(self) -> torch.amp.GradScaler | None:
        return None if self.scale is None else torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=6)


RECIPES = {
    "plain": Recipe(),
    "clipped": Recipe(clip=0.5, keep_grads=True),
    "accumulated": Recipe(accumulate=3),
    "scaled": Recipe(scale=2.0**24, clip=1.0),  # overflows at first: some steps are skipped
    "scaled-accumulated": Recipe(scale=2.0**20, accumulate=2),
}


@dataclass
class Run:
    """Where a run went and where it ended."""

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    guard: StepGuard | None = None

    @property
    def the_guard(self) -> StepGuard:
        assert self.guard is not None
        return self.guard


def run(model: nn.Module, recipe: Recipe = RECIPES["plain"], steps: int = STEPS, guarded: bool = False, **guard: Any) -> Run:
    """Train as the contract's loop does, or the same without a guard."""
    torch.manual_seed(5)
    out = Run()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = recipe.scaler()
    out.guard = StepGuard(model, optimizer, scaler=scaler, **guard) if guarded else None

    def forward_backward(x: Tensor, target: Tensor) -> float:
        total = 0.0
        for part, wanted in zip(x.chunk(recipe.accumulate), target.chunk(recipe.accumulate), strict=True):
            with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                loss = F.cross_entropy(model(part).float(), wanted) / recipe.accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += float(loss.detach())
        return total

    for x, target in batches(steps):
        if out.guard is None:
            loss = forward_backward(x, target)
        else:
            while out.guard.attempt():
                loss = forward_backward(x, target)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if out.guard is not None:
            out.taken.append(out.guard.step())
        elif scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=not recipe.keep_grads)
        out.losses.append(loss)
        out.scales.append(1.0 if scaler is None else scaler.get_scale())
    out.state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {} if scaler is None else scaler.state_dict(),
        "random": torch.get_rng_state(),
    }
    return out


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal bit for bit, through nested containers."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{where} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} is not {b}"


def assert_same_run(a: Run, b: Run) -> None:
    assert a.losses == b.losses
    assert a.scales == b.scales
    assert_same(a.state, b.state)


def protected(policy: Any = DETECT) -> nn.Module:
    return abft.protect(net(), policy)


# --- without faults, and with faults that go away ------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_guard_without_faults_changes_nothing(recipe):
    plain = run(net(), RECIPES[recipe])
    guarded = run(protected(None), RECIPES[recipe], guarded=True)
    assert_same_run(plain, guarded)
    assert all(guarded.taken)
    if RECIPES[recipe].scale:
        assert min(plain.scales) < RECIPES[recipe].scale, "no step was skipped: the recipe tests nothing"
        grew = any(b > a for a, b in zip(plain.scales, plain.scales[1:], strict=False))
        assert grew, "the scale never grew: the recipe tests nothing"
    report = abft.report()
    assert report.checks > 0 and report.detected == 0 and report.false_alarms == 0
    assert (guarded.the_guard.replays, guarded.the_guard.dropped) == (0, 0)


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_steps_leave_no_trace(recipe, role):
    plain = run(net(), RECIPES[recipe])
    # Three steps, each hit once: late enough that no scale overflows any more.
    in_a_step = RECIPES[recipe].accumulate * (2 if role == "dgrad" else 3)
    specs = [Fault("nullify", role=role, pattern="row", call=in_a_step * step + 1) for step in (11, 14, 19)]
    with abft.inject.faults(*specs) as log:
        guarded = run(protected(), RECIPES[recipe], guarded=True)
    assert len(log) == 3
    assert guarded.the_guard.replays == 3 and guarded.the_guard.dropped == 0
    assert_same_run(plain, guarded)
    report = abft.report()
    assert report.observed == report.detected >= 3


def test_two_faulty_attempts_of_one_step_are_replayed_twice():
    plain = run(net())
    specs = [Fault("nullify", pattern="row", call=call) for call in (0, 4)]  # three products in a forward
    with abft.inject.faults(*specs):
        guarded = run(protected(), guarded=True)
    assert guarded.the_guard.replays == 2
    assert_same_run(plain, guarded)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_mixture_at_half_of_the_attempts(seed):
    plain = run(net())
    with abft.inject.faults(Mixture.gpu_2026(), rate=0.3, seed=seed) as log:
        guarded = run(protected(), guarded=True, max_replays=20)
    harmless = sum(e.effect < 1e-5 for e in log)
    assert len(log) >= 3
    assert guarded.the_guard.replays >= len(log) - harmless
    if harmless == 0:
        assert_same_run(plain, guarded)


def test_repaired_faults_need_no_replay():
    plain = run(net())
    with abft.inject.faults(*(Fault("nullify", role=role, pattern="row", call=9) for role in ("fprop", "dgrad", "wgrad"))):
        guarded = run(protected(Policy(on_uncorrected="record")), guarded=True)
    assert guarded.the_guard.replays == 0
    assert abft.report().recomputed >= 3
    assert_same_run(plain, guarded)


def test_what_the_guard_reports():
    model = protected()
    with abft.inject.faults(Fault("nullify", pattern="row", call=3 * 5)):
        guarded = run(model, steps=6, guarded=True)
    guard = guarded.the_guard
    assert (guard.replays, guard.dropped) == (1, 0)
    assert guard.last.observed == 1, "the last step's report holds all its attempts"
    assert guard.last.events[0].step == 5, "steps are counted from 0 on events"
    run(model, steps=1, guarded=True)
    assert abft.report().observed == 1
    fresh = run(model, steps=3, guarded=True).the_guard
    assert fresh.last.detected == 0 and fresh.last.products == 9 - 1  # the input needs no gradient


# --- faults that stay ---------------------------------------------------------------------------------------

STUCK = Fault("nullify", pattern="row", probability=1.0)


def guarded_loop(model: nn.Module, scaler: Any, faulty: set[int], **options: Any) -> tuple[list[bool], StepGuard, Any]:
    """Six steps; those in ``faulty`` are wrong at every attempt."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = StepGuard(model, optimizer, scaler=scaler, **options)
    taken = []
    for i, (x, target) in enumerate(batches(6)):
        scope = abft.inject.faults(STUCK, seed=i) if i in faulty else torch.enable_grad()
        with scope:
            while guard.attempt():
                loss = F.cross_entropy(model(x), target)
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        taken.append(guard.step())
        optimizer.zero_grad()
    return taken, guard, optimizer


def test_a_fault_that_stays_raises_after_the_last_replay():
    model, seen = protected(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer, max_replays=3)
    before = copy.deepcopy(model.state_dict())
    (x, target), *_ = batches()
    with abft.inject.faults(STUCK), pytest.raises(UncorrectedFault, match=r"after 3 replays.*OBSERVED at .*fprop") as error:
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
            seen.append(1)
    for word in ("row", "residual", "bound", "rank", "device", "step"):
        assert word in str(error.value)
    assert len(seen) == 4 and guard.replays == 3
    assert guard.last.observed > 0
    assert_same(before, model.state_dict())
    with pytest.raises(UncorrectedFault, match="still wrong"):
        optimizer.step()  # the wrong gradients still lie there
    assert_same(before, model.state_dict())
    optimizer.zero_grad()
    while guard.attempt():
        F.cross_entropy(model(x), target).backward()
    assert guard.step()


@pytest.mark.parametrize("max_replays", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("callback", [False, True])
def test_a_dropped_step_never_happened(scaled, callback, max_replays):
    called: list[StepGuard] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) if scaled else None
    twin = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) if scaled else None
    model, plain = protected(), protected()
    taken, guard, optimizer = guarded_loop(
        model, scaler, {1, 4}, max_replays=max_replays, on_failed=called.append if callback else "drop"
    )
    assert taken == [True, False, True, True, False, True]
    assert (guard.dropped, guard.replays) == (2, 2 * max_replays)
    assert called == ([guard, guard] if callback else [])

    # The same steps, skipping those batches but drawing their random numbers.
    torch.manual_seed(5)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for i, (x, target) in enumerate(batches(6)):
        buffers = {k: b.clone() for k, b in plain.named_buffers()}
        loss = F.cross_entropy(plain(x), target)
        if i in (1, 4):
            plain.load_state_dict(buffers, strict=False)
            continue
        (loss if twin is None else twin.scale(loss)).backward()
        if twin is None:
            reference.step()
        else:
            twin.unscale_(reference)
            twin.step(reference)
            twin.update()
        reference.zero_grad()
    assert_same(plain.state_dict(), model.state_dict())
    assert_same(reference.state_dict(), optimizer.state_dict())
    if twin is not None and scaler is not None:
        assert_same(twin.state_dict(), scaler.state_dict())


def test_a_dropped_step_cannot_be_taken_behind_the_guards_back():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer, max_replays=0, on_failed="drop")
    before = copy.deepcopy(model.state_dict())
    (x, target), *_ = batches()
    with abft.inject.faults(STUCK):
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
    with pytest.raises(UncorrectedFault):
        optimizer.step()
    assert guard.step() is False
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("scaled", [False, True])
def test_stepping_with_a_fault_pending_raises(scaled):
    model = protected()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (x, target), *_ = batches()
    assert guard.attempt()
    with abft.inject.faults(Fault("nullify", pattern="row")):
        scaler.scale(F.cross_entropy(model(x), target)).backward()
    with pytest.raises(UncorrectedFault, match="pending.*replay"):
        scaler.step(optimizer) if scaled else optimizer.step()
    assert_same(before, {name: p.detach() for name, p in model.named_parameters()})
    assert guard.attempt(), "and the step is replayed"
    scaler.scale(F.cross_entropy(model(x), target)).backward()
    assert not guard.attempt() and guard.step()


def test_a_compiled_model_is_replayed(dynamo):
    runs = []
    for model in (net(), protected()):
        model[4].eval()  # its buffers change hands in Python
        faulty = abft.inject.faults(Fault("nullify", pattern="row", call=7)) if runs else torch.enable_grad()
        with faulty:
            runs.append((run(torch.compile(model, backend="eager"), steps=6, guarded=bool(runs)), model))
    (plain, _), (guarded, _) = runs
    assert guarded.the_guard.replays == 1
    assert_same_run(plain, guarded)


def test_faults_before_the_loop_and_after_the_step_do_not_concern_the_guard():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer)
    (x, target), *_ = batches()
    for _ in range(2):
        with abft.inject.faults(STUCK), torch.no_grad():
            model(x)  # an evaluation
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
        assert guard.step()
        with abft.inject.faults(STUCK), torch.no_grad():
            model(x)
    assert guard.replays == 0


# --- between the last attempt and the step ------------------------------------------------------------------------


class Interrupted:
    """A step whose attempt is over, gradients unscaled, the optimizer not yet stepped."""

    def __init__(self, scaled: bool = False) -> None:
        self.model = protected()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.guard = StepGuard(self.model, self.optimizer, scaler=self.scaler)
        (self.x, self.target), *_ = batches()
        self.run_attempts()
        self.before = copy.deepcopy(self.model.state_dict())

    def run_attempts(self) -> None:
        while self.guard.attempt():
            loss = F.cross_entropy(self.model(self.x), self.target)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)

    def step_alone(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def strike(self, policy: Any = DETECT) -> None:
        layer = abft.protect(nn.Linear(24, 10), policy, name="penalty")
        with abft.inject.faults(Fault("nullify", pattern="row")):
            layer(self.x)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["through the guard", "alone"])
def test_a_fault_after_the_last_attempt_keeps_the_step_back(scaled, alone):
    s = Interrupted(scaled)
    s.strike()
    for _ in range(2):  # it stays pending, however often one tries
        with pytest.raises(UncorrectedFault, match=r"1 wrong row\(s\) pending.*zero_grad\(\).*abandon\(\).*OBSERVED at penalty \(fprop\)"):
            s.step_alone() if alone else s.guard.step()
    assert_same(s.before, s.model.state_dict())
    s.optimizer.zero_grad()
    s.run_attempts()
    assert s.guard.step()
    assert any(not torch.equal(v, s.before[k]) for k, v in s.model.state_dict().items() if k.endswith("weight"))
    s.optimizer.zero_grad()
    s.run_attempts()
    assert s.guard.step(), "and the scaler knows where it stands"


@pytest.mark.parametrize("scaled", [False, True])
def test_a_fault_that_the_gradients_do_not_depend_on_can_be_abandoned(scaled):
    twin = Interrupted(scaled)
    twin.guard.step()
    s = Interrupted(scaled)
    s.strike()
    with pytest.raises(UncorrectedFault, match="pending"):
        s.guard.step()
    s.guard.abandon()
    s.step_alone()
    weights = dict(s.model.named_parameters()), dict(twin.model.named_parameters())
    assert_same(*({k: v.detach() for k, v in w.items()} for w in weights))
    assert s.scaler is None or s.scaler.state_dict() == twin.scaler.state_dict()


def test_a_repaired_or_a_clean_product_after_the_last_attempt_holds_nothing_up():
    s = Interrupted()
    s.strike(Policy(on_uncorrected="record"))
    abft.protect(nn.Linear(24, 10), "paranoid", name="other")(s.x)  # another model, another policy
    with abft.protected("audit"):
        nn.Linear(24, 10)(s.x)
    assert abft.report().recomputed == 1
    assert s.guard.step()


def test_the_report_of_a_pending_fault_does_not_make_it_go_away():
    s = Interrupted()
    s.strike()
    assert abft.report(reset=True).observed == 1
    with pytest.raises(UncorrectedFault, match="penalty"):
        s.guard.step()


def test_a_dropped_step_is_dropped_whatever_happened_after_it():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer, max_replays=0, on_failed="drop")
    (x, target), *_ = batches()
    with abft.inject.faults(STUCK):
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
        model(x)
    assert guard.step() is False
    optimizer.zero_grad()
    while guard.attempt():
        F.cross_entropy(model(x), target).backward()
    assert guard.step()


def test_a_guard_does_not_mind_what_another_guard_replayed():
    """Two models in turn, as a GAN trains: the second one's attempts lie between the first one's attempt and step."""
    first, second = Interrupted(), protected()
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    guard = StepGuard(second, optimizer)
    with abft.inject.faults(Fault("nullify", pattern="row")):
        while guard.attempt():
            F.cross_entropy(second(first.x), first.target).backward()
    assert guard.replays == 1
    assert first.guard.step() and guard.step()
    first.run_attempts()
    with abft.inject.faults(Fault("nullify", pattern="row")):
        while guard.attempt():
            F.cross_entropy(second(first.x), first.target).backward()
    first.strike()
    with pytest.raises(UncorrectedFault, match=r"1 wrong row\(s\).*penalty"):
        first.guard.step()


# --- use and misuse -------------------------------------------------------------------------------------------


def test_the_guards_policy_is_in_force_inside_attempts_only():
    model = abft.protect(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (x, target), *_ = batches()
    guard = StepGuard(model, optimizer, DETECT)
    with warnings.catch_warnings(), abft.inject.faults(Fault("nullify", pattern="row")):
        warnings.simplefilter("error")  # "record" warns nobody
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
    assert guard.replays == 1 and abft.report().observed == 1
    guard.step()
    with abft.inject.faults(Fault("nullify", pattern="row")):
        model(x)
    assert abft.report().recomputed == 1, "outside, the default policy repairs"
    guard = StepGuard(model, optimizer, Policy(level="detect", on_uncorrected="raise"))
    with abft.inject.faults(Fault("nullify", pattern="row")), pytest.raises(abft.FaultDetected):
        while guard.attempt():
            model(x)
    guard.abandon()
    with abft.inject.faults(Fault("nullify", pattern="row")):
        model(x)
    assert abft.report().recomputed == 2


def test_misuse_is_explained():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong, error in (
        ({"max_replays": -1}, ValueError), ({"max_replays": 1.5}, ValueError), ({"on_failed": "ignore"}, ValueError),
        ({"scaler": 128.0}, TypeError), ({"policy": "trainig"}, abft.PolicyError), ({"policy": 3}, TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            StepGuard(model, optimizer, **wrong)
    with pytest.raises(TypeError, match="Optimizer"):
        StepGuard(model, model)
    with pytest.raises(TypeError, match="Module"):
        StepGuard(optimizer, optimizer)
    guard = StepGuard(model, optimizer)
    with pytest.raises(RuntimeError, match=r"while guard\.attempt\(\)"):
        guard.step()
    assert guard.attempt()
    with pytest.raises(RuntimeError, match="inside the attempt loop"):
        guard.step()
    assert not guard.attempt()
    assert guard.step()
    with pytest.raises(RuntimeError, match="without a finished attempt"):
        guard.step()


def test_an_abandoned_attempt_is_forgotten():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer)
    (x, target), *_ = batches()
    with pytest.raises(ZeroDivisionError), abft.inject.faults(STUCK):
        while guard.attempt():
            F.cross_entropy(model(x), target).backward()
            raise ZeroDivisionError
    guard.abandon()
    optimizer.zero_grad()
    seen = 0
    while guard.attempt():
        F.cross_entropy(model(x), target).backward()
        seen += 1
    assert seen == 1 and guard.step() and guard.replays == 0


def test_a_guard_that_is_gone_guards_nothing():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer)
    (x, target), *_ = batches()
    with abft.inject.faults(STUCK):
        assert guard.attempt()
        F.cross_entropy(model(x), target).backward()
        del guard
    optimizer.step()


def test_the_data_iterator_is_never_touched():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = StepGuard(model, optimizer)
    drawn = 0

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal drawn
        for batch in batches(8):
            drawn += 1
            yield batch

    with abft.inject.faults(*(Fault("nullify", pattern="row", call=c) for c in (0, 9, 12))):
        for x, target in loader():
            while guard.attempt():
                F.cross_entropy(model(x), target).backward()
            guard.step()
            optimizer.zero_grad()
    assert drawn == 8 and guard.replays == 3


# --- the rate of injection ------------------------------------------------------------------------------------


def hits(model: nn.Module, *specs: Any, rate: float, seed: int = 0, events: int = 60, train: bool = False) -> list[int]:
    """The numbers of the forwards that were hit."""
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    struck = []
    with abft.inject.faults(*specs, rate=rate, seed=seed) as log:
        for i in range(events):
            before = len(log)
            if train:
                model(x).square().mean().backward()
            else:
                with torch.no_grad():
                    model(x)
            struck += [i] * (len(log) - before)
    return struck


@pytest.mark.parametrize("spec", [Mixture.gpu_2026(), Fault("nullify"), Fault("bitflip", bit=30, site="7")], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_at_rate_one_every_forward_is_hit_once(spec, train):
    spec = spec if train or isinstance(spec, Fault) else Mixture("fprop", ((1.0, Fault("nullify")),))
    assert hits(protected(), spec, rate=1.0, events=12, train=train) == list(range(12))


@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_at_rate_one_every_step_is_hit_in_the_role_asked_for(role):
    model = protected()
    assert hits(model, Fault("nullify", role=role), rate=1.0, events=12, train=True) == list(range(12))


def test_hits_spread_over_the_products_of_an_event():
    x = torch.randn(4, 24)
    with abft.inject.faults(Fault("nullify"), rate=1.0) as log, torch.no_grad():
        model = protected()
        for _ in range(40):
            model(x)
    assert {e.site for e in log} == {"0", "5", "7"}


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_the_rate_is_a_probability_per_forward(rate):
    model, n = protected(), 300
    struck = hits(model, Fault("nullify"), rate=rate, events=n)
    assert len(struck) == len(set(struck)), "one fault an event"
    sigma = (n * rate * (1 - rate)) ** 0.5
    assert abs(len(struck) - n * rate) < 4 * sigma


def test_draws_depend_on_the_seed_alone():
    first = hits(protected(), Fault("nullify"), rate=0.3, seed=4)
    assert first == hits(protected(), Fault("nullify"), rate=0.3, seed=4)
    assert first != hits(protected(), Fault("nullify"), rate=0.3, seed=5)
    # Which events are hit depends on their number alone: not on the model, nor on what was hit before.
    assert first == hits(abft.protect(nn.Linear(24, 9), DETECT), Fault("bitflip", bit=30), rate=0.3, seed=4)
    logs = []
    for _ in range(2):
        with abft.inject.faults(Mixture.gpu_2026(), rate=0.5, seed=9) as log:
            run(protected(), steps=6, guarded=True, max_replays=20)
        logs.append(log)
    assert logs[0] == logs[1] and len(logs[0]) > 0


def test_with_a_guard_the_rate_is_per_attempt():
    model = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = StepGuard(model, optimizer, max_replays=100)
    attempts = 0
    with abft.inject.faults(Fault("nullify", pattern="row"), rate=0.5, seed=1) as log:
        for x, target in batches(40):
            while guard.attempt():
                for part, wanted in zip(x.chunk(3), target.chunk(3), strict=True):
                    F.cross_entropy(model(part), wanted).backward()
                attempts += 1
            with torch.no_grad():
                model(x)  # between attempts nothing strikes
            guard.step()
            optimizer.zero_grad()
    assert attempts == 40 + guard.replays
    assert guard.replays == len(log) == abft.report().observed
    assert abs(len(log) - 0.5 * attempts) < 4 * (0.25 * attempts) ** 0.5


def test_recomputation_in_backward_is_no_event():
    """Under activation checkpointing a forward runs inside backward; it belongs to the step."""
    layers = protected()

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(layers, x, use_reentrant=False)

    struck = hits(Checkpointed(), Fault("nullify"), rate=0.5, events=30, train=True)
    assert struck == hits(protected(), Fault("nullify"), rate=0.5, events=30, train=True)


def test_a_rate_that_never_fires_is_said():
    with pytest.raises(abft.NotInjected):
        hits(protected(), Fault("nullify", site="nowhere"), rate=1.0, events=5)
    assert hits(protected(), Fault("nullify", site="nowhere"), rate=0.0, events=5) == []


# --- activation checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_trains_as_unprotected(reentrant):
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))
            self.head = nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    runs = []
    for model in (Blocks(), abft.protect(Blocks())):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        losses = []
        for x, target in batches():
            loss = F.cross_entropy(model(x.requires_grad_()), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        runs.append((losses, model.state_dict()))
    assert_same(runs[0], runs[1])
    report = abft.report()
    assert report.detected == 0
    assert report.repeated_checks == 3 * 12 * STEPS, "recomputed products are counted apart"
    assert report.checks == STEPS * (4 * 12 + 4 * 12 + 3 * 24 + 10)


# --- models of Hugging Face -----------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "max_position_embeddings": 64}
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **sizes
        )  # fmt: skip
        return transformers.BertForMaskedLM(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=101)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, **sizes
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokens(rows: int = 3, length: int = 16) -> Tensor:
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(8))


KINDS = ["bert", "gpt2", "llama"]


def train_tiny(model: nn.Module, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    model.train()
    for _ in range(steps):
        out = model(input_ids=tokens(), labels=tokens())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    return losses, model.state_dict()


def without_attention(kind: str) -> nn.Module:
    """Linear layers give torch's own bits; attention drops other elements than torch's (see test_huggingface.py)."""
    return abft.protect(tiny(kind), filter_fn=lambda module, _: "Attention" not in type(module).__name__)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_trains_as_unprotected(kind):
    plain, checked = train_tiny(tiny(kind)), train_tiny(without_attention(kind))
    assert_same(plain, checked)
    report = abft.report()
    assert report.checks > 0 and report.detected == 0 and report.false_alarms == 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_with_gradient_checkpointing_trains_as_unprotected(kind):
    models = [tiny(kind), without_attention(kind)]
    for model in models:
        model.gradient_checkpointing_enable()
    runs = [train_tiny(model, 6) for model in models]
    assert_same(*runs)
    report = abft.report()
    assert report.detected == 0 and report.repeated_checks > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_a_transformer_is_recomputed_bit_for_bit_under_checkpointing(kind):
    """Dropout included: its seed is drawn from the generator that checkpointing restores."""
    models = [abft.protect(tiny(kind)), abft.protect(tiny(kind))]
    models[1].gradient_checkpointing_enable()
    assert_same(*[train_tiny(model, 2) for model in models])
    report = abft.report()
    assert report.detected == 0 and report.repeated_checks > 0 and report.bypassed == {}


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_of_a_transformer_is_told(kind):
    model = abft.protect(tiny(kind))
    coverage = abft.coverage(model, input_ids=tokens())
    text = str(coverage)
    assert f"{coverage.covered} of {coverage.total}" in text
    assert coverage.flop_share == 1.0 and coverage.covered == coverage.total
    assert [m.how for m in coverage.modules].count("attention") == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_is_as_unprotected_even_when_faults_strike(kind):
    plain, checked = tiny(kind).eval(), abft.protect(tiny(kind), "inference").eval()
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(tokens(2, 5), **arguments)
    assert torch.equal(expected, checked.generate(tokens(2, 5), **arguments))
    assert abft.report().detected == 0
    with abft.inject.faults(Fault("nullify", pattern="row"), rate=0.5, seed=2) as log:
        struck = checked.generate(tokens(2, 5), **arguments)
    assert len(log) > 2
    report = abft.report()
    assert report.corrected > 0 and report.uncorrected == 0
    assert torch.equal(expected, struck)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_transformer_survives_what_strikes_its_steps(kind):
    plain = train_tiny(abft.protect(tiny(kind)), 8)
    model = abft.protect(tiny(kind), DETECT).train()
    torch.manual_seed(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = StepGuard(model, optimizer, max_replays=10)
    losses = []
    with abft.inject.faults(Fault("nullify", role="*", pattern="row"), rate=0.4, seed=3) as log:
        for _ in range(8):
            while guard.attempt():
                out = model(input_ids=tokens(), labels=tokens())
                out.loss.backward()
            guard.step()
            optimizer.zero_grad()
            losses.append(float(out.loss.detach()))
    assert guard.replays == len(log) > 1
    assert_same(plain, (losses, model.state_dict()))
