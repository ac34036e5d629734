"""The policy in force: a module's own, else the innermost ``protected()`` scope's, else ``Policy()``."""

from __future__ import annotations

import threading

from abft.policy import Policy

DEFAULT = Policy()


class _Stack(threading.local):
    def __init__(self) -> None:
        self.policies: list[Policy] = []


_stack = _Stack()


def in_force(own: Policy | None) -> Policy:
    """The policy of a product whose module or caller chose ``own`` (None: it chose nothing)."""
    if own is not None:
        return own
    policies = _stack.policies
    return policies[-1] if policies else DEFAULT


def push(policy: Policy) -> None:
    _stack.policies.append(policy)


def pop() -> None:
    _stack.policies.pop()


def drop(policy: Policy) -> None:
    """Leave the innermost scope of this very policy, wherever it stands."""
    policies = _stack.policies
    for i in reversed(range(len(policies))):
        if policies[i] is policy:
            del policies[i]
            return
