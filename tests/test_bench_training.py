"""Trainings under faults, made tiny: they resume, repaired runs are bit-equal, and a run that died is nowhere near the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import training_faults
from bench.results import Results
from bench.training_faults import FAULT_FREE, PROTECTED, UNPROTECTED, measure, summaries
from demo.gpt import Shape
from demo.training import Text


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = Results("training-faults", folder=tmp_path_factory.mktemp("results"))
    run(results)
    yield results
    torch.set_num_threads(threads)


def run(results: Results) -> None:
    symbols = Text.read().symbols
    measure(results, 8, 2, (0.6,), Shape(symbols, context=16, width=16, heads=1, layers=1))


def test_every_run_is_there_once_also_after_a_second_call(results, monkeypatch):
    keys = [r["key"] for r in results.records if r["kind"] == "run"]
    assert len(keys) == len(set(keys)) == 6
    monkeypatch.setattr(training_faults, "train", lambda *_, **__: pytest.fail("it is in the file already"))
    run(results)
    assert [r["key"] for r in results.records if r["kind"] == "run"] == keys
    assert sum(r["kind"] == "summary" for r in results.records) == 1


def test_protected_runs_end_where_the_fault_free_ones_do(results):
    (summary,) = (r for r in results.records if r["kind"] == "summary")
    arms = {arm["arm"]: arm for arm in summary["arms"]}
    assert arms[PROTECTED]["faults"] == arms[UNPROTECTED]["faults"] >= 4
    assert arms[PROTECTED]["missed"] == 0 < arms[UNPROTECTED]["missed"] == arms[UNPROTECTED]["harmful"]
    assert arms[PROTECTED]["all_repaired_bit_equal"] == arms[PROTECTED]["all_repaired"]
    assert (arms[PROTECTED]["inside"], arms[PROTECTED]["elsewhere"]) == (2, 0)
    assert arms[PROTECTED]["worst_off"] < 1e-5 < arms[UNPROTECTED]["worst_off"]


def test_a_run_that_died_is_outside_and_elsewhere(results, tmp_path: Path):
    runs = [dict(r) for r in results.records if r["kind"] == "run"]
    dead = next(r for r in runs if r["arm"] == UNPROTECTED)
    dead.update(held_out="nan", held_out_off="nan")
    arms = {arm["arm"]: arm for arm in summaries(runs)}
    assert arms[UNPROTECTED]["inside"] < 2 and arms[UNPROTECTED]["elsewhere"] >= 1
    assert arms[FAULT_FREE]["inside"] == 2
    pytest.importorskip("matplotlib")
    training_faults._draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
