"""What a plan needs to know of a model: per site its products, their time, the cost of every option, the harm a fault does. A value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from abft.errors import PolicyError
from abft.policies import options
from abft.policies.options import Option

VERSION = 1
#: Multiply-adds of a check on a CPU: per number of the input, and per number of the result (docs/decisions/0035).
PER_INPUT = {"float32": 8, "float64": 8, "bfloat16": 36, "float16": 36}
PER_RESULT = 5
#: A multiply-add of a check costs so many of the product's, which has the processor's best kernels: bench/results/time-linear-cpu.jsonl;
#: tests/test_adaptive.py compares the counted ratios with the measured ones.
WEIGHT = {"float32": 2.0, "float64": 2.0, "bfloat16": 4.0, "float16": 4.0}
#: Seconds of a multiply-add where nothing was measured; only ratios of costs enter a plan, and exposures of evidence.
SECONDS = 1e-11
#: Seconds that the dispatch of a checked product takes beside torch's (bench/results/host.jsonl: 28 µs of a small layer's 100).
DISPATCH = 28e-6


@dataclass(frozen=True)
class SiteProfile:
    """products, seconds: of one pass of the model, unprotected; costs: seconds that each measured option adds to a pass.

    sensitivity: P(a fault here makes the model's result wrong), with the trials it rests on (0: not measured, taken for certain).
    shape: (rows, columns, depth) of one product; intensity: multiply-adds per byte of operands and result.
    """

    products: float
    seconds: float
    costs: Mapping[str, float]
    dtype: str = "float32"
    shape: tuple[int, int, int] = (0, 0, 0)
    sensitivity: float = 1.0
    trials: int = 0

    def cost(self, option: Option) -> float:
        """Seconds added to a pass; of a sampled option the share of what it samples, and the rest costs what ``off`` does."""
        if option.every > 1:
            off = self.costs["off"]
            return off + (self.costs[option.level] - off) / option.every
        # Not measured on a GPU, nor before there was such a rung: what it does besides correcting is little.
        return self.costs["correct"] if option.name == "statistical" and option.name not in self.costs else self.costs[option.name]

    @property
    def intensity(self) -> float:
        m, n, k = self.shape
        width = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return m * n * k / (width * (m * k + n * k + m * n)) if m * n * k else 0.0


@dataclass(frozen=True)
class Profile:
    """sites by module name; harm: the relative change that counts as wrong; how: measured on the spot, or counted.

    seconds: of a whole pass, products and all else. Read and written as JSON text, never as a pickle.
    """

    sites: Mapping[str, SiteProfile]
    seconds: float
    harm: float = 1e-3
    how: str = "measured"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def products(self) -> float:
        return sum(site.products for site in self.sites.values())

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        values = json.loads(text)
        version = values.pop("version", None)
        if version != VERSION:
            raise PolicyError(f"this is a profile of version {version}; version {VERSION} is read here. Measure it again.")
        sites = {name: SiteProfile(**{**site, "shape": tuple(site["shape"])}) for name, site in values.pop("sites").items()}
        return cls(sites=sites, **values)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def counted(modules: Mapping[str, nn.Module], rows: int = 1024, *, training: bool = False, harm: float = 1e-3) -> Profile:
    """A profile without running anything: costs from counted operations, every fault taken for harmful.

    rows: of the products, which a module does not know. Good enough to rank options; ``profile`` measures.
    """
    sites = {name: _counted_site(module, rows, 3 if training else 1) for name, module in modules.items()}
    return Profile(sites, sum(site.seconds for site in sites.values()), harm, "counted", {"rows": rows})


def _counted_site(module: nn.Module, rows: int, passes: int) -> SiteProfile:
    weights = [p for p in module.parameters() if p.dim() == 2]
    dtype = str(weights[0].dtype)[6:] if weights else "float32"
    products = passes * max(1, len(weights))
    work = passes * sum(rows * w.shape[0] * w.shape[1] for w in weights) * SECONDS
    added = passes * sum(rows * (PER_INPUT.get(dtype, 8) * w.shape[1] + PER_RESULT * w.shape[0]) for w in weights)
    check = added * WEIGHT.get(dtype, 2.0) * SECONDS + products * DISPATCH
    again = work + products * DISPATCH
    costs = {
        "off": products * DISPATCH / 4, "detect": check, "statistical": check, "correct": check, "dmr": again, "tmr": again + work,
        "correct+dmr": again + check, "correct+tmr": again + work + check,
    }  # fmt: skip
    shape = (rows, *weights[0].shape) if weights else (0, 0, 0)
    return SiteProfile(products, work, costs, dtype, tuple(int(n) for n in shape))  # type: ignore[arg-type]


def complete(costs: Mapping[str, float]) -> dict[str, float]:
    """Measured costs made consistent: nothing is cheaper than nothing, and doing more costs no less; noise would say otherwise."""
    out = {name: max(0.0, seconds) for name, seconds in costs.items()}
    for weaker, stronger in (("off", "correct"), ("off", "detect"), ("off", "dmr"), ("dmr", "tmr"), ("dmr", "correct+dmr"),
                             ("correct", "correct+dmr"), ("tmr", "correct+tmr"), ("correct+dmr", "correct+tmr"),
                             ("correct", "statistical")):  # fmt: skip
        if stronger in out:
            out[stronger] = max(out[stronger], out[weaker])
    return {option.name: out[option.name] for option in options.MEASURED if option.name in out}
