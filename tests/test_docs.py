"""The documentation: its code runs, its links lead somewhere, its numbers have sources, its names are real."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import abft

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
TABLE = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table -->", re.S)
#: A number with a unit of time, memory, speed, or a share, or a number with an exponent.
FIGURE = re.compile(r"\d[\d.,]*\s?(%|×|ns|µs|ms|seconds|s\b|GB|MB|GiB|MiB|TFLOP|GFLOP)|\d(\.\d+)?e-?\d")
RESULT = re.compile(r"bench/results/[\w.-]+\.jsonl")


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _python(name: str) -> list[str]:
    return [code for language, code in CODE.findall(_text(name)) if language == "python"]


def _prose(name: str) -> str:
    return CODE.sub("", _text(name))


@pytest.fixture
def clean_slate():
    """Documentation counts from zero, and leaves nothing behind."""
    abft.report(reset=True)
    torch.manual_seed(0)
    yield
    abft.report(reset=True)


@pytest.mark.parametrize("name", [name for name in NAMES if _python(name)])
def test_code_runs(name, clean_slate, capsys):
    if any("init_process_group" in code for code in _python(name)):
        return _run_alone(name)  # process groups are a process's own business
    namespace: dict = {"__name__": "documentation"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of torch itself, about the CPU's part in things that are meant for GPUs.
        warnings.filterwarnings("ignore", module="torch")
        for number, code in enumerate(_python(name), 1):
            exec(compile(code, f"{name}, block {number}", "exec"), namespace)


def _run_alone(name: str) -> None:
    watch = "import faulthandler; faulthandler.dump_traceback_later(150, exit=True)\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks a name server for this machine's own name
    command = [sys.executable, "-c", watch + "\n".join(_python(name))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    dead = []
    for target in LINK.findall(_prose(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        if not page.exists() or (anchor and anchor not in _anchors(page)):
            dead.append(target)
    assert not dead


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop().resolve()
        if page in reached or not page.exists():
            continue
        reached.add(page)
        if page.is_dir():
            left += page.glob("*.md")
        elif page.suffix == ".md":
            targets = [t.partition("#")[0] for t in LINK.findall(_prose(page.relative_to(ROOT).as_posix()))]
            left += [page.parent / target for target in targets if target and ":" not in target]
    assert [page for page in PAGES if page.resolve() not in reached] == []


# --- names ------------------------------------------------------------------------------------------


def test_the_reference_names_what_is_public():
    text = _text("docs/reference.md")
    documented = re.findall(r"^### `(\w+)`", text, re.M)
    errors = re.findall(r"^\| `(\w+)` \|", text[text.index("## Errors") : text.index("## Environment")], re.M)
    assert sorted([*documented, *errors]) == sorted(abft.__all__)


def test_the_reference_lists_every_field():
    text = _text("docs/reference.md")
    for value in (
        abft.Policy,
        abft.Report,
        abft.FaultEvent,
        abft.Coverage,
        abft.ModuleCoverage,
        abft.CheckResult,
        abft.inject.Fault,
    ):
        missing = [
            field for field in value.__dataclass_fields__ if field not in ("text", "dynamic") and not re.search(rf"\b{field}\b", text)
        ]
        assert not missing, f"{value.__name__}: {missing}"
    assert all(f"`{verdict.name}`" in text for verdict in abft.Verdict)


def test_names_in_code_marks_exist():
    """`abft.x` in prose is a public name."""
    for name in NAMES:
        for path in re.findall(r"`abft\.([A-Za-z0-9_.]+)", _prose(name)):
            value = abft
            for part in path.rstrip(".").split("."):
                if part in ("triton_kernels", "backends"):
                    break
                if not hasattr(value, part) and find_spec(f"abft.{part}") is not None:
                    break  # a module that abft does not import
                assert hasattr(value, part), f"{name}: abft.{path}"
                value = getattr(value, part)


# --- numbers ----------------------------------------------------------------------------------------


def test_every_figure_in_the_readme_names_its_file():
    """A line with a figure names a result file that exists, or links to whoever published it."""
    unnamed = []
    for line in _prose("README.md").splitlines():
        if not FIGURE.search(line) or "https://" in line:
            continue
        files = RESULT.findall(line)
        if not files or not all((ROOT / file).exists() for file in files):
            unnamed.append(line)
    assert not unnamed


@pytest.mark.parametrize("name", NAMES)
def test_result_files_that_are_named_exist(name):
    assert [file for file in RESULT.findall(_prose(name)) if not (ROOT / file).exists()] == []


def _tables():
    spec = importlib.util.spec_from_file_location("documentation_tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results():
    """After a new measurement: python docs/tables.py"""
    tables = _tables()
    named = {name for page in NAMES for name, _ in TABLE.findall(_text(page))}
    assert named == set(tables.TABLES)
    for page in NAMES:
        assert tables.rewritten(_text(page), page) == _text(page), f"{page} is out of date: run python docs/tables.py"


def test_figures_of_times_are_those_of_the_results():
    """After a new measurement: python docs/tables.py"""
    from bench import protection

    tables = _tables()
    for device, rows in tables.compared().items():
        assert protection.digest([row for _, row in rows]).encode() in tables.picture(device).read_bytes(), f"{device}: run python docs/tables.py"


def test_every_bench_command_is_named():
    from bench.__main__ import COMMANDS

    assert [name for name in COMMANDS if f"`{name}`" not in _text("docs/contributing.md")] == []


def test_the_documentation_names_no_machine():
    for name in NAMES:
        assert not re.search(r"/work/|/root/|/home/|/tmp/|localhost|127\.0\.0\.1", _text(name)), name
