"""``bench gpu``: parts that end, fail, hang and are killed; going on where it stopped; and what the parts themselves find."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import __main__ as commands
from bench import comparison, devices, gpu, gpu_summary, kernel_tests, probe, supervisor, tensor_core
from bench.emulator import EmulatorUnavailable
from bench.results import UNFINISHED, Results, read
from bench.supervisor import Part

ROOT = Path(__file__).resolve().parents[1]
#: A stand-in for ``python -m bench``: the part's words are Python.
PYTHON = (sys.executable, "-c")
NOTE = "import sys, pathlib; pathlib.Path('{out}', 'ran.txt').open('a').write('%s ')\n"


def part(name: str, code: str = "", weight: float = 1.0) -> Part:
    return Part(name, (NOTE % name + code,), weight)


def outcomes(parts: list[Part], out: Path, seconds: float) -> dict[str, str]:
    return {r["key"]: r["outcome"] for r in supervisor.run(parts, out, seconds, program=PYTHON)}


def ran(out: Path) -> list[str]:
    return (out / "ran.txt").read_text().split()


def test_parts_run_in_turn_and_say_how_they_ended(tmp_path) -> None:
    parts = [part("good"), part("bad", "raise SystemExit(3)"), part("more", f"raise SystemExit({UNFINISHED})"), part("last", "print('said')")]
    assert outcomes(parts, tmp_path, 60) == {"good": "finished", "bad": "failed", "more": "unfinished", "last": "finished"}
    assert ran(tmp_path) == ["good", "bad", "more", "last"]
    assert (tmp_path / "last.log").read_text() == "said\n"


def test_one_that_is_killed_stops_nobody(tmp_path) -> None:
    parts = [part("shot", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), part("next")]
    assert outcomes(parts, tmp_path, 60) == {"shot": "killed by SIGSEGV", "next": "finished"}


def test_one_that_hangs_costs_its_share_with_all_that_it_started(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.2)
    # Deaf to being asked, and with a child that writes down that it lives.
    child = "import time\\nwhile True: time.sleep(0.05); open({out!r}, 'a').write('.')".replace("{out!r}", "'{out}/child'")
    deaf = "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += f'subprocess.Popen([sys.executable, "-c", "{child}"]); time.sleep(600)'
    start = time.monotonic()
    assert outcomes([part("hangs", deaf, weight=1), part("next", weight=9)], tmp_path, 20) == {"hangs": "out of time", "next": "finished"}
    assert time.monotonic() - start < 15  # its limit is two seconds
    grown = (tmp_path / "child").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "child").stat().st_size == grown > 0


def test_what_was_finished_is_skipped_and_the_rest_is_tried_again(tmp_path) -> None:
    parts = [part("good"), part("bad", "raise SystemExit(not pathlib.Path('{out}', 'mended').exists())"), part("other")]
    assert outcomes(parts, tmp_path, 60)["bad"] == "failed"
    (tmp_path / "mended").touch()
    assert outcomes(parts, tmp_path, 60) == {"good": "finished", "bad": "finished", "other": "finished"}
    assert ran(tmp_path) == ["good", "bad", "other", "bad"]


def test_limits_are_shares_of_what_is_left(tmp_path) -> None:
    def now() -> float:
        return 10.0 * len(ran(tmp_path)) if (tmp_path / "ran.txt").exists() else 0.0

    supervisor.run([part("a", weight=1), part("b", weight=3)], tmp_path, 40.0, program=PYTHON, now=now)
    limits = {r["key"]: r["limit"] for r in read(tmp_path / "parts.jsonl") if r["kind"] == "part"}
    assert limits["a"] == 10.0 and limits["b"] == 30.0


def test_without_time_nothing_begins(tmp_path) -> None:
    assert outcomes([part("a"), part("b")], tmp_path, 0.0) == {"a": "no time left", "b": "no time left"}
    assert not (tmp_path / "ran.txt").exists()


def test_a_part_is_told_to_end_before_it_is_ended(tmp_path) -> None:
    told = Part("told", ("print('{seconds}')",), 1.0)
    supervisor.run([told], tmp_path, 100.0, program=PYTHON)
    assert 80 < float((tmp_path / "told.log").read_text()) <= 85


def test_output_is_cut_to_its_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "KEPT", 1000)
    supervisor.run([part("loud", "print('x' * 10**6); print('the end')")], tmp_path, 60.0, program=PYTHON)
    text = (tmp_path / "loud.log").read_text()
    assert len(text) == 1000 and text.endswith("the end\n")


# --- the parts -----------------------------------------------------------------------------------------


class Reached(Exception):
    """The command has understood its words."""


def _stop(*args: object, **kwargs: object) -> None:
    raise Reached


@pytest.mark.parametrize("part", [*gpu.ON_GPU, *gpu.ON_CPU], ids=lambda p: p.name)
def test_every_part_is_a_command_that_understands_its_words(part: Part, monkeypatch, tmp_path) -> None:
    command, *words = (word.format(seconds="10", out=tmp_path) for word in part.words)
    module = importlib.import_module(f"bench.{commands.MODULES.get(command, command)}")
    assert command in commands.COMMANDS
    monkeypatch.setattr(comparison, "Results", _stop)
    monkeypatch.setattr(devices, "device_name", lambda device: "some-gpu")
    if hasattr(module, "Results"):
        monkeypatch.setattr(module, "Results", _stop)
    if part.environment or "--interpreted" in words:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Reached):
        module.main(words)


def test_parts_have_names_of_their_own() -> None:
    for parts in (gpu.ON_GPU, gpu.ON_CPU):
        assert len({p.name for p in parts}) == len(parts)


def test_a_run_says_what_it_found_and_fails_only_if_it_found_nothing(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    broken = (Part("broken", ("linear", "--shapes", "nonsense"), 1.0),)
    assert gpu.main(["--minutes", "1", "--out", str(out)], broken) == 1
    assert "broken" in capsys.readouterr().out.splitlines()[-1]
    (ceilings,) = (p for p in gpu.ON_CPU if p.name == "ceilings")
    assert gpu.main(["--minutes", "2", "--out", str(out)], (*broken, ceilings)) == 0
    text = (out / "summary.txt").read_text()
    assert capsys.readouterr().out.endswith(text + "\n")  # printed last
    assert "broken" in text and "failed" in text and "copy:" in text and "mm fp32:" in text
    assert sum(path.stat().st_size for path in out.iterdir()) < 10 << 20


def test_the_summary_shows_times_under_the_measured_roof(tmp_path) -> None:
    r = Results("time-linear-x", folder=tmp_path)
    r.add("ceiling", what="copy", seconds=1.0, bytes_per_second=1e12)
    r.add("ceiling", what="mm bf16", seconds=1.0, flops_per_second=1e15)
    row = {"workload": "w", "dtype": "bf16", "seconds": 2e-6, "p20": 1e-6, "p80": 3e-6, "ratio": 1.0, "low": 1.0, "high": 1.0}
    row |= {"error": 1e-3, "expected_floor": None, "trials": 0, "panel_bytes": 0, "provider": "torch"}
    r.add("timing", case="bound by memory", multiplications=10**6, bytes=10**6, **row)
    r.add("timing", case="bound by products", multiplications=10**9, bytes=10**3, **row)
    text = gpu_summary.of(tmp_path, [])
    assert "bound by memory   (roofline 1.00 µs)" in text and "bound by products   (roofline 2.00 µs)" in text


def test_the_summary_names_what_went_wrong(tmp_path) -> None:
    r = Results("mixed", folder=tmp_path)
    r.add("test", test="a::b", outcome="failed", seconds=1.0)
    r.add("test", test="a::c", outcome="passed", seconds=1.0)
    r.add("cell", rows=1000, alarms={"false_alarms": 2}, worst={"x": 1.2})
    r.add("calibration", key="bf16 k64", dtype="bf16", accepted=False, rows=10, worst_of_all_kinds=0.8)
    text = gpu_summary.of(tmp_path, [])
    assert "FAILED a::b" in text and "1 failed, 1 passed" in text
    assert "2 alarms in 1,000 rows" in text and "not accepted: bf16 k64" in text


def test_the_summary_counts_the_campaigns_of_attention(tmp_path) -> None:
    of_a_part = {"rows": 100, "alarms": 0, "worst": 0.25, "unchecked": 0}
    Results("attention-clean-triton-bf16", folder=tmp_path).add(
        "cell", **{f"{part}_{what}": value for part in ("forward", "backward") for what, value in of_a_part.items()}
    )
    faults = Results("attention-faults-triton-bf16", folder=tmp_path)
    for place, seen in (("S", 9), ("dV", 10)):
        faults.add("place", key=place, harmful=10, harmful_detected=seen, detected=20, repaired_bit_equal=19, false_alarms=0)
    text = gpu_summary.of(tmp_path, [])
    assert "attention-clean-triton-bf16, backward: 0 alarms in 100 rows" in text and "worst 0.25" in text
    assert "attention-faults-triton-bf16: 19 of 20 harmful faults found, 38 of 40 repaired bit for bit, 0 false alarms" in text
    assert gpu_summary.measured(tmp_path)


def test_the_summary_names_launch_shapes_that_were_faster(tmp_path) -> None:
    r = Results("tune-x", folder=tmp_path)
    about = {"row": "16-bit", "height": None, "dtype": "bf16", "m": 8, "n": 16, "k": 32}
    r.add("candidate", config={}, ratio=1.0, low=1.0, high=1.0, **about)
    r.add("candidate", config={"bn": 256}, ratio=0.9, low=0.89, high=0.91, **about)
    r.add("candidate", config={"bn": 64}, reason="checked_product spills", **about)
    text = gpu_summary.of(tmp_path, [])
    assert "2 of 3 candidates × cases timed, the others left out; 1 to be preferred" in text and "16-bit, many rows, every shape: {'bn': 256}, × 0.900" in text
    assert gpu_summary.measured(tmp_path)


def test_every_test_of_the_kernels_runs_on_a_gpu_or_says_why_not() -> None:
    files = {path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert {*kernel_tests.FILES, *kernel_tests.NOT_NATIVE} == files
    assert len(kernel_tests.FILES) + len(kernel_tests.NOT_NATIVE) == len(files)


def test_kernel_tests_go_on_where_they_died(tmp_path) -> None:
    """A recorder that finds a test begun and never ended writes it down, and begins it no more."""
    first = Results("kernel-tests", folder=tmp_path)
    first.add("begun", test="t::one")
    first.add("test", test="t::one", outcome="passed", seconds=0.1)
    first.add("begun", test="t::two")
    again = kernel_tests.Recorder(Results("kernel-tests", folder=tmp_path), deadline=float("inf"))
    assert {r["test"]: r["outcome"] for r in read(first.path) if r["kind"] == "test"} == {"t::one": "passed", "t::two": "died"}
    items = [SimpleNamespace(nodeid=f"t::{n}") for n in ("one", "two", "three")]
    again.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["t::three"]


def test_kernel_tests_begin_nothing_after_their_time(tmp_path) -> None:
    late = kernel_tests.Recorder(Results("kernel-tests", folder=tmp_path), deadline=0.0)
    assert late.pytest_runtest_protocol(SimpleNamespace(nodeid="t::one"), None) is True
    assert late.left == 1 and not (tmp_path / "kernel-tests.jsonl").exists()


# --- the probe and the calibration ---------------------------------------------------------------------


@pytest.mark.parametrize("model", probe.MODELS, ids=lambda m: m.name)
def test_the_probe_tells_units_apart(model: probe.Model) -> None:
    answers = probe.expected(model)
    assert probe.recognised(answers) == [model.name]
    assert probe.steps(answers) == [j for j in probe.PLACES if j % model.step == 0 or model.step == 1]


def test_a_cpu_rounds_to_nearest_after_every_product() -> None:
    """numpy's own loop over K, so that no library's blocking or vectors decide."""

    def sequential(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        acc = np.zeros((len(a), len(w)), np.float32)
        for x, y in zip(a.numpy().T, w.numpy().T, strict=True):
            acc += np.outer(x, y)
        return torch.from_numpy(acc)

    assert probe.recognised(probe.ask(sequential, torch.float32, torch.device("cpu"))) == ["fma32"]


def test_an_unknown_unit_is_not_recognised() -> None:
    assert probe.recognised(probe.expected(probe.Model("finer", 16, 27))) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_questions_are_exact_in_every_type(dtype: torch.dtype) -> None:
    seen = {}
    probe.ask(lambda a, w: seen.update(a=a, w=w) or a @ w.mT, dtype, torch.device("cpu"))
    products = seen["a"].double() * seen["w"].double()
    assert torch.equal(products, torch.tensor([[float(p) for p in row] for row in probe.questions()], dtype=torch.float64))


def test_the_calibration_accepts_the_interpreter_and_not_a_narrow_fit(tmp_path) -> None:
    """In a process of its own: Triton decides at import that it interprets. In which order the interpreter itself sums is its BLAS's affair;
    of the probe the kernels are asked on emulated tensor cores."""
    try:
        tensor_core.load()
    except EmulatorUnavailable as error:
        pytest.skip(f"no emulated tensor core: {error}")
    code = """
