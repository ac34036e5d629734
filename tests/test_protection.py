"""protect, unprotect, coverage: the same model, with its products checked, and back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import abft
from abft import panels
from abft.inject import Fault, faults


class Doubled(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Renamed(nn.Linear):
    """A subclass that keeps nn.Linear's forward."""


class Low(nn.Module):
    """A LoRA-like wrapper, which asks what it wraps."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.LayerNorm(24), nn.Linear(24, 8))


def state_of(model: nn.Module) -> list:
    """Everything by which a module could differ: types, attributes (identities of tensors), hooks."""
    return [
        (name, type(m), {k: (list(map(id, v.values())) if isinstance(v, dict) else id(v) if isinstance(v, torch.Tensor) else v) for k, v in m.__dict__.items()})
        for name, m in model.named_modules()
    ]  # fmt: skip


def checked(model: nn.Module, *inputs) -> abft.Report:
    abft.report(reset=True)
    model(*inputs)
    return abft.report()


# --- in place ------------------------------------------------------------------------------------------


def test_the_model_is_returned_and_gives_the_same_bits():
    model = mlp()
    x = torch.randn(5, 16)
    expected = model(x)
    assert abft.protect(model) is model
    assert oracles.bits_equal(model(x), expected)
    assert abft.report().checks == 10


def test_a_root_linear():
    layer = nn.Linear(16, 8)
    assert abft.protect(layer) is layer and isinstance(layer, nn.Linear)
    assert list(checked(layer, torch.randn(5, 16)).sites) == ["Linear"]
    assert list(checked(abft.protect(nn.Linear(16, 8), name="head"), torch.randn(5, 16)).sites) == ["head"]


def test_parameters_buffers_state_and_hooks_stay():
    model = mlp()
    parameters, keys, children = dict(model.named_parameters()), list(model.state_dict()), dict(model.named_modules())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[0].weight.register_hook(lambda g: calls.append("weight"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    abft.protect(model)
    assert all(p is parameters[n] for n, p in model.named_parameters()) and list(model.state_dict()) == keys
    assert all(m is children[n] for n, m in model.named_modules())
    assert list(model.named_buffers()) == []
    model(torch.randn(5, 16)).sum().backward()
    assert calls == ["before", "forward", "weight", "backward"] or calls == ["before", "forward", "backward", "weight"]
    optimizer.step()
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_isinstance_repr_and_type_names_stay_readable():
    layer = abft.protect(Renamed(3, 4))
    assert isinstance(layer, Renamed) and isinstance(layer, nn.Linear)
    assert "in_features=3, out_features=4, bias=True" in repr(layer) and "Renamed" in repr(layer)


def test_protecting_twice_is_protecting_once():
    model = mlp()
    abft.protect(model)
    types = [type(m) for m in model.modules()]
    abft.protect(model)
    assert [type(m) for m in model.modules()] == types
    assert checked(model, torch.randn(5, 16)).checks == 10
    abft.protect(model, abft.Policy(level="off"))
    assert checked(model, torch.randn(5, 16)).checks == 0


def test_layers_of_one_class_share_one_checked_class():
    """One class means one compiled graph for many layers."""
    model = abft.protect(mlp())
    assert type(model[0]) is type(model[3])


def test_names_prefix_the_sites():
    assert set(checked(abft.protect(mlp(), name="encoder"), torch.randn(5, 16)).sites) == {"encoder.0", "encoder.3"}
    assert set(checked(abft.protect(mlp()), torch.randn(5, 16)).sites) == {"0", "3"}


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    abft.protect(model)
    assert model[0].weight is model[1].weight and len(list(model.parameters())) == 3
    x = torch.randn(5, 16)
    for m in (model, twin):
        m(x).square().sum().backward()
    assert oracles.bits_equal(model[0].weight.grad, twin[0].weight.grad)
    assert abft.report().detected == 0


def test_an_embedding_tied_to_a_head():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model = abft.protect(Language())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(3):
        loss = F.cross_entropy(model(torch.arange(8)), torch.arange(8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = abft.report()
    assert model.head.weight is model.embed.weight and report.detected == report.stale == 0 and report.checks > 0


def test_a_shared_module_is_one_site():
    layer = nn.Linear(16, 16)
    model = abft.protect(nn.Sequential(layer, nn.ReLU(), layer))
    report = checked(model, torch.randn(5, 16))
    assert model[0] is model[2] and report.checks == 10 and len(report.sites) == 1
    abft.unprotect(model)
    assert type(layer) is nn.Linear


def test_train_and_eval_and_no_grad_and_inference_mode():
    model = abft.protect(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)))
    x = torch.randn(5, 16)
    assert model.train().training and model[0].training and not model.eval()[0].training
    with torch.no_grad():
        assert checked(model, x).checks == 5
    with torch.inference_mode():
        assert checked(model, x).checks == 5
        assert checked(abft.protect(nn.Linear(16, 8)), x).checks == 5  # parameters that are inference tensors
    assert checked(model, x).checks == 5


def test_frozen_parameters_get_no_gradient_products():
    layer = abft.protect(nn.Linear(16, 8)).requires_grad_(False)
    layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert abft.report().checks == 10 and layer.weight.grad is None


# --- back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    mlp, lambda: nn.Linear(3, 4), lambda: nn.Sequential(Doubled(3, 4), Renamed(4, 5)), lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), lambda: nn.MultiheadAttention(16, 2), lambda: Low(nn.Linear(4, 4)),
    lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
], ids=["mlp", "linear", "subclasses", "encoder layer", "encoder", "attention", "lora", "transformer"])  # fmt: skip
def test_unprotect_is_the_exact_inverse(make):
    model = make()
    model.register_forward_hook(lambda *_: None)
    before = state_of(model)
    assert abft.unprotect(abft.protect(abft.protect(model))) is model
    assert state_of(model) == before


def test_unprotecting_the_unprotected_changes_nothing():
    model = mlp()
    before = state_of(model)
    assert state_of(abft.unprotect(model)) == before
    born = abft.Linear(3, 4)
    assert type(abft.unprotect(born)) is abft.Linear


def test_after_unprotect_nothing_is_checked():
    model = abft.unprotect(abft.protect(mlp()))
    report = checked(model, torch.randn(5, 16))
    assert (report.checks, report.products) == (0, 0)


def test_a_protected_part_of_a_model_can_be_unprotected_alone():
    model = abft.protect(mlp())
    abft.unprotect(model[0])
    assert checked(model, torch.randn(5, 16)).checks == 5


# --- copies and files -----------------------------------------------------------------------------------


def test_deepcopy_is_protected_and_apart():
    model = abft.protect(mlp(), abft.Policy(level="detect", on_uncorrected="record"), name="net")
    clone = copy.deepcopy(model)
    assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
    assert clone[0].weight is not model[0].weight
    with torch.no_grad():
        clone[0].weight.zero_()
    x = torch.randn(5, 16)
    model(x), clone(x)
    report = abft.report()
    assert report.checks == 20 and report.detected == report.stale == 0
    with faults(Fault("nan")):
        clone(x)
    assert abft.report().observed == 1  # the policy went with the copy
    assert type(abft.unprotect(clone)[0]) is nn.Linear and type(model[0]) is not nn.Linear


@pytest.mark.parametrize("store", ["pickle", "torch.save"])
@pytest.mark.parametrize("make", [
    lambda: abft.protect(mlp()), lambda: abft.protect(Doubled(16, 8)), lambda: abft.Linear(16, 8), lambda: abft.protect(nn.Linear(16, 8), "audit"),
], ids=["protected model", "subclass", "abft.Linear", "with a policy"])  # fmt: skip
def test_pickling(make, store):
    model = make()
    x = torch.randn(5, 16)
    expected = model(x)
    if store == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    abft.report(reset=True)
    assert oracles.bits_equal(again(x), expected)
    assert abft.report().checks > 0 and set(abft.report().sites) == set(again_sites(model, x))


def again_sites(model, x):
    return checked(model, x).sites


def test_state_dicts_go_both_ways_strictly():
    plain, protected = mlp(), abft.protect(mlp())
    x = torch.randn(5, 16)
    protected(x)
    protected.load_state_dict(plain.state_dict(), strict=True)
    assert oracles.bits_equal(protected(x), plain(x))
    other = mlp()
    other.load_state_dict(protected.state_dict(), strict=True)
    assert oracles.bits_equal(other(x), plain(x))
    report = abft.report()
    assert report.detected == report.stale == 0


@pytest.mark.parametrize("weights", ["tracked", "frozen"])
def test_loading_a_state_dict_is_an_announced_change(weights):
    layer, other = abft.protect(nn.Linear(16, 8), abft.Policy(weights=weights)), nn.Linear(16, 8)
    x = torch.randn(5, 16)
    layer(x)
    for assign in (False, True):
        layer.load_state_dict(nn.Linear(16, 8).state_dict() if not assign else other.state_dict(), assign=assign)
        layer(x)
    assert oracles.bits_equal(layer(x), other(x))
    report = abft.report()
    assert (report.detected, report.stale, report.false_alarms) == (0, 0, 0)


@pytest.mark.parametrize("weights", ["tracked", "frozen"])
def test_meta_to_empty_and_load(weights):
    source = mlp()
    with torch.device("meta"):
        model = mlp()
    abft.protect(model, abft.Policy(weights=weights))
    assert model(torch.randn(5, 16, device="meta")).shape == (5, 8)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    x = torch.randn(5, 16)
    assert oracles.bits_equal(model(x), source(x))
    report = abft.report()
    assert (report.checks, report.detected, set(report.sites)) == (10, 0, {"0", "3"})


@pytest.mark.parametrize("change", [
    lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.apply(lambda _: None),
    lambda m: m.share_memory(), lambda m: m.cpu(), lambda m: m.requires_grad_(False),
], ids=["double", "bfloat16", "half", "to", "apply", "share_memory", "cpu", "requires_grad_"])  # fmt: skip
def test_moves_and_casts(change):
    model = abft.protect(mlp(), abft.Policy(weights="frozen"))
    model(torch.randn(5, 16))
    change(model)
    x = torch.randn(5, 16, dtype=model[0].weight.dtype)
    twin = abft.unprotect(copy.deepcopy(model))
    report_before = abft.report(reset=True)
    assert oracles.bits_equal(model(x), twin(x))
    report = abft.report()
    assert (report.checks, report.detected, report_before.detected, set(report.sites)) == (10, 0, 0, {"0", "3"})


def test_a_dead_model_leaves_no_panels_behind():
    gc.collect()
    before = panels.live_bytes()
    model = abft.protect(mlp())
    model(torch.randn(5, 16))
    assert panels.live_bytes() > before
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None and panels.live_bytes() == before


def test_the_whole_state_of_protection_is_invisible_to_parameters_buffers_and_keys():
    layer = abft.protect(nn.Linear(16, 8))
    layer(torch.randn(5, 16))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"] and not list(layer.buffers()) and not list(layer.children())


# --- what is left alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal], ids=lambda f: f.__name__.strip("_"))
def test_parametrizations(norm, when):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(16, 8))
    model = copy.deepcopy(plain)
    if when == "after":
        abft.protect(model)
    torch.manual_seed(2)
    norm(model[0])
    if when == "before":
        abft.protect(model)
    torch.manual_seed(2)
    norm(plain[0])
    plain.eval(), model.eval()
    x = torch.randn(5, 16)
    model(x).sum().backward(), plain(x).sum().backward()
    assert oracles.bits_equal(model(x), plain(x))
    assert all(oracles.bits_equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    report = abft.report()
    assert report.checks >= 5 + 8 + 5 and report.detected == 0
    parametrize.remove_parametrizations(model[0], "weight")
    assert checked(model, x).checks == 5
    abft.unprotect(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("order", ["parametrize, protect", "protect, parametrize", "parametrize, protect, parametrize"])
def test_unprotecting_keeps_the_parametrizations(order):
    layer, x = nn.Linear(16, 8), torch.randn(5, 16)
    for step in order.split(", "):
        if step == "protect":
            abft.protect(layer)
        else:
            parametrize.register_parametrization(layer, "bias" if parametrize.is_parametrized(layer) else "weight", nn.Tanh())
    expected = layer(x)
    assert checked(layer, x).checks == 5
    abft.unprotect(layer)
    assert checked(layer, x).products == 0
    assert oracles.bits_equal(layer(x), expected)
    for name in list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name)
    assert type(layer) is nn.Linear and oracles.bits_equal(layer(x), expected)


def test_copies_of_a_parametrized_layer_are_protected_one_by_one():
    layer = parametrizations.weight_norm(nn.Linear(16, 8))
    clone = copy.deepcopy(layer)
    abft.protect(layer)
    x = torch.randn(5, 16)
    assert (checked(clone, x).products, checked(layer, x).checks, checked(copy.deepcopy(layer), x).checks) == (0, 5, 5)


def test_old_style_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(nn.Linear(16, 8))
    x = torch.randn(5, 16)
    expected = layer(x)
    assert oracles.bits_equal(abft.protect(layer)(x), expected) and abft.report().checks == 5


class Packed(torch.Tensor):
    """A weight as quantisation libraries make them: a subclass that computes F.linear with a kernel of its own."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, requires_grad=False)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w, b = (*args, *(kwargs or {}).values(), None)[:3]
            return F.linear(x, w.codes.float() * w.scale, b)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"no kernel for {func}")


