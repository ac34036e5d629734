"""Policies: values that are validated when they are made, and that decide what a product does."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import abft
from abft.backends.call import Call
from abft.inject import Fault, faults
from abft.ops import checked

DEFAULTS = dict(  # noqa: C408
    level="correct", backend="auto", redundancy="none", panel="full", group=None, roles=frozenset({"fprop", "dgrad", "wgrad"}), timing="immediate",
    detector="checksum", weights="tracked", max_floor=None, on_uncorrected="warn", every=1,
)  # fmt: skip
CHOICES = {
    "level": ["off", "detect", "correct", "planned"], "every": [1, 2, 100], "backend": ["auto", "triton", "reference", "vendor"],
    "redundancy": ["none", "dmr", "tmr"],
    "panel": ["lean", "full"], "detector": ["checksum", "statistical", "both"], "group": [16, 128, 512], "weights": ["tracked", "frozen"], "max_floor": [1e-3, 1],
    "on_uncorrected": ["record", "warn", "raise"], "roles": [frozenset(), frozenset({"fprop"}), {"dgrad", "wgrad"}, ["fprop"], ("wgrad",), {"fprop", "qk"}, {"pv"}],
}  # fmt: skip
WRONG = [
    ("level", "on"), ("level", None), ("level", True), ("backend", "cuda"), ("backend", None), ("redundancy", "qmr"), ("redundancy", 2),
    ("panel", "fat"), ("group", 0), ("group", -16), ("group", 24), ("group", 8), ("group", 128.0), ("group", True), ("group", "128"),
    ("roles", {"forward"}), ("roles", "fprop"), ("roles", {1}), ("roles", None), ("roles", 3), ("timing", "later"), ("detector", "magic"), ("weights", "solid"),
    ("weights", ["frozen"]), ("max_floor", 0), ("max_floor", -1e-3), ("max_floor", "1e-3"), ("max_floor", float("nan")), ("max_floor", True),
    ("on_uncorrected", "panic"), ("on_uncorrected", None), ("on_uncorrected", 3), ("level", []), ("on_uncorrected", ["raise"]),
]  # fmt: skip


def named(value) -> str:
    return repr(sorted(value)) if isinstance(value, set | frozenset) and all(isinstance(v, str) for v in value) else repr(value)


def test_defaults_are_those_of_the_contract():
    assert {f.name: getattr(abft.Policy(), f.name) for f in dataclasses.fields(abft.Policy)} == DEFAULTS


def test_policies_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        abft.Policy("detect")
    with pytest.raises(dataclasses.FrozenInstanceError):
        abft.Policy().level = "off"


@pytest.mark.parametrize("field, value", [(f, v) for f, values in CHOICES.items() for v in values], ids=named)
def test_every_value_of_the_contract_is_accepted(field, value):
    policy = abft.Policy(**{field: value})
    assert getattr(policy, field) == (frozenset(value) if field == "roles" else value)


@pytest.mark.parametrize("detector", ["statistical", "both"])
def test_a_detector_that_a_backend_does_not_have_is_refused_by_name(detector):
    """On a device that is no CPU only the kernels keep statistics; they have all of them (tests/kernels/test_residuals.py, test_weigh.py)."""
    there = torch.ones(2, 16, device="meta")
    policy = abft.Policy(backend="reference", detector=detector)
    with pytest.raises(NotImplementedError, match=f"Policy.detector='{detector}'.*on meta.*kernels"):
        checked.choose_backend(Call(there, there, None, None, False, "fprop", policy, 0))


@pytest.mark.parametrize("field, value", WRONG, ids=named)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises((ValueError, TypeError), match=f"Policy.{field}"):
        abft.Policy(**{field: value})


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError):
        abft.Policy(speed="fast")
    with pytest.raises(ValueError, match="speed"):
        abft.Policy().replace(speed="fast")
    with pytest.raises(ValueError, match="speed"):
        abft.Policy.from_dict({"speed": "fast"})


@pytest.mark.parametrize("name, expected", [
    ("inference", {"weights": "frozen"}), ("training", {"on_uncorrected": "record"}), ("audit", {"level": "detect", "on_uncorrected": "record"}),
    ("paranoid", {"group": 128, "redundancy": "dmr", "on_uncorrected": "raise"}),
], ids=["inference", "training", "audit", "paranoid"])  # fmt: skip
def test_presets(name, expected):
    assert abft.Policy.preset(name) == abft.Policy(**expected)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="inference.*training.*audit.*paranoid"):
        abft.Policy.preset("fast")


def test_replace_changes_a_copy():
    policy = abft.Policy(group=128)
    other = policy.replace(level="detect")
    assert (other.level, other.group, policy.level) == ("detect", 128, "correct")
    with pytest.raises(ValueError):
        policy.replace(level="loud")


def every_policy():
    for fields in itertools.chain([{}], ({f: v} for f, values in CHOICES.items() for v in values)):
        yield abft.Policy(**fields)
    yield abft.Policy.preset("paranoid").replace(roles={"wgrad"}, max_floor=0.5)


def test_dicts_go_through_json_and_come_back_equal():
    for policy in every_policy():
        assert abft.Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert abft.Policy.from_dict({}) == abft.Policy()


def test_a_callable_reaction_has_no_dict():
    with pytest.raises(ValueError, match="on_uncorrected"):
        abft.Policy(on_uncorrected=print).to_dict()


def test_equal_policies_are_equal_and_hash_alike():
    for policy in every_policy():
        twin = copy.deepcopy(policy)
        assert twin == policy and hash(twin) == hash(policy)
        assert pickle.loads(pickle.dumps(policy)) == policy
    assert len(set(every_policy())) == len({json.dumps(p.to_dict(), sort_keys=True) for p in every_policy()})
    assert abft.Policy(roles={"fprop", "dgrad"}) == abft.Policy(roles=["dgrad", "fprop"])
    assert abft.Policy(on_uncorrected=print) != abft.Policy()


@pytest.mark.parametrize("policy", [3, 1.0, [], {1}, nn.Identity()], ids=repr)
def test_something_else_is_no_policy(policy):
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises((TypeError, ValueError)):
        abft.linear(x, w, policy=policy)
    with pytest.raises((TypeError, ValueError)):
        abft.Linear(4, 3, policy=policy)
    with pytest.raises((TypeError, ValueError)):
        abft.protected(policy).__enter__()
    with pytest.raises((TypeError, ValueError)):
        abft.protect(nn.Linear(4, 3), policy)


@pytest.mark.parametrize("use", [
    lambda p: abft.linear(torch.ones(2, 4), torch.ones(3, 4), policy=p), lambda p: abft.matmul(torch.ones(2, 4), torch.ones(4, 3), policy=p),
    lambda p: abft.bmm(torch.ones(1, 2, 4), torch.ones(1, 4, 3), policy=p), lambda p: abft.addmm(torch.ones(3), torch.ones(2, 4), torch.ones(4, 3), policy=p),
    lambda p: abft.protect(nn.Linear(4, 3), p), lambda p: abft.Linear(4, 3, policy=p), lambda p: abft.protected(p),
    lambda p: abft.verify_matmul(torch.ones(2, 4), torch.ones(4, 3), torch.full((2, 3), 4.0), policy=p),
], ids=["linear", "matmul", "bmm", "addmm", "protect", "Linear", "protected", "verify_matmul"])  # fmt: skip
def test_a_presets_name_stands_for_it_everywhere(use):
    use("audit")
    with pytest.raises(ValueError, match="unknown policy preset"):
        use("nosuch")


# --- what the values do ---------------------------------------------------------------------------------


def hit_linear(policy, *, what="nan", index=(1, 2), **more):
    """A product of 4 rows, row 1 struck; (result, clean result, report)."""
    x, w = torch.randn(4, 32), torch.randn(24, 32)
    clean = torch.nn.functional.linear(x, w)
    with faults(Fault(what, index=index, **more)):
        y = abft.linear(x, w, policy=policy)
    return y, clean, abft.report()


def test_level_correct_repairs():
    y, clean, report = hit_linear(abft.Policy())
    assert torch.equal(y, clean) and (report.detected, report.recomputed) == (1, 1)


def test_level_detect_reports_and_leaves_the_result():
    y, clean, report = hit_linear(abft.Policy(level="detect", on_uncorrected="record"))
    assert torch.isnan(y[1, 2]) and torch.equal(y[0], clean[0])
    assert (report.detected, report.observed, report.corrected) == (1, 1, 0)


def test_level_off_delivers_the_fault_and_counts_the_product():
    y, _, report = hit_linear(abft.Policy(level="off"))
    assert torch.isnan(y[1, 2])
    assert (report.detected, report.checks, report.products) == (0, 0, 0) and report.bypassed == {"level off": 1}


@pytest.mark.parametrize("roles", [set(), {"fprop"}, {"dgrad"}, {"wgrad"}, {"fprop", "wgrad"}], ids=lambda r: "+".join(sorted(r)) or "none")
def test_roles_choose_the_products(roles):
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    abft.linear(x, w, policy=abft.Policy(roles=roles)).sum().backward()
    report = abft.report()
    assert report.checks == sum({"fprop": 4, "dgrad": 4, "wgrad": 6}[r] for r in roles)
    assert sum(report.bypassed.values()) == 3 - len(roles)
    assert all(f"role {r} not in policy" in report.bypassed for r in {"fprop", "dgrad", "wgrad"} - roles)


@pytest.mark.parametrize("redundancy, clean, struck", [("none", 1, 2), ("dmr", 2, 3), ("tmr", 3, 3)])
def test_redundancy_really_executes(redundancy, clean, struck):
    x, w = torch.randn(4, 32), torch.randn(24, 32)
    policy = abft.Policy(redundancy=redundancy)
    expected = torch.nn.functional.linear(x, w)
    assert torch.equal(abft.linear(x, w, policy=policy), expected)
    assert abft.report(reset=True).executions == clean
    with faults(Fault("nullify", pattern="row", index=(2, 0))):
        assert torch.equal(abft.linear(x, w, policy=policy), expected)
    report = abft.report()
    assert report.executions == struck and report.detected == report.recomputed == 1


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_redundancy_without_checks_still_repairs(redundancy):
    """A flip of the lowest bit, far below any bound: only a comparison bit for bit sees it."""
    y, clean, report = hit_linear(abft.Policy(level="off", redundancy=redundancy), what="bitflip", bit=0)
    assert torch.equal(y, clean) and report.recomputed == 1
    y, clean, report = hit_linear(abft.Policy(level="off"), what="bitflip", bit=0)
    assert not torch.equal(y, clean)


@pytest.mark.parametrize("panel", ["lean", "full"])
@pytest.mark.parametrize("group", [None, 16, 64])
def test_every_panel_and_group_is_silent_and_loud(panel, group):
    policy = abft.Policy(panel=panel, group=group)
    x, w = torch.randn(40, 96), torch.randn(80, 96)
    abft.linear(x, w, policy=policy)
    assert abft.report().detected == 0
    with faults(Fault("nullify", index=(7, 70))):
        abft.linear(x, w, policy=policy)
    (event,) = abft.report().events
    assert event.row == 7 and abft.report().recomputed == 1


def test_an_unmeetable_floor_raises_and_says_what_is_reached():
    x, w = torch.randn(4, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    with pytest.raises(ValueError, match=r"max_floor=1e-06 cannot be met.*bfloat16"):
        abft.linear(x, w, policy=abft.Policy(max_floor=1e-6))
    abft.linear(x, w, policy=abft.Policy(max_floor=1.0))
    assert abft.report().checks == 4


def test_an_explicit_backend_never_falls_back():
    x, w = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(abft.DeviceError, match="triton"):
        abft.linear(x, w, policy=abft.Policy(backend="triton"))


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_the_backend_is_named_in_the_event(backend):
    *_, report = hit_linear(abft.Policy(backend=backend))
    assert [e.backend for e in report.events] == [backend] and report.recomputed == 1


# --- which policy is in force --------------------------------------------------------------------------


def recorded_level(function) -> str:
    """Which level a product ran at, told by what became of a fault in it."""
    abft.report(reset=True)
    with faults(Fault("nan", index=(0, 0))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function()
    report = abft.report()
    return "detect" if report.observed else "correct" if report.corrected else "off"


def test_the_modules_own_policy_then_the_innermost_scope_then_the_default():
    x = torch.randn(2, 8)
    free, fixed = abft.protect(nn.Linear(8, 8)), abft.protect(nn.Linear(8, 8), abft.Policy(level="off"))
    assert recorded_level(lambda: free(x)) == "correct"
    with abft.protected(abft.Policy(level="detect")):
        assert recorded_level(lambda: free(x)) == "detect"
        assert recorded_level(lambda: fixed(x)) == "off"
        with abft.protected(abft.Policy(level="off")):
            assert recorded_level(lambda: free(x)) == "off"
            with abft.protected():
                assert recorded_level(lambda: free(x)) == "off"  # None: what is in force outside
        assert recorded_level(lambda: free(x)) == "detect"
        assert recorded_level(lambda: abft.linear(x, free.weight, policy=abft.Policy())) == "correct"
        assert recorded_level(lambda: abft.linear(x, free.weight)) == "detect"
    assert recorded_level(lambda: free(x)) == "correct"


# --- what happens to a fault that stays -------------------------------------------------------------

DETECT = abft.Policy(level="detect")


def module_and_call(where: str, policy: abft.Policy):
    """The same reaction reached on every way: an argument, a module's own policy, or the scope around a module without one."""
    x, layer = torch.randn(3, 8), nn.Linear(8, 8)
    if where == "argument":
        return lambda: abft.linear(x, layer.weight, layer.bias, policy=policy)
    if where == "module":
        return lambda: abft.protect(layer, policy)(x)
    if where == "scope":
        abft.protect(layer)

    def in_scope():
        with abft.protected(policy):
            return layer(x)

    return in_scope


