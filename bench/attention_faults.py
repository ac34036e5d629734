"""Random faults in every place inside attention: detected, repaired bit for bit, missed; by effect on the product they strike.

    python -m bench attention-faults [--trials N]

Kinds: nullification, flips of one and two random bits, ±2^k, non-finite; single elements, warp strides, fragments, rows. Harmful: the
worst row of the struck product (of P and l: of O, or in the backward dV; of dS: of dS itself) changes by 1e-3 of its L2 norm or more.
A row of zeros (dS of a query that sees one key) has no such norm: there what becomes 1e-30 or more is harmful.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

import abft
from abft import bits
from bench import intervals
from bench.results import Results

PLACES = {"S": "qk", "dQ": "qk", "dK": "qk", "P": "pv", "l": "pv", "O": "pv", "dP": "pv", "dS": "pv", "dV": "pv"}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nullify", {}), ("bitflip", {"bits": 1}), ("bitflip", {"bits": 2}), ("carry", {}), ("nonfinite", {}),
)  # fmt: skip
PATTERNS = ("element", "element", "warp", "fragment", "row")
HARMFUL = 1e-3
NOTHING = 1e-30
POLICY = abft.Policy(on_uncorrected="record")
FORMS: tuple[dict[str, Any], ...] = ({}, {"is_causal": True}, {"dropout_p": 0.1})


def step(form: dict[str, Any], seed: int) -> list[torch.Tensor]:
    """Output and gradients of grouped-query attention, 2 x 4 heads x 64 queries x 80 keys, width 32."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in ((2, 4, 64, 32), (2, 2, 80, 32), (2, 2, 80, 32))]
    torch.manual_seed(seed)
    out = abft.scaled_dot_product_attention(*leaves, enable_gqa=True, policy=POLICY, **form)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=g))]


def trial(place: str, number: int, clean: dict[tuple[int, int], list[torch.Tensor]]) -> dict[str, Any]:
    rng = np.random.default_rng([number, *place.encode()])
    what, options = KINDS[number % len(KINDS)]
    form, data = int(rng.integers(len(FORMS))), int(rng.integers(4))
    if (form, data) not in clean:
        clean[form, data] = step(FORMS[form], data)
    call = int(rng.integers(2)) if place in ("S", "P") else 0  # these are in the forward and in the backward
    fault = abft.inject.Fault(what, place, role=PLACES[place], pattern=str(rng.choice(PATTERNS)), call=call, **options)
    abft.report(reset=True)
    with abft.inject.faults(fault, seed=number) as log:
        results = step(FORMS[form], data)
    report = abft.report()
    equal = all(bool(bits.same(a, b).all()) for a, b in zip(results, clean[form, data], strict=True))
    effect = log[0].effect
    if effect == np.inf and all(before == 0 and abs(after) < NOTHING for *_, before, after in log[0].elements):
        effect = 0.0
    return {"effect": effect, "detected": report.detected > 0, "equal": equal, "false_alarms": report.false_alarms}


def of_place(place: str, trials: int) -> dict[str, Any]:
    clean: dict[tuple[int, int], list[torch.Tensor]] = {}
    found = [trial(place, i, clean) for i in range(trials)]
    harmful = [t for t in found if t["effect"] >= HARMFUL]
    detected = [t for t in found if t["detected"]]
    seen = sum(t["detected"] for t in harmful)
    return {
        "trials": trials, "harmful": len(harmful), "harmful_detected": seen, "lower_limit": intervals.lower_limit(seen, len(harmful)),
        "detected": len(detected), "repaired_bit_equal": sum(t["equal"] for t in detected),
        "largest_missed": max((t["effect"] for t in found if not t["detected"]), default=0.0),
        "false_alarms": sum(t["false_alarms"] for t in found),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention-faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=500, help="per place")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = Results("attention-faults", fresh=options.fresh, trials=options.trials)
    for i, place in enumerate(PLACES):
        if results.find(place) is None:
            print(results.add("place", key=place, role=PLACES[place], **of_place(place, options.trials)))
        results.progress(i + 1, len(PLACES), place)
    return 0
