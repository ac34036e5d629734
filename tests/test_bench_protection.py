"""The figure and the table of what protection costs: which cases, which bars, and that both come from the records alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench import protection
from bench.results import Results, read

ROOT = Path(__file__).resolve().parents[1]
RATIOS = {"torch": 1.0, "torch-again": 1.01, "abft": 1.1, "abft:lean": 1.05, "dmr": 2.1, "tmr": 3.2}


def timed(results: Results, workload: str, *, passes: str = "forward", dtype: str = "fp32", way: str = "eager",
          ratios: dict[str, float] = RATIOS) -> None:  # fmt: skip
    for provider, ratio in ratios.items():
        results.add(
            "timing", case=f"{workload} {dtype} {passes} {way}", workload=workload, passes=passes, dtype=dtype, way=way, provider=provider,
            seconds=2e-3 * ratio, ratio=ratio, low=0.9 * ratio, high=1.2 * ratio, expected_floor=3e-5 if provider == "abft" else None,
            found=9, harmful=9, trials=9,
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of a CPU and of a GPU, and of what is not shown."""
    linear = Results("time-linear-cpu", folder=tmp_path, fresh=True)
    timed(linear, "square-1024")
    timed(linear, "square-1024", dtype="bf16")
    timed(linear, "gpt-out-1024")
    layer = Results("time-layer-cpu", folder=tmp_path, fresh=True)
    timed(layer, "minilm-layer-1x16", passes="backward", ratios={k: v for k, v in RATIOS.items() if k != "tmr"})
    timed(layer, "minilm-layer-16x128", ratios={"torch": 1.0, "dmr": 2.0})
    train = Results("time-train-some-gpu", folder=tmp_path, fresh=True)
    timed(train, "gpt-256x64", passes="step", ratios={"torch": 1.0, "abft:triton": 1.2, "dmr": 2.0})
    timed(Results("time-layer-interpreted", folder=tmp_path, fresh=True), "minilm-layer-1x16")
    timed(Results("scaling-cpu", folder=tmp_path, fresh=True), "m1-n2-k3")
    return tmp_path


@pytest.fixture
def tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables_of_protection", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(module, "IMAGES", folder)
    return module


def test_files_of_times_are_told_from_others() -> None:
    assert protection.device_of("time-linear-cpu") == ("linear", "cpu")
    assert protection.device_of("time-train-nvidia-h200") == ("train", "nvidia-h200")
    assert protection.device_of("time-layer-interpreted") is protection.device_of("scaling-cpu") is protection.device_of("host") is None


def test_a_case_is_shown_in_its_device_s_type_with_the_bars_it_has(folder: Path) -> None:
    (square,) = protection.shown(read(folder / "time-linear-cpu.jsonl"), "linear", "cpu")  # bf16 and gpt-out are left to the long table
    assert square.name == "square-1024, forward, fp32" and square.seconds == 2e-3 and square.expected_floor == 3e-5
    assert square.ours == protection.Bar(1.1, 0.99, 1.32)
    assert {name: bar.ratio for name, bar in square.others.items()} == {"DMR": 2.1, "TMR": 3.2, "torch again": 1.01}
    (layer,) = protection.shown(read(folder / "time-layer-cpu.jsonl"), "layer", "cpu")  # a case without abft is none
    assert set(layer.others) == {"DMR", "torch again"}
    (step,) = protection.shown(read(folder / "time-train-some-gpu.jsonl"), "train", "some-gpu")
    assert step.name == "gpt-256x64, step, fp32, eager" and step.ours.ratio == 1.2


def test_the_documentation_shows_every_device_with_its_numbers(tables: ModuleType, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    tables.draw()
    assert sorted(path.name for path in folder.glob("*.png")) == ["cost_of_protection_cpu.png", "cost_of_protection_some-gpu.png"]
    text = tables.protection("README.md")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "ms" in line]
    assert [line.split(" | ")[0] for line in rows] == [
        "| square-1024, forward, fp32", "| minilm-layer-1x16, backward, fp32", "| gpt-256x64, step, fp32, eager",
    ]  # fmt: skip
    assert "**1.10 (0.99 to 1.32)** | 2.10 (1.89 to 2.52) | 3.20 (2.88 to 3.84) | 1.01 (0.91 to 1.21) | 3e-5" in rows[0]
    assert "| 2.10 (1.89 to 2.52) | – | 1.01" in rows[1]
    assert all("time-" in line and ".jsonl)" in line for line in rows)  # a figure names its file
    assert text.count("![") == 2 and tables.protection_figure("docs/explanation/cost.md").count("![") == 2


def test_without_a_measurement_both_say_so(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "nothing")
    for text in (tables.protection("README.md"), tables.protection_figure("README.md"), tables.scaling("README.md")):
        assert text.startswith("*Not measured yet: `python -m bench") and "![" not in text
    tables.draw()
    assert "not measured yet" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_a_figure_is_drawn_once_and_anew_after_a_measurement(tables: ModuleType, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    tables.draw()
    path = tables.picture("cpu")
    first, when = path.read_bytes(), path.stat().st_mtime_ns
    tables.draw()
    assert path.stat().st_mtime_ns == when
    path.unlink()
    tables.draw()
    assert path.read_bytes() == first  # the same numbers, the same bytes
    timed(Results("time-model-cpu", folder=folder), "minilm-1x16")
    tables.draw()
    assert path.read_bytes() != first


def test_a_figure_is_opaque_and_knows_what_it_shows(folder: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = protection.shown(read(folder / "time-linear-cpu.jsonl"), "linear", "cpu")
    protection.draw(rows, folder / "figure.png", "a machine")
    pixels = pyplot.imread(folder / "figure.png")
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1).all()
    assert (pixels[0, 0, :3] == 1).all()  # white, also where a page is dark
    assert protection.digest(rows).encode() in (folder / "figure.png").read_bytes()
    # Bars are told apart without colour: by how light they are, or by their hatching.
    assert len(set(protection.LOOKS.values())) == len(protection.LOOKS) and len({hatch for _, hatch in protection.LOOKS.values()}) >= 3
    assert (abs(pixels[..., 0] - pixels[..., 2]) < 0.02).all()


def test_points_of_scaling_stand_beside_their_counts(tables: ModuleType, folder: Path) -> None:
    Results("scaling-cpu", folder=folder).add(
        "scaling", key="K-16", sweep="K", value=16, m=8, n=64, k=16, group=None, dtype="fp32", way="eager", provider="abft", against="torch",
        ratio=1.5, low=1.4, high=1.6, again=[1, 1], predicted={"multiplications": 1.2, "bytes": 2.5},
    )  # fmt: skip
    text = tables.scaling("docs/explanation/cost.md")
    assert "| K = 16 | M 8, N 64 | fp32 | torch | **1.50** (1.40 to 1.60) | 1.20 by multiplications, 2.50 by bytes |" in text
