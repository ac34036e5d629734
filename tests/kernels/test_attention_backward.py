"""The kernels of attention's gradient: right, silent on clean data, loud on every fault, repaired to the very bits, and counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import kernel_harness as harness
import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

import abft
from abft import ledger, threshold
from abft.attention import forward
from abft.attention.problem import Options, Problem
from abft.attention.tally import Tally
from abft.backends import triton_attention_backward as backend
from abft.backends.triton_attention_backward import Given, Hit
from abft.faults import BitOperation, Region, Strike
from abft.ops.attention_kernels import gradient_call
from abft.policy import Policy

DTYPES = (torch.float32, torch.float16)
CORRECT, DETECT = Policy(on_uncorrected="record"), Policy(level="detect", on_uncorrected="record")
SHAPE = {"B": 1, "H": 1, "G": 2, "L": 40, "S": 48, "E": 16, "D": 16}
KINDS = {
    "nullify": BitOperation(keep=0), "sign": BitOperation(flip=1 << 31), "bit 30": BitOperation(flip=1 << 30), "bit 22": BitOperation(flip=1 << 22),
    "carry": BitOperation(add=1 << 24), "nan": harness.NAN, "inf": harness.INF, "-inf": BitOperation(keep=0, flip=0xFF800000),
}  # fmt: skip
#: (place, by keys): S, P, dP and dS are computed in both kernels.
PLACES = [(place, by_keys) for place in ("S", "P", "dP", "dS") for by_keys in (False, True)] + [("dQ", False), ("dK", False), ("dV", False)]


@dataclass
class Run:
    gradients: tuple[Tensor, Tensor, Tensor]
    counters: dict[str, int]
    records: list[dict[str, int]]

    @property
    def detected(self) -> int:
        return sum(self.counters[name] for name in harness.FAULTS)

    @property
    def worst(self) -> float:
        return ledger.bits_float(self.counters["worst"])

    def equals(self, other: Run) -> bool:
        return all(oracles.bits_equal(a.cpu(), b.cpu()) for a, b in zip(self.gradients, other.gradients, strict=True))


class Case:
    """An attention with what its forward leaves to its backward."""

    def __init__(self, dtype=torch.float32, mask=None, scale=1.0, make=None, **kwargs):
        sizes = SHAPE | {name: kwargs.pop(name) for name in SHAPE if name in kwargs}
        b, h, g, length, s, e, d = sizes.values()
        generator = torch.Generator().manual_seed(1)
        make = make or (lambda *shape: torch.randn(shape, generator=generator))
        q, k, v, d_out = make(b, h, g, length, e) * scale, make(b, h, s, e), make(b, h, s, d), make(b, h, g, length, d)
        q, k, v, self.d_out = (t.to(dtype).to(harness.DEVICE) for t in (q, k, v, d_out))
        self.problem = Problem(q, k, v, mask, 5, Options(e**-0.5, **kwargs))
        self.given = self.forward()

    def forward(self) -> Given:
        attended = forward.attend(self.problem, Tally(Policy(level="off"), 0, "fprop", self.d_out.dtype, struck=False))
        return Given(self.d_out, attended.out, attended.statistics)

    def run(self, policy=CORRECT, hits=(), again=()) -> Run:
        words = harness.fresh_ledger()
        site = torch.tensor(harness.SITE, device=harness.DEVICE)
        found = backend.gradients(gradient_call(self.problem, policy), self.given, words, site, tuple(hits), tuple(again))
        return Run(found, harness.counters_of(words, harness.SITE), harness.records_of(words))


def exact(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients in fp64, and what an element of them may be wrong by: twice the error of an independent backward in the operands' type
    that rounds O, P and dS as flash attention does, by its largest in the tensor, and one rounding; and what exponents of base two add.

    Those are rounded twice more than natural ones (times log₂e, less a maximum that was converted), each time by half a unit in the last
    place, and an exponent that is off by δ makes its probability wrong by δ."""
    p, dtype = case.problem, case.d_out.dtype
    wide = _reference(p, case.d_out, torch.float64, None)
    low = _reference(p, case.d_out, torch.float32, dtype)
    x = (p.q.double() @ p.k.double().unsqueeze(2).mT) * p.options.scale
    if p.mask is not None and p.mask.dtype != torch.bool:
        x = x + p.mask.double()
    base_two = 2 * oracles.ROUNDOFF[torch.float32] * x[x.isfinite()].abs().max() if x.isfinite().any() else 0.0
    allowed = [
        2 * (a.double() - b).abs().amax() + oracles.ROUNDOFF[dtype] * b.abs() + base_two * b.abs().amax() for a, b in zip(low, wide, strict=True)
    ]
    return wide, allowed


