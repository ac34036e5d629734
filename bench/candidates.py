"""Launch shapes worth timing: those around the built-in one that fit a multiprocessor, the one first that the waves make fastest.

Tiles come first, for they decide most; then the best one's stages, steps in K and loads.

A candidate may change time alone. Its steps in K, its instructions' unit, type and K stay what they are, so that the chain of sums of
every result stays the same; whether it does, to the bit, bench/tune.py sees on the device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from abft.triton_kernels import configs, decode, tuning
from abft.triton_kernels.configs import Config

from abft.backends import triton as backend
from bench.occupancy import LIMITS, SHARED_RESERVED
from bench.shapes import Shape

# None of these imports Triton, which decides at its import whether it interprets.

#: fp32 accumulators of a thread: more do not fit beside operands and row sums (bench/results/audit-*.jsonl), fewer starve the unit.
ACCUMULATORS = (16, 128)
#: (warps, programs of a multiprocessor): more of either do not have 255 registers a thread.
WARPS = ((8, 1), (4, 1), (4, 2))
STAGES = (2, 3, 4, 5, 6)
FEW_STAGES = (4, 6, 8, 10)
#: Kind of operand, as in the table of configs → bytes of a number.
SIZE = {"16-bit": 2, "tf32": 4, "ieee": 4}


@dataclass(frozen=True)
class Row:
    """A row of the table of configs. architecture None: interpreted. height: of tiles for few rows."""

    architecture: int | None
    kind: str
    height: int | None = None

    @property
    def built_in(self) -> Config:
        if self.architecture is None:
            return replace(configs.INTERPRETED[0], precision="ieee") if self.height is None else self._few(configs.INTERPRETED_DECODE)
        key = self.architecture, self.kind
        return configs.CONFIGS[key][0] if self.height is None else self._few(configs.DECODE[key])

    def _few(self, rows: tuple[Config, ...]) -> Config:
        return next(c for c in rows if c.bm == self.height)

    @property
    def bounds(self) -> Any:
        """What a multiprocessor has; of the interpreter's, nothing is known."""
        return LIMITS[f"sm_{self.architecture or 90}"]


def difference(config: Config, built_in: Config) -> dict[str, Any]:
    """The fields of a config that tuning.py would have to name."""
    names = [f.name for f in fields(Config) if f.name in tuning.FIELDS]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(built_in, name)}


def label(config: Config) -> str:
    """What is told apart by."""
    how = "descriptors" if config.descriptors else "pointers"
    return f"{config.bm}×{config.bn}×{config.bk} warps {config.warps} stages {config.stages} resident {config.resident} {how}"


@contextlib.contextmanager
def in_use(row: Row, config: Config) -> Iterator[None]:
    """Plans made inside take this config, in place of any table; none made inside is remembered."""
    backend.forget_plans()
    try:
        with tuning.instead({(row.architecture, row.kind, row.height, None): difference(config, row.built_in)}):
            yield
    finally:
        backend.forget_plans()


# --- which, and in what order ---------------------------------------------------------------------


def tiles(row: Row, shapes: Iterable[Shape], multiprocessors: int) -> list[Config]:
    """The built-in config, then one for every other tile and number of warps, by the time predicted for these shapes together.

    Each has as many stages as the built-in one or, if those do not fit, as do.
    """
    built_in, wanted = row.built_in, list(shapes)

    def predicted(config: Config) -> float:
        return sum(_time(row, config, s, multiprocessors) / _time(row, built_in, s, multiprocessors) for s in wanted)

    found = {_tile(built_in): built_in}
    stages = sorted({*STAGES, built_in.stages}, key=lambda n: (n > built_in.stages, -n))
    for base, n in itertools.product(_tiles(row), stages):
        config = replace(base, stages=n)
        if _tile(config) not in found and _fits(config, row):
            found[_tile(config)] = config
    return [built_in, *sorted((c for c in found.values() if c != built_in), key=predicted)]


