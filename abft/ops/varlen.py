"""``torch.ops.abft.varlen_attention``: the operators behind checked attention of packed sequences, and their gradients.

    varlen_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, …, ledger, site, policy) -> (out, statistics)
    varlen_attention_backward(d_out, q, k, v, cu_seq_q, cu_seq_k, statistics, max_q, max_k, …, ledger, site, policy, out) -> (dq, dk, dv)

q (T, heads, E); k (S, key heads, E); v (S, key heads, D); cu_seq_q, cu_seq_k (sequences + 1,) int32; out (T, heads, D); statistics
(2, heads, T), maxima and sums of the softmax. The … are scale, and of a query: whether it sees no more than ``right`` keys behind its
own position, that is the last key for a sequence's last query, and ``window`` keys in all (0: any number). As ``abft::attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abft import floating, ledger, plans, sites
from abft.attention import sequences
from abft.attention.backward import Gradients
from abft.attention.problem import Attended, Options, Problem
from abft.attention.sequences import Packed, Sequence
from abft.attention.tally import Tally
from abft.errors import ShapeError
from abft.ops import attention_kernels, checked
from abft.ops.attention import _asks_for_kernels, _execute, _in_kernels, _on_meta_alone, _refuse
from abft.ops.checked import LIBRARY, bypass

_SEQUENCES = "Tensor cu_seq_q, Tensor cu_seq_k"
_OPTIONS = "SymInt max_q, SymInt max_k, float scale, bool causal, int right, int window"
LIBRARY.define(
    f"varlen_attention(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, {_OPTIONS}, Tensor ledger, Tensor site, str policy) -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"varlen_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor statistics, {_OPTIONS}, "
    "Tensor ledger, Tensor site, str policy, Tensor? out=None) -> (Tensor, Tensor, Tensor)"
)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool, right: int,
    window: int, ledger_: Tensor, site: Tensor, policy_text: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = Options.read(scale, causal, right, window, 0.0, 0.0)
    chosen = plans.now(policy_text, sites.index_of(site), "fprop", on_gpu=q.is_cuda)
    _refuse(max(1, max_k), q.shape[-1], v.shape[-1], floating.ACCUMULATOR[q.dtype], chosen)
    if q.device.type == "cpu":
        packed = _read(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, options)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if _in_kernels(q, chosen):
            if not all((q.shape[0], k.shape[0], max_q, max_k)):
                return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(2, *q.shape[1::-1], dtype=torch.float32)
            words = ledger_ if q.device.type != "cpu" else torch.from_numpy(ledger.cpu().words)
            whole, sequences_ = _as_one(q, k, v, options), _sequences(cu_seq_q, cu_seq_k, max_q, max_k)
            out, statistics = attention_kernels.attend(whole, plans.checked(chosen), site, words, sequences_)
            return _by_tokens(out), statistics.flatten(1, 3)

        def results(a: Attended) -> list[tuple[str, Tensor]]:
            return [("O", a.out.transpose(0, 1)), ("O", a.statistics)]

        tally = Tally(chosen, sites.index_of(site), "fprop", q.dtype, note=checked.on_strike)
        out, statistics = _execute(lambda books: sequences.attend(packed, books), results, tally)
        return out.transpose(0, 1).contiguous(), statistics


def _varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, statistics: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool, right: int, window: int, ledger_: Tensor, site: Tensor, policy_text: str, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = Options.read(scale, causal, right, window, 0.0, 0.0)
    chosen = plans.now(policy_text, sites.index_of(site), "dgrad", on_gpu=q.is_cuda)
    if q.device.type == "cpu":
        packed = _read(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, options)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if _in_kernels(q, chosen):
            if not all((q.shape[0], k.shape[0], max_q, max_k)):
                return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
            assert out is not None, "the kernels take δ from the forward's output"
            words = ledger_ if q.device.type != "cpu" else torch.from_numpy(ledger.cpu().words)
            whole, sequences_ = _as_one(q, k, v, options), _sequences(cu_seq_q, cu_seq_k, max_q, max_k)
            above, below = (t.unflatten(1, whole.q.shape[1:3]).permute(1, 2, 0, 3).unsqueeze(0) for t in (d_out, out))
            by_head = statistics.unflatten(1, (1, *whole.q.shape[1:3]))
            dq, *of_keys = attention_kernels.gradients(whole, above, below, by_head, chosen, site, words, sequences_)
            dk, dv = (t.squeeze(0).transpose(0, 1).contiguous() for t in of_keys)
            return _by_tokens(dq), dk, dv

        def results(g: Gradients) -> list[tuple[str, Tensor]]:
            return [(name, t.transpose(0, 1)) for name, t in (("dQ", g.q), ("dK", g.k), ("dV", g.v))]

        tally = Tally(chosen, sites.index_of(site), "dgrad", q.dtype, note=checked.on_strike)
        found = _execute(lambda books: sequences.gradients(packed, d_out, statistics, books), results, tally)
        dq, dk, dv = (t.transpose(0, 1).contiguous() for t in found)
        return dq, dk, dv


# --- for the kernels ------------------------------------------------------------------------------


def _as_one(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Problem:
    """The tokens of all sequences as one, (1, H, G, T, E) and (1, H, S, ·), views."""
    of_q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).unsqueeze(0)
    return Problem(of_q, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), None, 0, options)


def _by_tokens(t: Tensor) -> Tensor:
    """(1, H, G, T, ·) as (T, heads, ·)."""
    return t.squeeze(0).permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def _sequences(cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int) -> Any:
    from abft.backends.triton_attention import Sequences

    return Sequences(cu_seq_q.contiguous(), cu_seq_k.contiguous(), max_q, max_k)


# --- what the lengths say -------------------------------------------------------------------------


def _read(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, options: Options
) -> Packed:
    """The sequences, of lengths that the host can read: ShapeError where they cannot be."""
    of_q = _lengths("cu_seq_q", cu_seq_q, q.shape[0], "max_q", max_q)
    of_k = _lengths("cu_seq_k", cu_seq_k, k.shape[0], "max_k", max_k)
    spans = zip(of_q, of_q[1:], of_k, of_k[1:], strict=False)
    return Packed(q, k, v, tuple(Sequence(*span) for span in spans), options)


def _lengths(name: str, cumulative: Tensor, tokens: int, bound: str, longest: int) -> list[int]:
    at = cumulative.tolist()
    if at[0] != 0:
        raise ShapeError(f"{name} must begin with 0, where the first sequence begins; it begins with {at[0]}")
    for number, (first, last) in enumerate(zip(at, at[1:], strict=False)):
        if last < first:
            raise ShapeError(f"{name} must not decrease; {name}[{number + 1}] = {last} follows {first}")
        if last - first > longest:
            raise ShapeError(f"{bound} = {longest}, but sequence {number} has {last - first} tokens; {bound} is that of the longest")
    if at[-1] > tokens:
        raise ShapeError(f"{name} ends with {at[-1]}, but there are {tokens} tokens")
    return at


# --- dispatch -------------------------------------------------------------------------------------


def _varlen_meta(q: Tensor, k: Any, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _on_meta_alone(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], q.shape[1], v.shape[-1])), q.new_empty((2, q.shape[1], q.shape[0]), dtype=wide)


def _varlen_backward_meta(d_out: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _on_meta_alone(q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("varlen_attention", _varlen, _device)
    LIBRARY.impl("varlen_attention_backward", _varlen_backward, _device)
torch.library.register_fake("abft::varlen_attention", _varlen_meta, lib=LIBRARY)
torch.library.register_fake("abft::varlen_attention_backward", _varlen_backward_meta, lib=LIBRARY)

varlen_attention = torch.ops.abft.varlen_attention.default
varlen_attention_backward = torch.ops.abft.varlen_attention_backward.default
for _op in (varlen_attention, varlen_attention_backward):
    torch.fx.node.has_side_effect(_op)


class CheckedVarlen(torch.autograd.Function):
    """out of an attention of packed sequences; its gradients are checked, too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, options: tuple[Any, ...], book: Tensor, site: Tensor,
        policy_text: str,
    ) -> Tensor:  # fmt: skip
        out, statistics = varlen_attention(q, k, v, cu_seq_q, cu_seq_k, *options, book, site, policy_text)
        kept = out if q.device.type != "cpu" or _asks_for_kernels(policy_text) else None  # see CheckedAttention
        ctx.save_for_backward(q, k, v, cu_seq_q, cu_seq_k, kept, statistics)
        ctx.ledger, ctx.site, ctx.options, ctx.policy = book, site, options, policy_text
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, cu_seq_q, cu_seq_k, kept, statistics = ctx.saved_tensors
        rest = (None,) * 6
        if torch.is_grad_enabled():
            return (*_differentiable(ctx, q, k, v, cu_seq_q, cu_seq_k, d_out), *rest)
        found = varlen_attention_backward(
            d_out, q, k, v, cu_seq_q, cu_seq_k, statistics, *ctx.options, ctx.ledger, ctx.site, ctx.policy, kept
        )
        return *found, *rest


def _differentiable(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, d_out: Tensor
) -> list[Tensor | None]:
    """create_graph=True: gradients that have gradients are torch's business, unchecked and counted; on a CPU, whose lengths can be read."""
    if q.device.type != "cpu":
        raise NotImplementedError(
            "varlen_attention has no gradients of gradients on a GPU, where the lengths cannot be read without waiting for it; "
            "pad the sequences and use abft.scaled_dot_product_attention"
        )
    bypass(ctx.ledger, "double backward")
    max_q, max_k, scale, causal, right, window = ctx.options
    packed = _read(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, Options.read(scale, causal, right, window, 0.0, 0.0))
    wanted = [t for t, needs in zip((q, k, v), ctx.needs_input_grad, strict=False) if needs]
    found = torch.autograd.grad(sequences.plainly(packed), wanted, d_out, create_graph=True, allow_unused=True)
    by = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return [by.get(id(t)) for t in (q, k, v)]
