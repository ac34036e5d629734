"""Calibrations and envelopes: made, kept, compared, refused; silent on clean outputs, loud on those that left their range."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import abft
from abft import cli, events
from abft.calibration import identity
from abft.inject import Fault, faults
from abft.statistics import envelope, watches
from abft.statistics.baseline import WARM_UP


@pytest.fixture(autouse=True)
def nothing_known():
    watches.know({})
    abft.report(reset=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of products this small most of the time would be waiting for each other
    yield
    torch.set_num_threads(before)
    watches.know({})
    events.calibration = ""


def model(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def batches(count: int, rows: int = 64, seed: int = 0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 32, generator=generator) * scale for _ in range(count)]


# --- envelopes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_measures_are_those_of_the_definition(dtype):
    y = (torch.randn(7, 33) * 3).to(dtype)
    y[2, 3], y[4, 5] = math.nan, -math.inf
    kept = y[torch.isfinite(y)].double()
    expected = [kept.mean(), kept.square().mean().sqrt(), kept.abs().max(), 2 / y.numel()]
    # fp32 sums of 231 elements.
    for measured in (envelope.measure(y), envelope._measured_in_torch(y)):
        assert np.allclose(measured.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("y", [torch.zeros(0), torch.zeros(3, 4), torch.full((4,), 1e30), torch.full((2,), math.nan)], ids=["empty", "zeros", "huge", "nan"])
def test_measures_of_odd_outputs_are_finite(y):
    assert torch.isfinite(envelope.measure(y)).all()


def ar1(rng, n: int, rho: float) -> np.ndarray:
    out, x = np.empty((n, 4)), rng.standard_normal(3)
    for i in range(n):
        x = rho * x + math.sqrt(1 - rho * rho) * rng.standard_normal(3)
        rms = math.exp(0.1 * x[1])
        out[i] = 0.1 * x[0] * rms, rms, math.exp(1 + 0.1 * x[2]), 0.0
    return out


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_envelopes_of_dependent_samples_keep_their_rate(rho):
    """p = 1e-3 for each of three measures; the samples after the calibration go on where it ended."""
    rng, p, left, taken = np.random.default_rng(0), 1e-3, 0, 0
    for _ in range(60):
        values = ar1(rng, 64 + 500, rho)
        learnt = envelope.learn(values[:64], p)
        if learnt is None:
            continue
        taken += 3 * 500
        left += sum(len(learnt.outside(v)) for v in values[64:])
    assert taken > 3e4 and left / taken <= 2 * p  # within the error of ρ, estimated from 64 samples


def test_an_envelope_says_which_measure_left_it():
    learnt = envelope.learn(ar1(np.random.default_rng(1), 200, 0.2), 1e-6)
    assert learnt.outside([0.0, 1.0, math.e, 0.0]) == []
    assert [name for name, _ in learnt.outside([0.0, 10.0, math.e, 0.0])] == ["rms"]
    assert [name for name, _ in learnt.outside([5.0, 1.0, 1e20, 0.01])] == ["mean", "max", "nonfinite"]


def test_too_few_samples_say_nothing():
    assert envelope.learn(ar1(np.random.default_rng(0), 3, 0.0)) is None
    assert envelope.learn(np.array([[0.0, math.exp(i), math.exp(i), 0.0] for i in range(20)])) is None  # a trend


# --- watching -------------------------------------------------------------------------------------------


def test_clean_outputs_are_silent_and_a_corrupted_activation_is_loud():
    net = model()
    with torch.no_grad(), abft.watch(net, every=1) as watcher:
        for x in batches(300):
            net(x)
        assert set(watcher.envelopes) == {"(output)", "1", "2"} and abft.report().alarms == ()
        hook = net[1].register_forward_hook(lambda m, i, y: y.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(3e4)), prepend=True)
        net(batches(1, seed=9)[0])
        hook.remove()
    alarms = abft.report().alarms
    assert {"1"} <= {a.site for a in alarms} and {a.test for a in alarms} == {"envelope"} and not any(a.quarantine for a in alarms)
    assert any(a.site == "1" and "max 3e+04" in a.message for a in alarms)


def test_an_expert_without_tokens_says_nothing():
    layer = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    abft.report(reset=True)
    with abft.watch(layer, every=1):
        for i in range(100):
            layer(torch.randn(5, 8, generator=torch.Generator().manual_seed(i)))
        layer(torch.empty(0, 8))
    assert not abft.report(reset=True).alarms


def test_a_nan_is_an_alarm_even_where_nothing_else_changes():
    net = model()
    with torch.no_grad(), abft.watch(net, every=1):
        for x in batches(80):
            net(x)
        hook = net[2].register_forward_hook(lambda m, i, y: y.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan)), prepend=True)
        net(batches(1, seed=9)[0])
        hook.remove()
    assert any("nonfinite" in a.message and a.site == "2" for a in abft.report().alarms)


def test_only_every_so_many_calls_are_measured_and_hooks_go():
    net = model()
    with torch.no_grad(), abft.watch(net, every=8) as watcher:
        for x in batches(17):
            net(x)
        assert {name: len(taken) for name, taken in watcher.samples.items()} == {"(output)": 3, "1": 3, "2": 3}
    assert not any(m._forward_hooks for m in net.modules())


def test_anything_can_be_observed():
    with abft.watch(model()) as watcher:
        for i in range(200):
            watcher.observe("gradient norm", 1 + 0.1 * math.sin(7 * i))
        assert abft.report().alarms == ()
        watcher.observe("gradient norm", 1e4)
    assert [a.site for a in abft.report().alarms][:1] == ["gradient norm"]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1.5}, {"false_alarm": 0.0}], ids=repr)
def test_watch_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        abft.watch(model(), **arguments)


# --- calibrations ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    net = abft.protect(model(), name="net")
    with abft.context(release="1"):
        calibration = abft.calibrate(net, batches(WARM_UP, rows=1024))
    return net, calibration


def test_a_calibration_knows_every_site_and_output(made):
    net, calibration = made
    assert {(n[0], n[1], n[2], n[3]) for n in calibration.sites} == {("net.0", "fprop", 64, 32), ("net.3", "fprop", 8, 64)}
    assert set(calibration.envelopes) == {"(output)", "1", "2"} and calibration.incomplete == ()
    assert calibration.provenance["labels"] == {"release": "1"} and calibration.provenance["batches"] == WARM_UP
    assert all(s["kappa"] == 1.0 for s in calibration.sites.values()) and net[0]._abft_policy is None


def test_a_calibration_survives_its_file(made, tmp_path):
    _, calibration = made
    path = calibration.save(tmp_path / "c.json")
    again = abft.Calibration.load(path)
    assert again == calibration and again.hash == calibration.hash
    assert json.loads(path.read_text())["version"] == 1


def test_an_applied_calibration_needs_no_warm_up_and_names_itself(made, monkeypatch):
    net, calibration = made
    calibration.apply(net)
    abft.protect(net, abft.Policy(detector="both", on_uncorrected="record"), name="net")
    with torch.no_grad():
        for x in batches(4, rows=1024, seed=3):
            net(x)
        report = abft.report(reset=True)
        assert report.alarms == () and all(s.warm for s in report.statistics)
        with faults(Fault("bitflip", bit=28)):
            net(batches(1)[0])
    assert abft.report().events[0].calibration == calibration.hash


def test_an_applied_calibration_is_loud_about_another_arithmetic(made, monkeypatch):
    """Where the calibration was made sums were exact to their last bits; a unit that adds a bias differs at once."""
    from abft import checksum
    from abft.backends import reference

    net, calibration = made
    calibration.apply(net)
    abft.protect(net, abft.Policy(detector="both", on_uncorrected="record"), name="net")
    right = reference.multiply

    def wrong(a, w, bias):
        y = right(a, w, bias)
        return y + checksum.weights(("e",), y.shape[-1], torch.device("cpu"))[0] * 2e-8 * y.norm(dim=-1, keepdim=True)

    monkeypatch.setattr(reference, "multiply", wrong)
    with torch.no_grad():
        for x in batches(8, rows=1024, seed=3):
            net(x)
    report = abft.report()
    assert report.detected == 0 and {a.site for a in report.alarms if a.test == "bias"} >= {"net.0"}
    assert all(a.calibration == calibration.hash for a in report.alarms)


def test_envelopes_of_a_calibration_are_watched_at_once(made):
    net, calibration = made
    with torch.no_grad(), abft.watch(net, calibration, every=1):
        for x in batches(20, rows=1024, seed=5):
            net(x)
        assert abft.report().alarms == ()
        net(batches(1, rows=1024, scale=100.0)[0])
    assert {a.test for a in abft.report().alarms} == {"envelope"}


@pytest.mark.parametrize(
    "other, what",
    [
        (lambda: model(33), "fingerprint"),
        (lambda: model().bfloat16(), "dtype"),
        (lambda: model().to("meta"), "device"),
    ],
    ids=["model", "dtype", "device"],
)
def test_a_calibration_of_something_else_is_refused(made, other, what):
    _, calibration = made
    for use in (calibration.apply, lambda m: abft.watch(m, calibration)):
        with pytest.raises(abft.CalibrationError, match=f"their {what} differs.*Calibrate anew"):
            use(other())
    assert events.calibration == ""


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "abft calibration", "version": 2}', '{"format": "abft calibration", "version": 1}'], ids=repr
)
def test_what_is_no_calibration_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(abft.CalibrationError):
        abft.Calibration.load(tmp_path / "c.json")


def test_nothing_is_learnt_from_no_batches_or_from_faults():
    net = abft.protect(model(), abft.Policy(on_uncorrected="record"))
    with pytest.raises(abft.CalibrationError, match="at least one batch"):
        abft.calibrate(net, iter(()))
    with pytest.raises(abft.CalibrationError, match="disagreed"), faults(Fault("bitflip", bit=28)):
        abft.calibrate(net, batches(2))
    assert net[0]._abft_policy == abft.Policy(on_uncorrected="record")


def test_the_command_line_compares_and_rolls_back(made, tmp_path, capsys):
    _, calibration = made
    name = next(iter(calibration.sites))
    site = calibration.sites[name] | {"sigma": [2 * s for s in calibration.sites[name]["sigma"]]}
    changed = dataclasses.replace(calibration, sites=calibration.sites | {name: site})
    path = str(calibration.save(tmp_path / "c.json"))
    assert cli.main(["calibrate", "--compare", path, path]) == 0
    changed.save(path)
    assert cli.main(["calibrate", "--compare", f"{path}.previous", path]) == 1
    assert "σ × 2.000" in capsys.readouterr().out
    assert cli.main(["calibrate", "--rollback", path]) == 0
    assert abft.Calibration.load(path).hash == calibration.hash and abft.Calibration.load(f"{path}.previous").hash == changed.hash
    assert cli.main(["calibrate", "--rollback", str(tmp_path / "none.json")]) == 2


def test_the_identity_of_a_checked_model_is_that_of_the_plain_one():
    assert identity(abft.protect(model())) == identity(model())
