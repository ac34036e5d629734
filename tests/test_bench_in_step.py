"""Models in step (bench/in_step.py), with a clock that a test winds: no assertion here depends on how fast anything is."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from bench import in_step, intervals, providers, workloads
from bench.results import Results, read


class Now:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_everyone_does_a_part_before_anyone_does_the_next() -> None:
    now, seen = Now(), []

    def part(who: int, at: int):
        def work(value: int) -> int:
            assert value == at  # what the part before returned
            seen.append((who, at))
            now.seconds += 1.0 + who
            return at + 1

        return work

    seconds = in_step.laps([[part(who, at) for at in range(3)] for who in range(4)], 0, 5, random.Random(0), [now])
    assert seconds.shape == (5, 4, 1)
    assert seconds[..., 0].tolist() == [[3.0, 6.0, 9.0, 12.0]] * 5  # of three parts each; the first round is left out
    for i in range(0, len(seen), 4):
        assert {who for who, _ in seen[i : i + 4]} == {0, 1, 2, 3} and len({at for _, at in seen[i : i + 4]}) == 1
    assert len({tuple(seen[i : i + 4]) for i in range(0, len(seen), 4)}) > 8  # in an order drawn anew


def test_all_forms_of_a_model_have_its_weights_and_answers() -> None:
    case = next(c for c in in_step.cases() if c.workload.name == "minilm-1x16")
    model, inputs = case.workload.model(), case.workload.draw(None)
    forms = in_step._forms(case, model, [providers.parse(n) for n in ("torch", "abft", "abft:whole")])
    found = []
    for parts in forms:
        value = inputs
        for part in parts:
            value = part(value)
        found.append(value)
    with torch.no_grad():
        right = model.double()(*inputs)
    assert len(forms[0]) == 7  # the embeddings, and six layers
    assert torch.equal(found[0], found[1])  # linear layers: torch's own products
    for value in found:
        assert (value.double() - right).norm() < 1e-5 * right.norm()


def test_each_place_belongs_to_each_competitor_and_the_record_is_the_quotient_of_their_times(tmp_path, monkeypatch) -> None:
    now, places = Now(), []
    takes = {"torch": 1.0, "torch-again": 1.0, "abft": 1.5}

    def parts(model: nn.Module, _: torch.optim.Optimizer):
        def work(value):
            places.append((who, model[0].weight.data_ptr()))
            now.seconds += takes[who]
            return model(value)

        who = next(asked)
        return [work]

    order = ("torch", "torch-again", "abft")
    asked = iter(order * 3)
    monkeypatch.setattr(in_step, "CLOCKS", {"wall": now, "thread": now})
    known = next(workloads.models("forward", cuda=False))
    small = replace(known, name="small", model=lambda: nn.Sequential(nn.Linear(4, 4)), draw=lambda _: torch.randn(2, 4))
    results = Results("in-step-cpu", folder=tmp_path)
    records = in_step.measure(in_step.Case(small, parts, 2), ("abft",), results, 12)
    assert Counter(places).total() == 12 * 3 * 3 and set(Counter(places).values()) == {12}
    assert len({place for _, place in places}) == 3
    ratios = {r["provider"]: r["ratio"] for r in records}
    assert ratios == {"torch-again": 1.0, "abft": 1.5}
    assert [r["interval"] for r in records if r["provider"] == "abft"] == [list(intervals.median([1.5] * 12))] * (len(records) // 2)
    assert [r["key"] for r in read(tmp_path / "in-step-cpu.jsonl") if r["kind"] == "in step"] == [r["key"] for r in records]


def test_a_training_step_in_parts_is_the_step() -> None:
    case = next(c for c in in_step.cases() if c.workload.passes == "step")
    torch.manual_seed(0)
    model, inputs = case.workload.model(), case.workload.draw(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = [w.detach().clone() for w in model.parameters()]
    loss = model(*inputs)
    loss.backward()
    value = inputs
    wanted = [w.grad.clone() for w in model.parameters()]
    model.zero_grad(set_to_none=True)
    forward, backward, update = case.parts(model, optimizer)
    value = forward(value)
    assert torch.equal(value, loss)
    value = backward(value)
    assert all(torch.equal(w.grad, g) for w, g in zip(model.parameters(), wanted, strict=True))
    update(value)
    assert all(w.grad is None for w in model.parameters())
    assert all(not torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))


def test_the_command_says_what_cases_there_are(capsys) -> None:
    try:
        in_step.main(["--cases", "resnet"])
    except SystemExit as stopped:
        assert stopped.code == 2
    assert "minilm-16x128" in capsys.readouterr().err
