"""Sums of x = residual / bound over the checks of a site, for the second detector (abft/statistics/accumulators.py has the fields).

    groups (groups, ALL_KINDS, FIELDS)            every check once, by its group of columns
    units  (multiprocessors, ALL_KINDS, FIELDS)   once for every data tile under it, by the multiprocessor that computed the tile
    shares (multiprocessors, groups)              how many checks of a group were a multiprocessor's, counted like that
    pairs  (multiprocessors, multiprocessors)     … and of one were another's, too

A group may be several tiles, computed by several multiprocessors, and a grid may give one of them the same columns for ever. So a
unit's own sums alone cannot tell what is its own; shares and pairs are the rest of the normal equations that can
(abft/statistics/unmixing.py). A block of rows and group is reduced before anything is added: a record is one vector atomic.
Rows beyond a bound are left out: they are the checksums' business.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .judgement import actual, bound_of, noise, predicted

#: Kinds of checksum that there is room for: e, one, hi, lo.
ALL_KINDS = tl.constexpr(4)
#: Words of a record, and the fields in it: as abft/statistics/accumulators.py names them, then nothing.
FIELDS = tl.constexpr(16)
COUNT, SUM, SQUARES, MOST, ABOVE, BLOCKS, MAXIMA, MAXIMA2 = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 8, 9, 10))
#: Squares of what is counted above (4, 8, 12 σ̂ and the soft threshold), per kind of checksum, and of what a residual is cut at.
LEVELS, CUT = tl.constexpr(5), tl.constexpr(4)


class Kept(NamedTuple):
    """Where the sums of a site, role and shape lie; fp64 and int32, only ever added to."""

    groups: Any
    units: Any  # None where multiprocessors have no numbers; shares and pairs then, too
    shares: Any
    pairs: Any
    levels: Any  # (kinds, LEVELS) fp32


@triton.jit
def add_residuals(kept, tile_units, multiprocessors, sums, bound, calm, PLANES: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr,
                  shape, tiles_n, batch, tile_row, group, rows):  # fmt: skip
    """Add the calm rows of a block in one group. tile_units: (B × row blocks of the product, tiles_n), who computed each data tile;
    tile_row: in which of its first dimension the rows lie."""
    squares = actual(sums, KINDS, PLANES, False, shape, tiles_n, batch, group, rows)
    noise2, _ = noise(sums, KINDS, PARTS, shape, batch, group, rows)
    count = tl.sum(calm.to(tl.int32), 0)
    first = group * shape.tiles_per_group
    last = tl.minimum(first + shape.tiles_per_group, tiles_n)
    units = tile_units + tl.cast(tile_row, tl.int64) * tiles_n if kept.units is not None else None
    for kind in tl.static_range(KINDS):
        r = actual(sums, kind, PLANES, False, shape, tiles_n, batch, group, rows)
        c = predicted(sums, kind, KINDS, PARTS, shape, batch, group, rows)
        x = tl.where(calm, (r - c) / bound_of(bound.accumulate[kind], squares, c, noise2, bound.absolute[kind]), 0.0)
        record, most = _record(x, count, kept.levels + kind * LEVELS)
        _add(kept.groups, group * ALL_KINDS + kind, record, most)
        if kept.units is not None:
            for tile in range(first, last):
                _add(kept.units, _number(units, tile, multiprocessors) * ALL_KINDS + kind, record, most)
    if kept.units is not None:
        for tile in range(first, last):
            unit = _number(units, tile, multiprocessors)
            tl.atomic_add(kept.shares + unit * shape.groups + group, count, sem="relaxed")
            for other in range(first, last):
                tl.atomic_add(kept.pairs + unit * multiprocessors + _number(units, other, multiprocessors), count, sem="relaxed")


@triton.jit
def _number(units, tile, multiprocessors):
    # PTX promises numbers below %nsmid, which may exceed how many there are: those beyond share a record.
    return tl.load(units + tile).to(tl.int32) % multiprocessors  # deferred evidence is fp32


@triton.jit
def _record(x, count, levels):
    """(the fields of one kind, as a vector; the largest |x|) of a block of rows."""
    x2 = x * x
    cut2 = tl.minimum(x2, tl.load(levels + CUT))
    root = tl.sqrt(cut2)
    most2 = tl.max(x2, 0)
    most = tl.sqrt(most2)
    i = tl.arange(0, FIELDS)
    record = tl.where(i == COUNT, count.to(tl.float32), 0.0)
    record = tl.where(i == SUM, tl.sum(tl.where(x < 0, -root, root), 0), record)
    record = tl.where(i == SQUARES, tl.sum(cut2, 0), record)
    for level in tl.static_range(CUT):
        above = tl.sum((x2 > tl.load(levels + level)).to(tl.int32), 0).to(tl.float32)
        record = tl.where(i == ABOVE + level, above, record)
    record = tl.where(i == BLOCKS, tl.where(count > 0, 1.0, 0.0), record)
    record = tl.where(i == MAXIMA, most, record)
    return tl.where(i == MAXIMA2, most2, record).to(tl.float64), most.to(tl.float64)


@triton.jit
def _add(records, index, record, most):
    at = records + tl.cast(index, tl.int64) * FIELDS
    i = tl.arange(0, FIELDS)
    tl.atomic_add(at + i, record, mask=record != 0.0, sem="relaxed")
    if most > tl.load(at + MOST):
        tl.atomic_max(at + MOST, most, sem="relaxed")
