"""tests/kernels on the device at hand, every outcome written as it comes.

    python -m bench kernel-tests [--seconds 120]
    python -m bench kernel-tests --sanitizer        a few of them under NVIDIA's compute-sanitizer, if there is one

The tests run on a GPU where there is one, else in Triton's interpreter. A run that was stopped goes on with the tests that have
no outcome; one that was running when its process died is written down as such, and not begun again.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.results import UNFINISHED, Results
from bench.stamp import ROOT

#: What is worth most first: silence, bits, sums, faults; then attention; then what surrounds them.
FILES = (
    "test_kernel_clean", "test_twin", "test_kernel_sums", "test_kernel_faults", "test_kernel_backend", "test_decode",
    "test_attention_forward", "test_attention_backward", "test_attention_decode", "test_varlen_kernels",
    "test_kernel_deferred", "test_descriptors", "test_arbitration", "test_independent", "test_kernel_integer", "test_residuals",
    "test_weigh", "test_tile_choice", "test_record", "test_waves", "test_kernel_plans",
)  # fmt: skip
#: Which say nothing about a device: emulated units, and the search for launch shapes without one.
NOT_NATIVE = ("test_tensor_cores", "test_tuning")
#: Under the sanitizer everything is some fifty times slower.
SANITIZED = ("test_twin.py", "test_kernel_faults.py", "test_attention_forward.py")
TOOLS = ("memcheck", "racecheck")
MESSAGE = 2000  # characters of a failure that are kept


class Recorder:
    """A pytest plugin: outcomes into a result file, no test twice, no test after the deadline."""

    def __init__(self, results: Results, deadline: float) -> None:
        self._results, self._deadline = results, deadline
        self.left = 0
        begun = {r["test"] for r in results.records if r["kind"] == "begun"}
        self._died = begun - {r["test"] for r in results.records if r["kind"] == "test"}
        for test in sorted(self._died):
            results.add("test", test=test, outcome="died", message="the process ended while it ran, or hung")
        self._known = {r["test"] for r in results.records if r["kind"] == "test"}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._known]

    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> bool | None:
        if time.monotonic() > self._deadline:
            self.left += 1
            return True  # as if it had been run
        self._results.add("begun", test=item.nodeid)
        return None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = {} if report.outcome == "passed" else {"message": report.longreprtext[-MESSAGE:]}
            self._results.add("test", test=report.nodeid, outcome=report.outcome, seconds=report.duration, **message)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kernel-tests", description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--sanitizer", action="store_true")
    parser.add_argument("--select", help="pytest's -k")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    if options.sanitizer:
        return sanitize(Results("sanitizer", folder=options.out), options.seconds)
    results = Results("kernel-tests", folder=options.out)
    recorder = Recorder(results, deadline)
    paths = [str(ROOT / "tests" / "kernels" / f"{name}.py") for name in FILES]
    chosen = ["-k", options.select] if options.select else []
    # Quietly, for the log has to stay small; without a cache, for the checkout may be read-only.
    quietly = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*quietly, *chosen, *paths], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return 1
    # Failures are the part's finding, not its failure.
    return UNFINISHED if recorder.left else 0


def sanitize(results: Results, seconds: float) -> int:
    """Errors that compute-sanitizer sees in a few tests; of no GPU, or without the tool, that it was not run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        results.add("sanitizer", outcome="not there", tool="compute-sanitizer")
        return 0
    paths = [str(ROOT / "tests" / "kernels" / name) for name in SANITIZED]
    status = 0
    for which in TOOLS:
        command = [tool, "--tool", which, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "m3 or 3-577", *paths]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds / len(TOOLS))
        except subprocess.TimeoutExpired:
            results.add("sanitizer", outcome="out of time", tool=which)
            status = UNFINISHED
            continue
        errors = next((line for line in reversed(done.stdout.splitlines()) if "ERROR SUMMARY" in line), "no summary")
        results.add("sanitizer", outcome=errors.strip("= "), tool=which, status=done.returncode, tail=done.stdout[-MESSAGE:])
        print(which, errors)
    return status
