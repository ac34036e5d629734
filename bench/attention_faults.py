"""Random faults in every place inside attention: detected, repaired bit for bit, missed; by effect on the product they strike.

    python -m bench attention-faults [--trials N]
    python -m bench attention-faults --emulated bf16        the Triton kernels, interpreted on emulated tensor cores (emulated_units.py)
    python -m bench attention-faults --backend triton --dtype bf16      the kernels, on a GPU: causal attention, whose kernels hold a loop
                                                            with hidden keys and one without; every other form would be compiled first
    python -m bench attention-faults --places S dQ          only these, measured anew
    python -m bench attention-faults --decode …             attention over pages instead (decoding_faults.py)

Kinds: nullification, flips of one and two random bits, ±2^k, non-finite; single elements, warp strides, fragments, rows. Harmful: the
worst row of the struck product (of P and l: of O, or in the backward dV; of dS: of dS itself) changes by 1e-3 of its L2 norm or more.
A row of zeros (dS of a query that sees one key) has no such norm: there what becomes 1e-30 or more is harmful (1e-17 in the kernels,
whose bounds begin there).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import abft
from abft import bits
from bench import emulated_units, forms, intervals, tensor_core
from bench.results import UNFINISHED, Results

PLACES = {"S": "qk", "dQ": "qk", "dK": "qk", "P": "pv", "l": "pv", "O": "pv", "dP": "pv", "dS": "pv", "dV": "pv"}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nullify", {}), ("bitflip", {"bits": 1}), ("bitflip", {"bits": 2}), ("carry", {}), ("nonfinite", {}),
)  # fmt: skip
PATTERNS = ("element", "element", "warp", "fragment", "row")
HARMFUL, SEVERE = 1e-3, 1e-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS: tuple[dict[str, Any], ...] = ({}, {"is_causal": True}, {"dropout_p": 0.1})


@dataclass(frozen=True)
class Case:
    """Grouped-query attention: shapes of its operands, their type, the policy; ``nothing``: what becomes of zeros and is no harm; what
    is asked of it; where it runs."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    dtype: torch.dtype
    policy: abft.Policy
    nothing: float = 1e-30
    forms: tuple[dict[str, Any], ...] = FORMS
    device: str = "cpu"


ON_THE_HOST = Case((2, 4, 64, 32), (2, 2, 80, 32), torch.float32, abft.Policy(on_uncorrected="record"))


#: τ_abs of the kernels: docs/explanation/limits.md.
NOTHING_IN_KERNELS = 1e-17


def interpreted(dtype: torch.dtype) -> Case:
    """A smaller one: what is interpreted takes seconds."""
    return Case((1, 2, 64, 64), (1, 1, 80, 64), dtype, _policy("interpreted"), NOTHING_IN_KERNELS)


def native(dtype: torch.dtype) -> Case:
    """Several blocks of queries and of keys for each of several heads, of which the last ones are not whole."""
    return Case((2, 8, 500, 128), (2, 2, 700, 128), dtype, _policy("triton"), NOTHING_IN_KERNELS, ({"is_causal": True},), "cuda")


def _policy(backend: str) -> abft.Policy:
    return abft.Policy(backend=forms.backend_of(backend), on_uncorrected="record")  # type: ignore[arg-type]


def step(case: Case, form: dict[str, Any], seed: int) -> list[torch.Tensor]:
    """Output and gradients."""
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(s, generator=g).to(case.device, case.dtype).requires_grad_() for s in (case.q, case.k, case.k)]
    torch.manual_seed(seed)
    out = abft.scaled_dot_product_attention(*leaves, enable_gqa=True, policy=case.policy, **form)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape, generator=g).to(out))]


