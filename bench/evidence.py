"""What stands beside a time: how right the timed module is, how small a deviation it sees, and how many faults it finds.

    error            of the worst row of every result: ‖y - y64‖₂ / ‖y64‖₂, against the same model in fp64
    expected_floor   the smallest single deviation, relative to its row, that the policy's bound flags in a typical row; the largest of
                     the model's products (threshold.expected_floor). 0: compared bit for bit. None: nothing is looked for
    found            harmful single bit flips in accumulators that were found, of ``harmful``; at_least: the exact lower limit at 95 %
    smallest_found, largest_missed     of all flips, by the change of the worst row of the struck product

Taken with the very module, and so the very policy object, that is timed, in the same process.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import abft
from abft.backends.call import Call
from abft.inject import Fault
from abft.ops import checked
from bench import campaign, intervals
from bench.attention_layer import Attention
from bench.contender import Contender, results
from bench.workloads import Workload

#: A row of fp64 results this much smaller than the largest is rounding: 2⁻⁵³ times the sums it is the difference of.
ZERO = 1e-9
#: A flip at random in one accumulator of one product.
FLIP = Fault("bitflip", "accumulator", role="*")


def exact(model: nn.Module, workload: Workload, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The results of the same passes in fp64. Widens the model in place."""
    return results(model.double(), workload.passes, tuple(x.double() if x.is_floating_point() else x for x in inputs))


def error(found: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative L2 error of a row of any result.

    A row that is zero but for rounding (the gradient of a key's bias) has no size of its own: it counts by the largest row's.
    """
    rows = [(y.reshape(_matrix(y64).shape).double(), _matrix(y64)) for y, y64 in zip(found, right, strict=True)]
    sizes = [torch.linalg.vector_norm(y64, dim=-1) for _, y64 in rows]
    largest = max(float(size.max()) for size in sizes)
    worst = 0.0
    for (y, y64), size in zip(rows, sizes, strict=True):
        off = torch.linalg.vector_norm(y - y64, dim=-1)
        worst = max(worst, float((off / torch.where(size > ZERO * largest, size, largest)).max()))
    return worst


def _matrix(y: Tensor) -> Tensor:
    return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(1, -1)


def expected_floor(contender: Contender, tokens: int, device: torch.device, dtype: torch.dtype) -> float | None:
    """The largest expected floor of the model's products; with gradients, of those as well."""
    policy = contender.provider.policy
    if policy is None:
        return None
    if policy.level == "off":
        return 0.0
    floors = []
    for module in contender.model.modules():
        if isinstance(module, nn.Linear):
            n, k = module.weight.shape
            products = [(tokens, n, k)]
            if contender.workload.passes != "forward":
                products += [(tokens, k, n), (n, k, tokens)]
            floors += [_floor(policy, *product, device, dtype) for product in products]
        elif isinstance(module, Attention) and module.policy is not None and module.shape is not None:
            queries, keys, width = module.shape
            products = [(queries, keys, width), (queries, width, keys)]  # S, and O; in the backward again dP, and the others
            floors += [_floor(policy, *product, device, torch.float32) for product in products]
    return max(floors)


def _floor(policy: abft.Policy, m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> float:
    # Shapes decide, so nothing is allocated: one number, seen as a matrix.
    a, w = (torch.zeros((), dtype=dtype, device=device).expand(*shape) for shape in ((m, k), (n, k)))
    call = Call(a, w, None, None, False, "fprop", policy, 0)
    return checked._expected_floor(call, checked.choose_backend(call))


class _Subject:
    """What bench.campaign.trial strikes: all results of the timed module, as one row."""

    def __init__(self, contender: Contender, inputs: tuple[Tensor, ...]) -> None:
        self.number, self.fused = 0, True
        self._contender, self._inputs = contender, inputs
        self.clean = {FLIP.role: self.run(FLIP.role)}

    def run(self, role: str) -> Tensor:
        return torch.cat([t.reshape(1, -1) for t in self._contender.results(self._inputs)], 1)


def detection(contender: Contender, inputs: tuple[Tensor, ...], trials: int, harm: float, *, seconds: float = math.inf,
              seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """What became of ``trials`` flips, each in a random product of the passes; of fewer, if they would take more than ``seconds``."""
    if not contender.provider.checks or trials == 0:
        return {"trials": 0}
    subject = _Subject(contender, inputs)
    abft.report(reset=True)
    contender.results(inputs)
    products = abft.report(reset=True).products
    assert products, "a provider that checks has counted no product"
    rng, tally = np.random.default_rng(seed), campaign.Tally()
    end = time.monotonic() + seconds
    for number in range(trials):
        if number and time.monotonic() > end:
            break
        fault = FLIP.replace(call=int(rng.integers(products)))
        campaign.trial(tally, subject, fault, int(rng.integers(2**31)), harm)  # type: ignore[arg-type]
    return {
        "trials": tally.trials, "harm": harm, "harmful": tally.harmful, "found": tally.harmful_detected,
        "at_least": intervals.lower_limit(tally.harmful_detected, tally.harmful) if tally.harmful else 0.0,
        "smallest_found": tally.floor, "largest_missed": tally.largest_missed,
        "repaired": tally.repaired, "detected": tally.detected, "false_alarms": tally.false_alarms,
    }  # fmt: skip
