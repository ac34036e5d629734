"""What protection costs in memory: small panels, nothing in the state dict, nothing that grows, nothing that stays behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import pickletools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

import abft
from abft import Policy


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 8))


def live_tensor_bytes() -> int:
    """Bytes of every storage that some Python object still reaches."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Fake tensors, which other tests' compilers leave behind, have no memory.
        if issubclass(type(thing), Tensor) and not issubclass(type(thing), FakeTensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture(autouse=True)
def nothing_of_other_tests():
    gc.collect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_panels_are_a_thirtieth_of_the_weights_in_each_direction(dtype):
    """At 512 columns a group: checksums, sketches, fingerprints and biases, at most 3.3 % of a 4096 × 4096 weight."""
    layer = abft.protect(nn.Linear(4096, 4096, dtype=dtype), Policy(group=512)).requires_grad_(False)
    weight_bytes = layer.weight.nbytes
    before = abft.panels.live_bytes()
    x = torch.randn(2, 4096).to(dtype).requires_grad_()
    y = layer(x)
    forward = abft.panels.live_bytes() - before
    y.sum().backward()
    backward = abft.panels.live_bytes() - before - forward
    print(f"{forward / weight_bytes:.2%} forward, {backward / weight_bytes:.2%} backward")
    assert 0 < forward <= 0.033 * weight_bytes
    assert 0 < backward <= 0.033 * weight_bytes
    assert abft.report().detected == 0


def test_live_bytes_counts_what_is_really_held():
    layer = nn.Linear(512, 512).requires_grad_(False)
    x = torch.randn(4, 512).requires_grad_()
    F.linear(x, layer.weight).sum().backward()  # whatever torch allocates once
    abft.protect(layer)
    abft.protect(nn.Linear(512, 512))(x).sum().backward()  # and what abft does
    x.grad = None
    tensors, panels = live_tensor_bytes(), abft.panels.live_bytes()
    layer(x).sum().backward()
    x.grad = None
    held = live_tensor_bytes() - tensors
    counted = abft.panels.live_bytes() - panels
    assert counted > 0
    # A bias's sums and a panel's own checksum are a few numbers each, and not counted.
    assert counted <= held <= counted + 1024


def test_protection_adds_no_parameter_buffer_or_key():
    plain, checked = net(), abft.protect(net())
    for _ in range(2):
        checked(torch.randn(3, 40)).sum().backward()
    assert list(plain.state_dict()) == list(checked.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in checked.named_parameters()]
    assert list(checked.buffers()) == []
    for key, value in checked.state_dict(keep_vars=True).items():
        assert value is dict(checked.named_parameters())[key]


@pytest.mark.parametrize("what", ["state_dict", "keep_vars", "parameter"])
def test_saved_weights_hold_no_panels_and_need_no_abft(what):
    model = abft.protect(net())
    model(torch.randn(3, 40)).sum().backward()
    things = {
        "state_dict": lambda: model.state_dict(),
        "keep_vars": lambda: model.state_dict(keep_vars=True),
        "parameter": lambda: model[0].weight,
    }
    buffer = io.BytesIO()
    torch.save(things[what](), buffer)
    names = [arg for _, arg, _ in pickletools.genops(pickle.dumps(things[what]())) if isinstance(arg, str)]
    assert not any(name.split(".")[0] == "abft" for name in names), "unpickling would import abft"
    size = sum(p.nbytes for p in ([model[0].weight] if what == "parameter" else model.parameters()))
    assert buffer.tell() < size + 4096
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    first = loaded if what == "parameter" else loaded["0.weight"]
    assert torch.equal(first, model[0].weight)
    again = abft.linear(torch.randn(3, 40), nn.Parameter(first) if what == "state_dict" else first)
    assert again.shape == (3, 64) and abft.report().detected == 0


def steps(model: nn.Module, *, autocast: bool = False, guard: bool = False, inference: bool = False) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guarded = abft.StepGuard(model, optimizer) if guard else None

    def forward_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(torch.randn(6, 40)).float().square().mean()
        loss.backward()

    def step() -> None:
        if inference:
            with torch.inference_mode():
                model(torch.randn(6, 40))
        elif guarded is not None:
            while guarded.attempt():
                forward_backward()
            guarded.step()
        else:
            forward_backward()
            optimizer.step()
        model.zero_grad()

    return step


@pytest.mark.parametrize("kind", ["plain", "autocast", "guard", "inference", "accumulate-faults"])
def test_nothing_grows_over_a_hundred_steps(kind):
    model = abft.protect(net(), Policy(on_uncorrected="record"))
    step = steps(model, autocast=kind == "autocast", guard=kind == "guard", inference=kind == "inference")
    faults = [abft.inject.Fault("nullify", pattern="row", role="*", probability=0.1 if kind == "accumulate-faults" else 0.0)]

    def measure() -> tuple[int, int]:
        for panels in list(abft.panels._all):
            panels.lanes.clear()  # one that was not taken in a struck step keeps the bias sums of the step before
        return live_tensor_bytes(), abft.panels.live_bytes()

    with abft.inject.faults(*faults):
        # What judges a struck product keeps its tables for the next one: every product of the model is struck before it is counted.
        for _ in range(40 if kind == "accumulate-faults" else 3):
            step()
        start = measure()
        for _ in range(2):
            for _ in range(50):
                step()
            assert measure() == start


def test_panels_die_with_their_weights():
    start = abft.panels.live_bytes()
    model = abft.protect(net())
    model(torch.randn(3, 40)).sum().backward()
    assert abft.panels.live_bytes() > start
    held = abft.panels.live_bytes()
    model[0].weight = nn.Parameter(torch.randn(64, 40))
    assert abft.panels.live_bytes() < held, "a replaced weight takes its panels along"
    clone = copy.deepcopy(model)
    clone(torch.randn(3, 40))
    del clone
    assert abft.panels.live_bytes() < held
    del model
    assert abft.panels.live_bytes() == start


def test_unprotecting_frees_the_panels():
    start = abft.panels.live_bytes()
    model = abft.protect(net())
    model(torch.randn(3, 40)).sum().backward()
    abft.unprotect(model)
    assert abft.panels.live_bytes() == start
    assert all(not vars(p) for p in model.parameters()), "nothing is left on a parameter"


def test_functions_and_scopes_hold_panels_no_longer_than_their_weights():
    start = abft.panels.live_bytes()
    for _ in range(5):
        weight = nn.Parameter(torch.randn(64, 40))
        abft.linear(torch.randn(3, 40), weight)
        layer = nn.Linear(40, 64)
        with abft.protected():
            layer(torch.randn(3, 40))
    del weight, layer
    assert abft.panels.live_bytes() == start
