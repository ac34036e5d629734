"""Panels are valid exactly when they are: whatever changes a weight on purpose is followed, whatever else is a fault.

Every test runs a model and its unprotected twin side by side and demands equal bits.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import abft
from abft import Policy, Verdict

STEPS = 20
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def net(features: int = 48) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(features, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 10)
    )  # fmt: skip


def batches(steps: int = STEPS, rows: int = 16, features: int = 48) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield torch.randn(rows, features, generator=generator), torch.randint(10, (rows,), generator=generator)


def rows_of(n: int = 16, features: int = 48) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(3))


class Twins:
    """A model and its protected copy, in one state."""

    def __init__(self, make: Callable[[], nn.Module] = net, policy: Any = None) -> None:
        self.plain, self.checked = make(), make()
        self.checked.load_state_dict(self.plain.state_dict())
        abft.protect(self.checked, policy)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.plain, self.checked))

    def assert_same_outputs(self, x: Tensor | None = None) -> None:
        x = rows_of() if x is None else x
        assert same(self.plain(x), self.checked(x))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def assert_same_parameters(twins: Twins) -> None:
    for (name, p), q in zip(twins.plain.named_parameters(), twins.checked.parameters(), strict=True):
        assert same(p, q), f"{name} differs"


def assert_silent() -> None:
    """Products were checked, and nothing at all was found."""
    report = abft.report()
    assert report.checks > 0
    assert (report.detected, report.stale, report.false_alarms, report.weight_faults) == (0, 0, 0, 0), str(report)


def train(
    model: nn.Module, step: Callable[[], object], steps: int = STEPS, autocast: torch.dtype | None = None
) -> list[Tensor]:
    """Losses of a plain training loop."""
    losses = []
    for x, target in batches(steps):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        step()
        model.zero_grad()
        losses.append(loss.detach())
    return losses


def assert_same_losses(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert [float(v).hex() for v in mine] == [float(v).hex() for v in theirs]


# --- optimizers -------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=1e-2, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=1e-2, **kw),
    "adagrad": lambda p, **kw: torch.optim.Adagrad(p, lr=1e-2, **kw),
}
IMPLEMENTATIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_trains_as_it_does_unprotected(optimizer, implementation):
    twins = Twins()
    losses = []
    for model in twins:
        step = OPTIMIZERS[optimizer](model.parameters(), **IMPLEMENTATIONS[implementation]).step
        losses.append(train(model, step))
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


def test_an_optimizer_that_steps_inside_backward_is_followed():
    twins = Twins()
    losses = []
    for model in twins:
        for p in model.parameters():
            optimizer = torch.optim.AdamW([p], lr=1e-2, fused=True)
            p.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
        losses.append(train(model, lambda: None))
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


def test_a_run_that_diverges_does_so_as_unprotected():
    """Inf and NaN that training itself makes are nobody's fault."""
    twins = Twins()
    losses = [train(model, torch.optim.SGD(model.parameters(), lr=1e12).step) for model in twins]
    assert_same_losses(*losses)
    assert not torch.isfinite(losses[0][-1])
    report = abft.report()
    assert (report.detected, report.weight_faults) == (0, 0), str(report)
    assert report.input_rows > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.compiler, pytest.mark.slow])])
def test_a_compiled_optimizer_step_is_followed(backend, dynamo):
    twins = Twins()
    losses = []
    for model in twins:
        step = torch.compile(torch.optim.AdamW(model.parameters(), lr=1e-2).step, backend=backend)
        losses.append(train(model, step))
    assert_same_losses(*losses)
    assert_silent()


def test_gradient_accumulation_trains_as_unprotected():
    twins = Twins()
    losses = []
    for model in twins:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        mine = []
        for i, (x, target) in enumerate(batches(60)):
            loss = F.cross_entropy(model(x), target) / 3
            loss.backward()
            mine.append(loss.detach())
            if i % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(mine)
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


