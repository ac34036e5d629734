"""Attention of packed sequences: each a problem of its own, on views of what is packed; their books are added up.

q (T, heads, E); k (S, key heads, E); v (S, key heads, D): the tokens of all sequences, one after the other. Rows are numbered as in
(heads, T), keys as in (key heads, S). Tokens behind the last sequence belong to none: zeros, unchecked, uncounted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abft import floating
from abft.attention import backward, forward
from abft.attention.backward import Given, Gradients
from abft.attention.plain import plain
from abft.attention.problem import Attended, Options, Problem
from abft.attention.tally import Product, Tally
from abft.ledger import Outcome


@dataclass(frozen=True)
class Sequence:
    """Tokens [q0, q1) of q and [k0, k1) of k and v."""

    q0: int
    q1: int
    k0: int
    k1: int

    @property
    def queries(self) -> slice:
        return slice(self.q0, self.q1)

    @property
    def keys(self) -> slice:
        return slice(self.k0, self.k1)

    @property
    def is_empty(self) -> bool:
        return self.q0 == self.q1 or self.k0 == self.k1


@dataclass(frozen=True)
class Packed:
    """Sequences and what they attend with. options.offset: beyond the alignment of a sequence's last query with its last key."""

    q: Tensor
    k: Tensor
    v: Tensor
    sequences: tuple[Sequence, ...]
    options: Options

    def problem(self, s: Sequence) -> Problem:
        options = replace(self.options, offset=self.options.offset + (s.k1 - s.k0) - (s.q1 - s.q0))
        return Problem(self.of_queries(self.q, s), _by_heads(self.k, s.keys), _by_heads(self.v, s.keys), None, 0, options)

    def of_queries(self, t: Tensor, s: Sequence) -> Tensor:
        """(T, heads, …) of a sequence as (1, H, G, L, …)."""
        heads = self.k.shape[1]
        return t[s.queries].unflatten(1, (heads, t.shape[1] // heads)).permute(1, 2, 0, 3).unsqueeze(0)

    @property
    def tokens(self) -> tuple[int, int]:
        """(queries, keys) that belong to a sequence."""
        return (self.sequences[-1].q1, self.sequences[-1].k1) if self.sequences else (0, 0)


def _by_heads(t: Tensor, tokens: slice) -> Tensor:
    """(S, heads, …) of a sequence as (1, heads, keys, …)."""
    return t[tokens].transpose(0, 1).unsqueeze(0)


def attend(packed: Packed, tally: Tally) -> Attended:
    """out (T, heads, D); statistics (2, heads, T)."""
    q, v = packed.q, packed.v
    heads, wide = q.shape[1], floating.ACCUMULATOR[q.dtype]
    out, statistics = q.new_zeros((*q.shape[:2], v.shape[-1])), q.new_zeros((2, heads, q.shape[0]), dtype=wide)
    rows = heads * packed.tokens[0]
    _expect(tally, rows, S=(rows, 0, q.shape[-1]), O=(rows, v.shape[-1], 0))
    for s in packed.sequences:
        if not s.is_empty:
            books = replace(tally, products={})
            a = forward.attend(packed.problem(s), books)
            packed.of_queries(out, s).copy_(a.out)
            statistics[:, :, s.queries] = a.statistics.flatten(1, 3)
            _add(tally, books, s, packed)
    return Attended(out, statistics)


def gradients(packed: Packed, d_out: Tensor, statistics: Tensor, tally: Tally) -> Gradients:
    """The gradients of q, k and v, as these are packed."""
    q, k, v = packed.q, packed.k, packed.v
    total = Gradients(q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), None)
    e, d, (queries, keys) = q.shape[-1], v.shape[-1], packed.tokens
    rows, columns = q.shape[1] * queries, k.shape[1] * keys
    _expect(tally, rows, S=(rows, 0, e), dP=(rows, 0, d), dQ=(rows, e, 0))
    _expect(tally, columns, dV=(columns, d, 0), dK=(columns, e, 0))
    for s in packed.sequences:
        if not s.is_empty:
            books = replace(tally, products={})
            of_rows = statistics[:, :, s.queries].unflatten(1, (1, k.shape[1], -1))
            g = backward.gradients(packed.problem(s), Given(packed.of_queries(d_out, s), None, of_rows), books)
            packed.of_queries(total.q, s).copy_(g.q)
            _by_heads(total.k, s.keys).copy_(g.k)
            _by_heads(total.v, s.keys).copy_(g.v)
            _add(tally, books, s, packed)
    return total


def plainly(packed: Packed) -> Tensor:
    """out in torch's own differentiable operators, unchecked: for gradients of gradients only."""
    parts = []
    for s in packed.sequences:
        like = packed.q.new_zeros((s.q1 - s.q0, packed.q.shape[1], packed.v.shape[-1]))
        parts.append(like if s.is_empty else plain(packed.problem(s))[0].squeeze(0).permute(2, 0, 1, 3).flatten(1, 2))
    last = packed.tokens[0]
    return torch.cat([*parts, packed.q.new_zeros((packed.q.shape[0] - last, packed.q.shape[1], packed.v.shape[-1]))])


# --- books ----------------------------------------------------------------------------------------


def _expect(tally: Tally, checks: int, **products: tuple[int, int, int]) -> None:
    for name, shape in products.items():
        tally.products[name] = Product(shape, Outcome(checks=checks))


def _add(tally: Tally, books: Tally, s: Sequence, packed: Packed) -> None:
    """The books of one sequence to those of all: one product of each name, whose rows are those of all sequences."""
    for name, product in books.products.items():
        total, own = tally.products[name], product.outcome
        (rows, *sizes), (_, *others) = total.shape, product.shape
        total.shape = (rows, max(sizes[0], others[0]), max(sizes[1], others[1]))
        total.outcome.executions += own.executions - 1
        total.outcome.worst = max(total.outcome.worst, own.worst)
        of_keys = name in ("dK", "dV")
        length, first, tokens = (s.k1 - s.k0, s.k0, packed.k.shape[0]) if of_keys else (s.q1 - s.q0, s.q0, packed.q.shape[0])
        total.outcome.findings += [replace(f, row=f.row // length * tokens + first + f.row % length) for f in own.findings]
