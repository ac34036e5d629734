"""What one attention adds to the ledger: its products, each with its role, its checks and what was found wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from abft import faults, ledger, plans, reporting, sites
from abft.backends.call import Call
from abft.faults import Strike, Target
from abft.ledger import Finding, Outcome, Verdict
from abft.policy import Policy

#: Product → role: the scores and their gradients, and what the softmax makes of them.
ROLES = {"S": "qk", "dQ": "qk", "dK": "qk", "O": "pv", "dP": "pv", "dV": "pv"}
GRAVITY = (
    Verdict.INPUT, Verdict.OVERFLOW, Verdict.FALSE_ALARM, Verdict.STALE, Verdict.TOLERATED,
    Verdict.RECOMPUTED, Verdict.RECONSTRUCTED, Verdict.OBSERVED, Verdict.UNCORRECTED,
)  # fmt: skip

Note = Callable[[Call, Target, Tensor, Tensor, tuple[Strike, ...]], None]


@dataclass
class Product:
    """One product of a call: shape (rows over all heads, columns, depth) and outcome."""

    shape: tuple[int, int, int]
    outcome: Outcome


@dataclass
class Tally:
    """The books of one call. direction: fprop or dgrad; a policy that names either that or the product's own role checks it.

    struck: whether an injector may strike what is computed (the first execution only). note: where it is told of it.
    """

    policy: Policy
    site: int
    direction: str
    dtype: torch.dtype
    struck: bool = True
    note: Note | None = None
    products: dict[str, Product] = field(default_factory=dict)
    _target: Target | None = None

    def checks(self, role: str) -> bool:
        return self.policy.level != "off" and (role in self.policy.roles or self.direction in self.policy.roles)

    @property
    def repairs(self) -> bool:
        return self.policy.level == "correct" and self.policy.timing == "immediate"

    @property
    def only_told(self) -> Verdict:
        """What a wrong row is that nobody repairs."""
        return Verdict.OBSERVED if self.policy.level == "detect" else Verdict.UNCORRECTED

    def aside(self) -> Tally:
        """Books for a repetition, which nobody keeps and no injector strikes."""
        products = {name: Product(p.shape, Outcome()) for name, p in self.products.items()}
        return Tally(self.policy, self.site, self.direction, self.dtype, struck=False, products=products)

    def expect(self, name: str, rows: int, columns: int, depth: int) -> None:
        """A product of this call: every row of its result is a check."""
        self.products[name] = Product((rows, columns, depth), Outcome(checks=rows))

    def outcome(self, name: str) -> Outcome:
        return self.products[name].outcome

    def find(self, name: str, verdict: Verdict, rows: int, row: int, residual: float, bound: float, cause: str = "unknown") -> None:
        if rows:
            self.outcome(name).findings.append(Finding(verdict, rows, row, None, residual, bound, cause))

    @property
    def may_be_struck(self) -> bool:
        return self.struck and faults.active is not None

    def strikes(
        self, role: str, shape: tuple[int, int, int, int], dtype: torch.dtype, places: tuple[str, ...], checks: int
    ) -> tuple[Strike, ...]:
        """What an injector sends to a product of (heads, rows, columns, depth), ``checks`` columns in its panel."""
        heads, rows, columns, depth = shape
        name = sites.site_of(self.site).name
        self._target = Target(name, role, rows, columns, depth, dtype, dtype, heads, checks=checks, check=dtype, places=places)
        return tuple(faults.strikes(self._target))

    def struck_by(self, strikes: tuple[Strike, ...], clean: Tensor, struck: Tensor) -> None:
        """Tell the injector what its faults did."""
        if self.note is not None and strikes:
            self.note(None, self._target, clean, struck, strikes)  # type: ignore[arg-type]

    def close(self, alone: bool = False) -> None:
        """Write everything into this thread's ledger and react. alone: a vote has checked what the policy's checks do not."""
        book = ledger.cpu()
        repeated = self.direction == "fprop" and torch._C._current_graph_task_id() != -1
        for name, product in self.products.items():
            if self.checks(ROLES[name]) or alone:
                book.count(self.site, product.outcome, repeated)
            else:
                ledger.bypass(plans.why_unchecked(self.policy, ROLES[name]))
        for role in ("qk", "pv"):
            self._announce(role, book)

    def _announce(self, role: str, book: ledger.CpuLedger) -> None:
        found = [(f, p) for name, p in self.products.items() if ROLES[name] == role for f in p.outcome.findings]
        if not found:
            return
        # One event per call and role: the gravest finding speaks, the counters know the rest.
        finding, product = max(found, key=lambda pair: GRAVITY.index(pair[0].verdict))
        m, n, k = product.shape
        words: dict[str, Any] = {
            "role": ledger.ROLE_NAMES.index(role), "m": m, "n": n, "k": k,
            "dtype": ledger.DTYPES.index(self.dtype), "backend": ledger.BACKEND_NAMES.index("reference"),
        }  # fmt: skip
        event = reporting.note(book, self.site, finding, words)
        reporting.react(self.policy.on_uncorrected, event)