def _reference(p: Problem, d_out: Tensor, wide: torch.dtype, narrow: torch.dtype | None) -> list[Tensor]:
    o = p.options
    q, k, v, d_out = p.q.to(wide), p.k.unsqueeze(2).to(wide), p.v.unsqueeze(2).to(wide), d_out.to(wide)
    rounded = (lambda t: t) if narrow is None else lambda t: t.to(narrow).to(wide)
    multiply = torch.matmul if narrow is None else _chained
    s = multiply(q, k.mT) * o.scale
    x = s if o.softcap is None else torch.tanh(s / o.softcap) * o.softcap
    i = torch.arange(q.shape[3]).unsqueeze(1) + o.offset
    t = torch.arange(k.shape[3])
    seen = torch.ones(q.shape[3], k.shape[3], dtype=torch.bool)
    if o.causal:
        seen &= t <= i
    if o.window is not None:
        seen &= t > i - o.window
    if p.mask is not None and p.mask.dtype == torch.bool:
        seen = seen & p.mask
    elif p.mask is not None:
        x = x + p.mask.to(wide)
    x = x.masked_fill(~seen, -torch.inf)
    m = x.amax(-1, keepdim=True)
    e = torch.exp(x - torch.where(m == -torch.inf, 0.0, m))
    total = e.sum(-1, keepdim=True)
    probabilities = e / torch.where(total == 0, 1.0, total)
    keep = torch.ones_like(probabilities)
    if o.dropout:
        from abft.attention.problem import Plane, Tile

        b, h, _, length, _ = p.q.shape
        keep = Tile(Plane(p, slice(0, b), slice(0, h), length), slice(0, length), slice(0, p.keys)).kept().to(wide) / (1 - o.dropout)
    used = rounded(probabilities * keep)
    out = rounded(multiply(used, v))
    dp = multiply(d_out, v.mT) * keep
    ds = probabilities * (dp - (d_out * out).sum(-1, keepdim=True))
    ds = rounded(ds if o.softcap is None else ds * (1 - torch.tanh(s / o.softcap) ** 2))
    return [rounded(multiply(ds, k) * o.scale), rounded((multiply(ds.mT, q) * o.scale).sum(2)), rounded(multiply(used.mT, d_out).sum(2))]


