"""nn.MultiheadAttention, checked: torch's results in all its forms, protected in place and back, covered, faults repaired."""

from __future__ import annotations

import copy
import pickle
import warnings

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import abft

CLOSE = {"rtol": 0, "atol": 2e-5}


def make(**kwargs):
    torch.manual_seed(1)
    return nn.MultiheadAttention(16, 4, **kwargs)


def twins(**kwargs):
    """A module of torch's, and one of the same weights that is checked."""
    plain = make(**kwargs)
    return plain, abft.protect(copy.deepcopy(plain), name="mha")


def results(module, inputs, **kwargs):
    """[output, weights, gradients of inputs and parameters]."""
    leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
    module.zero_grad()
    out, weights = module(*(leaves[id(t)] for t in inputs), **kwargs)
    loss = out.sin().sum() + (0 if weights is None else weights.square().sum())
    loss.backward()
    grads = [p.grad for p in module.parameters()]
    return [out, weights, *(t.grad for t in leaves.values()), *grads]


def agree(one, other, close=None):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **(close or CLOSE))


def query(*shape):
    return torch.randn(shape)


SEQUENCES = {
    "self": lambda: [query(7, 3, 16)] * 3,
    "cross": lambda: (lambda kv: [query(7, 3, 16), kv, kv])(query(9, 3, 16)),
    "three": lambda: [query(7, 3, 16), query(9, 3, 16), query(9, 3, 16)],
    "unbatched": lambda: [query(7, 16)] * 3,
    "unbatched cross": lambda: [query(7, 16), query(9, 16), query(9, 16)],
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_sequences(sequence, bias, need_weights):
    plain, checked = twins(bias=bias)
    inputs = SEQUENCES[sequence]()
    agree(*(results(m, inputs, need_weights=need_weights) for m in (plain, checked)))
    assert abft.report().bypassed == {} and abft.report().detected == 0


@pytest.mark.parametrize("kwargs", [
    {"batch_first": True}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 10, "vdim": 6},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_options(kwargs, need_weights):
    plain, checked = twins(**kwargs)
    key, value = (query(3, 3, kwargs.get(w, 16)) for w in ("kdim", "vdim"))
    mask = torch.rand(3, 3) < 0.3 if "kdim" not in kwargs else None
    agree(*(results(m, [query(3, 3, 16), key, value], need_weights=need_weights, attn_mask=mask) for m in (plain, checked) if torch.manual_seed(2)))
    assert abft.report().bypassed == {} and abft.report().detected == 0


def causal(n):
    return nn.Transformer.generate_square_subsequent_mask(n)


MASKS = {
    "boolean": {"attn_mask": torch.arange(7)[:, None] < torch.arange(7)},
    "boolean per head": {"attn_mask": (torch.arange(7)[:, None] < torch.arange(7)).expand(12, 7, 7).clone()},
    "float": {"attn_mask": torch.linspace(-2, 2, 49).view(7, 7)},
    "padding": {"key_padding_mask": torch.arange(7) >= torch.tensor([[7], [5], [3]])},
    "float padding": {"key_padding_mask": torch.linspace(-3, 0, 21).view(3, 7)},
    "both": {"attn_mask": torch.arange(7)[:, None] < torch.arange(7), "key_padding_mask": torch.arange(7) >= torch.tensor([[7], [5], [3]])},
    "both, float": {"attn_mask": causal(7), "key_padding_mask": torch.zeros(3, 7).masked_fill(torch.arange(7) >= torch.tensor([[7], [5], [3]]), -torch.inf)},
    "causal": {"attn_mask": causal(7), "is_causal": True},
    "averaged not": {"average_attn_weights": False},
}


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, training, need_weights):
    plain, checked = (m.train(training) for m in twins(batch_first=True))
    x = query(3, 7, 16)
    agree(*(results(m, [x, x, x], need_weights=need_weights, **MASKS[kind]) for m in (plain, checked)))
    assert abft.report().bypassed == {} and abft.report().detected == 0


def test_every_product_is_counted():
    _, checked = twins(batch_first=True)
    x = query(3, 7, 16)
    with torch.no_grad():
        checked.eval()(x, x, x)
    projections, attention = 2 * 21, 2 * 3 * 4 * 7
    assert abft.report().checks == projections + attention and set(abft.report().sites) == {"mha"}
    abft.report(reset=True)
    results(checked, [x, x, x])
    backward = 2 * 21 + (48 + 16) + 3 * 3 * 4 * 7 + 2 * 3 * 4 * 7  # dgrad, wgrad; S, dP, dQ; dK, dV
    assert abft.report().checks == projections + attention + backward


def test_dropout_drops_in_training_only_and_returns_what_it_dropped():
    _, checked = twins(dropout=0.5, batch_first=True)
    x = query(2, 40, 16)
    weights = checked(x, x, x, average_attn_weights=False)[1]
    assert 0.4 < (weights == 0).double().mean() < 0.6
    assert not (checked.eval()(x, x, x)[1] == 0).any()
    assert abft.report().detected == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=oracles.name_of)
