"""One attention to be computed: its operands, what else it does to the scores, and how it is cut into tiles.

Queries that share a key head (grouped queries, GQA) lie beside each other, as more rows over the same keys: no key is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abft import floating
from abft.attention import dropout, steps

#: Scores per tile: 4 MiB in fp32, of which a backward holds about six at a time.
ELEMENTS = 1 << 20
#: Under a causal mask blocks of queries are at most this tall: keys that all of them do not see are left out.
CAUSAL_ROWS = 256


@dataclass(frozen=True)
class Options:
    """x = cap · tanh(scale · s / cap) (+ mask); p = softmax(x); dropout of p.

    Query i stands at position i + offset among the keys: it sees none behind it if ``causal``, and only the last ``window``.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def spelt(self) -> tuple[float, bool, int, int, float, float]:
        """As arguments of an operator."""
        return self.scale, self.causal, self.offset, self.window or 0, self.softcap or 0.0, self.dropout

    @staticmethod
    def read(scale: float, causal: bool, offset: int, window: int, softcap: float, dropout: float) -> Options:
        return Options(scale, causal, offset, window or None, softcap or None, dropout)


@dataclass
class Attended:
    """out (B, H, G, L, D); statistics (2, B, H, G, L): maxima and sums of the softmax, for the backward; weights: as dropped, or None."""

    out: Tensor
    statistics: Tensor
    weights: Tensor | None = None


def is_by_queries(q: Tensor) -> bool:
    """Whether the heads of a query of q (B, H, G, L, E) lie beside each other, as a model's projection leaves them."""
    return q.stride(3) > q.stride(1)


def empty_result(q: Tensor, depth: int) -> Tensor:
    """A (B, H, G, L, depth) in the memory order of q, as torch's kernel on a CPU leaves it: what a model does next needs no copy."""
    batch, heads, group, length, _ = q.shape
    if not is_by_queries(q):
        return q.new_empty((batch, heads, group, length, depth))
    return q.new_empty((batch, length, heads, group, depth)).permute(0, 2, 3, 1, 4)


@dataclass(frozen=True)
class Problem:
    """q (B, H, G, L, E); k (B, H, S, E); v (B, H, S, D): G query heads share each of the H key heads.

    mask: None, or five dimensions, each 1 or that of (B, H, G, L, S); bool (True: seen) or added to x. seed: of the dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: int
    options: Options
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def scratch(self, name: str, like: Tensor) -> Tensor:
        """Memory for a matrix like ``like`` that the tiles of this problem share, one after the other.

        A tile's matrices are of the size that allocators hand back to the system: fetching the pages again costs as much as an exponential.
        """
        flat = self._kept.get(name)
        if flat is None or flat.numel() < like.numel():
            flat = self._kept[name] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return flat[: like.numel()].view(like.shape)

    def empty(self) -> Attended:
        """A result to be filled."""
        statistics = torch.empty((2, *self.q.shape[:-1]), dtype=self.wide, device=self.q.device)
        return Attended(empty_result(self.q, self.v.shape[-1]), statistics)

    @property
    def wide(self) -> torch.dtype:
        """What everything is computed in."""
        return floating.ACCUMULATOR[self.q.dtype]

    @property
    def keys(self) -> int:
        return self.k.shape[2]

    @property
    def rows(self) -> int:
        """Rows of the scores, over all heads."""
        return self.q.shape[:-1].numel()

    def _fitting(self) -> tuple[int, int]:
        """(heads that make a tile with all their queries, or with CAUSAL_ROWS of them, the queries of a tile)."""
        _, _, group, length, _ = self.q.shape
        rows = min(length, CAUSAL_ROWS) if self.options.causal else length
        fitting = ELEMENTS // max(1, group * rows * self.keys)
        return fitting, rows if fitting else max(1, ELEMENTS // (group * self.keys))

    @property
    def rows_each(self) -> int:
        """Queries of a tile. Sums over queries are those of the tiles, added up."""
        return self._fitting()[1]

    def planes(self) -> Iterator[Plane]:
        """Parts that share no head; each as many heads as make a tile, or one."""
        batch, heads = self.q.shape[:2]
        fitting, rows = self._fitting()
        heads_each, batch_each = max(1, min(heads, fitting)), max(1, fitting // heads)
        for b in range(0, batch, batch_each):
            for h in range(0, heads, heads_each):
                yield Plane(self, slice(b, min(b + batch_each, batch)), slice(h, min(h + heads_each, heads)), rows)


@dataclass(frozen=True)
class Plane:
    """Some of the heads of some of the batch."""

    problem: Problem
    batch: slice
    heads: slice
    rows_each: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, key heads, query heads to each)."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start, self.problem.q.shape[2]

    def of_keys(self, t: Tensor) -> Tensor:
        """The part of a (B, H, S, …) in this plane, (heads, S, …), in the wide type."""
        return t[self.batch, self.heads].flatten(0, 1).to(self.problem.wide)

    def key_of(self, local: int) -> int:
        """The number of a key of this plane's heads among those of all heads (batch, key heads, keys)."""
        problem = self.problem
        head, key = divmod(local, problem.keys)
        b, h = divmod(head, self.shape[1])
        return ((self.batch.start + b) * problem.k.shape[1] + self.heads.start + h) * problem.keys + key

    def tiles(self) -> Iterator[Tile]:
        length, keys, o = self.problem.q.shape[3], self.problem.keys, self.problem.options
        for start in range(0, length, self.rows_each):
            stop = min(start + self.rows_each, length)
            first = 0 if o.window is None else min(max(0, start + o.offset - o.window + 1), keys - 1)
            if steps.compiled(self.problem.wide, self.problem.q.device):
                first -= first % steps.CHUNK
            last = min(keys, max(first + 1, stop + o.offset)) if o.causal else keys
            yield Tile(self, slice(start, stop), slice(first, last))