def test_quantised_weights_keep_their_kernels_and_are_counted():
    codes, scale = torch.randint(-128, 128, (8, 16), dtype=torch.int8), torch.rand(8, 1)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Packed(codes, scale), requires_grad=False)
    x = torch.randn(5, 16)
    expected = model(x)
    abft.protect(model)
    assert isinstance(model[0].weight, Packed)
    assert torch.equal(model(x), expected)
    report = abft.report()
    assert report.checks == 5 and report.bypassed == {"tensor subclass Packed": 1}
    coverage = abft.coverage(model)
    assert (coverage.covered, coverage.total) == (1, 2) and "Packed" in coverage.modules[0].reason


def test_subclasses_with_their_own_forward_are_checked_inside():
    layer = abft.protect(Doubled(16, 8), name="doubled")
    x = torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    assert oracles.bits_equal(y, 2 * F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    report = abft.report()
    assert report.sites["doubled"].checks == 5 + 5 + 8 == report.checks
    with faults(Fault("nan", site="doubled")):
        assert torch.isfinite(layer(x)).all()


def test_a_forward_replaced_on_the_instance_is_left_alone():
    layer = nn.Linear(16, 8)
    layer.forward = lambda x: x.sum()
    abft.protect(layer)
    assert type(layer) is nn.Linear and layer(torch.ones(2)) == 2
    (module,) = abft.coverage(layer).modules
    assert not module.covered and "forward was replaced" in module.reason


def test_lazy_layers_say_what_to_do():
    layer = nn.LazyLinear(8)
    abft.protect(layer)
    assert type(layer) is nn.LazyLinear and "run one forward first" in abft.coverage(layer).modules[0].reason
    layer(torch.randn(5, 16))
    assert checked(abft.protect(layer), torch.randn(5, 16)).checks == 5


def test_scripted_modules_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.jit.script(nn.Linear(16, 8)), nn.Linear(8, 8))
    types = [type(m) for m in model.modules()]
    abft.protect(model)
    assert [type(m) for m in model.modules()][:2] == types[:2]
    assert checked(model, torch.randn(5, 16)).checks == 5