def test_autocast_leaks_no_panel_over_a_hundred_steps():
    twins = Twins()
    losses, live = [], set()
    for model in twins:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

        def step(optimizer=optimizer):
            optimizer.step()
            live.add(abft.panels.live_bytes())

        before = abft.panels.live_bytes()
        losses.append(train(model, step, 100, autocast=torch.bfloat16))
        live.discard(before)
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert len(live) == 1, f"bytes held by panels moved: {sorted(live)}"
    assert_silent()


# --- announced changes ------------------------------------------------------------------------------------


def ema_copy(model: nn.Module, shadow: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p, s in zip(model.parameters(), shadow, strict=True):
            kept = p.clone()
            p.copy_(s)
            s.copy_(kept)


def ema_data(model: nn.Module, shadow: list[nn.Parameter]) -> None:
    for p, s in zip(model.parameters(), shadow, strict=True):
        p.data, s.data = s.data, p.data


def ema_lerp(model: nn.Module, shadow: list[nn.Parameter]) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), shadow, 0.5)


@pytest.mark.parametrize("swap", [ema_copy, ema_data, ema_lerp])
def test_exchanging_weights_with_their_average_is_followed(swap):
    twins = Twins()
    losses = []
    for model in twins:
        shadow = [nn.Parameter(p.detach() * 0.9) for p in model.parameters()]
        mine = []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for x, target in batches():
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            mine.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            swap(model, shadow)
            with torch.no_grad():
                mine.append(model(x).sum())
            swap(model, shadow)
        losses.append(mine)
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


def test_swapping_tensors_is_followed():
    twins = Twins()
    shadows = [nn.Parameter(p.detach() * 0.9) for p in twins.plain.parameters()], [
        nn.Parameter(p.detach() * 0.9) for p in twins.plain.parameters()
    ]
    for i in range(STEPS):
        for model, shadow in zip(twins, shadows, strict=True):
            for p, s in zip(model.parameters(), shadow, strict=True):
                torch.utils.swap_tensors(p, s)
            with torch.no_grad():
                model[0].weight[i, 2 * i] = 1.5
        twins.assert_same_outputs()
    assert_silent()


def test_a_running_average_of_the_model_is_followed():
    twins = Twins()
    losses = []
    for model in twins:
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        mine = []

        def step(model=model, optimizer=optimizer, averaged=averaged, mine=mine):
            optimizer.step()
            averaged.update_parameters(model)
            with torch.no_grad():
                mine.append(averaged(rows_of()).sum())

        mine += train(model, step)
        losses.append(mine)
    assert_same_losses(*losses)
    assert_silent()


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_followed(assign):
    twins = Twins()
    other = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(STEPS):
            state = {k: v * (1 + i) for k, v in other.state_dict().items()}
            for model in twins:
                model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
            twins.assert_same_outputs()
    assert_silent()


