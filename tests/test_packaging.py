"""The package as others get it: what the wheel holds, where imports work, what `./run` says when it cannot start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RUN = ROOT / "run"


def packages_of_pyproject() -> set[str]:
    listed = re.search(r"^packages = (\[[^\]]*\])", PYPROJECT, re.MULTILINE)
    assert listed
    return set(re.findall(r'"([^"]+)"', listed[1]))


def source_files() -> set[str]:
    """The files of the package, by their names in the wheel."""
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "abft").rglob("*.py")}
    kernels = {f"abft/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    return inside | kernels


Done = subprocess.CompletedProcess[str]


def execute(*command: str | Path, cwd: Path, path: str | None = None, **variables: str) -> Done:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("ABFT_", "PYTEST_"))}
    environment |= {"PATH": path or os.environ["PATH"], **variables}
    argv = [str(part) for part in command]
    return subprocess.run(argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = execute(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made from, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("abft", "triton_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    succeed(sys.executable, *build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_only_top_level_name_is_abft(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"abft"}


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert any(name.startswith("abft/triton_kernels/") for name in held)
    assert {name for name in held if name.endswith(".py")} == source_files()
    beside = {f"abft/native/{path.name}" for path in (ROOT / "abft" / "native").glob("*.[ch]")}
    assert {name for name in held if not name.endswith(".py")} <= {"abft/py.typed", "abft/triton_kernels/tuned.json", *beside}


def test_listed_packages_are_the_folders_with_an_init() -> None:
    assert packages_of_pyproject() == {
        Path(name).parent.as_posix().replace("/", ".") for name in source_files() if name.endswith("/__init__.py")
    }


def test_no_module_lies_in_a_folder_without_an_init() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in source_files()}
    assert folders <= packages_of_pyproject()


def test_both_versions_agree() -> None:
    import abft

    assert f'\nversion = "{abft.__version__}"\n' in PYPROJECT


# -------------------------------------------------------------------------------------------------------- imports


@dataclass(frozen=True)
class Installed:
    """abft in one of its ways of being there: a virtual environment, and the root of the checkout beside it."""

    python: Path
    root: Path


@pytest.fixture(scope="module")
def installed(checkout: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Installed]:
    """Light virtual environments that borrow torch, pytest and pip from the one that runs this test."""
    made: dict[str, Installed] = {}

    def install(how: str) -> Installed:
        if how not in made:
            folder = tmp_path_factory.mktemp(how)
            venv.create(folder, with_pip=False, symlinks=True)
            python = folder / "bin" / "python"
            site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
            # As lines of a .pth file, so that the .pth files in there (an editable abft) do not count.
            borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
            Path(site, "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
            # --ignore-installed: an abft in the borrowed folders is none of this environment's business
            pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed")
            if how == "editable":
                succeed(python, *pip, "--editable", checkout, cwd=folder)
            elif how == "wheel":
                succeed(python, *pip, wheel, cwd=folder)
            made[how] = Installed(python, checkout)
        return made[how]

    return install


PROBE = """
import sys
import abft
import abft.triton_kernels as kernels
assert kernels.__name__ == "abft.triton_kernels" and "triton_kernels" not in sys.modules
"""
# What the script `pytest` does: unlike `python -m pytest`, it does not put the current folder on the path.
PYTEST_SCRIPT = "import sys\nimport pytest\nsys.exit(pytest.main())\n"


@pytest.mark.parametrize("launcher", ["python-c", "python-m-pytest", "pytest"])
@pytest.mark.parametrize(
    ("how", "where"),
    [("bare", "root"), ("editable", "root"), ("editable", "elsewhere"), ("wheel", "root"), ("wheel", "elsewhere")],
)
def test_imports(how: str, launcher: str, where: str, installed: Callable[[str], Installed], tmp_path: Path) -> None:
    environment = installed(how)
    script = tmp_path / "bin" / "pytest_script.py"
    script.parent.mkdir()
    script.write_text(PYTEST_SCRIPT, encoding="utf-8")
    test = tmp_path / "test_probe.py"
    test.write_text("def test_probe():\n" + PROBE.replace("\n", "\n    "), encoding="utf-8")
    cwd = environment.root if where == "root" else tmp_path
    config = ("-c", environment.root / "pyproject.toml") if where == "root" else ()
    options = (*config, "-p", "no:cacheprovider", "-q", test)
    command: dict[str, tuple[str | Path, ...]] = {
        "python-c": ("-c", PROBE),
        "python-m-pytest": ("-m", "pytest", *options),
        "pytest": (script, *options),
    }
    succeed(environment.python, *command[launcher], cwd=cwd)


def test_the_kernels_refuse_the_name_of_the_triton_project() -> None:
    done = execute(sys.executable, "-c", "import triton_kernels", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "import abft.triton_kernels" in done.stderr


def test_importing_abft_imports_no_triton() -> None:
    script = "import abft, sys; print({'triton', 'triton_kernels', 'abft.triton_kernels'} & set(sys.modules))"
    assert succeed(sys.executable, "-c", script, cwd=ROOT).strip() == "set()"


# ------------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Path]:
    """A PATH with nothing on it but what `run` needs before it has found a Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "dirname", "mkdir", "rm", "uname"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    yield folder


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def run(*arguments: str, path: Path, venv: Path) -> Done:
    return execute(RUN, *arguments, cwd=path, path=str(path), ABFT_VENV=str(venv))


