"""``protected()``: a scope in which torch's products are checked without touching any module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from abft import events, pending, reporting, scope
from abft import policy as policies
from abft.ledger import Point
from abft.modes import ProductMode
from abft.ops.attention import attention
from abft.ops.checked import product
from abft.ops.integer import int_product
from abft.ops.varlen import varlen_attention
from abft.policy import Policy
from abft.reporting import Report


class protected:
    """``with abft.protected(policy) as scope:`` — linear, matmul, bmm, mm, addmm, _int_mm and attention inside are checked; so is their
    backward.

    policy: a Policy, a preset's name, or None (the policy in force outside). ``scope.report()`` is what happened since entering.
    Products under ``timing="deferred"`` are judged at exit, in one launch, and in ``scope.report()``.
    Under ``on_uncorrected="raise"`` an unrepaired fault raises inside the call on a CPU, at the latest at exit on a GPU.
    Products hidden from interception (einsum, convolutions) are counted in ``bypassed``.
    """

    def __init__(self, policy: policies.PolicyLike = None) -> None:
        self._policy = None if policy is None else policies.as_policy(policy)
        self._mode: ProductMode | None = None
        self._start: Point | None = None

    def __enter__(self) -> protected:
        self._start = reporting.mark()
        scope.push(scope.in_force(self._policy))
        self._mode = ProductMode()
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._mode is not None
        self._mode.__exit__(kind, error, trace)
        policy = scope.in_force(None)
        scope.pop()
        pending.flush()  # after an exception, too: what was computed is judged
        if kind is None and policy.on_uncorrected == "raise":
            reporting.drain()

    def report(self) -> Report:
        """What happened in this scope so far; waits for the device."""
        if self._start is None:
            raise RuntimeError("protected().report() needs the scope to have been entered: use `with abft.protected() as scope:`")
        return reporting.since(self._start)


@contextmanager
def context(**labels: str) -> Iterator[None]:
    """Put labels on the events of faults found inside: ``with abft.context(release="2.1", request="a17"):``."""
    token = events.labels.set(events.labels.get({}) | {k: str(v) for k, v in labels.items()})
    try:
        yield
    finally:
        events.labels.reset(token)


#: For selective activation checkpointing: save the results of these operators instead of recomputing them.
checkpoint_ops = [product, int_product, attention, varlen_attention]


def checkpoint_context() -> tuple[Any, Any]:
    """A ``context_fn`` for ``torch.utils.checkpoint``: recomputation in backward runs in the scope the forward ran in.

    Interception is off during backward, so without it the recomputed products of a ``protected()`` scope would not be
    checked. Modules made checked by ``protect`` need it not.
    """
    policies_now = scope._stack.policies
    return nullcontext(), _Reentered(policies_now[-1]) if policies_now else nullcontext()


class _Reentered:
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __enter__(self) -> None:
        scope.push(self._policy)
        self._mode = ProductMode()
        self._mode.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._mode.__exit__(*exc)
        scope.pop()


