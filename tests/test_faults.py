"""Every fault that matters is found at the right place and repaired; everything else is what it is called; nothing is counted twice."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import oracles
import pytest
import torch
from oracles import name_of
from torch import nn
from torch.nn import functional as F

import abft
from abft import checksum
from abft.backends import reference
from abft.faults import Addition
from abft.inject import Fault, Injected, Mixture, faults

WHATS = ("nullify", "bitflip", "carry", "nan", "inf", "-inf", "near_inf", "nonfinite", "scale", "stuck_at")
PATTERNS = ("element", "row", "warp", "warp2", "warp4", "warp8", "warp16", "fragment", "tile")
ROLES = ("fprop", "dgrad", "wgrad")
#: Relative L2 change of a row from which on a fault must be found (docs/explanation/thresholds.md).
HARM = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ROWS, DEPTH, COLUMNS = 40, 96, 160


class Step:
    """One layer and one batch: what fprop, dgrad and wgrad give, clean or struck."""

    def __init__(self, dtype: torch.dtype, policy: abft.Policy) -> None:
        torch.manual_seed(7)
        self.layer = abft.protect(nn.Linear(DEPTH, COLUMNS).to(dtype), policy, name="layer")
        self.x = torch.randn(ROWS, DEPTH).to(dtype).requires_grad_()
        self.g = torch.randn(ROWS, COLUMNS).to(dtype)
        self.clean = self.run()

    def run(self) -> dict[str, torch.Tensor]:
        y = self.layer(self.x)
        dx, dw = torch.autograd.grad(y, (self.x, self.layer.weight), self.g)
        return {"fprop": y.detach(), "dgrad": dx, "wgrad": dw}

    def struck(self, fault: Fault, seed: int = 0) -> tuple[dict[str, torch.Tensor], abft.Report, Injected]:
        abft.report(reset=True)
        with faults(fault, seed=seed) as log, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.run()
        (injected,) = log
        return out, abft.report(), injected


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=name_of)
def steps(request):
    """A step that repairs and one that only reports, of one dtype."""
    quiet = abft.Policy(level="detect", on_uncorrected="record")
    return Step(request.param, abft.Policy(on_uncorrected="record")), Step(request.param, quiet)


def balanced(report: abft.Report) -> bool:
    return report.detected == report.observed + report.corrected + report.uncorrected


# --- a unit that is a little off ----------------------------------------------------------------------


@pytest.mark.parametrize("amount", [3.0, -3.0])
def test_an_offset_shifts_one_column_of_every_row(steps, amount):
    repairing, observing = steps
    fault = Fault("offset", pattern="column", index=(0, 7), amount=amount)
    seen, report, injected = observing.struck(fault)
    expected = observing.clean["fprop"].clone()
    expected[:, 7] += amount
    assert oracles.bits_equal(seen["fprop"], expected)
    assert (report.observed, injected.what, injected.pattern) == (ROWS, "offset", "column")
    assert all(row == number and column == 7 for number, (row, column, *_) in enumerate(injected.elements))
    mended, report, _ = repairing.struck(fault)
    assert report.corrected == ROWS and oracles.bits_equal(mended["fprop"], repairing.clean["fprop"])


def test_the_kernels_refuse_an_offset_by_name():
    for word in ("keep", "flip", "add"):
        with pytest.raises(NotImplementedError, match="'offset' strikes on a CPU only"):
            getattr(Addition(1.0), word)


@pytest.mark.parametrize(("what", "amount"), [("offset", 0.0), ("offset", float("inf")), ("offset", float("nan")), ("nullify", 1.0)])
def test_only_an_offset_has_an_amount(what, amount):
    with pytest.raises(abft.PolicyError, match="Fault.amount is what 'offset' adds"):
        Fault(what, amount=amount)


# --- faults of a product -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["accumulator", "operand", "output"])
@pytest.mark.parametrize("what", WHATS)
def test_harmful_faults_are_found_where_they_are_and_repaired_to_the_bit(steps, what, where):
    repairing, observing = steps
    harm = HARM[repairing.x.dtype]
    harmful = 0
    for seed, (pattern, role) in enumerate(itertools.product(PATTERNS, ROLES)):
        fault = Fault(what, where, role=role, pattern=pattern)
        case = f"{what}-{where}-{pattern}-{role}"
        seen, report, injected = observing.struck(fault, seed)
        change = oracles.relative_change(observing.clean[role], seen[role])
        change = np.where(np.isnan(change), np.inf, change)
        changed, must = np.flatnonzero(change != 0), np.flatnonzero(change >= harm)
        assert balanced(report) and len(must) <= report.observed <= len(changed), f"{case}: {len(must)} harmful rows, {report.observed} found"
        assert injected.effect == pytest.approx(np.max(change, initial=0), rel=1e-6), case
        assert (injected.site, injected.role, injected.what, injected.where, injected.pattern) == ("layer", role, what, where, pattern)
        for event in report.events:
            assert (event.site, event.role) == ("layer", role) and event.row in changed, case
            if pattern == "element" and where != "operand":  # several errors at once may look like one elsewhere
                assert event.col in {injected.elements[0][1], None if harm > 1e-3 else -1}, f"{case}: located in the wrong column"
            assert not abs(event.residual) <= event.bound < float("inf"), case
        mended, report, _ = repairing.struck(fault, seed)
        assert balanced(report) and report.uncorrected == 0, case
        assert len(must) <= report.recomputed <= len(changed), case
        if report.recomputed == len(changed):
            assert oracles.bits_equal(mended[role], repairing.clean[role]), case
        assert (oracles.relative_change(repairing.clean[role], mended[role]) < harm).all(), case
        for other in set(ROLES) - {role, *(("dgrad", "wgrad") if role == "fprop" else ())}:
            assert oracles.bits_equal(mended[other], repairing.clean[other]), case
        harmful += len(must)
    assert harmful or what in ("carry", "stuck_at", "bitflip"), "the sample must contain faults that matter"


@pytest.mark.parametrize("what", ["nullify", "nan", "inf", "near_inf", "scale", "bitflip"])
@pytest.mark.parametrize("role", ["fprop", "dgrad", "wgrad"])
def test_a_check_that_goes_wrong_itself_is_repeated_and_told(steps, what, role):
    """The result is right; a unit that adds up wrongly is worth knowing of all the same."""
    repairing, reporting = steps
    fault = Fault(what, "checksum", role=role, pattern="row", bit=30 if what == "bitflip" else None)
    out, report, injected = repairing.struck(fault)
    assert all(torch.equal(out[name], repairing.clean[name]) for name in out)
    assert injected.elements == () and injected.effect == 0.0
    if what != "scale":  # of all sums and sketches alike, by as little as two: a clean row may bear it
        assert (report.recomputed, report.detected, report.uncorrected, report.false_alarms) == (1, 1, 0, 0)
        assert report.events[-1].cause == "transient"
    out, seen, _ = reporting.struck(fault)
    assert all(torch.equal(out[name], reporting.clean[name]) for name in out)
    assert seen.observed == seen.detected == report.detected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
def test_a_single_wrong_element_is_located(dtype):
    step = Step(dtype, abft.Policy(level="detect", on_uncorrected="record"))
    for row, column in [(0, 0), (17, 33), (39, 159), (8, 127), (21, 128)]:
        _, report, injected = step.struck(Fault("bitflip", bit={2: 14, 4: 30, 8: 62}[step.x.element_size()], index=(row, column)))
        (event,) = report.events
        assert (event.rows, event.row) == (1, row) and event.col in (column, None)
        assert [(r, c) for r, c, *_ in injected.elements] == [(row, column)]
    _, report, _ = step.struck(Fault("scale", index=(17, 33)), seed=1)
    assert report.events[0].col == 33 or report.detected == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 4), (3, 17, 577), (130, 40, 8), (1, 96, 257)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_faults_in_ragged_shapes(shape, dtype):
    rows, depth, columns = shape
    x, w = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    clean = F.linear(x, w)
    for what, seed in itertools.product(("nan", "inf", "nullify"), range(4)):
        abft.report(reset=True)
        with faults(Fault(what), seed=seed) as log:
            y = abft.linear(x, w)
        must = log[0].effect >= HARM[dtype]
        assert abft.report().recomputed == 1 or not must
        assert oracles.bits_equal(y, clean) or not must


@pytest.mark.parametrize("function", ["matmul", "bmm", "addmm"])
def test_faults_in_batches_and_other_functions(function):
    a, b, c = torch.randn(3, 20, 32), torch.randn(3, 32, 48), torch.randn(48)
    operands = {"matmul": (a, b), "bmm": (a, b), "addmm": (c, a[0], b[0])}[function]
    clean = getattr(torch, function)(*operands)
    for seed in range(9):
        abft.report(reset=True)
        with faults(Fault("nullify", pattern="row"), seed=seed) as log:
            y = getattr(abft, function)(*operands)
        (event,) = abft.report().events
        assert oracles.bits_equal(y, clean) and abft.report().recomputed == 1
        assert (event.site, event.row) == (function, log[0].elements[0][0])


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12], ids=lambda s: f"{s:g}")
def test_floors_do_not_depend_on_scale(scale):
    x, w = torch.randn(40, 96) * scale, torch.randn(160, 96)
    clean = F.linear(x, w)
    for seed in range(20):
        abft.report(reset=True)
        with faults(Fault("bitflip"), seed=seed) as log:
            y = abft.linear(x, w, policy=abft.Policy(on_uncorrected="raise"))
        if log[0].effect >= 1e-3:
            assert abft.report().recomputed == 1 and oracles.bits_equal(y, clean)


@pytest.mark.parametrize("magnitude", [1e-19, 1e-17, 1e17, 1e18], ids=lambda s: f"{s:g}")
def test_the_ends_of_the_range_are_silent_and_extreme_faults_loud(magnitude):
    """Squares over- and underflow there; see docs/explanation/limits.md for what is not seen."""
    x, w = torch.randn(40, 96) * magnitude, torch.randn(160, 96)
    clean = abft.linear(x, w)
    assert abft.report().detected == 0
    with faults(Fault("nan", index=(3, 5))):
        assert oracles.bits_equal(abft.linear(x, w), clean)
    with faults(Fault("near_inf", index=(4, 5))):
        assert oracles.bits_equal(abft.linear(x, w), clean)
    assert abft.report().recomputed == 2


@pytest.mark.parametrize("bit", [29, 30])
def test_squares_that_overflow_fail_closed(bit):
    """A wrong 1e20 makes Σ y² infinite and with it the bound: the row must be suspect all the same."""
    x, w = torch.randn(40, 96), torch.randn(160, 96)
    clean = F.linear(x, w)
    for seed in range(10):
        abft.report(reset=True)
        with faults(Fault("bitflip", bit=bit), seed=seed) as log:
            y = abft.linear(x, w)
        assert oracles.bits_equal(y, clean) or log[0].effect < 1e-3
        assert abft.report().recomputed == (log[0].effect >= 1e-3)


@pytest.mark.parametrize("weight", ["parameter", "tensor"])
@pytest.mark.parametrize("kind", checksum.FULL.kinds)
def test_every_sum_is_judged(monkeypatch, kind, weight):
    """Errors in four columns that cancel in all sums of a row but one."""
    weights = np.stack([checksum.column_weights(name, COLUMNS) for name in checksum.FULL.kinds])
    columns, errors = oracles.seen_by_one_sum(weights, checksum.FULL.kinds.index(kind))
    x, w = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    w = nn.Parameter(w, requires_grad=False) if weight == "parameter" else w
    genuine, struck = reference.multiply, []

    def multiply(a, b, bias):
        y = genuine(a, b, bias)
        if not struck:
            struck.append(1)
            y[7, columns] += 10 * torch.from_numpy(errors).float()
        return y

    monkeypatch.setattr(reference, "multiply", multiply)
    assert oracles.bits_equal(abft.linear(x, w), F.linear(x, w))
    report = abft.report()
    assert struck and report.recomputed == report.detected == 1 and report.events[0].row == 7


def test_all_rows_wrong_at_once():
    x, w = torch.randn(300, 96), torch.randn(160, 96)
    clean = F.linear(x, w)
    with faults(*(Fault("nullify", pattern="tile", index=(r, 0)) for r in (0, 128, 256))):
        y = abft.linear(x, w)
    report = abft.report()
    assert oracles.bits_equal(y, clean) and report.recomputed == 300 and report.events[0].rows == 300


# --- persistence -----------------------------------------------------------------------------------------


def test_several_faults_in_one_product_are_one_event():
    x, w = torch.randn(40, 96), torch.randn(160, 96)
    with faults(Fault("nan", index=(3, 3)), Fault("inf", index=(9, 9)), Fault("nullify", pattern="row", index=(20, 0))) as log:
        abft.linear(x, w)
    report = abft.report()
    assert len(log) == 3 and report.recomputed == 3 and [e.rows for e in report.events] == [3]


def test_a_fault_fires_once_at_its_call():
    layer = abft.protect(nn.Linear(8, 8))
    with faults(Fault("nan", call=2)) as log:
        for _ in range(5):
            layer(torch.randn(3, 8))
    assert [i.call for i in log] == [2] and abft.report().recomputed == 1


def test_probability_one_strikes_every_matching_product():
    model = abft.protect(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), name="m")
    with faults(Fault("nan", site="m.1", probability=1.0)) as log:
        for _ in range(4):
            model(torch.randn(3, 8))
    assert [(i.site, i.call) for i in log] == [("m.1", n) for n in range(4)] and abft.report().recomputed == 4


def test_probability_zero_strikes_nothing_and_is_no_error():
    with faults(Fault("nan", probability=0.0)) as log:
        abft.linear(torch.randn(3, 8), torch.randn(8, 8))
    assert log == []


@pytest.mark.parametrize("fault", [
    Fault("nan", site="nosuch"), Fault("nan", role="dgrad"), Fault("nan", call=1), Fault("nan", "weight"), Fault("nan", "panel"),
], ids=["site", "role", "call", "no weight", "no panel"])  # fmt: skip
def test_a_fault_that_never_fires_is_an_error(fault):
    with pytest.raises(abft.NotInjected, match="never fired"), faults(fault):
        abft.linear(torch.randn(3, 8), torch.randn(8, 8))


def test_an_error_inside_the_scope_is_not_hidden_by_it():
    with pytest.raises(KeyError), faults(Fault("nan")):
        raise KeyError
    abft.linear(torch.randn(3, 8), torch.randn(8, 8))
    assert abft.report().detected == 0, "the injector is gone"


def test_scopes_do_not_nest():
    with pytest.raises(RuntimeError, match="nested"), faults(Fault("nan", probability=0.0)), faults(Fault("nan")):
        pass


@pytest.mark.parametrize("wrong", [
    {"what": "explode"}, {"what": "nan", "where": "moon"}, {"what": "nan", "role": "sideways"}, {"what": "nan", "pattern": "spiral"}, {"what": "bitflip", "bits": 0},
    {"what": "bitflip", "bit": -1}, {"what": "nan", "call": -1}, {"what": "nan", "probability": 1.5},
], ids=str)  # fmt: skip
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValueError, match="Fault"):
        Fault(**wrong)


@pytest.mark.parametrize("fault", [Fault("nan", index=(3, 0)), Fault("nan", index=(0, 8)), Fault("bitflip", bit=32)], ids=["row", "column", "bit"])
def test_places_that_do_not_exist_are_refused(fault):
    with pytest.raises(ValueError, match="Fault"), faults(fault):
        abft.linear(torch.randn(3, 8), torch.randn(8, 8))


@pytest.mark.parametrize("arguments", [(), ("nan",), (None,)], ids=["nothing", "text", "none"])
def test_faults_needs_faults(arguments):
    with pytest.raises(TypeError):
        faults(*arguments)


# --- the log -------------------------------------------------------------------------------------------


def test_the_log_says_what_happened():
    x, w = torch.randn(40, 96), torch.randn(160, 96)
    clean = F.linear(x, w)
    with faults(Fault("bitflip", bit=24, index=(11, 13))) as log:
        abft.linear(x, w)
    (entry,) = log
    before = clean[11, 13]
    after = (before.view(torch.int32) ^ (1 << 24)).view(torch.float32)
    assert (entry.site, entry.role, entry.call, entry.what, entry.where, entry.pattern) == ("linear", "fprop", 0, "bitflip", "accumulator", "element")
    assert entry.elements == ((11, 13, before.item(), after.item()),)
    assert entry.effect == pytest.approx(((after - before).abs() / clean[11].norm()).item(), rel=1e-5)


@pytest.mark.parametrize("pattern, count", [("element", 1), ("row", 160), ("warp2", 64), ("warp8", 16), ("fragment", 16 * 8), ("tile", 40 * 128)])
def test_patterns_have_their_shapes(pattern, count):
    x, w = torch.randn(40, 96), torch.randn(160, 96)
    clean = F.linear(x, w)
    with faults(Fault("nullify", pattern=pattern, index=(0, 0))) as log:
        y = abft.linear(x, w, policy=abft.Policy(level="off"))
    changed = (y != clean).nonzero()
    assert len(changed) == count and len(log[0].elements) == min(count, 64)
    if pattern.startswith("warp"):
        assert set(changed[:, 0].tolist()) == {0} and set((changed[:, 1] % int(pattern[4:])).tolist()) == {0}
    if pattern == "fragment":
        assert changed[:, 0].max() == 15 and changed[:, 1].max() == 7


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_flips_turn_as_many_bits_as_asked(bits):
    x, w = torch.randn(40, 96), torch.randn(160, 96)
    clean = F.linear(x, w)
    for seed in range(5):
        with faults(Fault("bitflip", bits=bits), seed=seed):
            y = abft.linear(x, w, policy=abft.Policy(level="off"))
        turned = (y.view(torch.int32) ^ clean.view(torch.int32)).flatten()
        assert sum(bin(int(v) & 0xFFFFFFFF).count("1") for v in turned[turned != 0]) == bits


def test_low_bits_are_favoured_where_asked():
    def mean_bit(weighting):
        drawn = []
        x, w = torch.ones(1, 1), torch.ones(1, 1)
        for seed in range(150):
            with faults(Fault("bitflip", weighting=weighting), seed=seed):
                y = abft.linear(x, w, policy=abft.Policy(level="off"))
            drawn.append(int(y.view(torch.int32).item() & 0xFFFFFFFF ^ 0x3F800000).bit_length() - 1)
        return np.mean(drawn)

    # Uniform over 32 bits: 15.5 ± 9.2/√150; weights 32 … 1: 10.3 ± 7.6/√150. Four standard errors apart on both sides.
    assert abs(mean_bit("uniform") - 15.5) < 4 * 9.24 / 150**0.5
    assert abs(mean_bit("lsb") - 31 / 3) < 4 * 7.61 / 150**0.5


def test_equal_seeds_give_equal_faults():
    x, w = torch.randn(40, 96), torch.randn(160, 96)

    def draw(seed):
        with faults(Mixture.gpu_2026(), seed=seed) as log:
            abft.linear(x, w, policy=abft.Policy(level="off"))
        return log

    assert draw(5) == draw(5) and draw(5) != draw(6)


def test_injection_leaves_nothing_behind():
    layer = abft.protect(nn.Linear(16, 16))
    x = torch.randn(5, 16)
    clean = layer(x)
    with faults(Fault("nan")):
        layer(x)
    abft.report(reset=True)
    assert oracles.bits_equal(layer(x), clean) and abft.report().executions == 1


# --- rates and mixtures ----------------------------------------------------------------------------------


def test_the_mixture_has_a_name_and_known_shares():
    mixture = Mixture.gpu_2026()
    assert mixture.name == "gpu_2026" and sum(share for share, _ in mixture.parts) == pytest.approx(1)
    share = {}
    for p, fault in mixture.parts:
        share[fault.what] = share.get(fault.what, 0) + p
    assert share == pytest.approx({"nullify": 0.50, "bitflip": 0.48, "nonfinite": 0.01, "carry": 0.01})
    assert sum(p for p, f in mixture.parts if f.what == "bitflip" and f.bits > 1) > 0.24, "most flips turn more than one bit"


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 1.0])
def test_a_rate_is_per_outermost_forward(rate):
    model = abft.protect(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))), abft.Policy(level="off"))
    with faults(Fault("nullify"), rate=rate, seed=2) as log:
        for _ in range(300):
            model(torch.randn(3, 8))
    # Binomial(300, rate), five standard deviations.
    assert abs(len(log) - 300 * rate) <= 5 * (300 * rate * (1 - rate)) ** 0.5
    if 0 < rate < 1:
        assert len({i.site for i in log}) == 4, "every layer is hit some time"


def test_a_rate_depends_on_seed_and_number_only():
    def struck(model, rows):
        hit = []
        with faults(Fault("nan"), rate=0.3, seed=9) as log:
            for n in range(40):
                before = len(log)
                model(torch.randn(rows, 8))
                hit += [n] * (len(log) - before)
        return hit

    one = struck(abft.protect(nn.Linear(8, 8)), 3)
    assert one == struck(abft.protect(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))), 5) and 5 < len(one) < 20


def test_a_mixture_at_a_rate_is_survived():
    model = abft.protect(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)))
    x = torch.randn(8, 32)
    with torch.no_grad():
        clean = model(x)
        with faults(Mixture.gpu_2026(), rate=1.0, seed=4) as log:
            for _ in range(60):
                y = model(x)
                assert (oracles.relative_change(clean, y) < 1e-3).all(), log[-1]
    report = abft.report()
    assert len(log) == 60 and report.uncorrected == 0 and report.recomputed > 20


# --- faults in a weight ----------------------------------------------------------------------------------

#: What a fingerprint can name: one changed element per column of the weight as the product sees it (transposed in dgrad).
NAMEABLE = [("fprop", "element"), ("fprop", "row"), ("fprop", "warp2"), ("fprop", "warp16"), ("dgrad", "element")]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=name_of)
def frozen(request):
    return Step(request.param, abft.Policy(weights="frozen", on_uncorrected="record"))


@pytest.mark.parametrize("role, pattern", NAMEABLE)
@pytest.mark.parametrize("what", WHATS)
def test_a_changed_weight_is_named_and_the_right_product_delivered(frozen, what, role, pattern):
    harm = HARM[frozen.x.dtype]
    for seed in range(3):
        abft.refresh(frozen.layer)
        y = frozen.layer(frozen.x)
        torch.autograd.grad(y, frozen.x, frozen.g, retain_graph=True)
        before = frozen.layer.weight.detach().clone()
        abft.report(reset=True)
        with faults(Fault(what, "weight", role=role, pattern=pattern), seed=seed) as log:
            out = frozen.layer(frozen.x) if role == "fprop" else torch.autograd.grad(y, frozen.x, frozen.g)[0]
        report = abft.report()
        assert oracles.bits_equal(frozen.layer.weight, before), "undone at exit"
        assert balanced(report) and report.uncorrected == report.stale == 0
        if log[0].effect >= harm:
            assert report.reconstructed > 0 and report.weight_faults >= 1
            assert report.events[0].cause == "weight" and oracles.bits_equal(out, frozen.clean[role])
        assert (oracles.relative_change(frozen.clean[role], out) < harm).all()
    frozen.run()
    abft.report(reset=True)
    frozen.run()
    assert abft.report().detected == 0, "the weight is as it was, and so is its panel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("row, column", [(0, 0), (33, 17), (159, 95)])
def test_the_changed_element_of_a_weight_is_named(dtype, row, column):
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS).to(dtype), abft.Policy(weights="frozen"))
    x = torch.randn(ROWS, DEPTH).to(dtype)
    clean = layer(x)
    high = 14 if dtype != torch.float32 else 30
    with faults(Fault("bitflip", "weight", bit=high, index=(row, column))):
        y = layer(x)
    (event,) = abft.report().events
    assert oracles.bits_equal(y, clean)
    # The weight's row is the output's column.
    assert (event.cause, event.verdict, event.col) == ("weight", abft.Verdict.RECONSTRUCTED, row)
    assert f"weight element {row}, {column}" in event.message
    assert abft.report().weight_faults == 1 and event.rows == abft.report().reconstructed == ROWS


def test_the_changed_element_is_named_under_autocast_too():
    """The product sees the weight cast to bf16; the fault lies in the fp32 one."""
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen"))
    x = torch.randn(ROWS, DEPTH)
    with torch.autocast("cpu", torch.bfloat16):
        clean = layer(x)
        with faults(Fault("bitflip", "weight", bit=30, index=(33, 17))):
            y = layer(x)
        assert oracles.bits_equal(y, clean)
        (event,) = abft.report().events
        assert (event.cause, event.col, event.dtype) == ("weight", 33, "bfloat16") and "weight element 33, 17" in event.message
        assert oracles.bits_equal(layer(x), clean)
    assert abft.report().weight_faults == 1


def test_a_weight_fault_is_counted_once_however_often_it_is_seen():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen"))
    x = torch.randn(ROWS, DEPTH)
    clean = layer(x)
    with faults(Fault("bitflip", "weight", bit=29)):
        for _ in range(4):
            assert oracles.bits_equal(layer(x), clean)
    report = abft.report()
    assert report.weight_faults == 1 and report.reconstructed == 4 * ROWS


@pytest.mark.parametrize("pattern", ["fragment", "tile"])
def test_a_weight_that_nobody_can_restore_is_said_to_be_uncorrected(pattern):
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen", on_uncorrected="record"))
    x = torch.randn(ROWS, DEPTH)
    layer(x)
    with faults(Fault("bitflip", "weight", bit=29, pattern=pattern)):
        layer(x)
    report = abft.report()
    assert report.uncorrected == ROWS and report.weight_faults >= 1 and {e.cause for e in report.events} == {"weight"}


def test_under_detect_a_weight_fault_is_observed():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen", level="detect", on_uncorrected="record"))
    layer(torch.randn(ROWS, DEPTH))
    with faults(Fault("bitflip", "weight", bit=29)):
        layer(torch.randn(ROWS, DEPTH))
    report = abft.report()
    assert report.observed == ROWS and report.events[0].cause == "weight" and report.weight_faults == 1


@pytest.mark.parametrize("policy", ["tracked", "frozen"])
def test_a_bit_of_a_tracked_weight_is_a_fault_too(policy):
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights=policy))
    x = torch.randn(ROWS, DEPTH)
    clean = layer(x)
    with faults(Fault("bitflip", "weight", bit=29)):
        assert oracles.bits_equal(layer(x), clean)
    assert abft.report().weight_faults == 1 and abft.report().reconstructed == ROWS


def test_a_dense_unannounced_change_of_a_tracked_weight_is_stale():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), name="edited")
    x = torch.randn(ROWS, DEPTH)
    layer(x)
    with pytest.warns(UserWarning, match="abft.refresh") as caught:
        for _ in range(3):
            layer.weight.data.numpy()[:] *= 1.5  # past the version counter
            assert oracles.bits_equal(layer(x), F.linear(x, layer.weight, layer.bias))
    report = abft.report()
    assert (report.stale, report.detected, report.false_alarms, report.weight_faults) == (3, 0, 0, 0)
    assert len(caught) == 1, "warned once per site"
    assert {e.verdict for e in report.events} == {abft.Verdict.STALE}


def test_the_present_weight_is_delivered_after_an_announced_change():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen"))
    x = torch.randn(ROWS, DEPTH)
    layer(x)
    layer.weight.data.numpy()[:] *= 1.5
    abft.refresh(layer)
    assert oracles.bits_equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert abft.report().detected == abft.report().stale == 0


def test_a_changed_bias_under_frozen_is_a_fault():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen", on_uncorrected="record"))
    x = torch.randn(ROWS, DEPTH)
    clean = layer(x)
    layer.bias.data.numpy()[7] += 100.0
    y = layer(x)
    report = abft.report()
    assert report.detected == ROWS and report.weight_faults == 1
    assert report.uncorrected or oracles.bits_equal(y, clean)


# --- faults in the panel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["fprop", "dgrad"])
@pytest.mark.parametrize("what", WHATS)
def test_a_broken_panel_is_mended_and_no_fault_of_the_data(steps, what, role):
    repairing, _ = steps
    for seed, pattern in enumerate(("element", "row", "tile")):
        out, report, injected = repairing.struck(Fault(what, "panel", role=role, pattern=pattern), seed)
        assert report.detected == 0 and injected.effect == 0
        assert all(oracles.bits_equal(out[r], repairing.clean[r]) for r in ROLES), "the data never was wrong"
        assert all(e.verdict is abft.Verdict.FALSE_ALARM and e.cause == "panel" for e in report.events)
        abft.report(reset=True)
        repairing.run()
        assert abft.report().false_alarms == abft.report().detected == 0
        if what in ("nan", "inf", "-inf") or (what == "nullify" and pattern == "tile"):
            assert report.false_alarms > 0


# --- what is no fault ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_poisoned_inputs_are_reported_as_such(dtype, value):
    x, w = torch.randn(ROWS, DEPTH).to(dtype), torch.randn(COLUMNS, DEPTH).to(dtype)
    x[3, 4] = x[9, 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = abft.linear(x, w, policy=abft.Policy(on_uncorrected="raise"))
    report = abft.report()
    assert oracles.bits_equal(y, F.linear(x, w))
    assert (report.input_rows, report.detected, report.overflow_rows, report.false_alarms) == (2, 0, 0, 0)
    (event,) = report.events
    assert (event.verdict, event.rows) == (abft.Verdict.INPUT, 2) and event.row in (3, 9)


def test_poisoned_weights_are_inputs_of_every_row():
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS))
    with torch.no_grad():
        layer.weight[5, 5] = float("nan")
    layer(torch.randn(ROWS, DEPTH))
    assert (abft.report().input_rows, abft.report().detected) == (ROWS, 0)


def test_a_fault_beside_a_poisoned_row_is_still_found():
    x, w = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    x[3, 4] = float("nan")
    with faults(Fault("nan", index=(7, 7))):
        y = abft.linear(x, w)
    report = abft.report()
    assert oracles.bits_equal(y, F.linear(x, w))
    assert (report.input_rows, report.recomputed) == (1, 1)


def test_overflow_to_inf_is_torchs_result():
    """X = 100, W = 30, K = 64: 192,000 is beyond fp16, and GradScaler lives on it."""
    x, w = torch.full((6, 64), 100.0).half(), torch.full((8, 64), 30.0).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = abft.linear(x, w, policy=abft.Policy(on_uncorrected="raise"))
    report = abft.report()
    assert torch.isinf(y).all()
    assert (report.overflow_rows, report.detected, report.input_rows, report.false_alarms) == (6, 0, 0, 0)
    assert [e.verdict for e in report.events] == [abft.Verdict.OVERFLOW]


@pytest.mark.parametrize("dtype, big", [(torch.float16, 3e4), (torch.bfloat16, 1e38), (torch.float32, 1e38)], ids=name_of)
def test_some_overflowing_rows_among_clean_ones(dtype, big):
    x, w = torch.randn(ROWS, DEPTH).to(dtype), torch.randn(COLUMNS, DEPTH).to(dtype)
    x[5] = (torch.randn(DEPTH).clamp(-2, 2) * big).to(dtype)
    y = abft.linear(x, w)
    report = abft.report()
    assert oracles.bits_equal(y, F.linear(x, w)) and not torch.isfinite(y[5]).all()
    assert (report.overflow_rows, report.detected, report.input_rows) == (1, 0, 0)


def test_a_fault_in_an_overflowing_row_does_not_hide():
    x, w = torch.randn(ROWS, DEPTH).half(), torch.randn(COLUMNS, DEPTH).half()
    x[5] = 3e4
    with faults(Fault("nan", index=(6, 3))):
        y = abft.linear(x, w)
    assert oracles.bits_equal(y, F.linear(x, w)) and (abft.report().overflow_rows, abft.report().recomputed) == (1, 1)


@pytest.mark.parametrize("level", ["correct", "detect"])
def test_none_of_these_is_detected_or_raised(level):
    x, w = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    x[0] = float("inf")
    abft.linear(x, w, policy=abft.Policy(level=level, on_uncorrected="raise"))
    abft.linear(torch.full((6, 64), 100.0).half(), torch.full((8, 64), 30.0).half(), policy=abft.Policy(level=level, on_uncorrected="raise"))
    report = abft.report()
    assert report.detected == 0 and (report.input_rows, report.overflow_rows) == (1, 6)


# --- redundancy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
@pytest.mark.parametrize("level", ["off", "detect", "correct"])
@pytest.mark.parametrize("what", ["bitflip", "nan", "nullify"])
def test_replicas_outvote_a_transient_fault(redundancy, level, what):
    x, w = torch.randn(ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    clean = F.linear(x, w)
    for seed in range(6):
        abft.report(reset=True)
        with faults(Fault(what), seed=seed):
            y = abft.linear(x, w, policy=abft.Policy(redundancy=redundancy, level=level, on_uncorrected="record"))
        report = abft.report()
        assert oracles.bits_equal(y, clean) and report.recomputed == report.detected == 1 and report.executions == 3


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
@pytest.mark.parametrize("role", ROLES)
def test_replicas_of_gradients_outvote_a_transient_fault(redundancy, role):
    step = Step(torch.float32, abft.Policy(level="off", redundancy=redundancy))
    out, report, _ = step.struck(Fault("bitflip", bit=0, role=role))
    assert all(oracles.bits_equal(out[r], step.clean[r]) for r in ROLES)
    assert (report.recomputed, report.checks) == (1, 2 * ROWS + COLUMNS)
    assert report.executions == {"dmr": 3 * 2 + 1, "tmr": 3 * 3}[redundancy]


@pytest.mark.parametrize("redundancy", ["dmr", "tmr"])
def test_replicas_cannot_outvote_a_wrong_weight_but_checksums_see_it(redundancy):
    layer = abft.protect(nn.Linear(DEPTH, COLUMNS), abft.Policy(weights="frozen", redundancy=redundancy))
    x = torch.randn(ROWS, DEPTH)
    clean = layer(x)
    with faults(Fault("bitflip", "weight", bit=29)):
        assert oracles.bits_equal(layer(x), clean)
    assert abft.report().weight_faults == 1


@pytest.mark.parametrize("role", ["fprop", "dgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-15, 1e-20, 1e-24])
def test_rows_whose_squares_underflow_are_checked(scale, dtype, role):
    torch.manual_seed(1)
    layer = abft.protect(nn.Linear(64, 96, bias=False).to(dtype), abft.Policy(on_uncorrected="record"))
    x = (torch.randn(16, 64) * scale).to(dtype).requires_grad_()
    g = (torch.randn(16, 96) * scale).to(dtype)

    def run():
        y = layer(x)
        return torch.autograd.grad(y, x, g)[0] if role == "dgrad" else y

    clean = [run() for _ in range(3)][-1]
    assert abft.report(reset=True).detected == 0
    with abft.inject.faults(abft.inject.Fault("nullify", pattern="row", role=role)) as log:
        repaired = run()
    assert log[0].effect == 1.0 and abft.report().detected == 1
    assert torch.equal(repaired, clean)