def _chained(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, one product after the other."""
    y = torch.zeros((*a.shape[:-1], b.shape[-1]), dtype=a.dtype)
    for k in range(a.shape[-1]):
        y = y + a[..., k : k + 1] * b[..., k : k + 1, :]
    return y


WAYS = {
    "plain": {}, "causal": {"causal": True}, "causal from the end": {"causal": True, "offset": 8}, "window": {"causal": True, "offset": 8, "window": 20},
    "only a window": {"window": 20}, "soft-cap": {"softcap": 2.0}, "dropout": {"dropout": 0.3}, "wide heads": {"E": 24, "D": 40},
    "boolean": {"mask": torch.rand(1, 1, 1, 40, 48, generator=torch.Generator().manual_seed(2)) < 0.6},
    "added": {"mask": torch.randn(1, 1, 2, 40, 48, generator=torch.Generator().manual_seed(2))},
    "rows that see nothing": {"causal": True, "offset": -7}, "one query": {"L": 1}, "one key": {"S": 1}, "two heads": {"B": 2, "H": 2, "G": 1, "L": 33},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_right_and_nothing_is_suspect(way, dtype):
    case = Case(dtype, **WAYS[way])
    run, unchecked = case.run(), case.run(Policy(level="off"))
    assert run.equals(unchecked), "checks change no bit"
    wide, allowed = exact(case)
    for got, right, budget, name in zip(run.gradients, wide, allowed, ("dQ", "dK", "dV"), strict=True):
        oracles.assert_within(got.cpu(), right, budget, name)
    rows, keys = case.problem.rows, case.problem.k.shape[:3].numel()
    assert run.counters["checks"] == 3 * rows + 2 * keys and run.counters["products"] == run.counters["executions"] == 5
    assert run.detected == run.counters["input_rows"] == 0 and run.records == []
    assert run.worst < 0.5
    assert unchecked.counters["checks"] == 0


SPREADS = {
    "offset": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)) + 2.0,
    "peaky": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)) * 4.0,
    "tiny": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)) * 2.0**-9,
    # fp16 rounds such an output to multiples of its smallest number.
    "below the normal numbers": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)) * 1e-6,
    "lognormal": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)).exp(),
    "equal": lambda *s: torch.ones(s),
    "zero": lambda *s: torch.zeros(s),
    "one loud row": lambda *s: torch.randn(s, generator=torch.Generator().manual_seed(3)) * torch.where(torch.arange(s[-2]) == 3, 30.0, 0.1).unsqueeze(-1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("spread", SPREADS)
def test_no_distribution_raises_an_alarm(spread, dtype):
    run = Case(dtype, make=SPREADS[spread], causal=True, offset=8).run()
    assert run.detected == run.counters["input_rows"] == 0
    assert run.worst < 0.7


@pytest.mark.parametrize("fall", [10, 16, 20, 23, 25])
def test_a_sink_of_no_value_hides_no_other_key_and_raises_no_alarm(fall):
    """fp16: beside it the probabilities of all other keys, which make the output alone, are 2**-fall and less, below the normal numbers."""
    g = torch.Generator().manual_seed(fall)
    q, k = torch.zeros(1, 1, 32, 16), torch.randn(1, 1, 200, 16, generator=g) * 0.3
    k[..., 0] = -fall * math.log(2) - torch.rand(200, generator=g)  # q · k / 4
    q[..., 0], k[:, :, 0] = 4.0, 0.0
    v = torch.randn(1, 1, 200, 16, generator=g)
    v[:, :, 0] = 0.0
    leaves = [t.to(harness.DEVICE, torch.float16).requires_grad_() for t in (q, k, v)]
    abft.report(reset=True)
    out = abft.scaled_dot_product_attention(*leaves, policy=Policy(backend="triton", on_uncorrected="record"))
    torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=g).to(out))
    report = abft.report()
    assert (report.detected, report.false_alarms, report.bypassed) == (0, 0, {}) and 0 < report.worst < 0.7


# --- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def struck() -> tuple[Case, Run]:
    return _struck()


@cache
def _struck() -> tuple[Case, Run]:
    case = Case(G=1, causal=True, offset=8)
    return case, case.run()


def harm(wrong: Run, right: Run) -> float:
    """The largest relative change of a row."""
    changes = [oracles.relative_change(b.cpu(), a.cpu()) for a, b in zip(wrong.gradients, right.gradients, strict=True)]
    return max(float(torch.from_numpy(c).nan_to_num(nan=float("inf")).max()) for c in changes)


def place_of(case: Case, place: str, seed: int) -> tuple[int, int]:
    """An element that takes part: a score that is seen, or a number of a gradient."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    rows, keys = case.problem.q.shape[3], case.problem.keys
    if place in ("dQ", "dK", "dV"):
        return drawn(rows if place == "dQ" else keys), drawn(16)
    row = drawn(rows)
    return row, drawn(min(keys, row + case.problem.options.offset + 1))


def hit(place: str, by_keys: bool, at: tuple[int, int], operation: BitOperation, rows: int = 1, cols: int = 1) -> Hit:
    return Hit(Strike(place, Region(at[0], at[0] + rows, at[1], at[1] + cols), operation), by_keys)


#: Every place with three kinds of fault, every kind in some places: an interpreted backward takes seconds.
STRUCK = [(*place, kind) for place in PLACES for kind in ("nullify", "bit 22", "nan")]
STRUCK += [(*place, kind) for i, place in enumerate(PLACES) for kind in [("sign", "bit 30", "carry", "inf", "-inf")[i % 5]]]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "by_keys", "kind"), STRUCK)
def test_a_fault_in_every_place_is_repaired_to_the_very_bits(struck, place, by_keys, kind):
    case, clean = struck
    at = place_of(case, place, seed=len(kind) + 10 * len(place))
    fault = hit(place, by_keys, at, KINDS[kind])
    told, run = case.run(DETECT, (fault,)), case.run(CORRECT, (fault,))
    effect = harm(told, clean)
    assert run.equals(clean), "whatever was wrong is right"
    assert run.counters["uncorrected"] == run.counters["input_rows"] == run.counters["observed"] == 0
    assert run.counters["recomputed"] >= 1 or effect < 1e-3, f"an effect of {effect:.2g} was not seen"
    assert told.counters["observed"] == run.counters["recomputed"] and told.counters["recomputed"] == 0
    if run.detected:
        verdicts = {ledger.VERDICTS[r["verdict"]].name for r in run.records}
        assert verdicts == {"RECOMPUTED"} and all(ledger.CAUSES[r["cause"]] == "transient" for r in run.records)