import sys, torch
from bench import calibrate, forms
forms.backend_of("interpreted")
r = calibrate.measure(torch.float32, 64, "gauss", "gauss", 96, 64, torch.device("cpu"))
assert r["accepted"] and 0 < r["rms"] < r["largest"] < r["kappa"] / 2 and r["rows"] == 96, r
calibrate.fit = lambda steps: 1e-3
assert not calibrate.measure(torch.float32, 64, "gauss", "gauss", 96, 64, torch.device("cpu"))["accepted"]
from bench import emulated_units, tensor_core
for architecture, model in emulated_units.ARCHITECTURES.items():
    with emulated_units.tensor_cores(tensor_core.load(), architecture):
        found = calibrate.answers(torch.float16, torch.device("cpu"))["kernel"]
    assert found["models"] == [model], found
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_whole_call_runs_on_a_cpu(tmp_path) -> None:
    """The interpreter in place of a GPU, and a second call that finds everything done."""
    command = [sys.executable, "-m", "bench", "gpu", "--minutes", "5", "--out", str(tmp_path), "--only", "kernel-tests", "times"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=330)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {r["key"]: r["outcome"] for r in read(tmp_path / "parts.jsonl") if r["kind"] == "part"}
    assert outcomes == {"kernel-tests": "finished", "times": "finished"}, done.stdout
    providers = {r["provider"] for r in read(tmp_path / "time-linear-interpreted.jsonl") if r["kind"] == "timing"}
    assert {"torch", "twin", "abft:triton", "dmr"} <= providers
    start = time.monotonic()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "== " not in again.stdout and "twin" in again.stdout
    assert time.monotonic() - start < 100
