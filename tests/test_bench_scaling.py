"""``bench scaling``: sweeps, what is counted beside them, and one small run with its plot."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from abft.backends import reference
from abft.backends.call import Call
from abft.policy import Policy
from bench import comparison, counting, predictions, scaling, scaling_chart
from bench.results import UNFINISHED, read
from bench.scaling import Sweeps

TINY = Sweeps((8, 64, 32), {"K": (16, 32), "N": (32, 64), "M": (1, 8), "G": (16, 64)}, "fp32", "eager", "abft", "torch")


@pytest.mark.parametrize("sweeps", [scaling.ON_CPU, scaling.ON_GPU], ids=["cpu", "gpu"])
def test_a_sweep_moves_one_thing_and_sweeps_meet_in_what_is_held(sweeps: Sweeps) -> None:
    every = list(scaling.points(sweeps))
    assert len({p.name for p in every}) == len(every)
    for p in every:
        moved = {letter for letter, held in zip("MNK", sweeps.held, strict=True) if getattr(p.shape, letter.lower()) != held}
        assert moved <= {p.sweep} and (p.group is None) == (p.sweep != "G")
        assert p.provider(sweeps.ours) in (sweeps.ours, f"{sweeps.ours}:g={p.group}", f"{sweeps.ours},g={p.group}")
    crossing = [p for p in every if (p.shape.m, p.shape.n, p.shape.k) == sweeps.held and p.group is None]
    assert {p.sweep for p in crossing} == {"K", "N", "M"} and len({p.shape for p in crossing}) == 1


# --- counting --------------------------------------------------------------------------------------------


def test_counts_of_one_group_are_those_of_eight_columns_and_five_passes() -> None:
    """Four checksums and four sketches; a sum of each kind, and the norm."""
    found = counting.on_cpu(256, 1024, 1024, torch.float32, compiled=False)
    assert found["multiplications"] == pytest.approx(1 + 8 / 1024 + 5 / 1024)
    product, numbers = 256 * 1024 + 1024 * 1024 + 256 * 1024, 256 * 1024 + 8 * 1024 + 2 * 256 * 8 + 5 * 256 * 1024
    assert found["bytes"] == pytest.approx(1 + numbers / product)
    once = counting.on_cpu(256, 1024, 1024, torch.float32, compiled=True)
    assert once["multiplications"] == found["multiplications"]
    assert once["bytes"] == pytest.approx(1 + (256 * 1024 + 8 * 1024 + 256 * 1024) / product)


@pytest.mark.parametrize(("n", "group"), [(256, None), (256, 64), (1024, 128)])
def test_multiplications_with_the_panel_are_those_that_torch_counts(n: int, group: int | None) -> None:
    """M·N above the limit of few elements, so that sums are matrix-vector products; norms are not counted by torch."""
    m, k = 300, 96
    a, w = torch.randn(m, k), torch.randn(n, k)
    call = Call(a, w, None, None, False, "fprop", Policy(group=group), 0)
    p = reference.plan_for(call)
    panel, y = reference.build_panel(w, p.layout), reference.execute(call)
    from abft.backends import judging, quick

    q = quick.in_torch(panel, None, k, p)
    assert q is not None
    with FlopCounterMode(display=False) as counter:
        quick.worst(y, a, q)
    with_panel = 2 * m * k * p.layout.columns
    assert counter.get_total_flops() == with_panel
    counted = (counting.on_cpu(m, n, k, torch.float32, group)["multiplications"] - 1) * 2 * m * n * k
    assert counted == pytest.approx(with_panel + 2 * m * n * (len(p.tested) + 1))
    judge = judging.judge_for(p, k, torch.float32)
    assert judge is None or counted == pytest.approx(2 * m * judge.work)  # as the compiled judgement counts itself


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
def test_a_narrower_group_and_a_shallower_product_cost_more(compiled: bool) -> None:
    by_group = [counting.on_cpu(256, 1024, 1024, torch.float32, g, compiled=compiled) for g in (16, 64, 256, 1024)]
    by_depth = [counting.on_cpu(256, 1024, k, torch.float32, compiled=compiled) for k in (128, 512, 2048)]
    for found in (by_group, by_depth):
        for how in ("multiplications", "bytes"):
            ratios = [one[how] for one in found]
            assert ratios == sorted(ratios, reverse=True) and ratios[-1] > 1
    half, single = (counting.on_cpu(256, 1024, 1024, dtype, compiled=compiled)["bytes"] for dtype in (torch.bfloat16, torch.float32))
    assert half > single


def test_a_gpu_s_prediction_is_that_of_the_documentation() -> None:
    assert counting.on_gpu(4096, 4096, 4096, "bf16", 90) == {"waves": predictions.predict(4096, 4096, 4096)["ratio"]}
    assert counting.on_gpu(1, 4096, 4096, "bf16", 90) == {"bytes": predictions.bytes_moved(1, 4096, 4096, "immediate")["ratio"]}
    assert counting.on_gpu(4096, 4096, 4096, "bf16", 80) == counting.on_gpu(4096, 4096, 4096, "fp32", 90) == {}
    narrow, wide = (counting.on_gpu(4096, 4096, 4096, "bf16", 90, g)["waves"] for g in (128, 1024))
    assert narrow > wide > 1


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_points_stand_beside_their_predictions_and_are_timed_once(tmp_path, one_thread, capsys) -> None:
    pytest.importorskip("matplotlib")
    words = ["--device", "cpu", "--rounds", "6", "--trials", "1", "--out", str(tmp_path), "--plots", str(tmp_path)]
    assert scaling.main(words, TINY) == 0
    records = read(tmp_path / "scaling-cpu.jsonl")
    found = {(r["sweep"], r["value"]): r for r in records if r["kind"] == "scaling"}
    assert list(found) == [(sweep, value) for sweep, values in TINY.values.items() for value in values]
    cases = [r["key"] for r in records if r["kind"] == "case"]
    assert len(set(cases)) == len(cases) == 5  # three sweeps cross in one of two points; the widths of G are providers of one case
    timed = {(r["case"], r["provider"]): r for r in records if r["kind"] == "timing"}
    for (sweep, value), r in found.items():
        name = f"abft:g={value}" if sweep == "G" else "abft"
        case = f"m{r['m']}-n{r['n']}-k{r['k']}{'-groups' if sweep == 'G' else ''} fp32 forward eager"
        assert r["provider"] == name and r["ratio"] == timed[case, name]["ratio"] and r["low"] <= r["ratio"] <= r["high"]
        counted = counting.on_cpu(r["m"], r["n"], r["k"], torch.float32, r["group"])
        assert r["predicted"] == pytest.approx(counted, rel=1e-3)
    assert capsys.readouterr().out.count("counted by multiplications") == len(found)
    assert (tmp_path / "scaling-cpu-fp32-eager.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.main(words, TINY) == 0  # everything was there
    assert len([r for r in read(tmp_path / "scaling-cpu.jsonl") if r["kind"] == "scaling"]) == len(found)


def test_without_time_nothing_is_claimed(tmp_path, one_thread, capsys) -> None:
    words = ["--device", "cpu", "--shapes", "K-16", "--out", str(tmp_path), "--seconds", "0"]
    assert scaling.main([*words, "--rounds", "6"], TINY) in (1, UNFINISHED)
    assert not [r for r in read(tmp_path / "scaling-cpu.jsonl") if r["kind"] == "scaling"]


def test_points_have_names(capsys) -> None:
    assert scaling.main(["--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "K-4096" in shown and "G-16" in shown and "providers" in shown
    with pytest.raises(SystemExit):
        scaling.main(["--shapes", "Q-1", "--device", "cpu"])
    assert "no point is called Q-1" in capsys.readouterr().err


def test_a_plot_needs_no_prediction_and_is_the_same_twice(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"kind": "scaling", "sweep": "K", "value": k, "m": 1, "n": 2, "k": k, "dtype": "bf16", "way": "graph", "against": "twin",
         "ratio": 1.1, "low": 1.0, "high": 1.2, "again": [0.9, 1.1], "predicted": {"waves": 1.05} if k > 64 else {}}
        for k in (64, 128, 256)
    ]  # fmt: skip
    (first,), (second,) = (scaling_chart.draw(rows, tmp_path / name, "s") for name in "ab")
    assert first.name == "s-bf16-graph.png" and first.read_bytes() == second.read_bytes()


def test_other_comparisons_keep_their_names(tmp_path) -> None:
    from bench import shapes, workloads

    asked = comparison.parser("linear", "").parse_args(
        ["--rounds", "6", "--trials", "1", "--dtypes", "fp32", "--device", "cpu", "--providers", "abft", "--out", str(tmp_path)]
    )
    comparison.run("linear", [workloads.linear(shapes.Shape("s", 4, 8, 8), "forward")], asked)
    assert [path.name for path in tmp_path.iterdir()] == ["time-linear-cpu.jsonl"]