@pytest.mark.parametrize(("place", "by_keys"), PLACES)
def test_a_row_that_became_zero_is_seen(struck, place, by_keys):
    case, clean = struck
    by_row = place in ("dQ", "dK", "dV") or not by_keys
    rows, cols = (1, 48) if by_row else (40, 1)
    at = (17, 0) if by_row else (0, 5)
    run = case.run(CORRECT, (hit(place, by_keys, at, KINDS["nullify"], rows, cols),))
    assert run.equals(clean) and run.counters["recomputed"] >= 1 and run.counters["uncorrected"] == 0


@pytest.mark.parametrize(("place", "by_keys", "role", "rows"), [("S", False, "qk", 40), ("dQ", False, "qk", 40), ("dK", False, "qk", 48), ("dV", False, "pv", 48), ("dP", False, "pv", 40)])
def test_the_record_names_the_row(struck, place, by_keys, role, rows):
    case, _ = struck
    run = case.run(CORRECT, (hit(place, by_keys, (29, 3), KINDS["bit 30"]),))
    (record,) = [r for r in run.records if ledger.ROLE_NAMES[r["role"]] == role]
    assert (record["site"], record["row"], record["m"], record["rows"]) == (harness.SITE, 29, rows, 1)
    assert ledger.BACKEND_NAMES[record["backend"]] == "triton"
    residual, bound = ledger.bits_float(record["residual"]), ledger.bits_float(record["bound"])
    assert not abs(residual) <= bound or not math.isfinite(bound), "a bound whose squares overflowed explains nothing"


@pytest.fixture
def crowded() -> tuple[Case, Run]:
    return _crowded()


@cache
def _crowded() -> tuple[Case, Run]:
    case = Case(torch.float16, softcap=4.0, dropout=0.3, mask=WAYS["boolean"]["mask"])
    return case, case.run()


@pytest.mark.parametrize(("place", "by_keys"), PLACES)
def test_masks_dropout_a_soft_cap_and_groups_hide_no_place(crowded, place, by_keys):
    case, clean = crowded
    fault = hit(place, by_keys, (3, 5) if place in ("dK", "dV") else (70, 5), KINDS["bit 30"])
    run = case.run(CORRECT, (fault,))
    assert run.equals(clean) and run.counters["uncorrected"] == 0
    assert run.counters["recomputed"] or harm(case.run(DETECT, (fault,)), clean) < 1e-3


@pytest.mark.parametrize(("place", "by_keys"), [("S", False), ("dS", True), ("dQ", False), ("dV", False)])
def test_a_fault_that_returns_is_uncorrected(struck, place, by_keys):
    case, _ = struck
    fault = hit(place, by_keys, (29, 3), KINDS["bit 30"])
    run = case.run(CORRECT, (fault,), again=(fault,))
    assert run.counters["uncorrected"] == run.detected >= 1
    assert {ledger.VERDICTS[r["verdict"]].name for r in run.records} == {"UNCORRECTED"}


def test_statistics_that_changed_since_the_forward_are_uncorrected():
    for which in (0, 1):
        case = Case(G=1)
        case.given.statistics[which, 0, 0, 0, 7] += 0.5
        run = case.run()
        assert run.counters["uncorrected"] == run.detected == 1 and run.records[-1]["row"] == 7


@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_operands_that_changed_since_the_forward_are_not_called_repaired(which):
    case = Case(G=1)
    {"q": case.problem.q, "k": case.problem.k, "v": case.problem.v, "out": case.given.out}[which].view(-1)[83] += 1.0
    run = case.run()
    assert run.counters["uncorrected"] == run.detected > 0 and run.counters["recomputed"] == 0