def test_wrappers_that_ask_isinstance():
    base = abft.protect(nn.Linear(16, 8), name="base")
    model = Low(base)
    x = torch.randn(5, 16)
    assert checked(model, x).checks == 5
    abft.protect(model, name="lora")
    assert set(checked(model, x).sites) == {"lora.base", "lora.down", "lora.up"}


# --- encoder layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fused_path_of_encoder_layers_is_off_while_protected(training, norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first).train(training)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    fused = model.layers[0].activation_relu_or_gelu
    abft.protect(model)
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, expected)  # the fused kernel sums in another order
    rows = 2 + 2 + 2 * 2  # linear1 and linear2; both projections of the attention; its two products, for two heads each
    assert abft.report().checks == 2 * rows * 10, "both layers see ten rows"
    abft.unprotect(model)
    assert model.layers[0].activation_relu_or_gelu == fused


def test_a_protected_encoder_survives_faults_in_eval():
    model = abft.protect(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval())
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        with faults(Fault("nan", site="layers.1.linear2")):
            assert oracles.bits_equal(model(x), expected)


# --- whom: policies by name and filters ----------------------------------------------------------------


def levels(model: nn.Module) -> dict[str, str]:
    """Site → level, told by a fault in every layer."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            abft.report(reset=True)
            with warnings.catch_warnings(), faults(Fault("nan", probability=1.0)):
                warnings.simplefilter("ignore")
                module(torch.randn(2, module.in_features))
            report = abft.report()
            out[name] = "correct" if report.corrected else "detect" if report.observed else "off" if report.bypassed else "unprotected"
    return out


DETECT, OFF = abft.Policy(level="detect"), abft.Policy(level="off")


def tower() -> nn.Module:
    return nn.ModuleDict({"enc": nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), "head": nn.Linear(4, 4)})


@pytest.mark.parametrize("mapping, expected", [
    ({}, ("correct", "correct", "correct", "correct")),
    ({"enc.1": DETECT}, ("correct", "detect", "correct", "correct")),
    ({"enc.1": "audit", "head": None}, ("correct", "detect", "correct", "unprotected")),
    ({r"re:enc\..*": OFF}, ("off", "off", "off", "correct")),
    ({r"re:enc\..*": OFF, "enc.2": DETECT}, ("off", "off", "detect", "correct")),
    ({r"re:enc\.0": DETECT, r"re:enc\..*": OFF}, ("detect", "off", "off", "correct")),
    ({r"re:.*": None, "head": abft.Policy()}, ("unprotected", "unprotected", "unprotected", "correct")),
], ids=["empty", "exact", "none", "pattern", "exact beats pattern", "patterns in order", "all but one"])  # fmt: skip
def test_mappings_name_the_policies(mapping, expected):
    model = abft.protect(tower(), mapping)
    assert tuple(levels(model).values()) == expected


def test_a_later_exact_key_wins_over_an_earlier_pattern_that_matches_nothing_else():
    model = abft.protect(tower(), {r"re:head": OFF, "head": DETECT})
    assert levels(model)["head"] == "detect"


@pytest.mark.parametrize("mapping", [{"nosuch": DETECT}, {"re:nosuch.*": None}, {"enc": DETECT}, {"re:en": DETECT}, {"enc.1": DETECT, "enc.9": None}, {"": DETECT}], ids=lambda m: " and ".join(map(repr, m)))
def test_a_key_that_matches_nothing_is_an_error(mapping):
    model = tower()
    with pytest.raises(ValueError, match="match no"):
        abft.protect(model, mapping)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear)), "nothing was changed"


@pytest.mark.parametrize("mapping", [{"head": 3}, {"head": "nosuch"}, {"re:(": DETECT}, {3: DETECT}], ids=lambda m: " and ".join(map(repr, m)))
def test_wrong_mappings_are_refused(mapping):
    with pytest.raises((TypeError, ValueError)):
        abft.protect(tower(), mapping)


def test_an_earlier_protection_is_taken_back_by_none():
    model = abft.protect(tower())
    abft.protect(model, {"head": None})
    assert levels(model)["head"] == "unprotected"


def test_filters_see_module_and_name():
    seen = []

    def choose(module, fqn):
        seen.append((type(module), fqn))
        return fqn != "head"

    model = abft.protect(tower(), filter_fn=choose)
    assert tuple(levels(model).values()) == ("correct", "correct", "correct", "unprotected")
    assert [name for _, name in seen] == ["enc.0", "enc.1", "enc.2", "head"] and all(issubclass(t, nn.Linear) for t, _ in seen)


def test_a_mapping_and_a_filter_exclude_each_other():
    with pytest.raises(TypeError, match="not both"):
        abft.protect(tower(), {"head": DETECT}, filter_fn=lambda m, n: True)


@pytest.mark.parametrize("thing", [None, torch.nn.functional.linear, torch.zeros(3), nn.Linear, "model"], ids=["none", "function", "tensor", "class", "text"])
def test_only_modules_can_be_protected(thing):
    for function in (abft.protect, abft.coverage, abft.refresh, abft.unprotect):
        with pytest.raises(TypeError):
            function(thing)


def test_a_model_without_linear_layers_is_left_alone():
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(4))
    assert abft.protect(model) is model and abft.coverage(model).total == 0


# --- abft.Linear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_abft_linear_is_a_linear(bias):
    torch.manual_seed(3)
    layer = abft.Linear(16, 8, bias, dtype=torch.float64)
    torch.manual_seed(3)
    twin = nn.Linear(16, 8, bias, dtype=torch.float64)
    assert isinstance(layer, nn.Linear) and (layer.bias is not None) == bias
    x = torch.randn(5, 16, dtype=torch.float64)
    assert oracles.bits_equal(layer(x), twin(x)) and abft.report().checks == 5
    assert set(layer.state_dict()) == set(twin.state_dict())


def test_abft_linear_on_meta():
    layer = abft.Linear(16, 8, device="meta")
    assert layer(torch.randn(5, 16, device="meta")).shape == (5, 8)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert checked(layer, torch.randn(5, 16)).checks == 5


def test_abft_linear_has_its_own_policy():
    layer = abft.Linear(16, 8, policy=abft.Policy(level="off"))
    assert checked(layer, torch.randn(5, 16)).checks == 0
    with abft.protected(abft.Policy()):
        assert checked(layer, torch.randn(5, 16)).checks == 0


# --- coverage --------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two layers of 2·rows·64·64 FLOPs each, one as a module and one as a function."""

    def __init__(self, through: str):
        super().__init__()
        self.first, self.second, self.through = nn.Linear(64, 64, bias=False), nn.Parameter(torch.randn(64, 64)), through

    def forward(self, x):
        y = self.first(x)
        return torch.einsum("nk,mk->nm", y, self.second) if self.through == "einsum" else y @ self.second


