"""Pages of a key/value cache, and what is remembered of each, written when its tokens are.

    sums[page, head]     Σ_t w_t k_t  and  Σ_t k_t²             over the tokens written so far, in their order
    columns[…, token]    Σ_d w_d v_td for the kinds e, hi, lo of w, and ν_t, the norm of v_t and of these
    prints[…, token]     Σ_d h, Σ_d (d+1) h, Σ_d (d+1)² h      modulo 2³², for every 16-bit half h of the patterns of k_t and of v_t
    filled[page, head]   how many tokens the sums are of

Sums and columns are what an attention is judged by; nothing is added up again at a step. Fingerprints are only read when something is
suspect: one element of a token that changed in memory is named, and its old bits are what the sums say. A page that is begun again
(slot 0) starts from nothing; one that is rewound is summed anew from what it still holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from abft import bits, checksum, keyweights
from abft.checksum import Kind

#: Kinds of sums of a value's columns.
KINDS: tuple[Kind, ...] = ("e", "hi", "lo")
#: Rows of ``sums`` and of ``columns``.
SIGNED, SQUARES = 0, 1
COLUMNS = 4
#: Fingerprint planes of a half: plain, weighted, squared.
PLANES = 3
#: Sums of a token's numbers in another order differ by less, relative to their size; so much is far below any bound.
ORDER = 2.0**-18
_WORD = 1 << 32


@dataclass(frozen=True)
class Pages:
    """k (P, L, H, E), v (P, L, H, D) in one 16- or 32-bit dtype; sums (P, H, 2, E), columns (P, H, 4, L) fp32;
    prints (P, H, 2, planes, L), filled (P, H), lost (P, H) int32. lost: pages found changed that were not restored."""

    k: Tensor
    v: Tensor
    sums: Tensor
    columns: Tensor
    prints: Tensor
    filled: Tensor
    lost: Tensor

    @staticmethod
    def empty(pages: int, length: int, heads: int, e: int, d: int, dtype: torch.dtype, device: torch.device) -> Pages:
        planes = PLANES * bits.WIDTH[dtype] // 16

        def zeros(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        return Pages(
            zeros(pages, length, heads, e, of=dtype), zeros(pages, length, heads, d, of=dtype), zeros(pages, heads, 2, e, of=torch.float32),
            zeros(pages, heads, COLUMNS, length, of=torch.float32), zeros(pages, heads, 2, planes, length), zeros(pages, heads),
            zeros(pages, heads),
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def length(self) -> int:
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        return self.k.shape[2]


# --- what is remembered ---------------------------------------------------------------------------


def columns_of(v: Tensor) -> Tensor:
    """(..., 4) of values (..., D): their sums by kind, and ν."""
    wide, d = v.double(), v.shape[-1]
    c = torch.stack([wide @ torch.from_numpy(checksum.column_weights(kind, d).astype(np.float64)) for kind in KINDS], -1)
    rms = torch.tensor(_rms(d), dtype=torch.float64)
    nu = (wide.square().sum(-1) + (c / rms).square().sum(-1)).sqrt()
    return torch.cat([c, nu.unsqueeze(-1)], -1).float()


def prints_of(x: Tensor) -> Tensor:
    """(..., planes) int32 of rows (..., D): half-major, plain, weighted, squared."""
    n = bits.WIDTH[x.dtype] // 16
    halves = bits.as_integers(x.contiguous()).view(torch.int16).view(*x.shape, n).long() & 0xFFFF
    index = torch.arange(1, x.shape[-1] + 1)
    found = [(halves[..., i] * index**power).sum(-1) for i in range(n) for power in range(PLANES)]
    return _wrapped(torch.stack(found, -1)).int()


def _wrapped(x: Tensor) -> Tensor:
    """Modulo 2³², as the number nearest zero."""
    return (x + _WORD // 2) % _WORD - _WORD // 2


def weights(length: int) -> Tensor:
    """w (L,) of the tokens of a page."""
    return torch.from_numpy(keyweights.of_keys(length))


def add_tokens(sums: Tensor, k: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """sums (n, H, 2, E) with the tokens [begin, end) (n,) of k (n, L, H, E) added, one after the other."""
    own = weights(k.shape[1])
    for slot in range(int(begin.min()), int(end.max())) if len(k) else ():
        x = k[:, slot].float()
        more = torch.stack([sums[:, :, SIGNED] + x * own[slot], sums[:, :, SQUARES] + x * x], 2)
        sums = torch.where(((begin <= slot) & (slot < end))[:, None, None, None], more, sums)
    return sums


def append(pages: Pages, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, counts: Tensor | None) -> None:
    """Write k (B, H, T, E), v (B, H, T, D) behind what the sequences hold; counts: how many of the T tokens of each, None: all."""
    length, tokens = pages.length, torch.arange(k.shape[2])
    position = lengths[:, None] + tokens
    real = position >= 0 if counts is None else tokens < counts[:, None]
    real &= position < table.shape[1] * length
    which, token = real.nonzero(as_tuple=True)
    place, slot = position[real] // length, position[real] % length
    page = table[which, place].long()
    new_k, new_v = k[which, :, token], v[which, :, token]  # (n, H, ·)
    pages.k[page, slot], pages.v[page, slot] = new_k, new_v
    pages.columns[page, :, :, slot] = columns_of(new_v)
    pages.prints[page, :, 0, :, slot], pages.prints[page, :, 1, :, slot] = prints_of(new_k), prints_of(new_v)
    touched, at = torch.unique(page, return_inverse=True)
    n = len(touched)
    first = torch.full((n,), length).scatter_reduce(0, at, slot, "amin")
    end = torch.zeros(n, dtype=torch.long).scatter_reduce(0, at, slot + 1, "amax")
    # Heads are written together, so they are filled alike.
    goes_on = pages.filled[touched].eq(first[:, None].int()).all(1)
    begin = torch.where(goes_on, first, 0)
    before = torch.where((begin > 0)[:, None, None, None], pages.sums[touched], 0.0)
    pages.sums[touched] = add_tokens(before, pages.k[touched], begin, end)
    pages.filled[touched] = end.int()[:, None].expand(-1, pages.heads)
    pages.lost[touched] = torch.where((first == 0)[:, None], 0, pages.lost[touched])


# --- whether it still holds what was written ------------------------------------------------------


def moved(pages: Pages, page: Tensor, head: Tensor) -> Tensor:
    """By how much the fingerprints of heads of pages (n,) differ from what was remembered: int64 (n, 2, planes, L), 0 beyond the tokens."""
    now = torch.stack([prints_of(t[page, :, head]).mT for t in (pages.k, pages.v)], 1)
    written = torch.arange(pages.length) < pages.filled[page, head][:, None]
    return _wrapped(now.long() - pages.prints[page, head]) * written[:, None, None]


@dataclass
class Mended:
    """What became of the pages that a suspect row read. element: (position in the pages, column) of one that changed."""

    restored: int = 0
    lost: int = 0  # tokens that changed and were not restored
    new: int = 0  # … and restored ones, in pages that nobody has complained about before
    element: tuple[int, int] | None = None
    rebuilt: bool = False  # sums were wrong, of pages that were not


def mend(pages: Pages, page: Tensor, head: int, write: bool) -> Mended:
    """Compare a head's pages (n,) with their fingerprints, and, if ``write``, put back what can be named, and sums that are not theirs."""
    heads = torch.full_like(page, head)
    found = Mended()
    by = moved(pages, page, heads).numpy()
    for n, which, token in np.argwhere(by.any(2)):
        at, x = int(page[n]), (pages.k, pages.v)[which]
        row = x[at, token, head]
        place = _name(by[n, which, :, token], row)
        known = int(pages.lost[at, head]) > 0
        found.new += not known
        found.element = (at * pages.length + int(token), head * x.shape[-1] + (0 if place is None else place[0]))
        if place is not None and write:
            found.restored += 1
            bits.as_integers(row)[place[0]] = place[1]
        else:
            found.lost += 1
            pages.lost[at, head] = 1
    if write and not found.lost:
        found.rebuilt = _rebuild(pages, page, heads)
    return found