@pytest.mark.parametrize("which", ["q", "k", "v", "d_out"])
def test_operands_that_hold_nan_are_input(which):
    case = Case(G=1)
    {"q": case.problem.q, "k": case.problem.k, "v": case.problem.v, "d_out": case.d_out}[which].view(-1)[83] = float("nan")
    case.given = case.forward()
    run = case.run()
    assert run.counters["input_rows"] > 0 and run.counters["recomputed"] == 0
    assert {ledger.VERDICTS[r["verdict"]].name for r in run.records} == {"INPUT"}


@pytest.mark.parametrize("where, role", [("S", "qk"), ("P", "pv"), ("dS", "pv"), ("dK", "qk"), (None, None)])
def test_training_takes_the_kernels_and_an_injector_reaches_them(where, role):
    generator = torch.Generator().manual_seed(4)
    make = lambda *s: torch.randn(s, generator=generator).to(harness.DEVICE)  # noqa: E731
    operands, above = (make(1, 2, 24, 16), make(1, 1, 40, 16), make(1, 1, 40, 16)), make(1, 2, 24, 16)

    def step(backend_name):
        leaves = [t.clone().requires_grad_() for t in operands]
        policy = abft.Policy(backend=backend_name, on_uncorrected="record")
        abft.scaled_dot_product_attention(*leaves, enable_gqa=True, policy=policy).backward(above)
        return [t.grad for t in leaves]

    abft.report(reset=True)
    if where is None:
        got, report = step("triton"), abft.report(reset=True)
        assert (report.products, report.detected, report.bypassed) == (7, 0, {})
        for a, b in zip(got, step("reference" if harness.DEVICE.type == "cpu" else "auto"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        return
    # S and P are struck in the backward: the second time that they are computed.
    with abft.inject.faults(abft.inject.Fault("inf", where, role=role, call=1 if where in ("S", "P") else 0), seed=1) as log:
        got = step("triton")
    report = abft.report(reset=True)
    assert len(log) == 1 and log[0].effect > 1e-3
    assert report.recomputed == report.detected >= 1 and report.uncorrected == 0
    for a, b in zip(got, step("triton"), strict=True):
        assert oracles.bits_equal(a.cpu(), b.cpu())


def test_deferred_checks_repair_nothing(struck):
    case, clean = struck
    fault = hit("dV", False, (29, 3), KINDS["bit 30"])
    run = case.run(Policy(timing="deferred", on_uncorrected="record"), (fault,))
    assert run.counters["uncorrected"] == run.detected == 1 and not run.equals(clean)


def test_only_roles_that_are_named_are_counted(struck):
    case, _ = struck
    run = case.run(Policy(roles={"qk"}, on_uncorrected="record"), (hit("dV", False, (29, 3), KINDS["bit 30"]),))
    assert run.detected == 0 and run.counters["checks"] == 2 * 40 + 48 and run.counters["products"] == 3


@pytest.mark.parametrize("place", [0, 1024])
def test_one_key_beside_many_equal_ones_is_within_the_bound_of_sums_one_by_one(place: int) -> None:
    """fp32 on units that round after each product: their chain, in numpy, of a dQ whose terms are all equal but one."""
    keys, width, rng = 2048, 16, np.random.default_rng(0)
    k = np.full((keys, width), 0.43, np.float32)
    k[place] = 1.1
    ds = np.full((64, keys), -1.0, np.float32) * rng.standard_normal((64, 1)).astype(np.float32) / np.float32(keys - 1)
    ds[:, place] = -ds[:, place] * np.float32(keys - 1)
    weights = backend._weights(width, 2, torch.device("cpu")).numpy()
    right = np.concatenate([k, (k.astype(np.float64) @ weights.T).astype(np.float32)], 1).astype(np.float64)
    chain = np.zeros((64, width + 2), np.float32)
    for t in range(keys):  # exact product, one rounding: an fma
        chain = (chain.astype(np.float64) + ds[:, t : t + 1].astype(np.float64) * right[t]).astype(np.float32)
    actual, predicted = chain[:, :width].astype(np.float64) @ weights.T, chain[:, width:].astype(np.float64)
    size = np.sqrt((chain[:, :width].astype(np.float64) ** 2).sum(1, keepdims=True) + predicted**2)
    ratio = np.abs(actual - predicted) / size
    bounds = backend._bounds(threshold.FMA_32, torch.float32, keys, 64, width, width)
    assert ratio.max() < bounds.dq
    assert ratio.max() > threshold.FMA_32.unit * threshold.kappa(threshold.FMA_32, keys, width=width)  # independent numbers need less