def test_coverage_by_looking():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(3, 3, 1), nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.Bilinear(2, 2, 2), nn.ReLU())
    before = abft.coverage(model)
    assert (before.covered, before.flop_share) == (0, None) and before.total == 6  # out_proj is a module of its own
    abft.protect(model)
    after = abft.coverage(model)
    assert (after.covered, after.total) == (3, 6)  # out_proj is covered with the attention that reads it
    assert list(vars(after.modules[0])) == ["name", "type", "covered", "how", "backend", "policy", "reason"]
    assert (after.modules[0].name, after.modules[0].type, after.modules[0].backend) == ("0", "Linear", "reference")
    assert all(m.covered or m.reason for m in after.modules)
    table = str(after)
    assert "3 of 6" in table and "NOT CHECKED" in table and "Conv1d" in table and "level correct" in table


def test_coverage_knows_the_policies():
    model = abft.protect(tower(), {"enc.0": OFF, "enc.1": abft.Policy(redundancy="dmr", backend="vendor", roles={"fprop"}), "head": None})
    by_name = {m.name: m for m in abft.coverage(model).modules}
    assert not by_name["enc.0"].covered and "off" in by_name["enc.0"].reason
    assert by_name["enc.1"].covered and by_name["enc.1"].backend == "vendor" and "dmr" in by_name["enc.1"].policy and "fprop" in by_name["enc.1"].policy
    assert not by_name["head"].covered and "not protected" in by_name["head"].reason
    assert by_name["enc.2"].covered
    free = abft.protect(nn.Linear(4, 4))
    with abft.protected(OFF):
        assert abft.coverage(free).covered == 0, "a module without a policy of its own follows the scope"
        assert abft.coverage(model).covered == 2, "unmatched modules of a mapping have Policy()"
    assert abft.coverage(free).covered == 1