@dataclass(frozen=True)
class Tile:
    """A block of queries of a plane, and the keys that any of them may see. Its matrices are (heads, group · rows, …)."""

    plane: Plane
    rows: slice
    keys: slice

    @property
    def options(self) -> Options:
        return self.plane.problem.options

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the scores: (batch, key heads, group, rows, keys)."""
        return *self.plane.shape, self.rows.stop - self.rows.start, self.keys.stop - self.keys.start

    def of_rows(self, t: Tensor) -> Tensor:
        """The part of a (B, H, G, L, …), as one matrix per head, in the wide type."""
        part = t[self.plane.batch, self.plane.heads, :, self.rows]
        return part.flatten(2, 3).flatten(0, 1).to(self.plane.problem.wide)

    def of_queries(self) -> Tensor:
        """The part of q, scaled: fewer numbers than the scores."""
        return self.of_rows(self.plane.problem.q) * self.options.scale

    def write_rows(self, t: Tensor, part: Tensor) -> None:
        """Put such a matrix, or a vector with a number per row, where it belongs in (B, H, G, L, …)."""
        t[self.plane.batch, self.plane.heads, :, self.rows] = part.reshape(*self.shape[:4], *part.shape[2:])

    def view(self, x: Tensor) -> Tensor:
        """A matrix of scores with its five dimensions."""
        return x.view(self.shape)

    def masked_part_of(self, of_plane: Tensor) -> Tensor:
        """The same of a tensor that is a mask's part in this plane already."""
        return of_plane[
            :, :, :,
            slice(None) if of_plane.shape[3] == 1 else self.rows,
            slice(None) if of_plane.shape[4] == 1 else self.keys,
        ]  # fmt: skip

    def masked_part(self, mask: Tensor) -> Tensor:
        """The part of a mask; dimensions of size one stay."""
        slices = (self.plane.batch, self.plane.heads, slice(None), self.rows, self.keys)
        return mask[tuple(slice(None) if size == 1 else s for size, s in zip(mask.shape, slices, strict=True))]

    def hidden(self) -> Tensor | None:
        """True where a query does not see a key, in dimensions that broadcast to ``shape``; None if all see all."""
        problem, o = self.plane.problem, self.options
        device, mask = problem.q.device, problem.mask
        behind = None
        if o.causal or o.window is not None:
            position = torch.arange(self.rows.start, self.rows.stop, device=device).unsqueeze(1) + o.offset
            key = torch.arange(self.keys.start, self.keys.stop, device=device)
            if o.causal:
                behind = key > position
            if o.window is not None:
                gone = key <= position - o.window
                behind = gone if behind is None else behind | gone
        if mask is None or mask.dtype != torch.bool:
            return behind
        unseen = ~self.masked_part(mask)
        return unseen if behind is None else unseen | behind

    def added(self) -> Tensor | None:
        """What a mask adds to the scores."""
        mask = self.plane.problem.mask
        return None if mask is None or mask.dtype == torch.bool else self.masked_part(mask).to(self.plane.problem.wide)

    def kept(self) -> Tensor:
        """True where dropout keeps a probability, of ``shape``."""
        problem = self.plane.problem
        batch, heads, group, _, _ = problem.q.shape
        device = problem.q.device
        of_batch = torch.arange(self.plane.batch.start, self.plane.batch.stop, device=device)[:, None, None]
        of_head = torch.arange(self.plane.heads.start, self.plane.heads.stop, device=device)[:, None]
        head = (of_batch * heads + of_head) * group + torch.arange(group, device=device)
        query = torch.arange(self.rows.start, self.rows.stop, device=device)
        key = torch.arange(self.keys.start, self.keys.stop, device=device)
        return dropout.keep(problem.seed, head, query, key, self.options.dropout)

    def row_of(self, local: int) -> int:
        """The number of a row of this tile's matrices among those of all heads (batch, query heads, length)."""
        _, heads, group, rows, _ = self.shape
        rest, row = divmod(local, rows)
        rest, member = divmod(rest, group)
        b, h = divmod(rest, heads)
        _, all_heads, _, length, _ = self.plane.problem.q.shape
        head = ((self.plane.batch.start + b) * all_heads + self.plane.heads.start + h) * group + member
        return head * length + self.rows.start + row

    def key_of(self, local: int) -> int:
        """The same for a row that is a key's: among (batch, key heads, keys)."""
        head, key = divmod(local, self.shape[-1])
        return self.plane.key_of(head * self.plane.problem.keys + self.keys.start + key)