def trial(case: Case, place: str, number: int, clean: dict[tuple[int, int], list[torch.Tensor]]) -> dict[str, Any]:
    rng = np.random.default_rng([number, *place.encode()])
    what, options = KINDS[number % len(KINDS)]
    form, data = int(rng.integers(len(case.forms))), int(rng.integers(4))
    if (form, data) not in clean:
        clean[form, data] = step(case, case.forms[form], data)
    call = int(rng.integers(2)) if place in ("S", "P") else 0  # these are in the forward and in the backward
    fault = abft.inject.Fault(what, place, role=PLACES[place], pattern=str(rng.choice(PATTERNS)), call=call, **options)
    abft.report(reset=True)
    with abft.inject.faults(fault, seed=number) as log:
        results = step(case, case.forms[form], data)
    report = abft.report()
    equal = all(bool(bits.same(a, b).all()) for a, b in zip(results, clean[form, data], strict=True))
    effect = log[0].effect
    if effect == np.inf and all(before == 0 and abs(after) < case.nothing for *_, before, after in log[0].elements):
        effect = 0.0
    return {"effect": effect, "detected": report.detected > 0, "equal": equal, "false_alarms": report.false_alarms}


def of_place(case: Case, place: str, trials: int) -> dict[str, Any]:
    clean: dict[tuple[int, int], list[torch.Tensor]] = {}
    found = [trial(case, place, i, clean) for i in range(trials)]
    severe = [t["detected"] for t in found if t["effect"] >= SEVERE]
    harmful = [t for t in found if t["effect"] >= HARMFUL]
    detected = [t for t in found if t["detected"]]
    seen = sum(t["detected"] for t in harmful)
    return {
        "trials": trials, "harmful": len(harmful), "harmful_detected": seen, "lower_limit": intervals.lower_limit(seen, len(harmful)),
        "severe": len(severe), "severe_detected": sum(severe), "detected": len(detected),
        "repaired_bit_equal": sum(t["equal"] for t in detected),
        "largest_missed": max((t["effect"] for t in found if not t["detected"]), default=0.0),
        "false_alarms": sum(t["false_alarms"] for t in found),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench attention-faults", description=__doc__, formatter_class=raw)
    parser.add_argument("--trials", type=int, default=500, help="per place")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--backend", default="reference", choices=["reference", "interpreted", "triton"], help="triton: on a GPU")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the kernels; the reference computes in fp32")
    parser.add_argument("--emulated", choices=["bf16", "fp16"], help="the kernels, on emulated tensor cores of an H100")
    parser.add_argument("--decode", action="store_true", help="attention over pages: of the step, of the pages, of what they remember")
    parser.add_argument("--places", nargs="+", metavar="PLACE", help="only these, anew; default: what has no record yet")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other place after so long")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    options = parser.parse_args(argv)
    from bench import decoding_faults  # which reads this module

    if options.backend != "reference" and (options.decode or options.emulated):
        parser.error("attention over pages runs here by the reference or --emulated, and what is emulated has no other --backend")
    torch.set_num_threads(1)
    which: Any = decoding_faults if options.decode else sys.modules[__name__]
    case, unit, places = which.ON_THE_HOST, nullcontext(), list(which.PLACES)
    name = "attention-faults" + "-decode" * options.decode
    if options.backend != "reference":
        case = (native if options.backend == "triton" else interpreted)(DTYPES[options.dtype])
        name = f"{name}-{options.backend}-{options.dtype}"
    if options.emulated:
        dtype = DTYPES[options.emulated]
        case = decoding_faults.emulated(dtype, forms.backend_of("interpreted")) if options.decode else interpreted(dtype)
        places += decoding_faults.IN_LAUNCHES if options.decode else ()
        unit, name = emulated_units.tensor_cores(tensor_core.load(), 90), f"{name}-emulated-{options.emulated}"
    results = Results(name, fresh=options.fresh, folder=options.out, trials=options.trials)
    parts = decoding_faults.in_two_parts() if options.decode and options.emulated else nullcontext()
    if unknown := set(options.places or ()) - set(places):
        parser.error(f"there is no place {', '.join(sorted(unknown))}; there are {', '.join(places)}")
    places, deadline = options.places or places, time.monotonic() + options.seconds
    with unit, parts:
        for i, place in enumerate(places):
            if options.places or results.find(place) is None:
                if time.monotonic() > deadline:
                    return UNFINISHED
                role = which.PLACES.get(place, "pv")
                role = role[-1] if options.decode and place in which.PLACES else role
                found = which.of_place(case, place, options.trials)
                results.forget(place)
                print(results.add("place", key=place, role=role, **found), flush=True)
            results.progress(i + 1, len(places), place)
    return 0