def test_dtypes(dtype):
    plain, checked = (m.to(dtype) for m in twins(batch_first=True))
    x = query(3, 7, 16).to(dtype)
    unit = oracles.ROUNDOFF[dtype]
    agree(*([r.double() for r in results(m, [x, x, x])] for m in (plain, checked)), {"rtol": 32 * unit, "atol": 64 * unit})
    with torch.autocast("cpu", torch.bfloat16):
        plain, checked = twins(batch_first=True)
        agree(*([r.double() for r in results(m, [x.float()] * 3)] for m in (plain, checked)), {"rtol": 0.05, "atol": 0.05})
    assert abft.report().detected == 0


# --- in place, and back ------------------------------------------------------------------------------------


def test_protect_and_unprotect_are_inverse():
    module = make(batch_first=True)
    kind, state, attributes = type(module), list(module.state_dict()), dict(module.__dict__)
    abft.protect(module)
    assert isinstance(module, nn.MultiheadAttention) and type(module) is not kind and list(module.state_dict()) == state
    assert abft.protect(module) is module
    abft.unprotect(module)
    assert type(module) is kind and module.__dict__ == attributes and type(module.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    module.eval()(query(3, 7, 16), *[query(3, 7, 16)] * 2)
    assert abft.report().products == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_transformers(kind, training):
    torch.manual_seed(1)
    options = {"dropout": 0.0, "batch_first": True}
    x, memory = query(2, 5, 16), query(2, 6, 16)
    plain, call = {
        "encoder": (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **options), 2, enable_nested_tensor=False), lambda m: m(x, mask=causal(5), is_causal=True)),
        "decoder": (nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, **options), 2), lambda m: m(x, memory, tgt_mask=causal(5), memory_key_padding_mask=torch.arange(6).expand(2, 6) > 3)),
        "transformer": (nn.Transformer(16, 2, 1, 1, 32, **options), lambda m: m(memory, x, tgt_mask=causal(5))),
    }[kind]  # fmt: skip
    plain.train(training)
    checked = abft.protect(copy.deepcopy(plain), name="m")
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, y = call(plain), call(checked)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    coverage = abft.coverage(checked)
    assert coverage.covered == coverage.total and abft.report().bypassed == {}
    attentions = [n for n, m in plain.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert {f"m.{n}" for n in attentions} <= set(abft.report().sites)
    abft.unprotect(checked)
    assert [type(m) for m in checked.modules()] == [type(m) for m in plain.modules()]


def test_coverage_counts_attention():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make(batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Alone(), query(3, 7, 16)
    assert abft.coverage(model, x).flop_share == 0.0
    covered = abft.coverage(abft.protect(model), x)
    assert covered.flop_share == 1.0 and (covered.covered, covered.total) == (2, 2)
    assert [m.how for m in covered.modules] == ["projections and attention", "in the module above it"]
    forward_only = abft.coverage(abft.protect(model, abft.Policy(roles={"fprop"})), x).flop_share
    into, out, attention = 21 * 16 * 48, 21 * 16 * 16, 84 * 7 * 4  # x wants no gradient: the first projection has no dgrad
    total = 2 * into + 3 * out + 7 * attention
    assert forward_only == (into + out + 2 * attention) / total
    attention_only = abft.coverage(abft.protect(model, abft.Policy(roles={"qk", "pv"})), x).flop_share
    assert attention_only == 7 * attention / total


def test_policies_by_name_and_filter():
    model = nn.ModuleDict({"a": make(), "b": make(), "c": nn.Linear(16, 16)})
    abft.protect(model, {"a": abft.Policy(level="detect"), "b": None})
    assert [m.covered for m in abft.coverage(model).modules] == [True, True, False, False, True]
    model = nn.ModuleDict({"a": make(), "c": nn.Linear(16, 16)})
    abft.protect(model, filter_fn=lambda m, name: isinstance(m, nn.Linear))
    assert [m.covered for m in abft.coverage(model).modules] == [False, False, True]


def test_born_checked():
    module = abft.MultiheadAttention(16, 4, batch_first=True, policy="audit")
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(module.state_dict())
    x = query(3, 7, 16)
    torch.testing.assert_close(module.eval()(x, x, x), plain.eval()(x, x, x), **CLOSE)
    assert abft.report().sites["MultiheadAttention(16, 4)"].checks > 0
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(abft.protect(plain)))
    for other in (copied, pickled):
        torch.testing.assert_close(other(x, x, x), module(x, x, x), **CLOSE)
    with pytest.raises(Exception, match="embed_dim must be divisible"):
        abft.MultiheadAttention(10, 3)


def test_a_scope_sees_into_torchs_module():
    plain, x = make(batch_first=True).eval(), query(3, 7, 16)
    with abft.protected() as scope, torch.no_grad():
        plain(x, x, x)
    assert scope.report().bypassed == {} and scope.report().checks == 2 * 21 + 2 * 84


@pytest.mark.parametrize("what", ["mask", "width", "value", "hint"])
def test_what_torch_refuses_is_refused_by_the_same_error(what):
    plain, checked = twins()
    x = query(7, 3, 16)
    arguments = {
        "mask": ((x, x, x), {"attn_mask": torch.zeros(3, 3)}), "width": ((query(7, 3, 12),) * 3, {}), "value": ((x, x, query(5, 3, 16)), {}),
        "hint": ((x, x, x), {"is_causal": True}),
    }[what]  # fmt: skip
    with pytest.raises(Exception) as theirs:
        plain(*arguments[0], **arguments[1])
    with pytest.raises(type(theirs.value)) as ours:
        checked(*arguments[0], **arguments[1])
    assert str(ours.value) == str(theirs.value) and abft.report().bypassed == {}


@pytest.mark.parametrize("where, role", [("accumulator", "fprop"), ("accumulator", "wgrad"), ("S", "qk"), ("P", "pv"), ("l", "pv"), ("O", "pv"), ("dS", "pv"), ("dK", "qk"), ("dV", "pv")])
def test_faults_in_the_module_are_repaired_to_the_very_bits(where, role):
    _, checked = twins(batch_first=True)
    x = query(3, 7, 16)
    clean = results(checked, [x, x, x])
    abft.report(reset=True)
    with abft.inject.faults(abft.inject.Fault("inf", where, role=role, site="mha")):
        struck = results(checked, [x, x, x])
    assert all(oracles.bits_equal(a, b) for a, b in zip(clean, struck, strict=True))
    assert abft.report().detected >= 1 and abft.report().recomputed == abft.report().detected


def test_compiled_whole(dynamo):
    _, checked = twins(batch_first=True)
    x = query(3, 7, 16)
    compiled = torch.compile(checked, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], checked(x, x, x, need_weights=False)[0], **CLOSE)
    assert set(abft.report().sites) == {"mha"} and abft.report().bypassed == {}


