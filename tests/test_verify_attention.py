"""verify_attention: attention that something else computed is judged, never written."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from oracles import name_of
from torch.nn import functional as F

import abft
from abft import verification

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = {
    "whole": {}, "causal": {"is_causal": True}, "boolean": {"attn_mask": torch.rand(70, 90, generator=torch.Generator().manual_seed(3)) < 0.7},
    "padding": {"attn_mask": (torch.arange(90) < 50)[None]}, "added": {"attn_mask": torch.randn(70, 90, generator=torch.Generator().manual_seed(4))},
    "scaled": {"scale": 1.5},
}  # fmt: skip


def _operands(dtype=torch.float32, heads=(4, 4)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, d, generator=generator).to(dtype) for h, n, d in ((heads[0], 70, 32), (heads[1], 90, 32), (heads[1], 90, 48))]


def _exact(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """(out, lse) in fp64."""
    q, k, v = (t.double() for t in (q, k, v))
    x = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        x = x.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else x + attn_mask
    return torch.softmax(x, -1) @ v, x.logsumexp(-1)


def _cast(kwargs, dtype):
    return {n: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in kwargs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_computes_is_ok_and_untouched(kind, dtype, monkeypatch):
    monkeypatch.setattr(verification, "SCORES", 9000)  # several blocks, the last of them short
    operands, kwargs = _operands(dtype), _cast(KINDS[kind], dtype)
    out = F.scaled_dot_product_attention(*operands, **kwargs)
    lse = _exact(*operands, **kwargs)[1].to(torch.promote_types(dtype, torch.float32))
    before = [t.clone() for t in (*operands, out)]
    result = abft.verify_attention(*operands, out, lse, **kwargs)
    assert result.ok and result.suspect.shape == out.shape[:-1] and (result.floor > 0).all()
    assert (result.residual.abs() <= 0.5 * result.bound).all()
    assert all(oracles.bits_equal(t, u) for t, u in zip((*operands, out), before, strict=True))
    assert abft.report().checks == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_deviation_twice_the_floor_is_found_in_its_row_only(dtype):
    operands = _operands(dtype)
    out = F.scaled_dot_product_attention(*operands)
    floor = abft.verify_attention(*operands, out).floor
    for at in ((0, 0, 0, 0), (1, 3, 69, 47), (0, 2, 33, 17)):
        wrong, norm = out.clone(), out[at[:3]].double().norm()
        wrong[at] = (out[at].double() + 2.5 * floor[at[:3]] * norm).to(dtype)
        assert (wrong[at].double() - out[at].double()).abs() > floor[at[:3]] * norm
        assert abft.verify_attention(*operands, wrong).suspect.nonzero().tolist() == [list(at[:3])]


def test_the_floor_says_how_fine_it_is():
    floors = {}
    for dtype in DTYPES:
        operands = _operands(dtype)
        floors[dtype] = abft.verify_attention(*operands, F.scaled_dot_product_attention(*operands)).floor.max().item()
    assert floors[torch.float64] < 1e-11 and floors[torch.float32] < 1e-3 and floors[torch.float16] < 0.02 and floors[torch.bfloat16] < 0.15


@pytest.mark.parametrize("what", ["score", "exponential", "sum", "mask", "value"])
def test_what_was_wrong_inside_the_other_kernel_is_seen(what):
    q, k, v = _operands(torch.float64)
    x = q @ k.mT / math.sqrt(32)
    row, key = (1, 2, 40), 11
    x[(*row, key)] += 0.5 if what == "score" else 0.0
    x[(*row, key)] = -math.inf if what == "mask" else x[(*row, key)]
    e = (x - x.amax(-1, keepdim=True)).exp()
    e[(*row, key)] *= 1.5 if what == "exponential" else 1.0
    l = e.sum(-1, keepdim=True)
    l[row] *= 1.01 if what == "sum" else 1.0
    read = v.clone()
    read[1, 2, key, 5] += 1.0 if what == "value" else 0.0
    out = (e / l @ read).float()
    suspect = abft.verify_attention(*(t.float() for t in (q, k, v)), out).suspect
    assert suspect[row] and (what == "value" or suspect.sum() == 1)
    # A value that was read wrong is wrong for all queries of its head, as far as they see it, and for no other.
    assert not suspect[0].any() and not suspect[1, [0, 1, 3]].any()


def test_the_logarithm_of_the_sum_is_judged_itself():
    operands = _operands()
    out, lse = (t.float() for t in _exact(*operands))
    assert abft.verify_attention(*operands, out, lse).ok
    lse[1, 0, 9] += 1e-3
    assert abft.verify_attention(*operands, out, lse).suspect.nonzero().tolist() == [[1, 0, 9]]
    lse[1, 0, 9] = math.nan
    assert abft.verify_attention(*operands, out, lse).suspect.nonzero().tolist() == [[1, 0, 9]]


def test_grouped_queries_and_rows_that_see_nothing():
    q, k, v = _operands(heads=(4, 2))
    mask = torch.rand(70, 90) < 0.8
    mask[7] = False
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).nan_to_num(0.0)
    assert abft.verify_attention(q, k, v, out, attn_mask=mask, enable_gqa=True).ok
    out[0, 3, 7, 2] = 1e-3
    assert abft.verify_attention(q, k, v, out, attn_mask=mask, enable_gqa=True).suspect.nonzero().tolist() == [[0, 3, 7]]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_it_fails_closed(poison):
    operands = _operands()
    out = F.scaled_dot_product_attention(*operands)
    out[0, 1, 2, 3] = poison
    assert abft.verify_attention(*operands, out).suspect.nonzero().tolist() == [[0, 1, 2]]
    operands[0][1, 1, 5, 0] = poison
    assert abft.verify_attention(*operands, out).suspect[1, 1, 5]


def test_what_does_not_fit_is_refused():
    q, k, v = _operands()
    out = F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(abft.ShapeError, match=r"out \(…, L, D\)"):
        abft.verify_attention(q, k, v, out[..., :-1])
    with pytest.raises(abft.ShapeError):
        abft.verify_attention(q, k, v, out, torch.zeros(3))
    with pytest.raises(abft.ShapeError):
        abft.verify_attention(q, k[:, :2], v[:, :2], out)
    with pytest.raises(abft.DtypeError, match="value must be a strided float"):
        abft.verify_attention(q, k, v.int(), out)
    with pytest.raises(TypeError, match="out must be a tensor"):
        abft.verify_attention(q, k, v, None)
    with pytest.raises(abft.DeviceError):
        abft.verify_attention(q, k, v, out.to("meta"))