def test_run_is_an_executable_posix_script() -> None:
    assert os.access(RUN, os.X_OK)
    assert RUN.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    succeed("sh", "-n", RUN, cwd=ROOT)


def test_run_help_names_every_command_and_variable(commands: Path, tmp_path: Path) -> None:
    done = run("help", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 0
    for word in ("demo", "test", "lint", "bench", "shell", "ABFT_VENV", "ABFT_TORCH", "ABFT_TRITON"):
        assert word in done.stdout
    assert not (tmp_path / "venv").exists()


def test_run_refuses_an_unknown_command(commands: Path, tmp_path: Path) -> None:
    done = run("tset", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 2
    assert "'tset'" in done.stderr


def test_run_without_a_python(commands: Path, tmp_path: Path) -> None:
    done = run("test", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 1
    assert "Python 3.10 or newer" in done.stderr


def test_run_with_an_old_python_names_it(commands: Path, tmp_path: Path) -> None:
    write_script(commands / "python3", "echo 3.8")
    done = run("test", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 1
    assert "Python 3.10 or newer" in done.stderr and "python3 is Python 3.8" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_run_passes_over_an_old_python_and_a_broken_one(commands: Path, tmp_path: Path) -> None:
    write_script(commands / "python3", "echo 3.9")
    write_script(commands / "python3.13", "exit 127")  # a version manager's stub of a version that is not there
    write_script(commands / "python3.12", "case $2 in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac")
    done = run("test", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 1
    assert "python3.12 lacks ensurepip" in done.stderr


def test_run_without_ensurepip_says_what_to_install(commands: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "ensurepip.py").write_text("raise ImportError", encoding="utf-8")
    write_script(commands / "python3", f'PYTHONPATH="{blocked}" exec "{sys.executable}" "$@"')
    done = run("demo", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_run_without_ensurepip_turns_to_uv(commands: Path, tmp_path: Path) -> None:
    write_script(commands / "python3", "case $2 in *ensurepip*) exit 1 ;; *) echo 3.11 ;; esac")
    write_script(commands / "uv", 'echo "uv $*" >&2; exit 3')
    done = run("test", path=commands, venv=tmp_path / "venv")
    assert done.returncode == 3
    assert f"uv venv --quiet --allow-existing --seed --python {commands}/python3 {tmp_path}/venv" in done.stderr


def test_run_leaves_a_folder_alone_that_it_did_not_make(commands: Path, tmp_path: Path) -> None:
    precious = tmp_path / "venv" / "precious"
    precious.parent.mkdir()
    precious.touch()
    write_script(commands / "python3", "echo 3.11")
    done = run("test", path=commands, venv=precious.parent)
    assert done.returncode == 1
    assert "is not a virtual environment" in done.stderr
    assert precious.exists()


def test_ci_is_an_executable_bash_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    succeed("bash", "-n", script, cwd=ROOT)