def variants(row: Row, config: Config) -> list[Config]:
    """The same tile in other ways: stages, steps in K, loads; what changes least first."""
    stages = STAGES if row.height is None else FEW_STAGES
    depths = (row.built_in.bk, 2 * row.built_in.bk, row.built_in.bk // 2)
    loads = (True, False) if row.built_in.descriptors else (False,)
    ways = (replace(config, stages=n, bk=bk, descriptors=how) for n, bk, how in itertools.product(stages, depths, loads))
    return sorted((c for c in ways if c != config and _fits(c, row)), key=lambda c: len(difference(c, config)))


def _tile(c: Config) -> tuple[int, ...]:
    return c.bm, c.bn, c.warps, c.resident


def _tiles(row: Row) -> Iterator[Config]:
    c = row.built_in
    if row.height is not None:
        for bn, warps in itertools.product((64, 32, 16), (4, 8)):
            yield replace(c, bn=bn, warps=warps)
        return
    for bm, bn, (warps, resident) in itertools.product((64, 128, 256), (64, 128, 256), WARPS):
        yield replace(c, bm=bm, bn=bn, warps=warps, resident=resident)


def _fits(c: Config, row: Row) -> bool:
    """What can be told without compiling: registers of the accumulators, operands in shared memory, whole groups."""
    if c.bk < 16 or (row.height is None and configs.default_group(row.kind) % c.bn):
        return False
    fewest, most = ACCUMULATORS
    accumulators = c.bm * c.bn // (32 * c.warps)
    # Of few rows there is little to accumulate.
    if accumulators > most or (row.height is None and accumulators < fewest):
        return False
    # Warpgroup MMA wants 64 rows for each of the warpgroups.
    if row.architecture in (90, 100) and row.kind != "ieee" and row.height is None and c.bm // 64 < c.warps // 4 and c.bn < 128:
        return False
    operands = (c.bm + max(c.bn, c.bc if row.height is None else c.bn)) * c.bk * SIZE[row.kind]
    limits = row.bounds
    return operands * c.stages <= min(limits.block_shared, limits.shared // c.resident - SHARED_RESERVED)


def _time(row: Row, c: Config, s: Shape, multiprocessors: int) -> float:
    """Of the slowest program, in cycles; of few rows, in rows of W that it reads. An order, no time."""
    columns = -(-s.n // configs.default_group(row.kind)) * 16
    if row.height is not None:
        widths = [bn for bn in (64, 32, 16) if bn <= c.bn]
        return min(decode.slowest(s.n, columns, bn, c.bm, multiprocessors) for bn in widths)
    # Programs that share a multiprocessor share its matrix unit, and its path to the L2.
    return c.resident * configs.quickest_checks(c, row.architecture, row.kind, s.n, s.k, columns, s.m, multiprocessors)


# --- compiled -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a candidate's kernels became. reason: why it is not worth timing, None: it is."""

    reason: str | None
    arithmetic: tuple[str, ...] = ()


def compiled(row: Row, operands: str, config: Config, shape: Shape) -> Compiled:
    """Compile the product, its twin and its repair for the row's architecture; needs no GPU. Triton must not interpret."""
    from bench import compiled as compiling
    from bench import occupancy, sass

    arithmetic: set[str] = set()
    try:
        with in_use(row, config):
            launches = compiling.launches_of(operands, int(row.architecture or 0), m=shape.m, n=shape.n, k=shape.k, bias=shape.bias)
        for launch in (one for one in launches if "PRECISION" in one.kwargs):
            kernel = compiling.compile_launch(launch, int(row.architecture or 0))
            code, usage = sass.read(compiling.sass(kernel)), compiling.usage(kernel)
            if usage["STACK"] + usage["LOCAL"] or code.count(sass.SPILLS):
                return Compiled(f"{launch.name} spills")
            if launch.name == "checked_product":
                arithmetic = {sass.arithmetic_of(mnemonic) for mnemonic in code.matrix()}
                tensor = getattr(kernel.metadata, "tmem_size", 0) or 0
                shared, warps = kernel.metadata.shared, launch.kwargs["num_warps"]
                blocks = min(occupancy.blocks(f"sm_{row.architecture}", usage["REG"], shared, warps, tensor).values())
                if blocks < config.resident:
                    return Compiled(f"{blocks} at once on a multiprocessor, not {config.resident}")
    except Exception as error:  # Triton's compiler has no error type of its own
        return Compiled(f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}")
    return Compiled(None, tuple(sorted(arithmetic)))