def test_load_state_dict_by_swapping_is_followed():
    twins = Twins()
    twins.assert_same_outputs()
    state = {k: v * 2 for k, v in net().state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in twins:
            model.load_state_dict(state)
        twins.assert_same_outputs()
        for model in twins:
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    twins.assert_same_outputs(rows_of().double())
    assert_silent()


def test_moving_and_casting_is_followed_and_leaves_no_old_panel():
    twins = Twins()
    base = abft.panels.live_bytes()
    sizes = []
    for _ in range(5):
        for dtype in (torch.float16, torch.float64, torch.bfloat16, "cpu", torch.float32):
            for model in twins:
                model.to(dtype)
            twins.assert_same_outputs(rows_of().to(next(twins.plain.parameters()).dtype))
        sizes.append(abft.panels.live_bytes() - base)
    assert len(set(sizes)) == 1, f"panels of former dtypes stay: {sizes}"
    assert_silent()


@pytest.mark.parametrize("edit", ["element", "row", "all", "bias"])
def test_an_edit_that_moves_the_version_is_followed_however_small(edit):
    twins = Twins()
    for i in range(STEPS):
        for model in twins:
            with torch.no_grad():
                if edit == "element":
                    model[0].weight[3, 5 + i] = 2.5
                elif edit == "row":
                    model[2].weight[i].zero_()
                elif edit == "all":
                    model[4].weight.mul_(0.9)
                else:
                    model[4].bias[i % 10] = -1e4
        twins.assert_same_outputs()
        with torch.autocast("cpu", torch.bfloat16):
            twins.assert_same_outputs()
    assert_silent()


def test_a_replaced_weight_is_another_weight():
    for policy in (None, "inference"):
        twins = Twins(policy=policy)
        for i in range(STEPS):
            for model in twins:
                model[0].weight = nn.Parameter(model[0].weight.detach() * (1.0 + i))
                if i % 2:
                    model[0].bias = None if model[0].bias is not None else nn.Parameter(torch.ones(64))
            twins.assert_same_outputs()
    assert_silent()


def test_weights_used_in_inference_mode_can_be_trained_afterwards():
    twins = Twins()
    losses = []
    for model in twins:
        with torch.inference_mode():
            model(rows_of())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        mine = []
        for x, target in batches():
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.inference_mode():
                mine += [loss.detach(), model(x).sum()]
        losses.append(mine)
    assert_same_losses(*losses)
    assert_silent()


def test_weights_created_in_inference_mode():
    with torch.inference_mode():
        twins = Twins()
        for _ in range(3):
            twins.assert_same_outputs()
    with torch.no_grad():
        twins.assert_same_outputs()
    assert_silent()
    with torch.inference_mode(), warnings.catch_warnings():
        # No version tells of a write to an inference tensor.
        warnings.simplefilter("ignore")
        for _ in range(3):
            for p in (p for model in twins for p in model.parameters()):
                p.mul_(0.5)
            twins.assert_same_outputs()
    report = abft.report()
    assert (report.detected, report.weight_faults, report.stale) == (0, 0, 9), str(report)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(80, 48)
        self.body = nn.Linear(48, 48)
        self.head = nn.Linear(48, 80, bias=False)
        self.again = nn.Linear(48, 80)
        self.again.weight = self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.embed(tokens)))
        return self.head(h) + self.again(h)


def test_tied_weights_stay_tied_and_share_a_panel():
    twins = Twins(Tied)
    assert twins.checked.head.weight is twins.checked.embed.weight is twins.checked.again.weight
    tokens = torch.randint(80, (STEPS, 4, 9), generator=torch.Generator().manual_seed(2))
    losses = []
    for model in twins:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        mine = []
        for batch in tokens:
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine.append(loss.detach())
        losses.append(mine)
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.T) / 2


@pytest.mark.parametrize("how", ["own", "norms", "pruned"])
def test_parametrized_weights_train_as_unprotected(how):
    def make() -> nn.Module:
        model = net()
        if how == "own":
            parametrize.register_parametrization(model[2], "weight", Symmetric())
        elif how == "pruned":
            prune.l1_unstructured(model[0], "weight", 0.5)
        else:
            nn.utils.parametrizations.weight_norm(model[0])
            nn.utils.parametrizations.spectral_norm(model[4])
        return model

    twins = Twins(make)
    losses = [train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step) for model in twins]
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    assert_silent()


def test_a_parametrization_added_to_a_protected_layer_trains_as_unprotected():
    twins = Twins()
    for model in twins:
        model(rows_of())
        parametrize.register_parametrization(model[2], "weight", Symmetric())
    losses = [train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step) for model in twins]
    assert_same_losses(*losses)
    for model in twins:
        parametrize.remove_parametrizations(model[2], "weight")
    twins.assert_same_outputs()
    assert_silent()


def test_weights_passed_in_by_functional_call():
    twins = Twins()
    for i in range(1, 4):
        for wrap in (nn.Parameter, Tensor.clone):
            values = {name: wrap(p.detach() * i) for name, p in twins.plain.named_parameters()}
            outputs = [torch.func.functional_call(model, values, (rows_of(),)) for model in twins]
            assert same(*outputs)
    twins.assert_same_outputs()
    assert_silent()


