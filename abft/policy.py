"""Choices: what is checked, by what, and what happens when a check fails. Frozen values, validated at construction."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from abft.errors import PolicyError

Level = Literal["off", "detect", "correct", "planned"]
Backend = Literal["auto", "triton", "reference", "vendor"]
Redundancy = Literal["none", "dmr", "tmr"]
Role = Literal["fprop", "dgrad", "wgrad"]
ROLES: frozenset[str] = frozenset(get_args(Role))
#: Attention's own products, which the three above include by their direction.
ATTENTION_ROLES = frozenset({"qk", "pv"})
OnUncorrected = Literal["record", "warn", "raise"] | Callable[[Any], None]

_CHOICES = {
    "level": get_args(Level),
    "backend": get_args(Backend),
    "redundancy": get_args(Redundancy),
    "panel": ("lean", "full"),
    "timing": ("immediate", "deferred"),
    "detector": ("checksum", "statistical", "both"),
    "weights": ("tracked", "frozen"),
}
#: Callable reactions by their number in this process, kept alive with it, and the numbers by identity.
_callables: list[Callable[[Any], None]] = []
_numbers: dict[int, int] = {}
_lock = threading.Lock()


def _number_of(reaction: Callable[[Any], None]) -> int:
    with _lock:
        number = _numbers.setdefault(id(reaction), len(_callables))
        if number == len(_callables):
            _callables.append(reaction)
        return number


def _encode(policy: Policy) -> str:
    """What a product needs of a policy, as text: the same in every process, so compiled graphs may be cached on disk.

    A callable reaction goes by its number, which each process resolves for itself when the product runs.
    """
    kept = {f.name: getattr(policy, f.name) for f in fields(policy) if getattr(policy, f.name) != f.default}
    if "roles" in kept:
        kept["roles"] = sorted(policy.roles)
    if callable(policy.on_uncorrected):
        kept["on_uncorrected"] = _number_of(policy.on_uncorrected)
    return json.dumps(kept, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How products are protected.

    level: off (nothing is checked), detect (report only), correct (repair on the device), planned (everything here is what the plan of
        ``abft.policies.Adaptive`` says at the site when the product runs; without a plan: correct).
    every: of every so many products of a site and role one is protected, at a place drawn anew each time, and the others are left alone and
        counted: a fault is missed with probability 1 - 1/every. In a captured CUDA graph, where no host decides, all are protected.
    backend: auto, or an explicit one that never falls back.
    redundancy: dmr runs a product twice and lets a third decide bitwise; tmr runs three and votes. Independent of level.
    panel: checksum columns; lean costs half and is half-blind to equal pairs.
    group: result columns under one check; None takes the backend's table.
    roles: which products are checked: fprop, dgrad, wgrad of a layer; attention's in the forward with fprop, in the backward with dgrad,
        or by themselves, in both, as qk (scores and their gradients) and pv (softmax, values and theirs).
    timing: immediate judges (and repairs) a product before anybody reads it; deferred judges many products together, later (at the
        exit of ``protected``, in ``report`` and in ``StepGuard.attempt``), and repairs nothing: a wrong row is uncorrected.
    detector: checksum judges every row by its bound, at once. both also keeps statistics of the residuals, which show what no bound does:
        a small bias, more noise, rare outliers (docs/explanation/statistics.md). statistical does so too, and repairs
        of the rows beyond their bound those that matter: what one located element changes by less than 10⁻³ of the row is
        counted and left as it is (``Report.tolerated``), within a budget per site; with timing="deferred" or level="detect",
        where nothing is repaired, and with a lean panel, which locates nothing, it is ``both``.
    weights: tracked follows announced changes; frozen treats any change without ``abft.refresh`` as a memory fault.
    max_floor: largest acceptable floor relative to a row's L2 norm; auto must meet it or raises PolicyError.
    on_uncorrected: record, warn, raise, or a callable that receives the FaultEvent.

    Raises PolicyError (a ValueError) for unknown values. Backends on a GPU other than triton raise NotImplementedError for the
    detectors statistical and both.
    """

    level: Level = "correct"
    every: int = 1
    backend: Backend = "auto"
    redundancy: Redundancy = "none"
    panel: Literal["lean", "full"] = "full"
    group: int | None = None
    roles: frozenset[str] = ROLES
    timing: Literal["immediate", "deferred"] = "immediate"
    detector: Literal["checksum", "statistical", "both"] = "checksum"
    weights: Literal["tracked", "frozen"] = "tracked"
    max_floor: float | None = None
    on_uncorrected: OnUncorrected = "warn"
    text: ClassVar[str]  # set per instance; not a choice
    dynamic: ClassVar[bool]  # set per instance; what it means is decided when a product runs (abft.plans)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise PolicyError(f"Policy.{name} must be one of {', '.join(allowed)}; got {value!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PolicyError(f"Policy.every must be a whole number from 1; got {self.every!r}")
        if self.level == "planned" and (self.every != 1 or self.redundancy != "none"):
            raise PolicyError("Policy.level='planned' leaves every and redundancy to the plan; leave them at 1 and 'none'")
        self._check_roles()
        self._check_group()
        if self.timing == "deferred" and self.redundancy != "none":
            raise PolicyError(
                f"Policy.timing='deferred' leaves wrong rows to the caller; redundancy={self.redundancy!r} repairs them at once, and its "
                "repairs would be reported as faults later. Use timing='immediate' with it, or redundancy='none'"
            )
        floor = self.max_floor
        if floor is not None and (isinstance(floor, bool) or not (isinstance(floor, int | float) and 0 < floor < float("inf"))):
            raise PolicyError(f"Policy.max_floor must be a positive number or None; got {self.max_floor!r}")
        if not callable(self.on_uncorrected) and self.on_uncorrected not in ("record", "warn", "raise"):
            raise PolicyError(f"Policy.on_uncorrected must be record, warn, raise or a callable; got {self.on_uncorrected!r}")
        # How it travels as an operator argument; made once, so that tracers see a constant.
        object.__setattr__(self, "text", _encode(self))
        object.__setattr__(self, "dynamic", self.level == "planned" or (self.every > 1 and self.protects))

    @property
    def protects(self) -> bool:
        """Whether it does anything about a product."""
        return self.level != "off" or self.redundancy != "none"

    def __reduce__(self) -> Any:
        # Made anew in another process: the number of a callable reaction is this process's own.
        return _remake, ({f.name: getattr(self, f.name) for f in fields(self)},)

    def _check_roles(self) -> None:
        if isinstance(self.roles, str) or not isinstance(self.roles, Iterable) or not all(isinstance(role, str) for role in self.roles):
            raise PolicyError(f"Policy.roles must be a set of role names; got {self.roles!r}")
        object.__setattr__(self, "roles", frozenset(self.roles))
        unknown = self.roles - ROLES - ATTENTION_ROLES
        if unknown:
            raise PolicyError(f"Policy.roles must be among {sorted(ROLES | ATTENTION_ROLES)}; got {sorted(unknown)}")

    def _check_group(self) -> None:
        if self.group is None:
            return
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 16 or self.group % 16:
            raise PolicyError(f"Policy.group must be a positive multiple of 16, or None; got {self.group!r}")

    @classmethod
    def preset(cls, name: str) -> Policy:
        """inference · training · audit · paranoid."""
        if name not in PRESETS:
            raise PolicyError(f"unknown policy preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: Any) -> Policy:
        """A copy with some fields changed."""
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise PolicyError(f"Policy has no field {sorted(unknown)}; it has {[f.name for f in fields(self)]}")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; a callable on_uncorrected has none and raises PolicyError."""
        if callable(self.on_uncorrected):
            raise PolicyError("a callable on_uncorrected cannot be written to a dict; replace it by record, warn or raise first")
        return asdict(self) | {"roles": sorted(self.roles)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise PolicyError(f"Policy has no field {sorted(unknown)}; it has {[f.name for f in fields(cls)]}")
        return cls(**{**values, "roles": frozenset(values.get("roles", ROLES))})


def _remake(values: dict[str, Any]) -> Policy:
    return Policy(**values)


PRESETS: dict[str, Policy] = {
    "inference": Policy(weights="frozen"),
    "training": Policy(on_uncorrected="record"),
    "audit": Policy(level="detect", on_uncorrected="record"),
    "paranoid": Policy(group=128, redundancy="dmr", on_uncorrected="raise"),
}

class Strategy:
    """What chooses a policy for every module of a model, and may choose again: ``abft.policies.Adaptive``. ``protect`` asks it."""

    def choose(self, modules: Mapping[str, Any]) -> Policy:
        """The policy that all of these modules, by name, carry. Raises PolicyError, before any is touched, if it has no answer."""
        raise NotImplementedError

    def enforce(self) -> None:
        """The modules are protected now: let the choice be in force."""
        raise NotImplementedError


PolicyLike = Policy | str | None


def as_policy(value: Any, *, what: str = "policy") -> Policy:
    """A Policy from a Policy or a preset's name."""
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        return Policy.preset(value)
    raise TypeError(f"{what} must be a Policy, the name of a preset ({', '.join(PRESETS)}) or None; got {type(value).__name__}")


# --- the form in which a policy travels as an operator argument ---------------------------------


@lru_cache(maxsize=4096)
def decode(text: str) -> Policy:
    """The policy that travelled as ``text``."""
    values = json.loads(text)
    if isinstance(values.get("on_uncorrected"), int):
        values["on_uncorrected"] = _callables[values["on_uncorrected"]]
    return Policy.from_dict(values)


# --- mappings from module names ------------------------------------------------------------------


def resolve(policies: Mapping[str, Any], names: list[str]) -> dict[str, Policy | None]:
    """The policy of every name: exact keys win over ``"re:…"`` keys (full match, in order); the rest get Policy().

    A None value means unprotected. A key that matches nothing raises PolicyError (a ValueError).
    """
    patterns = [(key, _pattern(key)) for key in policies if _is_pattern(key)]
    used: set[str] = set()
    out: dict[str, Policy | None] = {}
    for name in names:
        key = name if name in policies else next((k for k, p in patterns if p.fullmatch(name)), None)
        for k, pattern in patterns:
            if pattern.fullmatch(name):
                used.add(k)
        if key is None:
            out[name] = Policy()
            continue
        used.add(key)
        value = policies[key]
        out[name] = None if value is None else as_policy(value, what=f"policy for {key!r}")
    unmatched = [key for key in policies if key not in used]
    if unmatched:
        near = ", ".join(repr(n) for n in names[:8])
        raise PolicyError(f"policy keys {unmatched} match no protected module; there are {near}{' …' if len(names) > 8 else ''}")
    return out


def _is_pattern(key: Any) -> bool:
    if not isinstance(key, str):
        raise PolicyError(f"policy keys must be module names or re:patterns; got {key!r}")
    return key.startswith("re:")


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key[3:])
    except re.error as error:
        raise PolicyError(f"policy key {key!r} is no regular expression: {error}") from None
