"""Packed sequences: where a program's queries and keys lie, from the cumulative lengths on the device.

Launches are sized by the longest sequence, and a program whose block lies behind the end of its sequence leaves at once. Inside, the scores
become those of the one sequence (``sequence_of``), and what is computed is what the dense kernels compute of it alone, bit for bit. What
differs is where things lie:

    rows, of numbers per query       (heads of queries, tokens)          dense: (batch, heads, queries)
    out, gradients                   (tokens, heads, columns)            as torch packs them
    blocks of B tokens with sums     (heads, ⌊tokens / B⌋ + sequences)   a sequence's begin at ⌊first token / B⌋ + its number: room for all

Without sequences (``cu_q`` None) every function here is what stood in its place, and compiles to that. The scores of one sequence are put
together where they are needed: a function that returns them would turn what is None, or constant, into numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_scores import Scores, start_of


class Sequence(NamedTuple):
    """One sequence: what of the scores these functions ask for, and the scores' offset, by which its last query stands at its last key."""

    length: Any
    keys: Any
    offset: Any
    heads: Any
    group: Any
    cu_q: Any
    sequences: Any
    tokens: Any
    key_tokens: Any
    begin_q: Any
    begin_k: Any
    sequence: Any


@triton.jit
def sequence_of(scores, number):
    """The number-th sequence."""
    begin_q, begin_k = tl.load(scores.cu_q + number), tl.load(scores.cu_k + number)
    length, keys = tl.load(scores.cu_q + number + 1) - begin_q, tl.load(scores.cu_k + number + 1) - begin_k
    return Sequence(length, keys, scores.offset + keys - length, scores.heads, scores.group, scores.cu_q, scores.sequences, scores.tokens,
                    scores.key_tokens, begin_q, begin_k, number)  # fmt: skip


@triton.jit
def start_of_queries(scores, t, batch, head, member):
    """The address of a head's first query."""
    if scores.cu_q is None:
        return start_of(t, batch, head, member)
    else:
        return start_of(t, 0, head, member) + tl.cast(scores.begin_q, tl.int64) * t.row


@triton.jit
def start_of_keys(scores, t, batch, head, member):
    """The address of a head's first key or value."""
    if scores.cu_q is None:
        return start_of(t, batch, head, member)
    else:
        return start_of(t, 0, head, member) + tl.cast(scores.begin_k, tl.int64) * t.row


# --- numbers per row ------------------------------------------------------------------------------


@triton.jit
def first_row_of(scores, number):
    """The place of the first query of the number-th head among numbers per query, int64."""
    if scores.cu_q is None:
        return tl.cast(number, tl.int64) * scores.length
    else:
        return tl.cast(number % (scores.heads * scores.group), tl.int64) * scores.tokens + scores.begin_q


@triton.jit
def first_key_of(scores, plane):
    """The same of keys."""
    if scores.cu_q is None:
        return tl.cast(plane, tl.int64) * scores.keys
    else:
        return tl.cast(plane % scores.heads, tl.int64) * scores.key_tokens + scores.begin_k


@triton.jit
def result_rows(scores, number, rows):
    """Rows of a result of queries, (tokens, heads, ·), int64; dense: (batch, heads, queries, ·)."""
    if scores.cu_q is None:
        return tl.cast(number, tl.int64) * scores.length + rows
    else:
        of_heads = scores.heads * scores.group
        return (tl.cast(scores.begin_q + rows, tl.int64)) * of_heads + number % of_heads


@triton.jit
def result_keys(scores, plane, cols):
    """The same of keys."""
    if scores.cu_q is None:
        return tl.cast(plane, tl.int64) * scores.keys + cols
    else:
        return (tl.cast(scores.begin_k + cols, tl.int64)) * scores.heads + plane % scores.heads


# --- blocks with sums -----------------------------------------------------------------------------


@triton.jit
def rooms(tokens, sequences, SIZE: tl.constexpr):
    """Blocks of SIZE tokens for which a head has room: as many as the sequences can have."""
    return tokens // SIZE + sequences


@triton.jit
def key_blocks(scores, BN: tl.constexpr):
    """Blocks of keys that lie beside each other, those of a head."""
    if scores.cu_q is None:
        return tl.cdiv(scores.keys, BN)
    else:
        return rooms(scores.key_tokens, scores.sequences, BN)


@triton.jit
def key_block(scores, plane, block, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """The place of a block of keys, int64, where each head has COLUMNS rows of such blocks. plane: of the Way."""
    if scores.cu_q is None:
        return tl.cast(plane, tl.int64) * COLUMNS * tl.cdiv(scores.keys, BN) + block
    else:
        first = scores.begin_k // BN + scores.sequence
        return tl.cast(plane, tl.int64) * COLUMNS * key_blocks(scores, BN) + first + block


@triton.jit
def first_prefix(scores, plane, BN: tl.constexpr):
    """The place of the first prefix of a head's keys, of which there is one more than blocks."""
    if scores.cu_q is None:
        return tl.cast(plane, tl.int64) * (tl.cdiv(scores.keys, BN) + 1)
    else:
        first = scores.begin_k // BN + 2 * scores.sequence
        return tl.cast(plane, tl.int64) * (key_blocks(scores, BN) + scores.sequences) + first


@triton.jit
def query_panel(scores, number, block, BM: tl.constexpr):
    """The place of a block of queries where every block has one."""
    if scores.cu_q is None:
        return number * tl.cdiv(scores.length, BM) + block
    else:
        first = scores.begin_q // BM + scores.sequence
        return number % (scores.heads * scores.group) * rooms(scores.tokens, scores.sequences, BM) + first + block


@triton.jit
def key_panel(scores, plane, block, BN: tl.constexpr):
    """The same of keys."""
    if scores.cu_q is None:
        return plane * tl.cdiv(scores.keys, BN) + block
    else:
        return plane % scores.heads * key_blocks(scores, BN) + scores.begin_k // BN + scores.sequence + block


# --- faults ---------------------------------------------------------------------------------------


@triton.jit
def plane_of(scores, batch, head):
    """The head of keys, over the batch, as faults and sums number it: packed sequences share one."""
    if scores.cu_q is None:
        return batch * scores.heads + head
    else:
        return head


@triton.jit
def own_rows(scores, member, rows):
    """Queries as faults number them: those of all heads that share one of keys, one head after the other."""
    if scores.cu_q is None:
        return member * scores.length + rows
    else:
        return member * scores.tokens + scores.begin_q + rows


@triton.jit
def own_keys(scores, cols):
    """Keys, where they are the rows of a gradient."""
    if scores.cu_q is None:
        return cols
    else:
        return scores.begin_k + cols


# --- launching ------------------------------------------------------------------------------------


def packed(scores: Scores, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> Scores:
    """The argument for sequences in q (1, H, G, tokens, E) and k (1, H, key tokens, E), of whose sizes ``scores`` is."""
    return scores._replace(
        length=max_q, keys=max_k, cu_q=cu_q, cu_k=cu_k, sequences=cu_q.shape[0] - 1, tokens=scores.length, key_tokens=scores.keys
    )
