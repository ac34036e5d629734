"""Small versions of the measured evidence: the campaigns run, are reproducible, and fail when something is wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import abft
from abft import checksum, threshold
from bench import campaign, clean, decoding_faults, emulated, emulated_faults, emulator, families, intervals, results, stamp

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("fp32", "bf16", "fp16")
#: One of each kind of trouble: a mean, outliers, a shared exponent, zeros, the ends of the range.
ACTIVATIONS = ("shifted", "outlier-channels", "constant-rows", "sparse", "zero-rows", "k-decay", "softmax", "denormal", "tiny", "huge")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "trials", "low", "high"),
    [(0, 10, 0.0, 0.30850), (10, 10, 0.69150, 1.0), (5, 10, 0.18709, 0.81291), (1, 20, 0.0012651, 0.24873), (0, 0, 0.0, 1.0)],
)
def test_intervals_are_the_published_ones(events: int, trials: int, low: float, high: float) -> None:
    assert intervals.proportion(events, trials) == pytest.approx((low, high), abs=5e-5)


def test_zero_events_give_the_rule_of_three() -> None:
    assert intervals.upper_limit(0, 10**7) == pytest.approx(-np.log(0.05) / 10**7, rel=1e-6)
    assert intervals.lower_limit(10**4, 10**4) == pytest.approx(1 + np.log(0.05) / 10**4, abs=1e-7)
    assert intervals.upper_limit(3, 3) == 1.0


@pytest.mark.parametrize(("events", "trials"), [(-1, 5), (6, 5)])
def test_impossible_counts_are_refused(events: int, trials: int) -> None:
    with pytest.raises(ValueError, match="events"):
        intervals.proportion(events, trials)


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_intervals_cover_what_they_promise(p: float) -> None:
    rng = np.random.default_rng(0)
    covered = [low <= p <= high for low, high in (intervals.proportion(int(e), 200) for e in rng.binomial(200, p, 400))]
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 400)


# --- families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_finite_and_repeat(family: str, dtype: str) -> None:
    x, again = (families.activations(family, 40, 64, families.generator(1, 2), clean.DTYPES[dtype]) for _ in range(2))
    assert torch.equal(x, again)
    assert bool(x.isfinite().all())
    assert not torch.equal(x, families.activations(family, 40, 64, families.generator(1, 3), clean.DTYPES[dtype]))


@pytest.mark.parametrize("family", families.WEIGHTS)
def test_weights_are_finite_and_repeat(family: str) -> None:
    w, again = (families.weights(family, 48, 64, families.generator(5)) for _ in range(2))
    assert torch.equal(w, again)
    assert bool(w.isfinite().all())


def test_denormals_are_denormal_and_huge_is_huge() -> None:
    g = families.generator(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = families.activations("denormal", 64, 64, g, dtype)
        assert 0 < float(x.abs().float().max()) < 4 * torch.finfo(dtype).smallest_normal
    assert float(families.activations("huge", 64, 64, g).abs().min()) > 1e18


# --- clean campaign --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clean_rows_raise_no_alarm(dtype: str, activation: str) -> None:
    tally = clean.measure(clean.DTYPES[dtype], activation, 64, 1500, seed=11, batch=256, backward=64)
    assert tally.rows >= 1500
    assert tally.alarms == {}
    assert max(tally.worst.values()) < 1.0


@pytest.fixture
def kappa_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Multiply κ by a factor: the defect that a campaign must notice."""
    original = threshold.kappa

    def plant(factor: float) -> None:
        monkeypatch.setattr(threshold, "kappa", lambda *args, **kwargs: factor * original(*args, **kwargs))
        threshold.coefficients.cache_clear()

    yield plant
    monkeypatch.undo()
    threshold.coefficients.cache_clear()


def test_a_bound_that_is_too_tight_fails_the_clean_campaign(kappa_times) -> None:
    kappa_times(0.01)
    tally = clean.measure(torch.float32, "gauss", 64, 1500, seed=12, batch=256, backward=64)
    assert tally.alarms.get("false_alarms", 0) > 0


# --- fault campaign --------------------------------------------------------------------------------------


def watched(weights: str) -> abft.Policy:
    return abft.Policy(backend="reference", weights=weights, on_uncorrected="record")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def subjects() -> dict[str, dict[str, list[campaign.Subject]]]:
    return {d: {w: [campaign.Subject(i, clean.DTYPES[d], watched(w)) for i in (0, 1, 3)] for w in ("tracked", "frozen")} for d in ("fp32", "bf16")}