BARE = {
    "nothing": {}, "boolean": {"attn_mask": torch.arange(5)[:, None] < torch.arange(5)},
    "boolean padding": {"key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]])},
    "both boolean": {"attn_mask": torch.arange(5)[:, None] < torch.arange(5), "key_padding_mask": torch.arange(5) >= torch.tensor([[5], [3]])},
    "one of each": {"attn_mask": causal(5), "key_padding_mask": torch.zeros(2, 5).masked_fill(torch.arange(5) >= torch.tensor([[5], [3]]), -torch.inf)},
}


@pytest.mark.parametrize("added", [False, True], ids=["", "a zero key"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("kind", BARE)
def test_the_function_in_a_scope_is_torchs(kind, need_weights, added):
    """The module turns boolean masks into floats before it calls the function; others do not."""
    x, w, o = query(5, 2, 8), torch.randn(24, 8), torch.randn(8, 8)
    arguments = (x, x, x, 8, 2, w, None, None, None, added, 0.0, o, None)
    options = {"need_weights": need_weights, **BARE[kind]}
    expected = F.multi_head_attention_forward(*arguments, **options)
    with abft.protected() as scope:
        agree(expected, F.multi_head_attention_forward(*arguments, **options))
    assert scope.report().bypassed == {} and scope.report().checks == 2 * 10 + 2 * 20


# --- what torch does around its layers ------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, nn.Linear, nn.MultiheadAttention], ids=["all", "linear", "attention"])
def test_an_encoder_takes_padded_batches_as_before(only):
    """Torch's encoder makes them nested for its fast path, which is switched off."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        abft.protect(encoder, filter_fn=None if only is None else lambda module, name: isinstance(module, only))
        found = encoder(x, src_key_padding_mask=padding)
        report = abft.report()
        abft.unprotect(encoder)
        again = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert report.checks and not report.detected and not report.bypassed
    assert torch.equal(again, expected) and encoder.use_nested_tensor


def test_nested_tensors_and_flex_attention_are_torchs_own_and_counted():
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    heads = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    weight = torch.randn(5, 8)
    with abft.protected() as scope:
        assert torch.equal(F.linear(nested, weight).unbind()[1], F.linear(nested.unbind()[1], weight))
        F.scaled_dot_product_attention(heads, heads, heads)
    assert sum(count for reason, count in scope.report().bypassed.items() if "nested" in reason) >= 2
    layer = abft.Linear(8, 5)
    layer(nested)
    assert abft.report().bypassed["nested tensor"] >= 1

    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    with abft.protected() as scope:
        flex_attention(q, q, q)
    assert scope.report().bypassed["flex_attention"] >= 1