@pytest.mark.parametrize("through, share", [("einsum", 0.5), ("matmul", 0.5)])
def test_coverage_by_counting(through, share):
    model = abft.protect(Mixed(through))
    coverage = abft.coverage(model, torch.randn(4, 64, requires_grad=True))
    assert coverage.flop_share == pytest.approx(share)
    with abft.protected():
        inside = abft.coverage(model, torch.randn(4, 64, requires_grad=True)).flop_share
    assert inside == pytest.approx(1.0 if through == "matmul" else 0.5)
    assert f"{100 * share:.1f} %" in str(coverage)


def test_counting_counts_forward_and_backward():
    """Of three equal products (fprop, dgrad, wgrad) one role is two thirds unchecked."""
    model = abft.protect(nn.Linear(64, 64), abft.Policy(roles={"fprop"}))
    assert abft.coverage(model, torch.randn(4, 64, requires_grad=True)).flop_share == pytest.approx(1 / 3)


def test_counting_leaves_the_model_as_it_was():
    model = abft.protect(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)))
    model[0].weight.grad = torch.ones(8, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    abft.coverage(model, torch.randn(4, 16))
    state = state if torch.equal(state, torch.get_rng_state()) else None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(8, 16)) and model[3].weight.grad is None


def test_counting_works_without_gradients_and_with_keywords():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, *, x):
            return {"out": self.layer(x), "aux": (x, None)}

    model = abft.protect(Keyword()).requires_grad_(False)
    with torch.no_grad():
        assert abft.coverage(model, x=torch.randn(4, 8)).flop_share == pytest.approx(1.0)


