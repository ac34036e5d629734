"""Tiles for few rows (decoding: at most 64 tokens at once), where the time of a product is that of reading W once.

    Y[M, N] = X[M, K] W[N, K]ᵀ       bytes = K (N + C + M · reads) · size        C = 16 N / G columns of panel

The kernel is the one for many rows (gemm.py): check tiles run in the same launch, beside the data tiles, so no launch
is added and the panel costs the share of W that it is, 16/G. What differs is how the columns are cut. A row block is one, so
a tile is all there is of its columns: W is read once. Narrow tiles give every multiprocessor something to read (4096 columns
are 128 tiles of 32, and their panel, at G = 512, is four more: one each for the 132 of an H100); wide ones read X less often.

A result is the same chain of K steps on the same unit whatever the tile, so the bound is the same (abft.threshold), and a row of
many and the same row alone should agree bit for bit; that is for a GPU to show (tests/kernels/test_decode.py).
"""

from __future__ import annotations

from dataclasses import replace

from . import tuning
from .configs import DECODE, INTERPRETED_DECODE, MIN_COLUMNS, PROGRAMS, Config

#: Rows up to which a product is bound by memory, and fits one block of warpgroup MMA.
FEW_ROWS = 64
#: Reading a row of X, which comes from the L2, beside reading a row of W: a multiprocessor's share of memory bandwidth over its
#: path to the L2 (H100: 3.35 TB/s over 132 and 1.75 GHz, 14.5 bytes a cycle, over 64).
CACHED = 0.25


def height(architecture: int | None, kind: str, rows: int) -> int | None:
    """Rows of the tiles of a product with so many rows, or None if they are too many for decode tiles."""
    if rows > FEW_ROWS:
        return None
    return next(c.bm for c in _configs(architecture, kind) if c.bm >= rows)


def choose(architecture: int | None, kind: str, bm: int, n: int, checksum_columns: int, widest: int, k: int | None = None) -> Config:
    """The config of tiles of ``bm`` rows; ``widest``: columns of the tiles for many rows, whose groups these must divide.

    k: as n, of a shape that may have been measured.
    """
    config = next(c for c in _configs(architecture, kind) if c.bm == bm)
    config = replace(config, **(tuning.find(architecture, kind, bm, None if k is None else (n, k)) or {}))
    programs = PROGRAMS.get(architecture, 1) if architecture is not None else 1
    widths = [bn for bn in (64, 32, 16) if bn <= min(config.bn, max(widest, MIN_COLUMNS))]
    bn = min(widths, key=lambda bn: slowest(n, checksum_columns, bn, bm, programs))  # of equals, the widest
    # Check tiles as wide as data tiles: no program reads much more than another.
    return replace(config, bn=bn, bc=bn)


def slowest(n: int, checksum_columns: int, bn: int, bm: int, programs: int) -> float:
    """Rows of W, or of what takes as long, that the slowest program reads."""
    tiles = -(-n // bn) + -(-checksum_columns // bn)
    return -(-tiles // programs) * (bn + CACHED * bm)


def _configs(architecture: int | None, kind: str) -> tuple[Config, ...]:
    return INTERPRETED_DECODE if architecture is None else DECODE[architecture, kind]
