"""The benchmark harness, on small shapes and with a clock that a test winds: no assertion here depends on how fast anything is."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import abft
from abft import panels
from abft.statistics import watches
from bench import (
    attention,
    attention_layer,
    comparison,
    detector_cost,
    evidence,
    intervals,
    linear,
    providers,
    shapes,
    stamp,
    timing,
    timing_table,
    workloads,
)
from bench.contender import Contender, results
from bench.results import Results, read

CPU = torch.device("cpu")
SMALL = shapes.Shape("small", 24, 96, 64, bias=True)


class StandInTime:
    """Time that passes only when work says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float):
        def work() -> None:
            self.seconds += seconds

        return work


# --- the race ------------------------------------------------------------------------------------------


def test_a_race_measures_every_competitor_once_a_round() -> None:
    now = StandInTime()
    times = timing.race({"a": now.work(1.0), "b": now.work(3.0)}, clock=timing.HostClock(now), rounds=7)
    assert times["a"].seconds == [1.0] * 7 and times["b"].seconds == [3.0] * 7
    assert timing.ratio(times["b"], times["a"]) == {"ratio": 3.0, "low": 3.0, "high": 3.0, "rounds": 7}


def test_the_order_is_drawn_anew_each_round_and_repeats_with_the_seed() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        timing.race({n: lambda n=n: seen.append(n) for n in "abcd"}, clock=timing.HostClock(), rounds=30, seed=seed, warm_up=1)
        return seen[4:]

    rounds = [tuple(order(1)[i : i + 4]) for i in range(0, 120, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 10
    assert {r[0] for r in rounds} == set("abcd")
    assert order(1) == order(1) != order(2)


def test_short_calls_are_repeated_until_a_lap_is_long_enough() -> None:
    now = StandInTime()
    times = timing.race({"short": now.work(0.001), "long": now.work(1.0)}, clock=timing.HostClock(now), rounds=6, lap_seconds=0.1)
    assert times["short"].calls == pytest.approx(100, abs=1) and times["long"].calls == 1
    assert times["short"].seconds == pytest.approx([0.001] * 6)


def test_a_slow_round_moves_neither_ratio_nor_interval() -> None:
    """Both competitors meet what the machine does in a round; what hits one of them alone in a few rounds is an outlier."""
    a, b = timing.Times(1, [1.0] * 41), timing.Times(1, [1.02] * 41)
    for slow in (3, 17, 30):
        a.seconds[slow] *= 50
        b.seconds[slow] *= 50
    b.seconds[5] *= 9
    found = timing.ratio(b, a)
    assert (found["ratio"], found["low"], found["high"]) == pytest.approx((1.02, 1.02, 1.02))


def test_a_deadline_ends_a_race_once_there_is_an_interval() -> None:
    now = StandInTime()
    times = timing.race({"a": now.work(1.0)}, clock=timing.HostClock(now), rounds=100, deadline=-math.inf)
    assert len(times["a"].seconds) == timing.FEWEST_ROUNDS
    assert math.isfinite(timing.ratio(times["a"], times["a"])["low"])


def test_a_device_s_clock_reads_events_around_each_call_after_the_cache_was_overwritten(monkeypatch) -> None:
    """With events that a test winds: device time passes in calls and in overwriting the cache, and only the former counts."""
    now, order = StandInTime(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now()
            order.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(timing, "FLUSHED", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    clock = timing.DeviceClock(CPU)

    def overwrite() -> None:
        now.work(5.0)()
        order.append("cache")

    clock._cache = type("Cache", (), {"zero_": staticmethod(overwrite)})()
    lap = clock.lap(now.work(0.25), 2)
    assert lap.seconds == 0.25
    assert order == ["wait", *["cache", "event", "event"] * 2, "wait"]


def test_garbage_is_collected_again_after_a_race_that_failed() -> None:
    import gc

    def fails() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.race({"a": fails}, clock=timing.HostClock(), rounds=6)
    assert gc.isenabled()


@pytest.mark.parametrize("n", [6, 11, 41])
def test_the_interval_of_a_median_covers_what_it_promises(n: int) -> None:
    rng = np.random.default_rng(n)
    covered = [i.low <= 0 <= i.high for i in (intervals.median(rng.standard_cauchy(n).tolist()) for _ in range(1000))]
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_the_interval_of_a_median_is_the_published_one() -> None:
    # Order statistics that enclose the median at 95 %: ranks 2 and 9 of ten, 6 and 15 of twenty (Conover, table A3).
    assert intervals.median(range(1, 11)) == (2, 9)
    assert intervals.median(range(1, 21)) == (6, 15)
    assert intervals.median(range(5)) == (-math.inf, math.inf)


# --- shapes and providers --------------------------------------------------------------------------------


def test_what_sets_equal_layers_apart_cancels_in_the_cost_of_a_detector() -> None:
    rng, places, rounds = np.random.default_rng(0), np.array([1.0, 1.03, 0.98]), 4
    seconds = np.array([[places[list(at)] * [1.0, 1.002, 1.0] * rng.normal(1, 1e-4, (rounds, 1)) for at in detector_cost.ASSIGNMENTS] for _ in range(2)])
    seconds = seconds.reshape(-1, rounds, 3) * rng.normal(1, 1e-4, (12, rounds, 3))
    assert detector_cost.quotients(seconds[..., 1], seconds[..., 0]) == pytest.approx([1.002] * 2, abs=3e-4)
    assert detector_cost.quotients(seconds[..., 2], seconds[..., 0]) == pytest.approx([1.0] * 2, abs=3e-4)


def test_every_lap_of_a_detector_s_cost_is_a_batch_that_is_compared(tmp_path) -> None:
    found = Results("cost", folder=tmp_path)
    detector_cost.measure(found, size=16, rows=256, blocks=7, rounds=2)
    assert [r["key"].split(" ", 1)[1] for r in found.records[1:]] == [f"{what} {c}" for c in ("wall", "thread") for what in ("both / checksum", "checksum / checksum")]
    assert all(r["blocks"] == 6 and r["calls"] == 4 and r["alarms"] == 0 for r in found.records[1:])
    seen = [monitor.pooled[0, 0] for monitor in watches.monitors().values()]
    assert seen == [1024 * (64 + 2 * 3)] * 3, "of each layer: the warm-up, then in two blocks three laps"
    watches.forget()


def test_shapes_have_names_of_their_own() -> None:
    names = [s.name for s in shapes.every()]
    assert len(set(names)) == len(names)
    assert shapes.named(["llama8b-qo-1"]) == [shapes.Shape("llama8b-qo-1", 1, 4096, 4096)]
    assert {s.m for s in shapes.named(["llama70b-down-*"])} == {1, 4, 16, 64, 512, 8192}
    assert {(s.m, s.n, s.k) for s in shapes.named(["square-*"])} == {(n, n, n) for n in (1024, 4096, 8192)}
    with pytest.raises(ValueError, match="no shape is called 'sqare'"):
        shapes.named(["square-1024", "sqare"])


def test_default_shapes_and_providers_exist() -> None:
    assert shapes.named(shapes.ON_CPU)
    for name in (*providers.ON_CPU, *providers.ON_GPU, *attention.ON_CPU, *attention.ON_GPU):
        assert providers.parse(name).name == name


def test_a_provider_is_a_policy_in_words() -> None:
    assert providers.parse("abft:triton,lean,deferred,g=256").policy == abft.Policy(
        backend="triton", panel="lean", timing="deferred", group=256, on_uncorrected="record"
    )
    assert providers.parse("dmr").policy == abft.Policy(level="off", redundancy="dmr", on_uncorrected="record")
    assert providers.parse("abft:guarded").guarded
    assert providers.parse("abft:whole").whole and not providers.parse("abft").whole
    assert providers.parse("torch:flash").kernel == "flash" and providers.parse("torch:flash").policy is None
    assert providers.parse("torch").policy is None and not providers.parse("twin").checks
    assert not providers.parse("abft:off").checks and providers.parse("dmr").checks
    for name in ("abft:fast", "cublas", "torch:lean", "abft:g=x"):
        with pytest.raises(ValueError, match="no provider is called"):
            providers.parse(name)


def test_what_cannot_run_here_says_why() -> None:
    assert providers.unavailable(providers.parse("abft"), CPU, torch.float32) is None
    assert providers.unavailable(providers.parse("abft"), CPU, torch.int8) is not None
    assert providers.unavailable(providers.parse("abft:triton"), CPU, torch.bfloat16) is not None  # neither interpreted nor compiled


# --- evidence ------------------------------------------------------------------------------------------


def contender(name: str, passes: workloads.Passes = "forward", dtype: torch.dtype = torch.float32) -> Contender:
    torch.manual_seed(0)
    workload = workloads.linear(SMALL, passes)
    return Contender(providers.parse(name), workload, workload.model().to(dtype), "eager", CPU, dtype)


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", ["torch", "abft", "abft:lean", "dmr"])
def test_the_timed_call_and_its_evidence_compute_the_same(name: str, passes: workloads.Passes) -> None:
    c = contender(name, passes)
    inputs = c.workload.inputs(CPU, torch.float32, 5)
    plain = contender("torch", passes)
    for ours, torchs in zip(c.results(inputs), results(plain.model, passes, inputs), strict=True):
        assert torch.equal(ours, torchs)
    assert len(c.results(inputs)) == (1 if passes == "forward" else 4)  # y; gradients of x, weight, bias


def test_an_error_is_that_of_the_worst_row() -> None:
    right = [torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    assert evidence.error([t.float() for t in right], right) == 0.0
    wrong = [right[0].clone(), right[1].clone()]
    wrong[0][0, 0] += 0.05  # of a row of norm 5
    assert evidence.error(wrong, right) == pytest.approx(0.01)
    wrong[0][2, 0] = 5.0  # where there should be nothing: by the largest row, of norm 50
    assert evidence.error(wrong, right) == pytest.approx(0.1)


def test_fp32_is_as_right_as_fp32_can_be() -> None:
    c = contender("abft", "backward")
    inputs = c.workload.inputs(CPU, torch.float32, 5)
    right = evidence.exact(contender("torch", "backward").model, c.workload, inputs)
    # Every result is a sum of at most K = 96 products: an error of K u in the worst case, √K u typically.
    assert 0 < evidence.error(c.results(inputs), right) < 96 * 2.0**-24


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("name", ["abft", "abft:detect", "dmr", "tmr"])
def test_harmful_flips_are_found_by_who_looks(name: str, passes: workloads.Passes) -> None:
    c = contender(name, passes)
    found = evidence.detection(c, c.workload.inputs(CPU, torch.float32, 5), 25, 1e-3)
    assert found["trials"] == 25 and found["harmful"] > 3
    assert found["found"] == found["harmful"] and found["false_alarms"] == 0
    assert found["repaired"] == (0 if "detect" in name else found["detected"])
    assert 0 < found["at_least"] < 1


def test_a_blind_bound_shows_in_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    from abft import threshold

    original = threshold.kappa
    monkeypatch.setattr(threshold, "kappa", lambda *args, **kwargs: 1e6 * original(*args, **kwargs))
    threshold.coefficients.cache_clear()
    try:
        c = contender("abft")
        found = evidence.detection(c, c.workload.inputs(CPU, torch.float32, 5), 25, 1e-3)
        floor = evidence.expected_floor(c, 24, CPU, torch.float32)
    finally:
        monkeypatch.undo()
        threshold.coefficients.cache_clear()
    assert found["found"] < found["harmful"]
    assert floor is not None and floor > 1e5 * evidence.expected_floor(contender("abft"), 24, CPU, torch.float32)


def test_who_looks_for_nothing_finds_nothing_and_has_no_floor() -> None:
    c = contender("torch")
    assert evidence.detection(c, c.workload.inputs(CPU, torch.float32, 5), 9, 1e-3) == {"trials": 0}
    assert evidence.expected_floor(c, 24, CPU, torch.float32) is None
    assert evidence.expected_floor(contender("dmr"), 24, CPU, torch.float32) == 0.0


def test_looking_for_faults_ends_in_time_but_tries_one() -> None:
    c = contender("abft")
    assert evidence.detection(c, c.workload.inputs(CPU, torch.float32, 5), 1000, 1e-3, seconds=0.0)["trials"] == 1


# --- commands ------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(folder, *words: str) -> argparse.Namespace:
    given = ["--rounds", "6", "--trials", "2", "--dtypes", "fp32", "--device", "cpu", "--out", str(folder), *words]
    return comparison.parser("test", "").parse_args(given)


def test_every_time_stands_beside_its_evidence(tmp_path, one_thread, capsys) -> None:
    asked = options(tmp_path, "--providers", "abft", "dmr", "abft:detect", "--gpu-price", "2")
    assert comparison.run("test", [workloads.linear(SMALL, "backward")], asked) == 0
    records = read(tmp_path / "time-test-cpu.jsonl")
    rows = {r["provider"]: r for r in records if r["kind"] == "timing"}
    assert list(rows) == ["torch", "torch-again", "abft", "dmr", "abft:detect"]
    for name, r in rows.items():
        assert r["rounds"] == 6 and 0 < r["p20"] <= r["seconds"] <= r["p80"] and r["low"] <= r["ratio"] <= r["high"]
        assert 0 < r["error"] < 96 * 2.0**-24
        assert (r["expected_floor"] is None) == name.startswith("torch")
        assert r["trials"] == (0 if name.startswith("torch") else 2)
        assert r["per_billion_tokens"] == pytest.approx(2 / 3600 * r["seconds"] / 24 * 1e9, rel=1e-3)
    assert rows["abft"]["panel_bytes"] > 0 == rows["torch"]["panel_bytes"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in rows) and "small fp32 backward eager" in shown
    assert records[0]["kind"] == "stamp" and records[0]["configuration"]["rounds"] == 6


def test_panels_of_garbage_are_nobodys(tmp_path, one_thread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection that falls between two looks at the memory took earlier models' panels from the row being measured."""
    layer = abft.Linear(96, 64)
    layer(torch.randn(24, 96))
    held = panels.live_bytes()
    layer.__dict__["itself"] = layer  # a cycle: only a collection frees it
    gc.disable()
    monkeypatch.setattr(evidence, "error", lambda *given, original=evidence.error: (gc.collect(), original(*given))[1])
    try:
        del layer
        assert panels.live_bytes() == held
        comparison.run("test", [workloads.linear(SMALL, "forward")], options(tmp_path, "--providers", "abft"))
    finally:
        gc.enable()
    rows = {r["provider"]: r for r in read(tmp_path / "time-test-cpu.jsonl") if r["kind"] == "timing"}
    assert rows["torch"]["panel_bytes"] == 0 == rows["torch-again"]["panel_bytes"] < rows["abft"]["panel_bytes"]


def test_a_stopped_comparison_goes_on_with_the_next_case(tmp_path, one_thread) -> None:
    workload = workloads.linear(SMALL, "forward")
    comparison.run("test", [workload], options(tmp_path, "--providers", "abft"))
    both = [workload, workloads.linear(SMALL, "backward")]
    comparison.run("test", both, options(tmp_path, "--providers", "abft"))
    cases = [r["key"] for r in read(tmp_path / "time-test-cpu.jsonl") if r["kind"] == "case"]
    assert cases == ["small fp32 forward eager", "small fp32 backward eager"]
    assert comparison.run("test", both, options(tmp_path / "other", "--seconds", "0")) == 1  # nothing was measured


def test_who_fails_is_written_down_and_the_others_go_on(tmp_path, one_thread, monkeypatch) -> None:
    def broken(contender: Contender, *args: object, **kwargs: object) -> dict[str, int]:
        if contender.provider.name == "dmr":
            raise RuntimeError("no such luck\nand more")
        return {"trials": 0}

    monkeypatch.setattr(evidence, "detection", broken)
    comparison.run("test", [workloads.linear(SMALL, "forward")], options(tmp_path, "--providers", "dmr", "abft:triton", "abft"))
    records = read(tmp_path / "time-test-cpu.jsonl")
    assert {r["provider"] for r in records if r["kind"] == "timing"} >= {"torch", "torch-again", "abft"}
    left_out = {r["provider"]: r["reason"] for r in records if r["kind"] == "left out"}
    assert left_out["dmr"] == "RuntimeError: no such luck"


def test_a_guarded_step_trains() -> None:
    from demo import gpt

    shape = gpt.Shape(symbols=11, context=8, width=16, heads=2, layers=1)
    text = torch.randint(11, (4, 9))
    workload = workloads.Workload("tiny", "step", 32, 1, 1, lambda: gpt.GPT(shape), lambda n: (text[:, :-1], text[:, 1:]), 1)
    torch.manual_seed(0)
    model = workload.model()
    trained = []
    for name in ("torch", "abft:off", "abft", "abft:guarded"):
        c = Contender(providers.parse(name), workload, model, "eager", CPU, torch.float32)
        for _ in range(3):
            c.work()
        trained.append(torch.cat([p.detach().flatten() for p in c.model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert not torch.equal(trained[0], before)
    # abft:off is the same attention without checks, which rounds otherwise than torch's.
    assert not torch.equal(trained[1], before)
    assert torch.equal(trained[1], trained[2]) and torch.equal(trained[1], trained[3])


def test_workloads_count_what_they_compute() -> None:
    once, thrice = (workloads.linear(SMALL, passes) for passes in ("forward", "backward"))
    assert (once.multiplications, once.numbers, once.times) == (24 * 96 * 64, 24 * 64 + 96 * 64 + 24 * 96, 1)
    assert (thrice.multiplications, thrice.times) == (once.multiplications, 3)
    batch, one, *_ = workloads.models("forward", cuda=False)
    per_token = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert (batch.multiplications, one.multiplications, one.numbers) == (16 * 128 * per_token, 16 * per_token, per_token)


@pytest.mark.parametrize("module", ["linear", "layer", "model", "train", "attention"])
def test_commands_list_what_they_have(module: str, capsys) -> None:
    import importlib

    assert importlib.import_module(f"bench.{module}").main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "providers" in shown and "dmr" in shown
    here = {"linear": "llama70b-gateup-8192", "layer": "minilm-layer-1x16", "model": "llama-small-1x512", "train": "gpt-16x64"}
    assert {**here, "attention": "decode-1x32x1x128-4096"}[module] in shown


# --- attention -----------------------------------------------------------------------------------------


def _attention(causal: bool, passes: workloads.Passes) -> workloads.Workload:
    return workloads._attention(1, 4, 2, 24, 24, 16, causal=causal, passes=passes)


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_attention_is_raced_beside_its_evidence(tmp_path, one_thread, passes: workloads.Passes) -> None:
    asked = options(tmp_path, "--providers", "abft", "abft:off", "dmr", "torch:math")
    assert comparison.run("test", [_attention(True, passes)], asked) == 0
    rows = {r["provider"]: r for r in read(tmp_path / "time-test-cpu.jsonl") if r["kind"] == "timing"}
    assert list(rows) == ["torch", "torch-again", "abft", "abft:off", "dmr", "torch:math"]
    for name, r in rows.items():
        assert 0 < r["error"] < 24 * 2.0**-24 and r["trials"] == (2 if name in ("abft", "dmr") else 0)
    # Of a row of 24 scores or 16 outputs: more than rounding, less than what harms.
    assert 2.0**-24 < rows["abft"]["expected_floor"] < 1e-3


def test_attention_in_fp64_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_layer, "SCORES", 100)  # several blocks
    for causal in (False, True):
        q, k, v = (t.double().requires_grad_() for t in _attention(causal, "forward").inputs(CPU, torch.float64, 0))
        ours = attention_layer.exactly(q, k, v, causal)
        right = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        for a, b in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), torch.autograd.grad(right.square().sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)


def test_a_whole_model_has_its_attention_checked_too() -> None:
    from bench import minilm

    workload = next(iter(workloads.layers("forward", cuda=False)))
    counted = {}
    for name in ("abft", "abft:whole"):
        torch.manual_seed(0)
        c = Contender(providers.parse(name), workload, minilm.Layer(), "eager", CPU, torch.float32)
        abft.report(reset=True)
        c.results(workload.inputs(CPU, torch.float32, 5, 1))
        counted[name] = abft.report(reset=True).products
    assert (counted["abft"], counted["abft:whole"]) == (6, 8)  # six linear layers; S and O


def test_the_small_llama_sees_its_cache_and_has_a_loss() -> None:
    from bench import llama

    with torch.device("meta"):
        assert llama.Llama(past=7, batch=2)(torch.zeros(2, 1, dtype=torch.long)).shape == (2, 1, llama.SMALL_VOCABULARY)
        words = torch.zeros(2, 5, dtype=torch.long)
        assert llama.Llama()(words, words).shape == ()


def test_an_unknown_shape_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        linear.main(["--shapes", "nonsense"])
    assert "no shape is called 'nonsense'" in capsys.readouterr().err


def test_plots_are_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from bench import charts

    rows = [
        {"kind": "timing", "case": case, "provider": p, "ratio": 1.1, "low": 1.0, "high": 1.2} for case in "ab" for p in ("torch", "abft", "dmr")
    ]
    (path,) = charts.draw(rows, tmp_path, "time")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_durations_have_three_digits() -> None:
    assert [timing_table.duration(s) for s in (2.5, 0.0314159, 123e-6, 4.2e-7)] == ["2.50 s", "31.4 ms", "123 µs", "0.42 µs"]


def test_the_llama_layer_sees_its_cache() -> None:
    from bench import llama

    with torch.device("meta"):
        layer = llama.Layer("Llama-3-8B", past=7, batch=2)
        assert layer(torch.empty(2, 1, 4096)).shape == (2, 1, 4096)
        assert llama.Layer("Llama-3-8B")(torch.empty(1, 5, 4096)).shape == (1, 5, 4096)
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    assert weights == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def test_a_result_file_says_what_ran_it(tmp_path) -> None:
    Results("r", folder=tmp_path, rounds=3).add("x")
    (first, _) = read(tmp_path / "r.jsonl")
    assert first["configuration"] == {"rounds": 3} and "gpu" in stamp.stamp() and "triton" in stamp.stamp()


def test_the_documentation_s_table_shows_a_comparison(tmp_path, one_thread, monkeypatch) -> None:
    import importlib.util
    import sys
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("tables_of_times", Path(__file__).parents[1] / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, tables)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "Not measured yet" in tables.times("docs/explanation/cost.md")
    comparison.run("linear", [workloads.linear(SMALL, "forward")], options(tmp_path, "--providers", "abft", "dmr"))
    rows = {r["provider"]: r for r in read(tmp_path / "time-linear-cpu.jsonl") if r["kind"] == "timing"}
    shown = tables.times("docs/explanation/cost.md").splitlines()
    assert len(shown) == 3 and shown[0].count("|") == shown[2].count("|")
    assert "small fp32 forward eager" in shown[2] and f"**{rows['abft']['ratio']:.3f}**" in shown[2] and f"{rows['dmr']['ratio']:.2f}" in shown[2]
