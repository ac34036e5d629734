"""Checked attention: torch's results and errors, gradients against fp64, silence on clean data, every row counted."""

from __future__ import annotations

import math
import warnings

import oracles
import pytest
import torch
from oracles import name_of
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import abft
from abft.attend import More, attention_at
from abft.attention import dropout, problem, softmax

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP_INFO = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def exact(q, k, v, mask=None, causal=False, scale=None, offset=0, window=None, softcap=None):
    """softmax(q kᵀ scale) v in fp64, rows that see nothing being zero; key heads repeated where query has more."""
    q, k, v = (t.double() for t in (q, k, v))
    if q.dim() > 3 and q.shape[-3] != k.shape[-3] and k.shape[-3] > 1:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    x = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    position, key = torch.arange(q.shape[-2])[:, None] + offset, torch.arange(k.shape[-2])
    seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    seen = seen & (key <= position) if causal else seen
    seen = seen if window is None else seen & (key > position - window)
    if mask is not None and mask.dtype != torch.bool:
        x = x + mask.double()
    elif mask is not None:
        seen = seen & mask
    x = x.masked_fill(~seen, -torch.inf)
    nothing = (x == -torch.inf).all(-1, keepdim=True)
    return x.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v


def math_sdpa(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def run(function, operands, g=None, **kwargs):
    """[output, gradients of the operands] under a cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    out = function(*leaves, **kwargs)
    (out * (torch.ones_like(out) if g is None else g)).sum().backward()
    return [out.detach()] + [t.grad for t in leaves]


def silent():
    report = abft.report()
    assert (report.detected, report.false_alarms, report.input_rows, report.overflow_rows) == (0, 0, 0, 0), str(report)
    return report


# --- torch's own samples, and fp64 ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_torchs_own_samples_agree_in_values_and_gradients(dtype):
    for number, sample in enumerate(OP_INFO.sample_inputs("cpu", dtype, requires_grad=True)):
        if sample.kwargs.get("dropout_p", 0.0) > 0:
            continue  # other elements are dropped: see below
        kwargs = {k: v for k, v in sample.kwargs.items() if not isinstance(v, torch.Tensor)}
        operands = [sample.input, *sample.args]
        names = [k for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)]
        operands += [sample.kwargs[k] for k in names]
        n = len(sample.args) + 1

        def call(function, *leaves, kwargs=kwargs, names=names, n=n):
            return function(*leaves[:n], **dict(zip(names, leaves[n:], strict=True)), **kwargs)

        results = [run(lambda *t, f=f: call(f, *t), operands) for f in (math_sdpa, abft.scaled_dot_product_attention)]
        for torchs, ours in zip(*results, strict=True):
            assert ours.dtype == torchs.dtype and ours.shape == torchs.shape, number
            size = torchs.double().abs().max().item() if torchs.numel() else 0.0
            gap = (ours.double() - torchs.double()).abs().max().item() if torchs.numel() else 0.0
            # Both are computed in the wide type and rounded once; gradients of the samples' sizes sum at most some hundred terms.
            assert gap <= 2 * oracles.ROUNDOFF[dtype] * size + 500 * oracles.ROUNDOFF[oracles.WIDE[dtype]] * max(size, 1.0), (number, gap, size)
    silent()


SHAPES = [(1, 1, 1, 1, 1), (2, 3, 17, 33, 8), (1, 2, 64, 64, 64), (1, 1, 5, 300, 20), (1, 4, 130, 1, 16)]  # batch, heads, L, S, E


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_at_most_twice_as_wrong_as_torchs_own_math(shape, dtype, causal):
    batch, heads, length, keys, width = shape
    q, k, v = (torch.randn(batch, heads, n, width).to(dtype) for n in (length, keys, keys))
    g = torch.randn(batch, heads, length, width).to(dtype)
    results = [run(f, (q, k, v), g, is_causal=causal) for f in (math_sdpa, abft.scaled_dot_product_attention)]
    truth = run(lambda *t: exact(*t, causal=causal), [t.double() for t in (q, k, v)], g.double())
    for torchs, ours, right in zip(*results, truth, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (torchs.double() - right).abs().max() + oracles.ROUNDOFF[dtype] * right.abs() * (1 + 1e-6)
        # Torch's own error may happen to be zero, as where one key is all there is.
        oracles.assert_within(ours, right, allowed + 16 * oracles.ROUNDOFF[oracles.WIDE[dtype]] * right.abs().max() + torch.finfo(dtype).tiny)
    report = silent()
    rows, columns = batch * heads * length, batch * heads * keys
    assert report.checks == 2 * rows + 3 * rows + 2 * columns and report.products == 2 + 5 and report.bypassed == {}


MASKS = {
    "boolean": lambda length, keys: torch.rand(length, keys) < 0.6,
    "per head": lambda length, keys: torch.rand(2, 4, length, keys) < 0.6,
    "of the batch": lambda length, keys: (torch.rand(2, 1, 1, keys) < 0.7),
    "rows that see nothing": lambda length, keys: (torch.rand(length, 1) < 0.5).expand(length, keys),
    "added": lambda length, keys: torch.randn(length, keys) * 3,
    "added per head": lambda length, keys: torch.randn(1, 4, length, keys),
    "added, minus infinity": lambda length, keys: torch.zeros(length, keys).masked_fill(torch.rand(length, keys) < 0.5, -torch.inf),
    "added, the lowest number": lambda length, keys: torch.zeros(length, keys).masked_fill(torch.rand(length, keys) < 0.5, torch.finfo(torch.float32).min),
    "alibi": lambda length, keys: -(torch.arange(length)[:, None] - torch.arange(keys)).abs().float() * 0.5,
}


@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, key_heads):
    q, k, v = torch.randn(2, 4, 21, 8), torch.randn(2, key_heads, 30, 8), torch.randn(2, key_heads, 30, 12)
    mask = MASKS[kind](21, 30)
    ours = run(lambda *t: abft.scaled_dot_product_attention(*t, attn_mask=mask, enable_gqa=True), (q, k, v))
    k4, v4 = (t.repeat_interleave(4 // key_heads, 1) for t in (k, v))
    right = run(lambda *t: exact(*t, mask=mask), [q.double(), k4.double(), v4.double()])
    for got, expected in zip(ours, right, strict=True):
        if got.shape != expected.shape:
            expected = expected.unflatten(1, (key_heads, -1)).sum(2)
        oracles.assert_within(got, expected, torch.full_like(expected, 64 * 2.0**-24 * max(1.0, expected.abs().max().item())))
    silent()


def test_a_row_that_sees_nothing_is_torchs():
    q, k, v = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2:4] = False
    theirs, ours = (run(f, (q, k, v), attn_mask=mask) for f in (F.scaled_dot_product_attention, abft.scaled_dot_product_attention))
    assert torch.equal(ours[0][:, :, 2:4], theirs[0][:, :, 2:4]) and torch.equal(ours[1][:, :, 2:4], theirs[1][:, :, 2:4])
    silent()


@pytest.mark.parametrize("more", [
    More(offset=12), More(window=5), More(window=5, offset=12), More(softcap=2.0), More(softcap=1.0, window=3, offset=7), More(window=1),
], ids=lambda m: f"offset {m.offset} window {m.window} softcap {m.softcap}")  # fmt: skip
def test_windows_caps_and_alignments(more, monkeypatch):
    q, k, v = torch.randn(2, 4, 18, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    more_of = {"offset": more.offset, "window": more.window, "softcap": more.softcap}
    right = run(lambda *t: exact(*t, causal=True, **more_of), [t.double() for t in (q, k, v)])
    for elements in (problem.ELEMENTS, 256):
        monkeypatch.setattr(problem, "ELEMENTS", elements)
        ours = run(lambda *t: attention_at(None, *t, is_causal=True, enable_gqa=True, more=more), (q, k, v))
        for got, expected in zip(ours, right, strict=True):
            oracles.assert_within(got, expected, torch.full_like(expected, 64 * 2.0**-24 * max(1.0, expected.abs().max().item())))
    silent()


@pytest.mark.parametrize("shapes", [
    ((5, 4), (7, 4), (7, 3)), ((3, 5, 4), (3, 7, 4), (3, 7, 3)), ((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 3)), ((5, 4), (3, 7, 4), (7, 3)),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 3)), ((2, 1, 3, 5, 4), (1, 2, 3, 7, 4), (3, 7, 3)),
], ids=lambda s: "-".join(name_of(t) for t in s))  # fmt: skip
def test_leading_dimensions_broadcast(shapes):
    operands = [torch.randn(s) for s in shapes]
    ours, right = run(abft.scaled_dot_product_attention, operands), run(exact, [t.double() for t in operands])
    for got, expected in zip(ours, right, strict=True):
        oracles.assert_within(got, expected, torch.full_like(expected, 64 * 2.0**-24 * max(1.0, expected.abs().max().item())))
    silent()


@pytest.mark.parametrize("elements", [200, 3000])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_blocks_change_nothing_but_the_order_of_sums(elements, causal, monkeypatch):
    q, k, v = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 41, 8), torch.randn(2, 2, 41, 8)
    mask = None if causal else torch.randn(2, 1, 37, 41)
    whole = run(abft.scaled_dot_product_attention, (q, k, v), attn_mask=mask, is_causal=causal, enable_gqa=True)
    checks = abft.report(reset=True).checks
    monkeypatch.setattr(problem, "ELEMENTS", elements)
    monkeypatch.setattr(problem, "CAUSAL_ROWS", 16)
    cut = run(abft.scaled_dot_product_attention, (q, k, v), attn_mask=mask, is_causal=causal, enable_gqa=True)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=32 * 2.0**-24 * max(1.0, a.abs().max().item()))
    assert silent().checks == checks


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_gradcheck_in_fp64(mask):
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 3, 4), (1, 2, 5, 4), (1, 2, 5, 3)))
    added = {None: None, "bool": torch.rand(3, 5) < 0.7, "float": torch.randn(3, 5, dtype=torch.float64, requires_grad=True)}[mask]

    def attend(q, k, v, added):
        return abft.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)

    assert torch.autograd.gradcheck(attend, (q, k, v, added))
    capped = lambda q, k, v: attention_at(None, q, k, v, enable_gqa=True, more=More(softcap=1.5, window=4, offset=2))  # noqa: E731
    assert torch.autograd.gradcheck(capped, (q, k, v))
    silent()


def test_second_derivatives_are_unchecked_and_counted():
    q, k, v = (torch.randn(1, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
    assert torch.autograd.gradgradcheck(abft.scaled_dot_product_attention, (q, k, v))
    assert abft.report().bypassed["double backward"] > 0


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_operands_without_gradients(wanted):
    operands = [torch.randn(1, 2, 5, 4) for _ in range(3)]
    operands[wanted].requires_grad_()
    abft.scaled_dot_product_attention(*operands).sum().backward()
    assert [t.grad is not None for t in operands] == [i == wanted for i in range(3)]


# --- dropout --------------------------------------------------------------------------------------------


def test_dropout_repeats_with_torchs_seed_and_drops_its_share():
    q, k, v = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8), torch.eye(64).expand(1, 2, 64, 64)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(abft.scaled_dot_product_attention(q, k, v, dropout_p=0.25))
    assert oracles.bits_equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    p = exact(q, k, v)  # v is the identity: these are the probabilities
    kept = outs[0] != 0
    oracles.assert_within(outs[0], torch.where(kept, p / 0.75, 0.0), 16 * 2.0**-24 * p / 0.75 + 1e-12)
    share, n = kept.double().mean().item(), kept.numel()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / n)
    silent()


def test_dropout_has_the_gradient_of_what_it_kept():
    q, k = (torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)

    def seeded(q, k, v):
        torch.manual_seed(11)
        return abft.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    assert torch.autograd.gradcheck(seeded, (q, k, v))
    silent()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_is_kept_is_independent_between_rows_heads_and_seeds(p):
    head, n = torch.arange(4), torch.arange(256)
    a, b = (dropout.keep(seed, head, n, n, p) for seed in (1, 2))
    sigma = math.sqrt(p * (1 - p) / a.numel())
    assert abs(a.double().mean().item() - (1 - p)) < 5 * sigma
    for left, right in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a[..., 1:], a[..., :-1]), (a, a.mT)):
        x, y = left.double() - (1 - p), right.double() - (1 - p)
        # The products of independent centred numbers average 0 with a deviation of p (1 - p) / √n; a and its transpose share each pair.
        assert abs((x * y).mean().item()) < 5 * p * (1 - p) * math.sqrt(2 / x.numel()) + p * (1 - p) / 256


@pytest.mark.parametrize("p, expected", [(0.0, "all"), (1.0, "none")])
def test_dropout_of_everything_and_nothing(p, expected):
    q = torch.randn(1, 1, 8, 4)
    y = abft.scaled_dot_product_attention(q, q, q, dropout_p=p)
    assert torch.equal(y, abft.scaled_dot_product_attention(q, q, q)) if expected == "all" else not y.any()
    silent()


# --- silence --------------------------------------------------------------------------------------------

CLEAN = {
    "zero-mean": lambda *s: torch.randn(s), "shifted": lambda *s: torch.randn(s) + 3, "sharp": lambda *s: torch.randn(s) * 6,
    "outlier channels": lambda *s: torch.randn(s) * torch.where(torch.arange(s[-1]) % 7 == 0, 50.0, 1.0), "equal": lambda *s: torch.full(s, 0.37),
    "logits of 1e4": lambda *s: torch.randn(s) * 40, "zeros": lambda *s: torch.zeros(s), "tiny": lambda *s: torch.randn(s) * 1e-6,
    "sparse": lambda *s: torch.randn(s) * (torch.rand(s) < 0.05), "one sign": lambda *s: torch.rand(s) + 0.5,
    "a sink": lambda *s: torch.cat([torch.full((*s[:-2], 1, s[-1]), 4.0), torch.randn(*s[:-2], s[-2] - 1, s[-1]) * 0.3], -2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("kind", CLEAN)
def test_clean_data_is_silent(kind, dtype):
    for length, keys, causal in ((64, 64, True), (96, 200, False), (1, 130, False), (3, 1, False)):
        q, k, v = (CLEAN[kind](1, 4, n, 32).to(dtype) for n in (length, keys, keys))
        for value in (v, v.abs() + 1):
            run(abft.scaled_dot_product_attention, (q, k, value), torch.randn(1, 4, length, 32).to(dtype), is_causal=causal)
    assert silent().worst < 0.5


def test_poisoned_operands_are_inputs_not_faults():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    q[0, 0, 3, 1] = torch.nan
    y = abft.scaled_dot_product_attention(q, k, v)
    report = abft.report(reset=True)
    assert report.detected == report.false_alarms == 0 and report.input_rows > 0
    assert torch.isnan(y[0, 0, 3]).all() and torch.isfinite(y[0, 0, :3]).all()
    v[0, 1, 2, 2] = torch.inf
    run(abft.scaled_dot_product_attention, (q, k, v))
    report = abft.report()
    assert report.detected == 0 and report.input_rows > 0


# --- what torch refuses, and what is left to it ----------------------------------------------------------------

R = torch.randn
REFUSED = {
    "other widths": lambda f: f(R(1, 1, 3, 4), R(1, 1, 3, 5), R(1, 1, 3, 4)),
    "other dtypes": lambda f: f(R(1, 1, 3, 4), R(1, 1, 3, 4).half(), R(1, 1, 3, 4)),
    "a vector": lambda f: f(R(4), R(3, 4), R(3, 4)),
    "a mask of whole numbers": lambda f: f(R(1, 1, 3, 4), R(1, 1, 3, 4), R(1, 1, 3, 4), attn_mask=torch.ones(3, 3, dtype=torch.int64)),
    "a mask that does not fit": lambda f: f(R(1, 1, 3, 4), R(1, 1, 3, 4), R(1, 1, 3, 4), attn_mask=torch.ones(7, 3, dtype=torch.bool)),
    "heads that do not divide": lambda f: f(R(1, 3, 3, 4), R(1, 2, 3, 4), R(1, 2, 3, 4), enable_gqa=True),
    "no tensor": lambda f: f(R(1, 1, 3, 4), 3, R(1, 1, 3, 4)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses_is_refused_by_the_same_error(what):
    with pytest.raises(Exception) as theirs:
        REFUSED[what](F.scaled_dot_product_attention)
    with pytest.raises(type(theirs.value)) as ours:
        REFUSED[what](abft.scaled_dot_product_attention)
    assert str(ours.value) == str(theirs.value)
    assert abft.report().bypassed == {}


def test_what_is_not_checked_is_counted():
    q = torch.randn(1, 2, 4, 4)
    torch.func.vmap(abft.scaled_dot_product_attention)(q[None], q[None], q[None])
    assert abft.report().bypassed == {"functorch transform": 1}


@pytest.mark.parametrize("arguments, kwargs", [
    ((R(1, 1, 3, 4),) * 3, {"attn_mask": torch.rand(3, 3) < 0.7, "is_causal": True}),
    ((R(1, 4, 3, 4), R(1, 2, 3, 4), R(1, 4, 3, 4)), {"enable_gqa": True}),
], ids=["a mask and causal", "key and value heads differ"])  # fmt: skip
def test_what_only_torch_knows_is_its_own_and_counted(arguments, kwargs):
    y = abft.scaled_dot_product_attention(*arguments, **kwargs)
    assert oracles.bits_equal(y, F.scaled_dot_product_attention(*arguments, **kwargs))
    assert abft.report().bypassed == {"attention of operands that do not fit": 1} and abft.report().products == 0


@pytest.mark.parametrize("shapes", [((0, 3, 4), (0, 5, 4)), ((2, 0, 4), (2, 5, 4)), ((2, 3, 4), (2, 0, 4))], ids=str)
def test_nothing_to_multiply(shapes):
    q, k = (torch.randn(s) for s in shapes)
    y = abft.scaled_dot_product_attention(q, k, k)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, k)) and abft.report().products == 0


def test_an_explicit_backend_never_falls_back():
    q = torch.randn(1, 1, 4, 4)
    with pytest.raises(abft.DeviceError, match="attention"):
        abft.scaled_dot_product_attention(q, q, q, policy=abft.Policy(backend="triton"))
    with pytest.raises(abft.PolicyError, match="max_floor"):
        abft.scaled_dot_product_attention(q, q, q, policy=abft.Policy(max_floor=1e-12))


# --- policies, scopes, books ------------------------------------------------------------------------------


@pytest.mark.parametrize("roles, forward, backward", [
    ({"fprop", "dgrad", "wgrad"}, {"qk", "pv"}, {"qk", "pv"}), ({"fprop"}, {"qk", "pv"}, set()), ({"dgrad"}, set(), {"qk", "pv"}),
    ({"qk"}, {"qk"}, {"qk"}), ({"pv"}, {"pv"}, {"pv"}), ({"pv", "fprop"}, {"qk", "pv"}, {"pv"}), ({"wgrad"}, set(), set()), (set(), set(), set()),
], ids=lambda v: "+".join(sorted(v)) or "none")  # fmt: skip
def test_roles_choose_the_products(roles, forward, backward):
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4)
    run(lambda *t: abft.scaled_dot_product_attention(*t, policy=abft.Policy(roles=roles)), (q, k, v))
    checks = {"qk": (10, 10 + 10 + 14), "pv": (10, 10 + 14)}
    products = {"qk": (1, 3), "pv": (1, 2)}
    report = abft.report()
    assert report.checks == sum(checks[r][0] for r in forward) + sum(checks[r][1] for r in backward)
    assert report.products == sum(products[r][0] for r in forward) + sum(products[r][1] for r in backward)
    assert report.products + sum(report.bypassed.values()) == 7
    assert {f"role {r} not in policy" for r in {"qk", "pv"} - (forward & backward)} == set(report.bypassed)


def test_level_off_computes_the_same_and_is_counted():
    q = torch.randn(1, 2, 5, 4)
    off = abft.scaled_dot_product_attention(q, q, q, policy=abft.Policy(level="off"))
    assert abft.report(reset=True).bypassed == {"level off": 2}
    assert oracles.bits_equal(off, abft.scaled_dot_product_attention(q, q, q))


def test_a_scope_catches_torchs_function_and_its_backward():
    q = torch.randn(1, 2, 5, 4)
    with abft.protected() as scope:
        ours = run(F.scaled_dot_product_attention, (q, q, q))
    report = scope.report()
    plain = run(abft.scaled_dot_product_attention, (q, q, q))
    assert all(oracles.bits_equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert (report.products, report.checks, report.bypassed) == (7, 10 * 7, {})
    assert set(report.sites) == {"scaled_dot_product_attention"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_casts_as_torch_does(dtype):
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    results = []
    for f in (F.scaled_dot_product_attention, abft.scaled_dot_product_attention):
        with torch.autocast("cpu", dtype):
            results.append(run(f, (q, k, v)))
    for torchs, ours in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=0, atol=8 * oracles.ROUNDOFF[dtype] * max(1.0, torchs.abs().max().item()))
    silent()


def test_checkpointing_counts_recomputed_checks_apart():
    from torch.utils.checkpoint import checkpoint

    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    direct = run(lambda t: abft.scaled_dot_product_attention(t, t, t, dropout_p=0.3), [q], torch.ones(1, 2, 5, 4))
    checks = abft.report(reset=True).checks
    torch.manual_seed(5)
    first = run(lambda t: checkpoint(lambda u: abft.scaled_dot_product_attention(u, u, u, dropout_p=0.3), t, use_reentrant=False), [q])
    report = abft.report(reset=True)
    assert (report.checks, report.repeated_checks) == (checks, 20)
    torch.manual_seed(5)
    again = run(lambda t: abft.scaled_dot_product_attention(t, t, t, dropout_p=0.3), [q])
    assert all(oracles.bits_equal(a, b) for a, b in zip(first, again, strict=True)) and len(direct) == 2


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
def test_compiled_whole(mode, dynamo):
    @torch.compile(backend=mode, fullgraph=True)
    def block(q, k, v, mask):
        return abft.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).sin()

    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    for mask in (None, torch.rand(9, 11) < 0.7):
        compiled = run(block, (q, k, v), mask=mask)
        eager = run(lambda q, k, v, m=mask: abft.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True).sin(), (q, k, v))
        for a, b in zip(compiled, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert silent().products == 2 * 2 * 7


def test_memory_stays_bounded(monkeypatch):
    """No tensor made on the way is larger than a few tiles."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in oracles.tensors_in(out):
                Largest.size = max(Largest.size, t.numel())
            return out

    monkeypatch.setattr(problem, "ELEMENTS", 1 << 11)
    q = torch.randn(1, 1, 128, 8)
    site = abft.sites.functional_tensor(abft.sites.functional("memory", "warn"))
    from abft.ops import attention as op

    options = problem.Options(0.3, causal=True).spelt()
    with Largest():
        out, statistics, _ = op._attention(q[:, :, None], q, q, None, None, *options, False, abft.ledger.tensor(q.device), site, abft.Policy().text)
        op._attention_backward(out, None, q[:, :, None], q, q, None, None, statistics, *options, False, abft.ledger.tensor(q.device), site, abft.Policy().text)
    assert Largest.size <= 2 * (1 << 11), "128 x 128 scores never exist at once"


def test_the_softmax_check_fails_closed():
    tile = next(next(problem.Problem(*(torch.randn(1, 1, 1, 4, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)), None, 0, problem.Options(0.3)).planes()).tiles())
    s = torch.randn(1, 4, 6)
    soft = softmax.softmax(s, tile)
    assert not softmax.evidence(s, soft, soft.probabilities.sum(-1), tile).suspects().any()
    for wrong in (torch.nan, torch.inf, 0.0, -1.0):
        total, sums = soft.probabilities.sum(-1), soft.sums.clone()
        total[0, 1], sums[0, 2] = wrong, wrong
        found = softmax.evidence(s, softmax.Softmax(soft.probabilities, soft.maxima, sums), total, tile).suspects()
        assert found.tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_token_repeated_for_long_is_clean(dtype):
    """Sums of tens of thousands of equal numbers round alike at every step; beside the one key that differs, gradients of scores, too."""
    torch.manual_seed(0)

    def repeated() -> torch.Tensor:
        x = torch.randn(1, 1, 1, 64).expand(1, 1, 32768, 64).clone()
        x[..., 0, :] = torch.randn(64)
        return x

    q, k, v = (t.to(dtype).requires_grad_() for t in (torch.randn(1, 1, 8, 64) * 0.3, repeated() * 0.3, repeated()))
    abft.report(reset=True)
    y = abft.scaled_dot_product_attention(q, k, v)
    torch.autograd.grad(y, (q, k, v), torch.randn(y.shape).to(dtype))
    report = abft.report()
    assert report.checks > 65536 and not report.events and report.worst < 0.5