def _name(by: np.ndarray, row: Tensor) -> tuple[int, int] | None:
    """(column, old bits) of the element that alone explains how a token's fingerprint moved (planes,); None if there is none."""
    pattern, column = bits.as_integers(row), None
    change = 0
    for half, (plain, weighted, squared) in enumerate(by.reshape(-1, PLANES).tolist()):
        if (plain, weighted, squared) == (0, 0, 0):
            continue
        if plain == 0 or abs(plain) > 0xFFFF or weighted % plain:
            return None
        index = weighted // plain
        if not 1 <= index <= len(row) or (index * index * plain - squared) % _WORD or column not in (None, index - 1):
            return None
        column = index - 1
        change += plain << (16 * half)
    if column is None:
        return None
    width = bits.WIDTH[row.dtype]
    old = (int(pattern[column]) - change) % (1 << width)
    return column, old - (1 << width) if old >> (width - 1) else old


def _rebuild(pages: Pages, page: Tensor, heads: Tensor) -> bool:
    """Sums and columns of pages from what they hold; whether those that were there were others, by more than their order explains."""
    k, v, end = pages.k[page, :, heads], pages.v[page, :, heads], pages.filled[page, heads].long()
    sums = add_tokens(torch.zeros_like(pages.sums[page, heads].unsqueeze(1)), k.unsqueeze(2), torch.zeros_like(end), end).squeeze(1)
    written = (torch.arange(pages.length) < end[:, None])[:, None]
    columns = torch.where(written, columns_of(v).mT, pages.columns[page, heads])
    old, size = pages.columns[page, heads], columns[:, COLUMNS - 1 :] * torch.tensor([*_rms(v.shape[-1]), 1.0])[:, None]
    alike = bits.same(columns, old) | ((columns - old).abs() <= ORDER * size)
    same = bits.same(sums, pages.sums[page, heads]).all() & alike.all()
    pages.sums[page, heads], pages.columns[page, heads] = sums, columns
    return not bool(same)


def _rms(d: int) -> list[float]:
    return [checksum.weight_rms(kind, d) for kind in KINDS]