WAYS = ["argument", "module", "scope", "scope, plain module"]


@pytest.mark.parametrize("way", WAYS)
def test_record_is_quiet(way):
    call = module_and_call(way, DETECT.replace(on_uncorrected="record"))
    with warnings.catch_warnings(), faults(Fault("nan", index=(1, 1))):
        warnings.simplefilter("error")
        call()
    assert abft.report().observed == 1


@pytest.mark.parametrize("way", WAYS)
def test_warn_warns(way):
    call = module_and_call(way, DETECT)
    with pytest.warns(RuntimeWarning, match="OBSERVED at .* worst row 1"), faults(Fault("nan", index=(1, 1))):
        call()


@pytest.mark.parametrize("way", WAYS)
def test_raise_raises_inside_the_call(way):
    call = module_and_call(way, DETECT.replace(on_uncorrected="raise"))
    with pytest.raises(abft.FaultDetected, match="worst row 1"), faults(Fault("nan", index=(1, 1))):
        call()
    assert abft.report().observed == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_callable_receives_the_event(way):
    seen = []
    call = module_and_call(way, DETECT.replace(on_uncorrected=seen.append))
    with faults(Fault("nan", index=(1, 1))), warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    assert [(e.row, e.verdict) for e in seen] == [(1, abft.Verdict.OBSERVED)]
    assert seen == list(abft.report().events)


