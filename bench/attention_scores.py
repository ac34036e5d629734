"""Random faults in the scores of attention's kernels, one in every row of a launch, on emulated tensor cores: which rows are found.

    python -m bench attention-scores [--launches N]

Rows are judged one by one, so a launch is as many trials as it has rows: the kinds and patterns of ``attention-faults``, in the
forward. "nonfinite" includes the largest finite number, equal in all struck scores: what signs ±1 let pass. Harmful: the row of O
changes by 1e-3 of its L2 norm or more, or is no longer finite. Repaired: the bits of O, m and l after suspect blocks were computed again.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import abft
from abft import bits, ledger
from abft.backends import triton_attention
from abft.backends.triton_attention import AttentionCall
from abft.faults import Strike, Target
from abft.injection.fault import strike_of
from bench import emulated_units, forms, intervals, tensor_core
from bench.attention_faults import HARMFUL, KINDS, SEVERE
from bench.results import Results

PATTERNS = ("element", "warp", "fragment", "fragment", "row", "tile")
#: (keys, the last query's place among them or None: not causal): one, two and five blocks of keys.
FORMS = ((64, None), (80, None), (80, 16), (300, None), (300, 236))
GROUP, LENGTH, WIDTH = 2, 64, 64
KEY = "S, forward"


def call_of(keys: int, offset: int | None, seed: int) -> AttentionCall:
    """Attention of random operands, its last query beside the last key where it is causal."""
    g = torch.Generator().manual_seed(seed)
    shapes = (1, 1, GROUP, LENGTH, WIDTH), (1, 1, keys, WIDTH), (1, 1, keys, WIDTH)
    q, k, v = (torch.randn(shape, generator=g).bfloat16() for shape in shapes)
    policy = abft.Policy(backend=forms.backend_of("interpreted"), on_uncorrected="record")  # type: ignore[arg-type]
    causal = offset is not None
    return AttentionCall(q, k, v, None, 0, 1 / math.sqrt(WIDTH), causal, offset or 0, None, None, 0.0, policy, frozenset({"qk", "pv"}))


def strikes_of(keys: int, rng: np.random.Generator) -> list[Strike]:
    """A fault for each row."""
    rows = GROUP * LENGTH
    target = Target("bench", "qk", rows, keys, WIDTH, torch.bfloat16, torch.float32, places=("S",))
    found = []
    for row in range(rows):
        what, options = KINDS[int(rng.integers(len(KINDS)))]
        fault = abft.inject.Fault(
            what, "S", role="qk", pattern=str(rng.choice(PATTERNS)), index=(row, int(rng.integers(keys))), **options
        )  # fmt: skip
        strike = strike_of(fault, target, rng)
        found.append(replace(strike, region=replace(strike.region, row0=row, row1=row + 1)))
    return found


def launch(call: AttentionCall, faults: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(O as the first launch left it, (rows,) what was suspect, (O, statistics) after the repair)"""
    from abft.triton_kernels import attention_forward, attention_settle

    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    attention, both = triton_attention.plan(call), sum(triton_attention.ROLES.values())
    with triton_attention.products.quiet():
        evidence = attention_forward.attend(attention, words, site, both, False, faults)
        first, status = evidence.out.clone(), evidence.status.clone()
        attention_settle.settle(attention, evidence, words, site, triton_attention.labels(call), both, True)
    return first, status, (evidence.out, evidence.statistics)


def trials(number: int) -> list[dict[str, Any]]:
    """One launch: a trial for each row that changed, or was suspect."""
    keys, offset = FORMS[number % len(FORMS)]
    rng, call = np.random.default_rng([0x5C0, number]), call_of(keys, offset, number)
    clean, suspect, right = launch(call, None)
    faults = triton_attention.descriptors(tuple(("qk", strike) for strike in strikes_of(keys, rng)), call.q.device)
    wrong, status, repaired = launch(call, faults)
    a, b = (t.flatten(0, -2).double() for t in (clean, wrong))
    effect = ((b - a).norm(dim=1) / a.norm(dim=1)).nan_to_num(nan=math.inf, posinf=math.inf)
    equal = torch.stack([bits.same(right[0], repaired[0]).flatten(0, -2).all(1), bits.same(right[1], repaired[1]).flatten(1).all(0)]).all(0)
    return [
        {"effect": float(e), "detected": s > 0, "by_scores": s & triton_attention.ROLES["qk"] > 0, "equal": bool(same), "alarm": alarm > 0}
        for e, s, same, alarm in zip(effect, status.tolist(), equal, suspect.tolist(), strict=True)
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench attention-scores", description=__doc__)
    parser.add_argument("--launches", type=int, default=10, help="of 128 rows each")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    forms.backend_of("interpreted")  # before anything imports a kernel
    results = Results("attention-faults-emulated-bf16", launches=options.launches)
    found: list[dict[str, Any]] = []
    with emulated_units.tensor_cores(tensor_core.load(), 90):
        for number in range(options.launches):
            found += trials(number)
            results.forget(KEY)  # of fewer launches: what is stopped has told what it found
            record = results.add("place", key=KEY, role="qk", **summary(found))
            results.progress(number + 1, options.launches)
    print(record)
    return 0


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    harmful, severe = ([t for t in found if t["effect"] >= least] for least in (HARMFUL, SEVERE))
    detected, seen = [t for t in found if t["detected"]], sum(t["detected"] for t in harmful)
    return {
        "trials": len(found), "harmful": len(harmful), "harmful_detected": seen, "lower_limit": intervals.lower_limit(seen, len(harmful)),
        "severe": len(severe), "severe_detected": sum(t["detected"] for t in severe),
        "harmful_detected_by_scores": sum(t["by_scores"] for t in harmful), "detected": len(detected),
        "repaired_bit_equal": sum(t["equal"] for t in detected),
        "largest_missed": max((t["effect"] for t in found if not t["detected"]), default=0.0),
        "false_alarms": sum(t["alarm"] for t in found),
    }  # fmt: skip