# --- refresh and scopes -------------------------------------------------------------------------------


def test_refresh_announces_a_change_of_frozen_weights():
    layer = abft.protect(nn.Linear(16, 8), abft.Policy(weights="frozen"))
    x = torch.randn(5, 16)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    abft.refresh(layer)
    y = layer(x)
    assert oracles.bits_equal(y, F.linear(x, layer.weight, layer.bias))
    assert abft.report().detected == abft.report().stale == 0


SCOPED = {
    "F.linear": lambda a, b: F.linear(a, b), "torch.matmul": torch.matmul, "@": lambda a, b: a @ b, "Tensor.matmul": lambda a, b: a.matmul(b),
    "torch.mm": torch.mm, "Tensor.mm": lambda a, b: a.mm(b), "torch.bmm": lambda a, b: torch.bmm(a[None], b[None]),
    "Tensor.bmm": lambda a, b: a[None].bmm(b[None]), "torch.addmm": lambda a, b: torch.addmm(torch.zeros(8), a, b),
    "Tensor.addmm": lambda a, b: torch.zeros(8).addmm(a, b), "nn.Linear": lambda a, b: nn.Linear(8, 8)(a),
    "torch.nn.functional keyword": lambda a, b: F.linear(input=a, weight=b), "addmm keywords": lambda a, b: torch.addmm(torch.zeros(8), mat1=a, mat2=b, beta=0),
    "reflected @": lambda a, b: b.__rmatmul__(a), "torch.linalg.matmul": torch.linalg.matmul,
}  # fmt: skip


