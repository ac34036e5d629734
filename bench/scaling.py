"""Cost of the check against K, N, M and the group's width G, each with the others held, beside what counting predicts.

    python -m bench scaling --plots plots          a few minutes on a CPU
    python -m bench scaling --shapes 'K-*' 'G-*'   some of the sweeps
    python -m bench scaling --list

Timed as ``bench linear`` does, forward. On a CPU a ratio is against torch, on a GPU against the unchecked twin. The prediction
(bench/counting.py) is in the same file and the same plot; it is a count, and was made without looking at times.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import comparison, counting, devices, scaling_chart, workloads
from bench.providers import AGAIN, BASELINE, TWIN
from bench.results import Results
from bench.shapes import Shape
from bench.workloads import DTYPES


@dataclass(frozen=True)
class Sweeps:
    """What is held (m, n, k; G is the policy's own), what is swept, who is timed, against whom."""

    held: tuple[int, int, int]
    values: dict[str, tuple[int, ...]]
    dtype: str
    way: str
    ours: str
    against: str


ON_CPU = Sweeps(
    (256, 1024, 1024),
    {"K": (128, 256, 512, 1024, 2048, 4096), "N": (128, 256, 512, 1024, 2048, 4096), "M": (1, 16, 64, 256, 1024, 4096),
     "G": (16, 32, 64, 128, 256, 512, 1024)},
    "fp32", "eager", "abft", BASELINE,
)  # fmt: skip
ON_GPU = Sweeps(
    (4096, 4096, 4096),
    {"K": (512, 1024, 2048, 4096, 8192, 16384), "N": (512, 1024, 2048, 4096, 8192, 16384), "M": (1, 16, 64, 512, 2048, 4096, 8192, 16384),
     "G": (128, 256, 512, 1024, 2048)},
    "bf16", "graph", "abft:triton", TWIN,
)  # fmt: skip
#: Beside these figures, faults are looked for only so that no check is timed that sees nothing.
ROUNDS, TRIALS = 21, 5


@dataclass(frozen=True)
class Point:
    """One value of one sweep; group None: as the policy has it."""

    sweep: str
    value: int
    shape: Shape
    group: int | None = None

    @property
    def name(self) -> str:
        return f"{self.sweep}-{self.value}"

    def provider(self, ours: str) -> str:
        """``abft``, or with a width ``abft:g=64``, ``abft:triton,g=64``."""
        return ours if self.group is None else f"{ours}{',' if ':' in ours else ':'}g={self.group}"


def points(sweeps: Sweeps) -> Iterator[Point]:
    """Every point; where sweeps cross they have the same shape, which is timed once."""
    m, n, k = sweeps.held
    for sweep, values in sweeps.values.items():
        for value in values:
            sizes = {"M": m, "N": n, "K": k} | ({} if sweep == "G" else {sweep: value})
            name = "m{M}-n{N}-k{K}".format(**sizes) + ("-groups" if sweep == "G" else "")
            shape = Shape(name, sizes["M"], sizes["N"], sizes["K"])
            yield Point(sweep, value, shape, value if sweep == "G" else None)


def main(argv: list[str], sweeps: Sweeps | None = None) -> int:
    parser = comparison.parser("scaling", __doc__)
    parser.set_defaults(rounds=ROUNDS, trials=TRIALS)
    options = parser.parse_args(argv)
    cuda = options.device.startswith("cuda")
    sweeps = sweeps or (ON_GPU if cuda else ON_CPU)
    if options.list:
        for point in points(sweeps):
            s = point.shape
            print(f"  {point.name:<10} M {s.m:>6}  N {s.n:>6}  K {s.k:>6}  G {point.group or 'of the policy'}")
        comparison.list_providers()
        return 0
    wanted = options.shapes or ["*"]
    chosen = [p for p in points(sweeps) if any(fnmatch.fnmatchcase(p.name, pattern) for pattern in wanted)]
    if not chosen:
        parser.error(f"no point is called {' or '.join(wanted)}; --list names them")
    return _run(chosen, sweeps, options)


def _run(chosen: list[Point], sweeps: Sweeps, options: argparse.Namespace) -> int:
    options.dtypes, options.ways = options.dtypes or [sweeps.dtype], options.ways or [sweeps.way]
    plots, options.plots = options.plots, None
    others = [name for name in options.providers or () if name != sweeps.ours]
    beside = [sweeps.against] if sweeps.against != BASELINE else []
    status = 0
    # Widths are providers of one case, interleaved; the other sweeps are cases.
    for mine in ([p for p in chosen if p.group is None], [p for p in chosen if p.group is not None]):
        if mine:
            options.providers = [*beside, *dict.fromkeys(p.provider(sweeps.ours) for p in mine), *others]
            todo = [workloads.linear(shape, "forward") for shape in dict.fromkeys(p.shape for p in mine)]
            status = comparison.run("scaling", todo, options, name="scaling") or status
            options.fresh = False
    results = Results(f"scaling-{devices.device_name(torch.device(options.device))}", folder=options.out)
    for point in chosen:
        for dtype in options.dtypes:
            for way in options.ways:
                _join(point, dtype, way, sweeps, results, torch.device(options.device))
    if plots:
        scaling_chart.draw(results.records, plots, results.path.stem)
    return status


def _join(point: Point, dtype: str, way: str, sweeps: Sweeps, results: Results, device: torch.device) -> None:
    """Put what was measured and what was predicted into one record; nothing where the point was not timed."""
    key = f"{point.name} {dtype} {way}"
    case = f"{point.shape.name} {dtype} forward {way}"
    timed = {r["provider"]: r for r in results.records if r["kind"] == "timing" and r["case"] == case}
    ours = timed.get(point.provider(sweeps.ours))
    if results.find(key) is not None or ours is None or sweeps.against not in timed:
        return
    measured: dict[str, Any] = ours["over_twin"] if sweeps.against == TWIN else ours
    s, again = point.shape, timed[AGAIN]
    r = results.add(
        "scaling", key=key, sweep=point.sweep, value=point.value, m=s.m, n=s.n, k=s.k, group=point.group, dtype=dtype, way=way,
        provider=ours["provider"], against=sweeps.against, **{name: measured[name] for name in ("ratio", "low", "high")},
        again=[again["low"], again["high"]], predicted=_predicted(point, dtype, device),
    )  # fmt: skip
    counted = ", ".join(f"by {how} {ratio:.3f}" for how, ratio in r["predicted"].items()) or "nothing predicted"
    print(f"{key:<20} × {float(r['ratio']):.3f} ({float(r['low']):.3f} … {float(r['high']):.3f}); counted {counted}", flush=True)


def _predicted(point: Point, dtype: str, device: torch.device) -> dict[str, float]:
    s = point.shape
    if device.type != "cuda":
        return counting.on_cpu(s.m, s.n, s.k, DTYPES[dtype][0], point.group)
    from abft.backends import triton as backend

    try:
        return counting.on_gpu(s.m, s.n, s.k, dtype, backend.family_of(device), point.group)
    except LookupError:  # launch shapes that were never audited, as measured ones may be
        return {}