@pytest.mark.parametrize("way", WAYS)
def test_a_callable_receives_faults_of_the_backward_too(way):
    seen = []
    policy = DETECT.replace(on_uncorrected=seen.append)
    call = module_and_call(way, policy)
    y = call()
    with faults(Fault("nan", role="wgrad", index=(1, 1))), warnings.catch_warnings():
        warnings.simplefilter("error")
        y.sum().backward()
    assert [e.role for e in seen] == ["wgrad"]


def test_what_a_callable_raises_reaches_the_caller():
    class Stop(Exception):
        pass

    def stop(event):
        raise Stop(event.message)

    with pytest.raises(Stop, match="row 1"), faults(Fault("nan", index=(1, 1))):
        abft.linear(torch.randn(3, 8), torch.randn(4, 8), policy=DETECT.replace(on_uncorrected=stop))


@pytest.mark.parametrize("role", ["dgrad", "wgrad"])
def test_raise_raises_inside_the_backward(role):
    x = torch.randn(3, 8, requires_grad=True)
    y = abft.linear(x, torch.randn(8, 8, requires_grad=True), policy=DETECT.replace(on_uncorrected="raise"))
    with pytest.raises(abft.FaultDetected, match=f"\\({role}\\)"), faults(Fault("nan", role=role, index=(1, 1))):
        y.sum().backward()