@pytest.mark.parametrize("how", SCOPED)
def test_products_in_a_scope_are_checked(how):
    a, b = torch.randn(4, 8), torch.randn(8, 8)
    torch.manual_seed(5)
    expected = SCOPED[how](a, b)
    torch.manual_seed(5)
    with abft.protected() as scope:
        y = SCOPED[how](a, b)
    assert oracles.bits_equal(y, expected)
    assert (scope.report().checks, scope.report().bypassed) == (4, {})


HIDDEN = {
    "einsum": lambda a, b: torch.einsum("ij,jk", a, b), "bilinear": lambda a, b: nn.Bilinear(8, 8, 3)(a, a), "tensordot": lambda a, b: torch.tensordot(a, b, 1),
    "baddbmm": lambda a, b: torch.baddbmm(a[None], a[None], b[None]), "mv": lambda a, b: torch.mv(b, b[0]), "conv1d": lambda a, b: nn.Conv1d(4, 4, 1)(a),
    "multi_head_attention_forward": lambda a, b: F.multi_head_attention_forward(
        a[:, None], b[:, None], b[:, None], 8, 2, torch.randn(24, 8), None, None, None, False, 0.0, torch.randn(8, 8), None, static_k=torch.randn(2, 8, 4),
    ),
    "multi_dot": lambda a, b: torch.linalg.multi_dot([a, b, b]), "chain_matmul": lambda a, b: torch.chain_matmul(a, b, b),
    "lstm": lambda a, b: nn.LSTM(8, 4)(a), "gru": lambda a, b: nn.GRUCell(8, 4)(a), "rnn": lambda a, b: nn.RNN(8, 4)(a), "inner": lambda a, b: torch.inner(a, b),
    "dot": lambda a, b: torch.dot(a[0], b[0]), "addmv": lambda a, b: torch.addmv(torch.zeros(8), b, a[0]),
    "addmm_": lambda a, b: torch.zeros(4, 8).addmm_(a, b), "conv_transpose1d": lambda a, b: nn.ConvTranspose1d(4, 4, 1)(a),
    "matrix_power": lambda a, b: torch.linalg.matrix_power(b, 2), "addbmm": lambda a, b: torch.addbmm(torch.zeros(4, 8), a[None], b[None]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HIDDEN)
def test_products_that_a_scope_cannot_see_are_counted_by_name(name):
    with abft.protected() as scope:
        HIDDEN[name](torch.randn(4, 8), torch.randn(8, 8))
    report = scope.report()
    assert report.bypassed.get(name) == 1 and report.detected == 0


def test_a_scope_inside_a_protected_module_counts_once():
    layer = abft.protect(nn.Linear(16, 8), name="once")
    with abft.protected() as scope, abft.protected():
        layer(torch.randn(5, 16))
        F.linear(torch.randn(5, 16), layer.weight)
    assert scope.report().checks == 10 and scope.report().sites["once"].checks == 5


def test_a_scope_is_left_by_an_error():
    with pytest.raises(KeyError), abft.protected():
        raise KeyError
    F.linear(torch.randn(3, 4), torch.randn(5, 4))
    assert abft.report().products == 0


def test_a_scope_can_be_entered_again():
    scope = abft.protected()
    for _ in range(2):
        with scope:
            torch.randn(3, 4) @ torch.randn(4, 5)
        assert scope.report().checks == 3


# --- weights that come past `_apply` -------------------------------------------------------------


def _by_load(model, state):
    model.load_state_dict(state, assign=True)


def _by_attribute(model, state):
    model[0].weight, model[0].bias = nn.Parameter(state["0.weight"]), nn.Parameter(state["0.bias"])


def _by_registration(model, state):
    model[0].register_parameter("weight", nn.Parameter(state["0.weight"]))
    model[0].register_parameter("bias", nn.Parameter(state["0.bias"]))


def _past_the_module(model, state):  # as offloading hooks do
    model[0]._parameters["weight"], model[0]._parameters["bias"] = nn.Parameter(state["0.weight"]), nn.Parameter(state["0.bias"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("origin", ["protect", "by-birth", "moved"])
@pytest.mark.parametrize("materialise", [_by_load, _by_attribute, _by_registration, _past_the_module])
def test_weights_put_in_place_after_meta_are_used_and_checked(materialise, origin, compiled):
    plain = nn.Sequential(nn.Linear(16, 8))
    with torch.device("cpu" if origin == "moved" else "meta"):
        model = nn.Sequential(abft.Linear(16, 8) if origin == "by-birth" else nn.Linear(16, 8))
    abft.protect(model)
    if origin == "moved":
        model.to("meta")
    materialise(model, {k: v.clone() for k, v in plain.state_dict().items()})
    if compiled:
        torch._dynamo.reset()
        # Past the module nothing could move the site: that breaks the graph, once.
        model = torch.compile(model, backend="aot_eager", fullgraph=materialise is not _past_the_module)
    abft.report(reset=True)
    x = torch.randn(5, 16)
    for _ in range(3):
        y = model(x)
        assert torch.equal(y, plain(x))
        model.zero_grad()
        y.sum().backward()
    report = abft.report()
    assert report.checks == 3 * (5 + 8) and report.detected == 0 and report.bypassed == {}


def test_a_product_with_something_on_meta_is_an_error_and_no_uninitialised_memory():
    x, w, site = torch.randn(5, 16), torch.randn(8, 16), torch.zeros((), dtype=torch.int64)
    book = torch.zeros(1, dtype=torch.int64)
    for b, s in ((w, site.to("meta")), (w.to("meta"), site)):
        with pytest.raises(abft.AbftError, match="meta"):
            torch.ops.abft.product(x, False, b, False, None, book, s, "fprop", "{}")
