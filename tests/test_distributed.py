"""Several ranks: replays that all of them take together, and weights that FSDP2 gathers. On gloo, with one or two processes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import stand_in
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import abft
from abft import Policy, StepGuard, UncorrectedFault
from abft.inject import Fault

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="NO GLOO")

DETECT = Policy(level="detect", on_uncorrected="record")
STEPS = 20
TIMEOUT = timedelta(seconds=120)


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(24, 32), nn.BatchNorm1d(32) if norm else nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 32),
        nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(rank: int = 0, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        yield torch.randn(8, 24, generator=generator), torch.randint(10, (8,), generator=generator)


def train(
    model: nn.Module,
    rank: int,
    guard_options: dict[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: int = 1,
    steps: int = STEPS,
) -> tuple[list[float], list[bool], StepGuard | None]:
    """The contract's loop on one rank; without ``guard_options``, the same loop without a guard."""
    torch.manual_seed(50 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    guard = None if guard_options is None else StepGuard(model, optimizer, scaler=scaler, **guard_options)
    losses, taken = [], []

    def forward_backward(x: Tensor, target: Tensor) -> float:
        total = 0.0
        for i, (part, wanted) in enumerate(zip(x.chunk(accumulate), target.chunk(accumulate), strict=True)):
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = i == accumulate - 1
            loss = F.cross_entropy(model(part), wanted) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += float(loss.detach())
        return total

    for x, target in batches(rank, steps):
        if guard is None:
            loss = forward_backward(x, target)
        else:
            while guard.attempt():
                loss = forward_backward(x, target)
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard is not None:
            taken.append(guard.step())
        elif scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
    return losses, taken, guard


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(whole(mine), whole(theirs)), f"{name} differs"


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


# --- two ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_are_peers(tmp_path):
    torch.multiprocessing.spawn(_peers, (f"file://{tmp_path}/rendezvous",), nprocs=3)


def _peers(rank: int, rendezvous: str) -> None:
    """The middle one of three ranks is off by less than its checks see, and all three learn that it is that one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=3, timeout=TIMEOUT)
    try:
        torch.manual_seed(rank)
        model, peers = abft.protect(nn.Linear(32, 32), Policy(detector="both"), name="layer"), abft.Peers(warm_up=16)
        fault = Fault("offset", pattern="column", index=(0, 3), probability=1.0, amount=1e-6)
        found: list[Any] = []
        for step in range(60):
            with torch.no_grad(), abft.inject.faults(fault) if step >= 20 and rank == 1 else nullcontext():
                model(torch.randn(1024, 32))
            found += peers.compare()
            assert step >= 20 or not found
            if any(f.alarm.quarantine for f in found):  # that outliers became frequent may be told before, and asks for none
                break
        assert {(f.unit, f.name) for f in found} == {(1, "rank 1")} and any(f.alarm.quarantine for f in found)
        assert abft.report().detected == 0
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """One pair of processes for everything; an assertion that fails in one of them fails here."""
    torch.multiprocessing.spawn(_two_ranks, (f"file://{tmp_path}/rendezvous",), nprocs=2)


def _two_ranks(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        for work in (replay_together, one_reading_each, give_up_together, fsdp_replay_together):
            start = time.perf_counter()
            work(rank)
            dist.barrier()
            print(f"{work.__name__}: {time.perf_counter() - start:.1f} s")
    finally:
        dist.destroy_process_group()


def replay_together(rank: int) -> None:
    for options in ({}, {"accumulate": 2}, {"scaler": 8.0}):
        bucket_view = "accumulate" in options
        scale = options.pop("scaler", None)

        def scaler(scale: float | None = scale) -> torch.amp.GradScaler | None:
            return None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)

        plain = DistributedDataParallel(net(), gradient_as_bucket_view=bucket_view)
        expected, _, _ = train(plain, rank, scaler=scaler(), **options)
        checked = DistributedDataParallel(abft.protect(net(), DETECT), gradient_as_bucket_view=bucket_view)
        abft.report(reset=True)
        # One rank is hit in its forward, later the other in its backward.
        fault = Fault("nullify", pattern="row", call=7) if rank == 1 else Fault("nullify", role="wgrad", pattern="row", call=31)
        with abft.inject.faults(fault) as log:
            losses, taken, guard = train(checked, rank, {}, scaler=scaler(), **options)
        assert len(log) == 1 and all(taken)
        assert guard is not None and (guard.replays, guard.dropped) == (2, 0), "both ranks replay both faults"
        assert losses == expected
        assert_same_state(plain, checked)
        report = abft.report()
        assert report.observed == 1, "and each rank has seen its own fault only"
        assert report.events[0].rank == rank


def one_reading_each(rank: int) -> None:
    """Agreeing over the group is one all_reduce per attempt, and no second look at the ledger."""
    agreed, all_reduce = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        agreed.append(args[1:])
        return all_reduce(*args, **kwargs)

    with stand_in.devices() as devices, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        model = DistributedDataParallel(abft.protect(net(), DETECT))
        with abft.inject.faults(Fault("nullify", pattern="row", call=7)) if rank == 1 else nullcontext():
            _, taken, guard = train(model, rank, {}, steps=4)
        assert all(taken) and guard is not None and guard.replays == 1, "both ranks replay what one of them found"
        # One more before the first step, when the guard is made.
        assert devices.transfers == 1 + 4 + 1
        assert agreed == [(dist.ReduceOp.MAX,)] * 5


def give_up_together(rank: int) -> None:
    stuck = Fault("nullify", pattern="row", probability=1.0)

    def here(faulty: int) -> Any:
        return abft.inject.faults(stuck) if rank == faulty else nullcontext()

    for faulty in (0, 1):
        model = DistributedDataParallel(abft.protect(net(), DETECT))
        before = copy.deepcopy(model.state_dict())
        try:
            with here(faulty):
                train(model, rank, {"max_replays": 1}, steps=1)
        except UncorrectedFault as error:
            assert "after 1 replays" in str(error)
            assert ("another rank" in str(error)) == (rank != faulty)
        else:
            raise AssertionError(f"rank {rank} did not raise")
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was touched"

        with here(faulty):
            _, taken, guard = train(model, rank, {"max_replays": 2, "on_failed": "drop"}, steps=3)
        assert taken == [False] * 3 and guard is not None and (guard.dropped, guard.replays) == (3, 6)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), f"{name} was touched"
        _, taken, _ = train(model, rank, {"process_group": dist.new_group([0, 1])}, steps=2)
        assert taken == [True, True], "and both go on"


def fsdp_replay_together(rank: int) -> None:
    plain = sharded(net(norm=False))
    expected, _, _ = train(plain, rank)
    for protect_first in (True, False):
        checked = sharded(net(norm=False), DETECT, protect_first=protect_first)
        abft.report(reset=True)
        fault = Fault("nullify", pattern="row", call=7)
        with abft.inject.faults(fault) if rank == 1 else nullcontext():
            losses, _, guard = train(checked, rank, {})
        assert guard is not None and guard.replays == 1
        assert losses == expected
        assert_same_state(plain, checked)
        report = abft.report()
        assert (report.detected, report.stale, report.weight_faults) == (rank, 0, 0)


# --- one rank -----------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Sequential, policy: Any = None, *, protect_first: bool | None = None, **options: Any) -> nn.Module:
    """FSDP2 around every layer and the whole; protected before or after, or (None) not at all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if protect_first:
        abft.protect(model, policy)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model if protect_first is not False else abft.protect(model, policy)


@pytest.mark.parametrize("protect_first", [True, False], ids=["protect-then-shard", "shard-then-protect"])
def test_fsdp2_is_covered_and_unprotected(one_rank, protect_first):
    model = sharded(net(norm=False), protect_first=protect_first)
    x = next(iter(batches()))[0]
    model.eval()
    linears = [m for m in abft.coverage(model, x).modules if "Linear" in m.type]
    assert len(linears) == 3 and all(m.covered for m in linears)
    expected = model(x)
    abft.report(reset=True)
    abft.unprotect(model)
    assert torch.equal(model(x), expected) and abft.report().checks == 0
    assert [type(m).__name__ for m in model if isinstance(m, nn.Linear)] == ["FSDPLinear"] * 3
    assert not any(m.covered for m in abft.coverage(model).modules)
    model(x).sum().backward()  # still gathered and sharded
    abft.protect(model)
    assert torch.equal(model(x), expected) and abft.report().checks > 0


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("protect_first", [True, False], ids=["protect-then-shard", "shard-then-protect"])
def test_fsdp2_trains_as_unprotected(one_rank, protect_first, implementation):
    runs = []
    for model in (sharded(net(norm=False)), sharded(net(norm=False), protect_first=protect_first)):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **{implementation: True})
        losses = []
        for i, (x, target) in enumerate(batches()):
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            if i % 2:  # every other step accumulates
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        runs.append((losses, model))
    assert runs[0][0] == runs[1][0]
    assert_same_state(runs[0][1], runs[1][1])
    report = abft.report()
    assert report.checks > 0 and (report.detected, report.stale, report.false_alarms) == (0, 0, 0), str(report)


