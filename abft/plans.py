"""The policy of a product whose policy may change from one product to the next: planned for its site, or sampled.

Decided inside the operator, when the product runs, from what the host knows (the site's plan, a count of its products). The text that
travels with a product stays the same, so a compiled graph serves every plan; nothing reads a device.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from functools import lru_cache

import torch

from abft import sites
from abft.policy import Policy, decode

_counts: defaultdict[tuple[int, str], itertools.count[int]] = defaultdict(itertools.count)
NOT_SAMPLED = "not sampled"


def planned(policy: Policy, site: int) -> Policy:
    """What the plan of the site says; ``policy`` itself where it does not ask for a plan."""
    if policy.level != "planned":
        return policy
    return sites.site_of(site).plan or _variants(policy.text)[0]


def now(text: str, site: int, role: str, *, on_gpu: bool = False) -> Policy:
    """The policy of the next product of this role at the site; counts it, if it is sampled."""
    policy = decode(text)
    if not policy.dynamic:
        return policy
    policy = planned(policy, site)
    if policy.every == 1:
        return policy
    protected, left_alone = _variants(policy.text)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return protected  # a replayed graph repeats this decision for ever
    block, place = divmod(next(_counts[site, role]), policy.every)
    return protected if place == chosen_place(block, site, role, policy.every) else left_alone


def chosen_place(block: int, site: int, role: str, every: int) -> int:
    """Which of a block of ``every`` products is protected: drawn, so that nothing periodic in the program hides from it.

    The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    z = (block * 0x9E3779B97F4A7C15 + site * 0xD1B54A32D192ED03 + len(role) * ord(role[0])) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) % every


@lru_cache(maxsize=1024)
def _variants(text: str) -> tuple[Policy, Policy]:
    """(the policy where it protects, the one where it does not) of a dynamic policy."""
    policy = decode(text)
    protected = policy.replace(level="correct" if policy.level == "planned" else policy.level, every=1)
    return protected, policy.replace(level="off", redundancy="none")


@lru_cache(maxsize=1024)
def checked(policy: Policy) -> Policy:
    """For what has no unchecked form (attention's kernels): the policy, with its checks on where a plan or a sample leaves them off."""
    return policy if policy.level != "off" else policy.replace(level="correct", every=1)


def why_unchecked(policy: Policy, role: str) -> str:
    """The reason under which an unchecked product is counted."""
    if policy.level != "off":
        return f"role {role} not in policy"
    return NOT_SAMPLED if policy.every > 1 else "level off"