def test_serving_threads_while_weights_are_refreshed():
    twins = Twins(policy="inference")
    xs = [rows_of(n) for n in (4, 8, 12, 16)]
    with torch.no_grad():
        expected = [twins.plain(x) for x in xs]
        done = threading.Event()

        def serve(i: int) -> int:
            served = 0
            with torch.no_grad():
                while served < 20 or not done.is_set():
                    assert same(twins.checked(xs[i]), expected[i])
                    served += 1
            return served

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(serve, i) for i in range(4)]
            for _ in range(60):
                abft.refresh(twins.checked)
                time.sleep(0.002)
            done.set()
            served = [future.result() for future in futures]
    assert_silent()
    assert abft.report().products == 3 * sum(served)


def test_copies_have_panels_of_their_own():
    twins = Twins()
    twins.assert_same_outputs()
    clones = copy.deepcopy(twins.plain), copy.deepcopy(twins.checked)
    with torch.no_grad():
        for model in clones:
            for p in model.parameters():
                p.mul_(0.5)
    assert same(clones[0](rows_of()), clones[1](rows_of()))
    shallow = copy.copy(twins.checked[0].weight)  # attributes, too, are copied
    shallow.data = shallow.data * 2
    assert same(abft.linear(rows_of(), shallow), F.linear(rows_of(), shallow))
    twins.assert_same_outputs()
    assert_silent()


# --- unannounced changes ----------------------------------------------------------------------------------


def data_mul(w: Tensor) -> None:
    w.data.mul_(0.9)


def data_copy(w: Tensor) -> None:
    w.data.copy_(torch.randn(w.shape, generator=torch.Generator().manual_seed(int(w.numel()))))


def numpy_write(w: Tensor) -> None:
    w.detach().numpy()[...] *= 1.5


