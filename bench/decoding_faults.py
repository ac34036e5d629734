"""Random faults in attention over pages: inside the step, in the pages that it reads, in what they remember, in parts between launches.

    python -m bench attention-faults --decode [--trials N]                  the reference, fp32
    python -m bench attention-faults --decode --emulated bf16               the Triton kernels, interpreted on emulated tensor cores

Kinds and patterns are those of attention_faults.py; of pages and what they remember single elements, as memory fails. The effect is the
largest relative change of a row of O that would be delivered: a fault that a check alone sees has none. ``largest_left``: the same of
what was delivered where something was detected, and not said to be wrong: of several rows those within their bounds are left.
Places that only the kernels have (α, m, partial results between two launches) are struck in the launches, and their effect is what level
"detect" delivers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import abft
from abft import bits
from abft.faults import Region, Strike, Target
from abft.injection.fault import strike_of
from bench import intervals
from bench.attention_faults import HARMFUL, KINDS, PATTERNS, SEVERE

#: What is struck → (place, role of an injector's fault).
PLACES: dict[str, tuple[str, str]] = {
    "S": ("S", "qk"), "P": ("P", "pv"), "l": ("l", "pv"), "O": ("O", "pv"), "queries": ("operand", "qk"),
    "P as multiplied": ("operand", "pv"), "sums of S": ("checksum", "qk"), "sums of O": ("checksum", "pv"),
    "K in pages": ("weight", "qk"), "V in pages": ("weight", "pv"), "sums of K": ("panel", "qk"), "sums of V": ("panel", "pv"),
}  # fmt: skip
#: Of the kernels alone.
IN_LAUNCHES = ("α", "m", "parts in memory")
#: What lies in memory for long fails by single elements.
IN_MEMORY = ("weight", "panel")
FORMS: tuple[dict[str, Any], ...] = ({}, {"window": 40}, {"softcap": 2.0})


@dataclass(frozen=True)
class Case:
    """Heads of keys with ``group`` queries each, of sequences of these lengths; type of the operands; the policy."""

    heads: int
    group: int
    columns: int
    lengths: tuple[int, ...]
    page_length: int
    dtype: torch.dtype
    policy: abft.Policy
    in_kernels: bool = False


ON_THE_HOST = Case(2, 4, 32, (150, 90), 16, torch.float32, abft.Policy(on_uncorrected="record"))


def emulated(dtype: torch.dtype, backend: str) -> Case:
    """A smaller one: what is interpreted takes seconds. To be run ``in_two_parts``."""
    return Case(1, 4, 32, (44,), 16, dtype, abft.Policy(backend=backend, on_uncorrected="record"), in_kernels=True)  # type: ignore[arg-type]


class Step:
    """A cache whose pages lie in disorder, and the queries of one step."""

    def __init__(self, case: Case, form: dict[str, Any], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        batch, longest = len(case.lengths), max(case.lengths)
        width = -(-longest // case.page_length)
        self.case, self.form, self.lengths = case, form, torch.tensor(case.lengths, dtype=torch.int32)
        self.query, key, value = (
            torch.randn(batch, heads, tokens, case.columns, generator=g).to(case.dtype)
            for heads, tokens in ((case.heads * case.group, 1), (case.heads, longest), (case.heads, longest))
        )
        self.table = torch.randperm(batch * width, generator=g).int().view(batch, width)
        self.cache = abft.PagedCache(batch * width, case.page_length, case.heads, case.columns, case.dtype)
        self.cache.append(key, value, self.table, torch.zeros_like(self.lengths), self.lengths)

    def __call__(self, policy: abft.Policy) -> Tensor:
        return abft.paged_attention(self.query, self.cache, self.table, self.lengths, policy=policy, **self.form)


#: Fault-free outputs, by case, form and data: the same for every place.
_right: dict[tuple[Case, int, int], Tensor] = {}


def trial(case: Case, struck: str, number: int) -> dict[str, Any]:
    rng = np.random.default_rng([number, *struck.encode()])
    what, options = KINDS[number % len(KINDS)]
    form, data = int(rng.integers(len(FORMS))), int(rng.integers(4))
    step = Step(case, FORMS[form], data)
    if (case, form, data) not in _right:
        _right[case, form, data] = step(case.policy)
    right = _right[case, form, data]
    abft.report(reset=True)
    if struck in PLACES:
        place, role = PLACES[struck]
        pattern = "element" if place in IN_MEMORY else str(rng.choice(PATTERNS))
        fault = abft.inject.Fault(what, place, role=role, pattern=pattern, **options)  # type: ignore[arg-type]
        with abft.inject.faults(fault, seed=number) as log:
            out = step(case.policy)
        effect = log[0].effect
    else:
        fault = abft.inject.Fault(what, "accumulator", role="pv", **options)
        with in_launches(struck, step, fault, number):
            effect = _effect(right, step(case.policy.replace(level="detect")))
        abft.report(reset=True)
        with in_launches(struck, step, fault, number):
            out = step(case.policy)
    report = abft.report()
    return {
        "effect": effect, "detected": report.detected > 0, "equal": bool(bits.same(out, right).all()),
        "uncorrected": report.uncorrected > 0, "false_alarm": report.false_alarms > 0, "left": _effect(right, out),
    }  # fmt: skip


def _effect(right: Tensor, out: Tensor) -> float:
    a, b = (t.flatten(0, -2).double().numpy() for t in (right, out))
    with np.errstate(all="ignore"):
        ratio = np.where((a == b).all(1), 0.0, np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1))
    return float(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).max(initial=0.0))


@contextmanager
def in_launches(struck: str, step: Step, fault: abft.inject.Fault, seed: int) -> Iterator[None]:
    """While it lasts, the first execution of a step is struck where no injector reaches."""
    rng, case = np.random.default_rng([seed, 1]), step.case
    heads = len(case.lengths) * case.heads
    target = Target("paged_attention", "pv", case.group, case.columns, 1, case.dtype, torch.float32, heads, places=("O",))
    operation = strike_of(fault, target, rng).operation
    with ExitStack() as stack:
        if struck == "parts in memory":
            _between(stack, lambda parts: _hit_a_part(parts, operation, np.random.default_rng([seed, 2])))
        else:
            _inside(stack, struck, step, operation, rng)
        yield


def _inside(stack: ExitStack, struck: str, step: Step, operation: Any, rng: np.random.Generator) -> None:
    """A factor or a maximum of one row, at the first key of one of its pages that is not its part's first."""
    from abft.triton_kernels import attention_forward

    from abft.backends import triton_decode
    from abft.ops import paged

    case, unit = step.case, int(rng.integers(len(step.case.lengths) * step.case.heads))
    row, pages = int(rng.integers(case.group)), -(-case.lengths[unit // case.heads] // case.page_length)
    key = case.page_length * int(rng.integers(pages))
    number = {"α": attention_forward.ALPHA, "m": attention_forward.M}[struck].value
    stack.enter_context(mock.patch.dict(triton_decode.PLACES, {("pv", struck): number}))
    strike = Strike(struck, Region(row, row + 1, key, key + 1, batch=unit), operation)  # type: ignore[arg-type]
    stack.enter_context(mock.patch.object(paged, "strikes_of", lambda request, site: (("pv", strike),)))


@contextmanager
def in_two_parts() -> Iterator[None]:
    """While it lasts, the keys of every sequence are split, however few they are."""
    from abft.triton_kernels import configs

    with mock.patch.object(configs, "decode_splits", lambda units, pages: 2):
        yield


def _between(stack: ExitStack, change: Callable[[Any], None]) -> None:
    """Run ``change`` on the parts when they have been computed and before they are combined."""
    from abft.triton_kernels import attention_decode

    made, launch, parts = attention_decode.parts_of, attention_decode.combine_parts, []

    def parts_of(decoding: Any) -> Any:
        parts.append(made(decoding))
        return parts[-1]

    class Late:
        def __getitem__(self, grid: Any) -> Any:
            change(parts[-1])
            return launch[grid]

    stack.enter_context(mock.patch.multiple(attention_decode, parts_of=parts_of, combine_parts=Late()))


def _hit_a_part(parts: Any, operation: Any, rng: np.random.Generator) -> None:
    """One number: of an accumulator, or of what goes with it; each field as likely as the accumulator."""
    fields = parts.numbers.shape[2]
    field = int(rng.integers(fields + 1))
    values = parts.acc.flatten(0, 2) if field == fields else parts.numbers[:, :, field].flatten(0, 1)
    row, column = (int(rng.integers(n)) for n in values.shape)
    struck = operation.apply(values[row, column].reshape(1))
    if field == fields:
        parts.acc.view(values.shape)[row, column] = struck[0]
    else:
        parts.numbers[row // parts.numbers.shape[1], row % parts.numbers.shape[1], field, column] = struck[0]


def of_place(case: Case, struck: str, trials: int) -> dict[str, Any]:
    found = [trial(case, struck, i) for i in range(trials)]
    harmful, severe = ([t for t in found if t["effect"] >= least] for least in (HARMFUL, SEVERE))
    seen, detected = sum(t["detected"] for t in harmful), [t for t in found if t["detected"]]
    return {
        "trials": trials, "harmful": len(harmful), "harmful_detected": seen, "lower_limit": intervals.lower_limit(seen, len(harmful)),
        "severe": len(severe), "severe_detected": sum(t["detected"] for t in severe), "detected": len(detected),
        "repaired_bit_equal": sum(t["equal"] for t in detected), "said_uncorrected": sum(t["uncorrected"] for t in detected),
        "largest_left": max((t["left"] for t in detected if not t["uncorrected"]), default=0.0),
        "largest_missed": max((t["effect"] for t in found if not t["detected"]), default=0.0),
        "false_alarms": sum(t["false_alarm"] for t in found),
    }  # fmt: skip
