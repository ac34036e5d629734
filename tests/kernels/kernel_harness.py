"""One product through the kernels, with a ledger of its own, and everything that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import oracles
import torch
from abft.triton_kernels import gemm, launch
from torch import Tensor

from abft import ledger, sites
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.checksum import Panel, Sums
from abft.faults import BitOperation, Region, Strike
from abft.policy import Policy
from bench import residuals

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: bf16 only where the tensor cores multiply it: the interpreter's product of bf16 numbers is wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE.type == "cuda" else ())
SITE = 3
#: Patterns on the fp32 bits of an accumulator.
NULLIFY, INF, NAN = BitOperation(keep=0), BitOperation(keep=0, flip=0x7F800000), BitOperation(keep=0, flip=0x7FC00000)
FAULTS = ("observed", "recomputed", "reconstructed", "uncorrected")


@dataclass
class Run:
    """A product and what the ledger says of it."""

    y: Tensor
    counters: dict[str, int]
    records: list[dict[str, int]]
    evidence: gemm.Evidence
    status: Tensor  # (B, groups, M): what verification made of every row and group
    panel: Panel
    plan: backend.Plan

    @property
    def worst(self) -> float:
        return ledger.bits_float(self.counters["worst"])

    @property
    def suspect_rows(self) -> list[int]:
        return (self.status >= 2).any(1).flatten().nonzero().flatten().tolist()

    @property
    def detected(self) -> int:
        return sum(self.counters[name] for name in FAULTS)

    def verdict(self) -> str:
        return ledger.VERDICTS[self.records[-1]["verdict"]].name


def fresh_ledger() -> Tensor:
    return torch.zeros(ledger.WORDS, dtype=torch.int64, device=DEVICE)


def run(a: Tensor, w: Tensor, bias: Tensor | None = None, *, strikes: tuple[Strike, ...] = (), again: tuple[Strike, ...] = (),
        words: Tensor | None = None, site: int = SITE, source: Tensor | None = None, role: str = "fprop", transposed: bool = False,
        **policy: Any) -> Run:  # fmt: skip
    """``strikes`` hit the product, ``again`` its repetition."""
    words = fresh_ledger() if words is None else words
    policy = {"panel": "full", "level": "correct"} | policy
    a, w, bias = a.to(DEVICE), w.to(DEVICE), None if bias is None else bias.to(DEVICE)
    call = Call(a, w, bias, source, transposed, role, Policy(**policy), site, tuple(strikes))
    seen: dict[str, Any] = {}

    def multiply(product: gemm.Product, faults: Tensor | None) -> gemm.Evidence:
        seen["evidence"] = _multiply(product, faults)
        return seen["evidence"]

    def check(*args: Any) -> Tensor:
        seen["judge"], seen["panel"] = args[2], args[0].panel
        seen["status"] = _check(*args, backend.descriptors(again, DEVICE))
        return seen["status"]

    _multiply, _check = gemm.multiply, launch.check
    with mock.patch.object(gemm, "multiply", multiply), mock.patch.object(launch, "check", check):
        y = backend.product(call, words, torch.tensor(site, device=DEVICE))
    plan = backend.plan_for(call)
    return Run(y, counters_of(words, site), records_of(words), seen["evidence"], seen["status"],
               Panel(plan.layout, seen["panel"], seen["judge"].memory.scales), plan)  # fmt: skip


def counters_of(words: Tensor, site: int) -> dict[str, int]:
    row = words[ledger.HEADER :][site * ledger.COUNTERS : (site + 1) * ledger.COUNTERS].tolist()
    return dict(zip(ledger.COUNTER_NAMES, row, strict=False))


def records_of(words: Tensor) -> list[dict[str, int]]:
    host = words.cpu().numpy()
    ring = host[ledger.HEADER + sites.CAPACITY * ledger.COUNTERS :].reshape(ledger.RING, ledger.RECORD)
    head = int(host[ledger.HEAD])
    return [dict(zip(ledger.RECORD_NAMES, ring[i % ledger.RING].tolist(), strict=True)) for i in range(max(0, head - ledger.RING), head)]


def judged(result: Run, k: int) -> tuple[Sums, np.ndarray]:
    """The sums that the product stored, and their bounds, by abft.checksum and abft.threshold: (B, M, groups, kinds)."""
    panel = result.panel
    on_host = Panel(panel.layout, panel.columns.cpu(), None if panel.scales is None else panel.scales.cpu())
    return residuals.judged(result.evidence.partials.cpu(), result.evidence.raw.cpu(), on_host, result.plan, k)


def assert_right(result: Run, a: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Against fp64, at most twice as wrong as the worst element of an independent product, plus one rounding."""
    exact = oracles.product(a, w.mT, bias)
    rounding = oracles.ROUNDOFF[a.dtype] * exact.abs()
    oracles.assert_within(result.y.cpu(), exact, (oracles.budget(a, w.mT, bias) - rounding).amax() + rounding)


def at(row: int, col: int, rows: int = 1, cols: int = 1, stride: int = 1) -> Region:
    return Region(row, row + rows, col, col + cols, stride)


def operands(m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian activations and a weight that keeps their size."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g).to(dtype), (torch.randn(n, k, generator=g) / max(k, 1) ** 0.5).to(dtype)