def row_range(w: Tensor) -> None:
    w.data[: w.shape[0] // 2].add_(1.0)


@pytest.mark.parametrize("write", [data_mul, data_copy, numpy_write, row_range])
def test_a_dense_unannounced_write_is_stale_not_a_fault(write):
    twins = Twins()
    twins.assert_same_outputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            for model in twins:
                for name, p in model.named_parameters():
                    if name in ("0.weight", "2.weight"):
                        write(p)
            twins.assert_same_outputs()
            twins.assert_same_outputs()  # the rebuilt panel is the present weight's
    report = abft.report()
    edits = 1 if write is data_copy else STEPS  # the same values again are no change
    assert (report.detected, report.weight_faults, report.false_alarms) == (0, 0, 0), str(report)
    assert report.stale == 2 * edits
    assert {site: r.stale for site, r in report.sites.items()} == {"0": edits, "2": edits, "4": 0}
    assert {e.verdict for e in report.events} == {Verdict.STALE}
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and "refresh" in messages[0], "each site warns once"
    assert " 0 " in messages[0] and " 2 " in messages[1], "the warning names the site"


def test_an_unannounced_write_to_a_bias_is_stale():
    twins = Twins()
    twins.assert_same_outputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            for model in twins:
                model[0].bias.data.add_(1.0)
                model[4].bias.data.mul_(2.0)
            twins.assert_same_outputs()
    report = abft.report()
    assert (report.detected, report.weight_faults, report.stale) == (0, 0, 2 * STEPS), str(report)
    assert len(caught) == 2


def test_an_unannounced_write_to_a_tiny_weight_is_stale():
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))

    twins = Twins(make)
    twins.assert_same_outputs(rows_of(16, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in twins:
            for p in model.parameters():
                p.data.mul_(0.5)
        twins.assert_same_outputs(rows_of(16, 6))
    report = abft.report()
    assert (report.detected, report.weight_faults) == (0, 0) and report.stale > 0


def test_training_by_hand_through_data_equals_unprotected():
    twins = Twins()
    losses = []
    for model in twins:

        def step(model=model):
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.1)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(train(model, step))
    assert_same_losses(*losses)
    assert_same_parameters(twins)
    report = abft.report()
    assert report.detected == 0 and report.weight_faults == 0
    assert report.stale >= 3 * (STEPS - 1)


@pytest.mark.parametrize("level", ["correct", "detect"])
def test_refresh_makes_an_unannounced_write_silent(level):
    for policy in (Policy(level=level), Policy(level=level, weights="frozen")):
        twins = Twins(policy=policy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(STEPS):
                twins.assert_same_outputs()
                for model in twins:
                    for p in model.parameters():
                        p.data.mul_(0.9)
                    model[0].weight.data[3, 4] = 7.0
                abft.refresh(twins.checked)
            twins.assert_same_outputs()
    assert_silent()


def test_a_stale_weight_under_detect_is_followed():
    twins = Twins(policy=Policy(level="detect"))
    twins.assert_same_outputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in twins:
            model[0].weight.data.mul_(0.5)
        twins.assert_same_outputs()
        twins.assert_same_outputs()
    report = abft.report()
    assert (report.detected, report.stale) == (0, 1)


# --- memory faults ----------------------------------------------------------------------------------------


def flip(weight: Tensor, *index: int, bit: int) -> None:
    """Turn one bit of a weight in memory, past every version counter."""
    integers = weight.data.view(INTEGER[weight.dtype])
    width = 8 * weight.element_size()
    integers[index] ^= -(1 << bit) if bit == width - 1 else 1 << bit


def effect(clean: Tensor, faulty: Tensor) -> float:
    """Relative L2 change of the worst row."""
    clean, faulty = clean.detach().double(), faulty.detach().double()
    change = (faulty - clean).norm(dim=-1) / clean.norm(dim=-1)
    return float(torch.nan_to_num(change, nan=np.inf, posinf=np.inf).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_bit_of_a_frozen_weight(dtype):
    """Each bit of elements here and there: what changes the result by 1e-3 or more is found, undone and named."""
    layer = abft.protect(nn.Linear(40, 72).to(dtype), "inference", name="layer")
    twin = nn.Linear(40, 72).to(dtype)
    x = rows_of(24, 40).to(dtype)
    generator = torch.Generator().manual_seed(1)
    harmful = 0
    with torch.no_grad():
        clean = layer(x)
        for bit in range(8 * layer.weight.element_size()):
            for _ in range(6):
                row, column = (int(torch.randint(size, (1,), generator=generator)) for size in (72, 40))
                flip(layer.weight, row, column, bit=bit)
                twin.load_state_dict(layer.state_dict())
                damage = effect(clean, twin(x))
                abft.report(reset=True)
                y = layer(x)
                report = abft.report()
                if damage >= 1e-3:
                    harmful += 1
                    assert report.detected > 0, f"bit {bit} of ({row}, {column}), {damage:.2g} of a row, was not seen"
                    assert report.weight_faults == 1 and report.uncorrected == 0
                    (event,) = report.events
                    assert (event.cause, event.col, event.verdict) == ("weight", row, Verdict.RECONSTRUCTED)
                    assert f"weight element {row}, {column}" in event.message
                if report.detected:
                    assert same(y, clean), f"bit {bit} of ({row}, {column}) was seen, and its wrong product delivered"
                assert (report.false_alarms, report.stale) == (0, 0)
                flip(layer.weight, row, column, bit=bit)
                abft.refresh(layer)
                assert same(layer(x), clean)
    assert harmful > 40
    abft.report(reset=True)
    with torch.no_grad():
        assert same(layer(x), clean)
    assert_silent()


@pytest.mark.parametrize("bit", [30, 31, 24, 22])
def test_a_bit_of_a_tracked_weight(bit):
    """Under "tracked", too, one changed element is a memory fault: the remembered weight's product is delivered."""
    twins = Twins()
    twins.assert_same_outputs()
    flip(twins.checked[0].weight, 3, 4, bit=bit)
    changed = twins.checked[0].weight.detach().clone()
    for _ in range(STEPS):
        twins.assert_same_outputs()
    assert same(twins.checked[0].weight, changed), "nothing may be written into a weight"
    report = abft.report()
    assert report.reconstructed > 0 and report.uncorrected == 0
    assert report.weight_faults == 1, "one element is counted once"


@pytest.mark.parametrize("value", [1.5, -1.0, 3e38, 1e-39], ids=str)
@pytest.mark.parametrize("policy", [None, "inference"], ids=["tracked", "frozen"])
def test_a_bit_that_makes_a_weight_anything(policy, value):
    """NaN, Inf, a denormal: a value that only a fault put there is no property of the input or of the model."""

    def make() -> nn.Module:
        layer = nn.Linear(48, 20)
        with torch.no_grad():
            layer.weight[3, 4] = value
            layer.bias[6] = value
        return nn.Sequential(layer)

    twins = Twins(make, policy)
    x = rows_of() * 1e-3
    twins.assert_same_outputs(x)
    before = abft.report(reset=True)
    assert before.detected == before.weight_faults == 0
    for bit in range(20, 32):
        for name, index in (("weight", (3, 4)), ("bias", (6,))):
            flip(getattr(twins.checked[0], name), *index, bit=bit)
            damage = effect(twins.plain(x), F.linear(x, twins.checked[0].weight, twins.checked[0].bias))
            y = twins.checked(x)
            report = abft.report(reset=True)
            if damage >= 1e-3 or report.detected:
                assert same(y, twins.plain(x)), f"{name} bit {bit}"
                assert report.detected > 0 and report.uncorrected == report.input_rows == report.overflow_rows == 0
            flip(getattr(twins.checked[0], name), *index, bit=bit)


def test_a_bit_of_a_bias():
    for policy in (None, "inference"):
        abft.report(reset=True)
        twins = Twins(policy=policy)
        twins.assert_same_outputs()
        for bit in (30, 31, 27):
            flip(twins.checked[4].bias, 7, bit=bit)
            twins.assert_same_outputs()
            flip(twins.checked[4].bias, 7, bit=bit)
        flip(twins.checked[4].bias, 3, bit=30)
        with torch.autocast("cpu", torch.bfloat16):
            abft.refresh(twins.checked)
            twins.plain.load_state_dict(twins.checked.state_dict())
            twins.assert_same_outputs()  # announced: a legitimate, if large, bias
        report = abft.report()
        assert report.reconstructed > 0 and report.uncorrected == 0 and report.stale == 0
        assert report.weight_faults == 1
        assert "bias element 7" in report.events[0].message and report.events[0].cause == "weight"


def test_several_faulty_elements_are_all_named_and_counted_once():
    twins = Twins(policy="inference")
    twins.assert_same_outputs()
    for row, column in ((3, 4), (60, 40), (3, 11)):
        flip(twins.checked[0].weight, row, column, bit=30)
    for _ in range(3):
        twins.assert_same_outputs()
    assert abft.report().weight_faults == 3
    flip(twins.checked[0].weight, 9, 9, bit=30)
    twins.assert_same_outputs()
    report = abft.report()
    assert (report.weight_faults, report.uncorrected) == (4, 0)


def test_one_fault_seen_by_forward_and_backward_is_one_fault():
    twins = Twins(policy=Policy(weights="frozen", on_uncorrected="record"))
    for model in twins:
        model.requires_grad_(False)
    grads = []
    for attempt in range(3):
        for model in twins:
            x = rows_of().requires_grad_()
            model(x).square().sum().backward()
            grads.append(x.grad)
        if attempt == 0:
            flip(twins.checked[2].weight, 5, 6, bit=30)
    assert all(same(g, grads[0]) for g in grads)
    report = abft.report()
    assert report.weight_faults == 1
    assert {e.role for e in report.events} == {"fprop", "dgrad"}
    assert all("weight element 5, 6" in e.message for e in report.events)
    assert report.uncorrected == 0


def test_a_frozen_weight_is_never_silently_followed():
    """A dense change without refresh: said at every use, the present product delivered, until somebody refreshes."""
    twins = Twins(policy=Policy(weights="frozen", on_uncorrected="record"))
    twins.assert_same_outputs()
    for model in twins:
        with torch.no_grad():
            model[2].weight.mul_(0.5)  # even if torch could tell
    for _ in range(3):
        twins.assert_same_outputs()
    report = abft.report()
    assert report.uncorrected == 3 * 16 and report.weight_faults == 1 and report.stale == 0
    assert {(e.verdict, e.cause, e.site) for e in report.events} == {(Verdict.UNCORRECTED, "weight", "2")}
    abft.refresh(twins.checked)
    abft.report(reset=True)
    twins.assert_same_outputs()
    assert_silent()


@pytest.mark.parametrize("other", ["refresh", "to", "load_state_dict", "optimizer", "protect"])
def test_what_happens_to_another_model_excuses_no_fault(other):
    twins = Twins(policy="inference")
    twins.assert_same_outputs()
    flip(twins.checked[0].weight, 3, 4, bit=30)
    stranger = abft.protect(net())
    stranger(rows_of()).sum().backward()
    if other == "refresh":
        abft.refresh(stranger)
    elif other == "to":
        stranger.double()
    elif other == "load_state_dict":
        stranger.load_state_dict(net().state_dict())
    elif other == "optimizer":
        torch.optim.AdamW(stranger.parameters(), fused=True).step()
    else:
        abft.protect(abft.unprotect(stranger))
    twins.assert_same_outputs()
    report = abft.report()
    assert report.reconstructed == 16 and report.weight_faults == 1


def test_a_fault_is_new_again_after_a_refresh():
    twins = Twins(policy="inference")
    for expected in (1, 2):
        twins.assert_same_outputs()
        flip(twins.checked[0].weight, 3, 4, bit=30)
        twins.assert_same_outputs()
        assert abft.report().weight_faults == expected
        flip(twins.checked[0].weight, 3, 4, bit=30)
        abft.refresh(twins.checked)


def test_a_faulty_weight_under_detect_is_reported_and_not_repaired():
    twins = Twins(policy=Policy(level="detect", weights="frozen", on_uncorrected="record"))
    twins.assert_same_outputs()
    for model in twins:
        flip(model[0].weight, 3, 4, bit=30)
    twins.assert_same_outputs()
    report = abft.report()
    assert report.observed == report.detected == 16 and report.weight_faults == 1
    assert report.events[0].cause == "weight" and report.events[0].col == 3


def test_frozen_under_autocast():
    twins = Twins(policy="inference")
    with torch.autocast("cpu", torch.bfloat16):
        twins.assert_same_outputs()
        flip(twins.checked[0].weight, 3, 4, bit=30)
        for _ in range(3):
            twins.assert_same_outputs()
    report = abft.report()
    assert report.reconstructed > 0 and report.weight_faults == 1 and report.uncorrected == 0


def test_an_element_of_a_very_tall_weight_is_named():
    """As tall as a large vocabulary: more rows than a 16-bit number counts."""
    layer = abft.protect(nn.Linear(4, 100_000, bias=False), "inference", name="head")
    x = rows_of(2, 4)
    with torch.no_grad():
        clean = layer(x)
        for row, bit in ((99_999, 30), (70_001, 31), (65_535, 23), (3, 15)):
            flip(layer.weight, row, 2, bit=bit)
            abft.report(reset=True)
            y = layer(x)
            report = abft.report()
            if report.detected:
                assert same(y, clean) and f"weight element {row}, 2" in report.events[0].message
            flip(layer.weight, row, 2, bit=bit)
            assert report.detected or bit < 30


@pytest.mark.parametrize("policy", [None, "inference"])
def test_injected_weight_faults_are_repaired_and_undone(policy):
    twins = Twins(policy=policy)
    before = twins.checked[0].weight.detach().clone()
    for seed in range(5):
        with abft.inject.faults(abft.inject.Fault("bitflip", where="weight", bit=30, site="0"), seed=seed) as log:
            twins.assert_same_outputs()
        assert len(log) == 1 and log[0].where == "weight" and log[0].effect > 1e-3
        assert same(twins.checked[0].weight, before)
        twins.assert_same_outputs()
    report = abft.report()
    assert report.reconstructed > 0 and report.uncorrected == 0 and report.weight_faults == 5


# --- edits that nobody announced and that leave the range ---------------------------------------------


def _nan_weight(layer: nn.Linear) -> None:
    layer.weight.data[:2] = float("nan")


def _nan_bias(layer: nn.Linear) -> None:
    layer.bias.data.fill_(float("nan"))


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("policy", ["training", "audit"])
@pytest.mark.parametrize("edit", [_nan_weight, _nan_bias])
def test_an_unannounced_edit_to_nan_is_stale_and_input_and_no_fault(edit, policy, rows):
    layer = abft.protect(nn.Linear(40, 48), policy)
    x = torch.randn(rows, 40)
    layer(x)
    abft.report(reset=True)
    edit(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x)
    report = abft.report(reset=True)
    assert (report.stale, report.input_rows, report.detected, report.false_alarms) == (1, rows, 0, 0)
    layer(x)
    assert (abft.report().stale, abft.report().input_rows) == (0, rows)


@pytest.mark.parametrize("policy", ["training", "audit"])
@pytest.mark.parametrize("factor", [1e15, 1e19, 1e30])
def test_an_unannounced_edit_beyond_the_range_of_squares_is_stale(factor, policy):
    layer, x = abft.protect(nn.Linear(40, 48), policy), torch.randn(20, 40)
    layer(x)
    abft.report(reset=True)
    layer.weight.data.mul_(factor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert (report.stale, report.input_rows, report.overflow_rows, report.detected) == (1, 0, 0, 0)


def test_an_unannounced_edit_that_overflows_the_output_is_stale_and_overflow():
    layer, x = abft.protect(nn.Linear(40, 48).half(), "training"), torch.randn(20, 40).half()
    layer(x)
    abft.report(reset=True)
    layer.weight.data.fill_(6e4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x)
    report = abft.report()
    assert report.stale == 1 and report.detected == 0
    assert report.overflow_rows == int((~y.isfinite()).any(1).sum()) > 0


@pytest.mark.parametrize("policy", ["frozen", "tracked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=oracles.name_of)
def test_restore_writes_the_remembered_bits_back(dtype, policy):
    layer = abft.Linear(90, 700, dtype=dtype, policy=abft.Policy(weights=policy))
    x = torch.randn(20, 90).to(dtype).requires_grad_()
    layer(x).sum().backward()
    loaded = layer.weight.detach().clone()
    assert abft.restore(layer) == 0
    raw = abft.bits.as_integers(layer.weight.data)
    for row, column in ((0, 0), (333, 17), (699, 89)) if policy == "frozen" else ((0, 0), (3, 7), (15, 2)):  # more would be an edit
        raw[row, column] ^= 1 << (8 * dtype.itemsize - 2)
    assert abft.restore(torch.nn.Sequential(layer)) == 3 and oracles.bits_equal(layer.weight.detach(), loaded)
    with torch.no_grad():
        layer.weight[3, 3] = 7.0  # an edit: tracked, what was remembered is of no use; frozen, it is a fault until announced
    restored = int(policy == "frozen")
    assert abft.restore(layer) == restored and bool(layer.weight[3, 3] == 7.0) is not bool(restored)


def test_restore_refuses_what_it_cannot_name_and_writes_nothing():
    layer = abft.Linear(90, 700, policy=abft.Policy(weights="frozen"))
    layer(torch.randn(20, 90))
    raw = abft.bits.as_integers(layer.weight.data)
    raw[3, 7] ^= 1 << 30
    raw[9, 7] ^= 1 << 30
    wrong = layer.weight.detach().clone()
    with pytest.raises(abft.AbftError, match="weight changed in memory"):
        abft.restore(layer)
    assert oracles.bits_equal(layer.weight.detach(), wrong)
    with pytest.raises(TypeError, match="Module"):
        abft.restore(layer.weight)