CELLS = (
    ("accumulator", "flip1", "element"),
    ("accumulator", "carry", "fragment"),
    ("accumulator", "nullify", "warp"),
    ("output", "near-inf", "row"),
    ("operand", "flip1", "element"),
    ("panel", "scale", "row"),
    ("weight", "flip1", "element"),
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_harmful_faults_are_found_and_repaired(dtype: str, cell: tuple[str, str, str], subjects) -> None:
    t = campaign.run_cell(*cell, trials=12, seed=3, subjects=subjects[dtype], harm=campaign.HARM if dtype == "fp32" else campaign.HARM_ROUNDED)
    assert t.trials > 0
    assert t.harmful_detected == t.harmful, t.misses
    assert t.repaired == t.detected, t.unrepaired
    assert t.false_alarms == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_campaign_runs_on_a_gpu(dtype: str) -> None:
    subjects = {"tracked": [campaign.Subject(i, clean.DTYPES[dtype], abft.Policy(backend="triton", on_uncorrected="record"), "cuda") for i in (0, 1)]}
    t = campaign.run_cell("accumulator", "flip1", "element", trials=12, seed=3, subjects=subjects, harm=campaign.HARM)
    assert t.trials > 0 and t.harmful_detected == t.harmful, t.misses


@pytest.mark.gpu
def test_clean_rows_raise_no_alarm_on_a_gpu() -> None:
    policy = abft.Policy(backend="triton", on_uncorrected="record")
    tally = clean.measure(torch.bfloat16, "post-norm", 64, 10**6, seed=11, batch=1 << 16, backward=1024, policy=policy, device="cuda")
    assert tally.rows >= 10**6 and tally.alarms == {}


def test_single_wrong_elements_are_named(subjects) -> None:
    t = campaign.run_cell("accumulator", "nullify", "element", trials=15, seed=4, subjects=subjects["fp32"], harm=1e-3)
    assert t.single > 0
    assert t.located == t.single


def test_a_bound_that_is_too_loose_fails_the_fault_campaign(kappa_times) -> None:
    kappa_times(100.0)
    fresh = {w: [campaign.Subject(i, torch.float32, watched(w)) for i in (1, 3)] for w in ("tracked", "frozen")}
    t = campaign.run_cell("accumulator", "flip1", "element", trials=150, seed=5, subjects=fresh, harm=1e-3)
    assert t.harmful_detected < t.harmful


@pytest.mark.parametrize(("uncommon", "repaired"), [(["--panel", "lean"], True), (["--timing", "deferred"], False)], ids=["lean", "deferred"])
def test_kernels_are_struck_under_other_forms(tmp_path, uncommon, repaired) -> None:
    """In a process of its own: here Triton may not be told to interpret."""
    pytest.importorskip("triton")
    common = ["--backend", "interpreted", "--dtype", "fp16", "--place", "accumulator", "--what", "nullify", "--trials", "1"]
    command = [sys.executable, "-m", "bench", "campaign", *common, *uncommon, "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    found = json.loads((tmp_path / f"faults-{uncommon[1]}-interpreted-fp16.jsonl").read_text().splitlines()[-1])["places"]["accumulator"]
    assert found["harmful"] == found["harmful_detected"] > 0
    assert found["repaired"] == (found["detected"] if repaired else 0)


# --- emulated tensor cores -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensor_core() -> emulator.Emulator:
    try:
        return emulator.load(os.environ.get("ABFT_EMULATOR"))
    except (emulator.EmulatorUnavailable, OSError) as error:
        pytest.skip(f"the tensor-core emulator is not available: {error}")


@pytest.mark.parametrize("unit", emulated.UNITS)
def test_emulated_units_are_silent_and_see_harm(unit: str, tensor_core: emulator.Emulator) -> None:
    u, g, k = emulated.UNITS[unit], families.generator(9), 128
    product = emulated.Product(tensor_core, u, u.operand(families.weights("offset", 640, k, g)), ("e", "one", "hi", "lo"))
    x = u.operand(families.activations("post-norm", 300, k, g))
    acc, prediction = product.multiply(x), product.predict(x)
    assert not product.judge(acc, prediction, k).suspect.any()
    wrong = emulated_faults.strike(acc, "element", emulated_faults.OPERATIONS["flip1"], np.random.default_rng(1))
    harmful = emulated_faults.effect(acc, wrong) >= emulated_faults.HARM
    assert harmful.sum() > 50
    assert product.judge(wrong, prediction, k).suspect[harmful].all()


@pytest.mark.parametrize("unit", emulated.UNITS)
def test_the_bound_has_room_for_an_exact_product_too(unit: str, tensor_core: emulator.Emulator) -> None:
    """Sums and predictions of a unit that truncates, each against fp64: by this the kernels tell a false alarm from a persistent unit.

    The families with the largest deviations of all, and bf16 as a model's layers have it."""
    u, k = emulated.UNITS[unit], 2048
    for activation, weight in (("k-decay", "gauss"), ("softmax", "half-offset"), ("student-t", "output-scales"), ("post-norm", "offset")):
        g = families.generator(11, *activation.encode())
        w, x = u.operand(families.weights(weight, 384, k, g)), u.operand(families.activations(activation, 60, k, g))
        product = emulated.Product(tensor_core, u, w)
        (r, _), (c, noise2, _) = product.sum_rows(product.multiply(x)), product.predict(x)
        weights = np.stack([checksum.column_weights(kind, 384) for kind in checksum.FULL.kinds]).astype(np.float64)
        y = (x.double() @ w.double().mT).numpy()
        exact = (y @ weights.T)[:, None]
        sums = checksum.Sums(checksum.FULL.kinds, r.astype(np.float64), exact, (y**2).sum(1)[:, None], noise2.astype(np.float64))
        tau = threshold.bounds(sums, threshold.coefficients(u.arithmetic, k, checksum.FULL.kinds, 384))
        for side in (r, c):
            ratio = (abs(side - exact) / tau).max()
            assert ratio < 1, (activation, weight, ratio)
        assert abs(r - exact).max() > 0


def test_a_fault_whose_square_overflows_is_suspect(tensor_core: emulator.Emulator) -> None:
    u, g = emulated.UNITS["bf16"], families.generator(10)
    product = emulated.Product(tensor_core, u, u.operand(families.weights("gauss", 128, 64, g)))
    x = u.operand(families.activations("gauss", 8, 64, g))
    acc = product.multiply(x)
    for row, value in enumerate((1e19, 3e38, np.inf, -np.inf, np.nan, 1e25, -1e20, 2e19)):
        acc[row, 16 * row] = value
    assert product.judge(acc, product.predict(x), 64).suspect.all()


# --- results ---------------------------------------------------------------------------------------------


def test_results_resume_and_survive_a_cut_line(tmp_path: Path) -> None:
    first = results.Results("r", folder=tmp_path, seed=1)
    first.add("cell", key="a", value=1.23456789, missing=float("nan"), array=np.float32(2.0))
    with first.path.open("a") as file:
        file.write('{"kind": "cell", "key": "b", "va')
    again = results.Results("r", folder=tmp_path)
    assert again.find("a") == {"kind": "cell", "key": "a", "value": 1.235, "missing": "nan", "array": 2.0}
    assert again.find("b") is None
    again.replace("summary", total=1)
    again.replace("summary", total=2)
    assert [r["total"] for r in results.read(again.path) if r["kind"] == "summary"] == [2]


def test_a_stamp_names_no_machine() -> None:
    text = json.dumps(stamp.stamp())
    assert platform.node() not in text
    assert str(ROOT) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert {"date", "commit", "sources", "cpu", "cores", "torch", "python"} <= stamp.stamp().keys()


def test_committed_results_are_stamped() -> None:
    campaigns = [p for p in results.FOLDER.glob("*.jsonl") if p.name.startswith(("clean-", "faults-", "floors", "memory", "host"))]
    for path in campaigns:
        kinds = [r["kind"] for r in results.read(path)]
        assert kinds and kinds[0] == "stamp", path.name


def test_the_command_lists_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "clean" in done.stdout and "campaign" in done.stdout
    assert subprocess.run([sys.executable, "-m", "bench", "nonsense"], cwd=ROOT, capture_output=True).returncode == 2


# --- found by a campaign -----------------------------------------------------------------------------------


def test_a_backward_inside_autocast_is_checked_like_any_other() -> None:
    layer = abft.Linear(32, 16)
    x = torch.randn(5, 32, requires_grad=True)
    abft.report(reset=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    report = abft.report(reset=True)
    assert report.checks == 5 + 5 + 16
    assert report.detected == report.false_alarms == 0


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_equal_rows_of_a_weight_raise_no_alarm(width: int) -> None:
    # Every partial sum of equal numbers rounds the same way: in fp32 such panels and row sums drift by tens of U·S.
    g = families.generator(width)
    layer = abft.Linear(64, width, bias=False, policy=abft.Policy(on_uncorrected="record"))
    with torch.no_grad():
        layer.weight.copy_(families.weights("gauss", 1, 64, g).expand(width, 64))
        abft.report(reset=True)
        for family in ("shifted", "constant-rows"):
            layer(families.activations(family, 500, 64, g))
    report = abft.report(reset=True)
    assert report.false_alarms == report.detected == 0
    assert report.worst < 0.9


# --- attention over pages --------------------------------------------------------------------------------


def test_the_campaign_over_pages_finds_what_is_checked_and_misses_what_is_not() -> None:
    checked = decoding_faults.ON_THE_HOST
    for struck in ("O", "V in pages"):
        found = decoding_faults.of_place(checked, struck, 10)
        assert found["harmful_detected"] == found["harmful"] > 0 and found["false_alarms"] == 0 and found["largest_missed"] < 1e-3
        assert found == decoding_faults.of_place(checked, struck, 10)
    blind = replace(checked, policy=checked.policy.replace(level="off"))
    missed = decoding_faults.of_place(blind, "O", 10)
    assert missed["harmful"] > 0 == missed["detected"] and missed["largest_missed"] > 1e-3
