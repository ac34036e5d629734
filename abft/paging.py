"""``abft.PagedCache`` and ``abft.paged_attention``: checked decoding over a key/value cache that remembers what was written into it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abft import ledger, scope
from abft import policy as policies
from abft.attention.pages import Pages, moved
from abft.errors import DeviceError, DtypeError, ShapeError
from abft.functional import _site_here
from abft.ops.paged import append_to_pages
from abft.ops.paged import paged_attention as attend
from abft.policy import Policy, PolicyLike

NAME = "paged_attention"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Tokens of a page: what a tile of a kernel holds.
LENGTHS = (16, 32, 64, 128)
#: Columns of a head.
WIDEST = 256
#: Queries of a head of keys that a kernel's tile holds, over its group and the queries of each.
MOST_ROWS = 64


class PagedCache:
    """Keys and values in pages, each with the sums that its attention is judged by, and with exact fingerprints.

    k and v are (pages, page_length, kv_heads, head_dim): pages in order, ``table(sequences)``, are a contiguous (B, S, H, D) cache.
    fp16, bf16 or fp32; page_length 16, 32, 64 or 128. Beside the contents lie, per page and head, two fp32 vectors of K's width, and
    per token and head four fp32 numbers, which a step reads (of 16-bit contents 2 / page_length + 4 / head_dim more), and a fingerprint,
    which it does not. Does not see a token that was wrong when it was appended. Raises ShapeError, DtypeError.
    """

    def __init__(
        self, pages: int, page_length: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu", *, value_dim: int | None = None,
    ) -> None:  # fmt: skip
        if dtype not in DTYPES:
            raise DtypeError(f"a PagedCache holds {', '.join(str(t)[6:] for t in DTYPES)}; got {dtype}")
        value_dim = head_dim if value_dim is None else value_dim
        if page_length not in LENGTHS:
            raise ShapeError(f"page_length must be one of {', '.join(map(str, LENGTHS))}; got {page_length}")
        if pages < 1 or kv_heads < 1 or not (1 <= head_dim <= WIDEST and 1 <= value_dim <= WIDEST):
            raise ShapeError(
                f"a PagedCache needs pages and heads, of up to {WIDEST} columns; got {pages} pages, {kv_heads} heads of {head_dim} and "
                f"{value_dim} columns"
            )
        self.pages = Pages.empty(pages, page_length, kv_heads, head_dim, value_dim, dtype, torch.device(device))

    @classmethod
    def of(cls, key: Tensor, value: Tensor, page_length: int = 64, *, room: int = 0) -> PagedCache:
        """A cache of plain keys (B, H, S, E) and values (B, H, S, D), copied into pages in order, with room for so many more tokens.

        Its table is ``cache.table(B)``.
        """
        batch, heads, tokens, e = key.shape
        each = max(1, -(-(tokens + room) // page_length))
        cache = cls(batch * each, page_length, heads, e, key.dtype, key.device, value_dim=value.shape[-1])
        cache.append(key, value, cache.table(batch), torch.zeros(batch, dtype=torch.int32, device=key.device))
        return cache

    @property
    def k(self) -> Tensor:
        """(pages, page_length, kv_heads, head_dim); what is written into it past ``append`` is taken for a fault."""
        return self.pages.k

    @property
    def v(self) -> Tensor:
        """(pages, page_length, kv_heads, value_dim); as ``k``."""
        return self.pages.v

    @property
    def nbytes(self) -> int:
        """Of everything."""
        return sum(t.nbytes for t in self.pages.tensors())

    def table(self, sequences: int) -> Tensor:
        """(sequences, pages of each) int32: the table of pages that lie in order."""
        each = self.k.shape[0] // sequences
        return torch.arange(sequences * each, dtype=torch.int32, device=self.k.device).view(sequences, each)

    def append(self, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor, counts: Tensor | None = None) -> None:
        """Write key (B, H, T, E), value (B, H, T, D) behind the ``lengths`` (B,) tokens that the sequences hold.

        table (B, W): numbers of their pages, in order; counts (B,): how many of the T tokens are real, None: all. A page whose first token
        is written starts anew; one may be rewound by appending at an earlier place. No two sequences may write one page. Tokens beyond the
        table's pages are not written, and nothing waits for the device: neither is an error. Raises ShapeError, DtypeError, DeviceError.
        """
        pages, shapes = self.pages, (tuple(key.shape), tuple(value.shape))
        batch = table.shape[0]
        right = key.dim() == 4 and (key.shape[0], *key.shape[1::2]) == (batch, pages.heads, pages.k.shape[-1])
        if not (right and value.shape == (*key.shape[:-1], pages.v.shape[-1])):
            raise ShapeError(
                f"append needs key (B, H, T, E) and value (B, H, T, D) with B = {batch}, H = {pages.heads}, E = {pages.k.shape[-1]}, "
                f"D = {pages.v.shape[-1]}; got {shapes[0]} and {shapes[1]}"
            )
        _check_table(self, table, lengths, counts)
        if key.dtype != pages.k.dtype or value.dtype != pages.k.dtype:
            raise DtypeError(f"this cache holds {str(pages.k.dtype)[6:]}; got key {key.dtype}, value {value.dtype}: convert them first")
        if key.device != pages.k.device or value.device != pages.k.device:
            raise DeviceError(f"this cache lies on {pages.k.device}; got key on {key.device}, value on {value.device}")
        if key.numel():
            append_to_pages(*pages.tensors(), key.detach(), value.detach(), table, lengths, counts)

    def changed(self) -> Tensor:
        """bool (pages, kv_heads): where a page holds other bits than were written, however small the difference. Reads all of the cache.

        An attention compares only what it suspects; this looks at everything, for a scrubber between requests. CPU only, today.
        """
        if self.k.device.type != "cpu":
            raise DeviceError(f"PagedCache.changed() compares on a CPU; this cache lies on {self.k.device}")
        page, head = (t.flatten() for t in torch.meshgrid(*(torch.arange(n) for n in self.pages.filled.shape), indexing="ij"))
        return moved(self.pages, page, head).flatten(1).any(1).view(self.pages.filled.shape)


def paged_attention(
    query: Tensor, cache: PagedCache, table: Tensor, lengths: Tensor, *, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, policy: PolicyLike = None,
) -> Tensor:  # fmt: skip
    """softmax(query · Kᵀ · scale) · V over the pages of each sequence, checked and, if the policy says so, repaired: (B, heads, L, D).

    query (B, heads, L, E), heads a multiple of the cache's; table (B, W) integer: numbers of the pages, in order; lengths (B,) integer:
    tokens of each sequence, those of the L queries included and appended before. Query i stands at token lengths - L + i and sees none
    behind it, only the last ``window`` if there is one; of a sequence shorter than L the first ones see nothing and are zero. scale: 1/√E
    unless given; softcap as in ``softcap · tanh(x / softcap)``. Nothing waits for the device: lengths and table are read there, so their
    numbers have to be right, and a CUDA graph can be replayed with others.

    Detects wrong scores, exponentials, sums and outputs above the bounds of docs/explanation/attention.md, and by them keys, values and
    their stored sums that changed in memory since they were appended. One changed element of a token is put back in its page bit for bit
    (RECONSTRUCTED, cause "weight"), more are UNCORRECTED. Does not see tokens that were wrong when they were appended, a wrong table or
    wrong lengths, nor what lies below the bounds (``PagedCache.changed``). No gradients. Raises ShapeError, DtypeError, DeviceError.
    """
    own = None if policy is None else policies.as_policy(policy)
    return paged_attention_at(None, query, cache, table, lengths, scale, window, softcap, own)


def paged_attention_at(
    site: Tensor | None, query: Tensor, cache: PagedCache, table: Tensor, lengths: Tensor, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, own: Policy | None = None, name: str = NAME,
) -> Tensor:  # fmt: skip
    """``paged_attention`` at a given site."""
    policy = scope.in_force(own)
    _check_query(query, cache, table, lengths, window, softcap)
    heads, device = cache.pages.heads, query.device
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if query.numel() == 0:
        return query.new_empty((*query.shape[:-1], cache.v.shape[-1]))
    _refuse(query, cache, policy)
    q, site = query.detach().unflatten(1, (heads, -1)), _site_here(site, name, policy, device)
    out = attend(
        q, *cache.pages.tensors(), table, lengths, scale, window or 0, softcap or 0.0, ledger.tensor(device), site, policy.text
    )
    return out.flatten(1, 2)


def _check_query(
    query: Tensor, cache: PagedCache, table: Tensor, lengths: Tensor, window: int | None, softcap: float | None
) -> None:
    heads, e = cache.pages.heads, cache.k.shape[-1]
    if query.dim() != 4 or query.shape[0] != table.shape[0] or query.shape[1] % heads or query.shape[-1] != e:
        raise ShapeError(
            f"paged_attention needs query (B, heads, L, E) with B = {table.shape[0]}, heads a multiple of {heads}, E = {e}; "
            f"got {tuple(query.shape)}"
        )
    _check_table(cache, table, lengths, None)
    if query.dtype != cache.k.dtype:
        raise DtypeError(f"the query is {query.dtype}, this cache {cache.k.dtype}: convert the query")
    if query.device != cache.k.device:
        raise DeviceError(f"the query lies on {query.device}, this cache on {cache.k.device}")
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        raise ValueError(f"window must be at least 1 and softcap positive, or None; got {window} and {softcap}")
    if torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError("paged_attention has no gradient; decode under torch.no_grad(), train with scaled_dot_product_attention")


def _check_table(cache: PagedCache, table: Tensor, lengths: Tensor, counts: Tensor | None) -> None:
    if table.dim() != 2 or table.shape[1] < 1 or any(t is not None and t.shape != table.shape[:1] for t in (lengths, counts)):
        raise ShapeError(f"table must be (B, W), lengths and counts (B,); got {tuple(table.shape)} and {tuple(lengths.shape)}")
    for t in (table, lengths, counts):
        if t is not None and t.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"tables and lengths are int32 or int64; got {t.dtype}")
        if t is not None and t.device != cache.k.device:
            raise DeviceError(f"tables and lengths must lie where the cache does, on {cache.k.device}; got {t.device}")


def _refuse(query: Tensor, cache: PagedCache, policy: Policy) -> None:
    """What cannot be done under this policy is said, never done differently."""
    if query.device.type == "cpu" and policy.backend != "triton":
        return
    rows = query.shape[1] // cache.pages.heads * query.shape[2]
    reason = _unavailable(query.device, query.dtype, query.shape[-1], cache.v.shape[-1])
    if rows > MOST_ROWS:
        reason = f"its tile holds {MOST_ROWS} rows of a head of keys; {rows} were asked for: use scaled_dot_product_attention"
    if query.device.type != "cpu" and policy.backend in ("reference", "vendor"):
        reason = "on a GPU only the kernel decodes over pages"
    if reason is not None:
        raise DeviceError(f"backend={policy.backend!r} cannot run paged_attention: {reason}")


def _unavailable(device: torch.device, dtype: torch.dtype, e: int, d: int) -> str | None:
    try:
        from abft.backends import triton_decode
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return triton_decode.available(device, dtype, e, d)


_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see functional._own_site
