"""The suite notices defects: each is planted in a copy of the sources, where the tests named beside it have to fail.

Takes minutes, so it is left out unless asked for: ./run test -m defects tests/defects
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from plants import PLANTS, Plant

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("abft", "triton_kernels", "tests", "bench")
#: How the message of a failure begins that is a test's own: an assertion, or an error or warning that did not come.
#: Everything else is a crash, which would be noticed by running the code at all.
ASSERTIONS = ("assert ", "AssertionError", "Failed: DID NOT ")
HAS_TRITON = importlib.util.find_spec("triton") is not None

pytestmark = [pytest.mark.defects, pytest.mark.slow]


@dataclass(frozen=True)
class Outcome:
    """How pytest ended, and what it said of its tests."""

    code: int
    passed: int
    skipped: int
    failures: tuple[tuple[str, str], ...]  # test, message
    errors: tuple[str, ...]
    output: str


def copied(to: Path) -> Path:
    """A copy of all that tests need."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "defects"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def run(tests: Iterable[str], at: Path) -> Outcome:
    """The tests in a process of their own, up to the first that fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--junitxml=outcome.xml", *tests]
    done = subprocess.run(
        command, cwd=at, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    report = at / "outcome.xml"
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failures = [(_name(case), f.get("message", "")) for case in cases for f in case.iter("failure")]
    errors = [_name(case) for case in cases if case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failures) - len(errors) - skipped
    return Outcome(done.returncode, passed, skipped, tuple(failures), tuple(errors), done.stdout)


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"


def _selected(*, triton: bool) -> list[str]:
    return list(dict.fromkeys(test for plant in PLANTS if plant.needs_triton is triton for test in plant.tests))


def _skip_without_triton(needed: bool) -> None:
    if needed and not HAS_TRITON:
        pytest.skip("NO TRITON: defects of the kernels are not planted")


@pytest.mark.parametrize("triton", [False, True], ids=["host", "kernels"])
def test_without_a_defect_all_of_these_pass(triton, tmp_path):
    _skip_without_triton(triton)
    outcome = run(_selected(triton=triton), copied(tmp_path))
    assert outcome.code == 0 and outcome.passed and not outcome.skipped, outcome.output


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_is_noticed(plant: Plant, tmp_path):
    _skip_without_triton(plant.needs_triton)
    source = copied(tmp_path) / plant.file
    source.write_text(plant.sown(source.read_text(encoding="utf-8")), encoding="utf-8")
    outcome = run(plant.tests, tmp_path)
    assert outcome.code != 0, f"NOT NOTICED by {', '.join(plant.tests)}: {plant.what}"
    assert outcome.code == 1 and outcome.failures and not outcome.errors, f"pytest itself failed:\n{outcome.output}"
    ((test, message),) = outcome.failures
    assert message.lstrip().startswith(ASSERTIONS), f"{test} crashed, it did not disagree:\n{outcome.output}"
    print(f"{plant.name}: noticed by {test}")


def test_names_are_unique():
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)