def test_fsdp2_with_mixed_precision_trains_as_unprotected(one_rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = []
    for protect_first in (None, True):
        model = sharded(net(norm=False), protect_first=protect_first, mp_policy=policy)
        runs.append((train(model, 0)[0], model))
    assert runs[0][0] == runs[1][0]
    assert_same_state(runs[0][1], runs[1][1])
    report = abft.report()
    assert report.checks > 0 and (report.detected, report.stale) == (0, 0)


def test_edits_of_shards_are_followed(one_rank):
    """The gathered weight keeps address and version whatever happens to its shards; the shards' versions tell."""
    plain, checked = sharded(net(norm=False)).eval(), sharded(net(norm=False), protect_first=True).eval()
    x, _ = next(batches())
    averages = [plain[i].weight.detach().clone() * 0.9 for i in (0, 4, 6)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(STEPS):
            for model in (plain, checked):
                if i % 4 == 0:
                    model[0].weight.mul_(0.5)
                elif i % 4 == 1:
                    model[4].weight._local_tensor[3, i] = 2.0
                elif i % 4 == 2:
                    for layer, average in zip((0, 4, 6), averages, strict=True):
                        model[layer].weight.copy_(average)
                else:
                    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
            assert torch.equal(plain(x), checked(x))
    report = abft.report()
    assert (report.detected, report.stale, report.weight_faults) == (0, 0, 0), str(report)


def test_a_bit_of_a_shard_is_a_memory_fault(one_rank):
    plain, checked = sharded(net(norm=False)).eval(), sharded(net(norm=False), "inference", protect_first=True).eval()
    x, _ = next(batches())
    with torch.no_grad():
        assert torch.equal(plain(x), checked(x))
        shard = checked[0].weight._local_tensor
        shard.data.view(torch.int32)[3, 4] ^= 1 << 30
        for _ in range(3):
            assert torch.equal(plain(x), checked(x))
        report = abft.report()
        assert report.reconstructed == 3 * 8 and report.weight_faults == 1
        assert "weight element 3, 4" in report.events[0].message
        abft.refresh(checked)
        abft.report(reset=True)
        assert not torch.equal(plain(x), checked(x)), "refreshed: the shard counts as it is"
        assert abft.report().detected == 0


def test_fsdp2_leaks_no_panel(one_rank):
    checked = sharded(net(norm=False), protect_first=True)
    optimizer = torch.optim.AdamW(checked.parameters(), lr=1e-2, fused=True)
    live = []
    for x, target in batches():
        F.cross_entropy(checked(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        live.append(abft.panels.live_bytes())
    assert len(set(live)) == 1 and live[0] > 0


@pytest.mark.filterwarnings("ignore:`broadcast_buffers`:FutureWarning")
@pytest.mark.parametrize("broadcast", [True, False])
def test_ddp_trains_as_unprotected(one_rank, broadcast):
    runs = []
    for model in (net(), abft.protect(net())):
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
        runs.append((train(ddp, 0)[0], ddp))
    assert runs[0][0] == runs[1][0]
    assert_same_state(runs[0][1], runs[1][1])
    report = abft.report()
    assert report.checks > 0 and report.detected == 0, "counters survive the broadcast of buffers"
    assert len(runs[1][1].state_dict()) == len(runs[0][1].state_dict())
