"""Fault campaign on the public path: every class × place × pattern × role, through ``abft.inject``; what became of each.

    python -m bench campaign --dtype fp32 --trials 300
    python -m bench campaign --backend interpreted --dtype fp16 --trials 20  the Triton kernels, in Triton's interpreter
    python -m bench campaign --backend triton --dtype bf16 --trials 20       … on a GPU
    python -m bench campaign --backend interpreted --timing deferred         … judged later, and not repaired; or --panel lean
    python -m bench campaign --detector statistical                          … harmless ones left as they are, without a budget

A trial is one fault in one product of a protected ``nn.Linear``: of its forward, input gradient or weight gradient. Its
effect is the relative L2 change of the worst row before any repair. Counted per class, never as one average:

    harmful     effect ≥ 1e-3, but ≥ 1e-2 where the product arrives rounded (bf16, fp16 on a CPU)
    detected    a verdict that is a fault (or, for a broken panel: the panel was rebuilt)
    repaired    detected, and what was delivered equals the fault-free result bit for bit
    rounded     … or differs from it by no more than one rounding of the output type
    located     of detected single wrong elements: row and column named rightly
    void        nothing changed (a zero nullified, a bit stuck where it was): not a fault, not counted
    hidden      in a kernel: the accumulator changed and was found, but the rounding to the output type would have hidden it
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import abft
from abft import floating
from abft.inject import Fault
from abft.statistics import watches
from abft.statistics.severity import Budget
from bench import families, forms, intervals
from bench.clean import DTYPES
from bench.results import UNFINISHED, Results

HARM, HARM_ROUNDED = 1e-3, 1e-2
WHATS = {
    "nullify": {"what": "nullify"},
    "flip1": {"what": "bitflip", "bits": 1},
    "flip2-lsb": {"what": "bitflip", "bits": 2, "weighting": "lsb"},
    "flip4-lsb": {"what": "bitflip", "bits": 4, "weighting": "lsb"},
    "carry": {"what": "carry"},
    "nan": {"what": "nan"},
    "inf": {"what": "inf"},
    "near-inf": {"what": "near_inf"},
    "scale": {"what": "scale"},
    "stuck-at": {"what": "stuck_at"},
}
#: place → (patterns, roles, how the weight is watched). A panel or a weight belongs to products with a remembered weight.
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "accumulator": (("element", "row", "warp", "fragment", "tile"), ("fprop", "dgrad", "wgrad"), "tracked"),
    "output": (("element", "row", "warp", "fragment", "tile"), ("fprop", "dgrad", "wgrad"), "tracked"),
    "operand": (("element", "row", "warp", "fragment", "tile"), ("fprop", "dgrad", "wgrad"), "tracked"),
    "checksum": (("element", "row", "fragment"), ("fprop", "dgrad", "wgrad"), "tracked"),
    "panel": (("element", "row", "fragment"), ("fprop", "dgrad"), "tracked"),
    "weight": (("element",), ("fprop", "dgrad"), "frozen"),
    # Several elements of a weight at once: beyond what the fingerprints can name when they share an input channel.
    "weight-multi": (("warp", "fragment"), ("fprop", "dgrad"), "frozen"),
}
NOT_FINITE = ("nan", "inf", "near-inf")
#: (activations, weights, rows, columns, depth): ragged and even sizes, one and several groups.
SUBJECTS = (
    ("gauss", "gauss", 48, 256, 64),
    ("post-norm", "output-scales", 130, 96, 512),
    ("post-gelu", "two-valued", 64, 384, 384),
    ("shifted", "offset", 40, 200, 512),
    ("outlier-channels", "gauss", 33, 1024, 256),
    ("row-scales", "big-output", 48, 256, 512),
    ("softmax", "half-offset", 64, 128, 2048),
    ("student-t", "student-t3", 48, 520, 128),
)
KEPT = 8  # misses of a class that are written out, to be run again


class Subject:
    """One layer with its operands and fault-free results."""

    def __init__(self, number: int, dtype: torch.dtype, policy: abft.Policy, device: torch.device | str = "cpu") -> None:
        activation, weight, m, n, k = SUBJECTS[number]
        g = families.generator(number, 7)  # the same numbers on every device
        self.number, self.fused = number, policy.backend == "triton"
        self.layer = nn.Linear(k, n, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(families.weights(weight, n, k, g, dtype))
            self.layer.bias.copy_(torch.randn(n, generator=g))
        x = families.activations(activation, m, k, g, dtype)
        # In fp16 a heavy tail may overflow, which is legitimate and no subject for faults: kept a factor of 16 below.
        largest = float(F.linear(x.float(), self.layer.weight.detach().float()).abs().max()) if dtype == torch.float16 else 0.0
        self.x = (x if largest < 4096 else x * 2.0 ** -math.ceil(math.log2(largest / 4096))).to(device)
        self.gradient = families.activations("gauss", m, n, g, dtype).to(device)
        self.layer.to(device)
        abft.protect(self.layer, policy, name=f"{number}/{policy.weights}/{dtype}")
        # One graph per gradient, kept, so that a trial is one product.
        self.layer.weight.requires_grad_(False)
        x_leaf = self.x.clone().requires_grad_()
        self._graphs = {"dgrad": (self.layer(x_leaf), x_leaf)}
        self.layer.weight.requires_grad_(True)
        self._graphs["wgrad"] = (self.layer(self.x), self.layer.weight)
        self.clean = {role: self.run(role) for role in ("fprop", "dgrad", "wgrad")}
        assert all(bool(y.isfinite().all()) for y in self.clean.values()), f"subject {number} overflows"
        found = abft.report(reset=True)
        assert found.detected == found.false_alarms == 0, f"alarm on clean data of subject {number}: {found}"

    def run(self, role: str) -> Tensor:
        if role == "fprop":
            with torch.no_grad():
                return self.layer(self.x)
        y, leaf = self._graphs[role]
        return torch.autograd.grad(y, leaf, self.gradient, retain_graph=True)[0]


@dataclass
class Tally:
    """Counts of one class."""

    trials: int = 0
    void: int = 0
    hidden: int = 0
    harmful: int = 0
    detected: int = 0
    harmful_detected: int = 0
    repaired: int = 0
    rounded: int = 0
    single: int = 0
    located: int = 0
    mislocated: int = 0
    benign_missed: int = 0
    false_alarms: int = 0
    weight_named: int = 0
    floor: float = float("inf")  # smallest effect found
    largest_missed: float = 0.0
    misses: list[dict[str, Any]] = field(default_factory=list)
    unrepaired: list[dict[str, Any]] = field(default_factory=list)
    by_role: dict[str, list[int]] = field(default_factory=dict)  # role → [harmful, of these detected]


def trial(tally: Tally, subject: Subject, fault: Fault, seed: int, harm: float) -> None:
    """One fault, and what became of it."""
    for monitor in watches.monitors().values():
        monitor.budget = Budget(burst=math.inf, left=math.inf)  # what is tolerated is the gate's doing, not the last trial's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with abft.inject.faults(fault, seed=seed) as log:
            delivered = subject.run(fault.role)
    report = abft.report(reset=True)
    effect = max(entry.effect for entry in log)
    on_panel, of_check = fault.where == "panel", fault.where in ("checksum", "panel")
    detected = report.detected > 0 or (on_panel and report.false_alarms > 0)
    same = _same_bits(delivered, subject.clean[fault.role])
    if not of_check and not log[0].elements:
        found = detected or report.false_alarms > 0
        tally.void += 1
        tally.hidden += found and subject.fused
        tally.false_alarms += found and not subject.fused
        return
    tally.trials += 1
    tally.detected += detected
    tally.false_alarms += report.false_alarms > 0 and not on_panel
    harmful = effect >= harm
    tally.harmful += harmful
    tally.harmful_detected += harmful and detected
    counts = tally.by_role.setdefault(fault.role, [0, 0])
    counts[0] += harmful
    counts[1] += harmful and detected
    how = {"subject": subject.number, "role": fault.role, "seed": seed, "effect": effect}
    if detected:
        tally.floor = min(tally.floor, effect)
        tally.repaired += same
        tally.rounded += same or _within_rounding(delivered, subject.clean[fault.role])
        if not same and len(tally.unrepaired) < KEPT:
            tally.unrepaired.append(how | {"left": _effect(delivered, subject.clean[fault.role]), "verdicts": _verdicts(report)})
        _locate(tally, fault, log[0], report)
    elif harmful:
        tally.largest_missed = max(tally.largest_missed, effect)
        if len(tally.misses) < KEPT:
            tally.misses.append(how | {"verdicts": _verdicts(report)})
    else:
        tally.benign_missed += 1
        tally.largest_missed = max(tally.largest_missed, effect)


def _locate(tally: Tally, fault: Fault, entry: abft.inject.Injected, report: abft.Report) -> None:
    event = report.events[-1] if report.events else None
    if event is None:
        return
    if fault.where == "weight" and fault.pattern == "element":
        # A weight's element changes one column of the result; the event names it.
        tally.weight_named += event.cause == "weight" and event.col in {c for _, c, _, _ in entry.elements}
        tally.single += 1
    elif fault.pattern == "element" and fault.where in ("accumulator", "output"):
        tally.single += 1
        right = (event.row, event.col) == entry.elements[0][:2]
        tally.located += right
        tally.mislocated += event.col is not None and not right


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) and torch.equal(torch.signbit(a), torch.signbit(b))


def _within_rounding(a: Tensor, b: Tensor) -> bool:
    """One spacing of the output type at the element, or, where an element cancelled, at a thousandth of its row."""
    a64, b64 = a.double(), b.double()
    size = b64.abs().clamp(min=1e-3 * float(b64.square().mean(-1, keepdim=True).sqrt().max()))
    return bool(((a64 - b64).abs() <= 2 * torch.finfo(b.dtype).eps * size).all())


def _effect(a: Tensor, b: Tensor) -> float:
    change = torch.linalg.vector_norm(a.double() - b.double(), dim=-1)
    return float((change / torch.linalg.vector_norm(b.double(), dim=-1).clamp(min=1e-300)).nan_to_num(torch.inf).max())


def _verdicts(report: abft.Report) -> dict[str, int]:
    names = (
        "observed", "recomputed", "reconstructed", "uncorrected", "false_alarms", "stale", "input_rows", "overflow_rows", "weight_faults",
    )  # fmt: skip
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def cells() -> Iterator[tuple[str, str, str]]:
    for place, (patterns, _, _) in PLACES.items():
        for what in WHATS:
            for pattern in patterns:
                yield place, what, pattern


def run_cell(place: str, what: str, pattern: str, trials: int, seed: int, subjects: dict[str, list[Subject]], harm: float) -> Tally:
    """``trials`` seeded faults of one class, roles and subjects in turn."""
    tally = Tally()
    _, roles, watched = PLACES[place]
    rng = np.random.default_rng([seed, *f"{place} {what} {pattern}".encode()])
    for i in range(trials):
        fault = Fault(where=place.split("-")[0], role=roles[i % len(roles)], pattern=pattern, **WHATS[what])  # type: ignore[arg-type]
        pool = subjects[watched]
        trial(tally, pool[int(rng.integers(len(pool)))], fault, int(rng.integers(2**31)), harm)
    return tally


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench campaign", description=__doc__)
    parser.add_argument("--backend", default="reference", choices=["reference", "interpreted", "triton"], help="triton: on a GPU")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    forms.add_options(parser)
    parser.add_argument("--trials", type=int, default=300, help="per class")
    parser.add_argument("--place", choices=PLACES, help="only this place")
    parser.add_argument("--what", choices=WHATS, help="only this class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    if (options.place or options.what) and options.out is None:
        parser.error("a part of the classes would stand for all of them: name another folder with --out")
    torch.set_num_threads(1)
    results = Results(f"faults-{forms.name(options)}", fresh=options.fresh, folder=options.out, trials=options.trials, seed=options.seed)
    backend, dtype = forms.policy(options).backend, DTYPES[options.dtype]
    rounded = backend == "reference" and floating.ACCUMULATOR[dtype] != dtype
    harm = HARM_ROUNDED if rounded else HARM
    # The kernels check before they cast: what happens to the output afterwards is blind by construction.
    blind = {"output"} if backend == "triton" else set()
    asked = [cell for cell in cells() if options.place in (None, cell[0]) and options.what in (None, cell[1])]
    todo = [cell for cell in asked if cell[0] not in blind]
    policies = {weights: forms.policy(options, weights=weights) for weights in sorted({PLACES[place][2] for place, _, _ in todo})}
    device, numbers = forms.device(options), range(len(SUBJECTS))
    subjects = {weights: [Subject(i, dtype, policy, device) for i in numbers] for weights, policy in policies.items()}
    deadline, status = time.monotonic() + options.seconds, 0
    for i, (place, what, pattern) in enumerate(todo):
        key = f"{place} {what} {pattern} trials{options.trials} seed{options.seed}"
        if results.find(key) is None:
            if time.monotonic() > deadline:
                status = UNFINISHED
                break
            t = run_cell(place, what, pattern, options.trials, options.seed, subjects, harm)
            kept = {k: v for k, v in vars(t).items() if v}
            results.add("class", key=key, place=place, what=what, pattern=pattern, **kept)
        results.progress(i + 1, len(todo), key)
    print(summarise(results, harm, blind))
    return status


def summarise(results: Results, harm: float, blind: Set[str] = frozenset()) -> str:
    """Write one summary record per place, with exact intervals; returns them as lines."""
    classes = [r for r in results.records if r["kind"] == "class"]
    summary = {place: _sum([r for r in classes if r["place"] == place]) for place in PLACES if place not in blind}
    summary["all single"] = _sum([r for r in classes if r["place"] not in ("checksum", "panel", "weight-multi")])
    results.replace("summary", harmful_from=harm, blind=sorted(blind), confidence=0.95, places=summary)
    lines = [f"{results.path.stem}: harmful = effect ≥ {harm:g}"]
    for place, s in summary.items():
        found = f"{s['harmful']:>6} harmful, detected {s['harmful_detected']:>6} (≥ {s['harmful_detected_at_least']:.5f})"
        mended = f"repaired {s['repaired']}/{s['detected']}, within a rounding {s['rounded']}"
        named = f"located {s['located']}/{s['single']} (finite {s['located_finite']}/{s['single_finite']})"
        sizes = f"smallest found {s['floor']:.2g}, largest missed {s['largest_missed']:.2g}"
        lines.append(f"  {place:<15} {s['trials']:>6} faults, {found}; {mended}; {named}; false alarms {s['false_alarms']}; {sizes}")
    return "\n".join(lines)


def _sum(classes: list[dict[str, Any]]) -> dict[str, Any]:
    names = (
        "trials", "void", "hidden", "harmful", "harmful_detected", "detected", "repaired", "rounded", "single", "located", "mislocated",
        "weight_named", "benign_missed", "false_alarms",
    )  # fmt: skip
    out: dict[str, Any] = {name: sum(r.get(name, 0) for r in classes) for name in names}
    out["located"] += out["weight_named"]
    # A wrong element that is not finite has no ratio of residuals; it is counted apart.
    out["located_finite"] = sum(r.get("located", 0) + r.get("weight_named", 0) for r in classes if r["what"] not in NOT_FINITE)
    out["single_finite"] = sum(r.get("single", 0) for r in classes if r["what"] not in NOT_FINITE)
    out["harmful_detected_at_least"] = intervals.lower_limit(out["harmful_detected"], out["harmful"]) if out["harmful"] else 0.0
    out["repaired_interval"] = intervals.proportion(out["repaired"], out["detected"])
    out["located_interval"] = intervals.proportion(out["located_finite"], out["single_finite"])
    out["floor"] = min((float(r.get("floor", "inf")) for r in classes), default=float("inf"))
    out["largest_missed"] = max((float(r.get("largest_missed", 0)) for r in classes), default=0.0)
    return out