def test_a_repaired_fault_needs_no_reaction():
    seen = []
    with faults(Fault("nan", index=(1, 1))), warnings.catch_warnings():
        warnings.simplefilter("error")
        abft.linear(torch.randn(3, 8), torch.randn(4, 8), policy=abft.Policy(on_uncorrected="raise"))
        abft.linear(torch.randn(3, 8), torch.randn(4, 8), policy=abft.Policy(on_uncorrected=seen.append))
    assert seen == [] and abft.report().recomputed == 1


def test_uncorrected_is_raised_as_uncorrected():
    """A weight whose old bits nobody knows any more: several elements of one column changed under weights="frozen"."""
    layer = abft.protect(nn.Linear(32, 24), abft.Policy(weights="frozen", on_uncorrected="raise"))
    x = torch.randn(5, 32)
    layer(x)
    with pytest.raises(abft.UncorrectedFault, match="UNCORRECTED"), faults(Fault("bitflip", where="weight", pattern="tile", bit=29, index=(0, 0))):
        layer(x)
    assert abft.report().uncorrected == 5


def test_the_errors_are_a_family_of_runtime_errors():
    assert issubclass(abft.UncorrectedFault, abft.FaultDetected)
    assert issubclass(abft.FaultDetected, abft.AbftError)
    assert issubclass(abft.AbftError, RuntimeError)


def test_the_message_names_everything(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    layer = abft.protect(nn.Linear(32, 24), DETECT.replace(on_uncorrected="raise"), name="encoder.head")
    with pytest.raises(abft.FaultDetected) as caught, faults(Fault("bitflip", bit=29, index=(4, 17))):
        layer(torch.randn(5, 32))
    text = str(caught.value)
    for part in ("encoder.head", "fprop", "row 4", "column 17", "residual", "bound", "rank 3", "device cpu", "step"):
        assert part in text, text
