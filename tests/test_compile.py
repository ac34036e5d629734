"""torch's machinery around checked products: compilers, checkpointing, functorch, opcheck, FLOP counters, and no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import abft
from abft.inject import Fault, faults

COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)]
PACKAGE = os.path.dirname(os.path.abspath(abft.__file__)) + os.sep
QUIET = abft.Policy(level="detect", on_uncorrected="record")


def net(depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(depth)))


def compiled(model, backend, **options):
    return torch.compile(model, fullgraph=True, backend=backend, **options)


class Graphs:
    """An aot_eager that counts the graphs it is given and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


# --- fullgraph ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", COMPILERS)
def test_forward_and_backward_in_one_graph(backend, dynamo):
    model, twin = abft.protect(net()), net()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 16, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    fast = compiled(model, backend)
    fast(x).square().sum().backward()
    twin(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    report = abft.report()
    assert (report.checks, report.products, report.executions) == (2 * (5 + 5 + 16), 6, 6)
    assert (report.detected, report.repeated_checks, report.bypassed) == (0, 0, {})


@pytest.mark.parametrize("backend", COMPILERS)
def test_faults_in_a_compiled_model_are_found_and_repaired(backend, dynamo):
    model = abft.protect(net())
    fast = compiled(model, backend)
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = fast(x)
        with faults(Fault("nullify", site="1.0", index=(3, 7))) as log:
            y = fast(x)
    assert oracles.bits_equal(y, expected) and len(log) == 1
    (event,) = abft.report().events
    assert (event.site, event.row, event.verdict) == ("1.0", 3, abft.Verdict.RECOMPUTED)


@pytest.mark.parametrize("role", ["dgrad", "wgrad"])
@pytest.mark.parametrize("backend", COMPILERS)
def test_faults_in_a_compiled_backward_are_found_and_repaired(backend, role, dynamo):
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, backend)
    x = torch.randn(5, 16, requires_grad=True)
    wanted = (x, model.weight)
    clean = torch.autograd.grad(fast(x).sum(), wanted)
    with faults(Fault("inf", role=role)):
        struck = torch.autograd.grad(fast(x).sum(), wanted)
    assert all(oracles.bits_equal(a, b) for a, b in zip(clean, struck, strict=True))
    assert [e.role for e in abft.report().events] == [role]


@pytest.mark.parametrize("redundancy, executions", [("none", 1), ("dmr", 2), ("tmr", 3)])
@pytest.mark.parametrize("backend", COMPILERS)
def test_replicas_are_really_executed(backend, redundancy, executions, dynamo):
    """A compiler deletes what nobody uses and merges what is equal; not these."""
    model = abft.protect(nn.Linear(16, 16), abft.Policy(redundancy=redundancy))
    fast = compiled(model, backend)
    fast(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert abft.report().executions == 3 * executions


@pytest.mark.parametrize("backend", COMPILERS)
def test_two_equal_products_are_two_products(backend, dynamo):
    model = abft.protect(nn.Linear(16, 16))
    with torch.no_grad():
        compiled(lambda x: model(x) + model(x), backend)(torch.randn(5, 16))
    assert (abft.report().checks, abft.report().products) == (10, 2)


@pytest.mark.parametrize("backend", COMPILERS)
def test_products_whose_results_are_dropped_still_count(backend, dynamo):
    model = abft.protect(nn.Linear(16, 16))

    def function(x):
        model(x)
        return x + 1

    with torch.no_grad():
        compiled(function, backend)(torch.randn(5, 16))
    assert abft.report().checks == 5


@pytest.mark.parametrize("backend", COMPILERS)
def test_every_function_compiles(backend, dynamo):
    def function(x, w, b, c):
        return abft.linear(x, w, b).sum() + abft.matmul(x, w.mT).sum() + abft.bmm(c, c.mT).sum() + abft.addmm(x @ w.mT, x, w.mT, beta=2, alpha=3).sum()

    leaves = [torch.randn(s, requires_grad=True) for s in [(5, 16), (8, 16), (8,), (2, 3, 4)]]
    expected = torch.autograd.grad(function(*leaves), leaves)
    abft.report(reset=True)
    got = torch.autograd.grad(compiled(function, backend)(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert abft.report().checks == (5 + 5 + 8) + (5 + 5 + 16) + (6 + 6 + 8) + (5 + 5 + 16) and abft.report().bypassed == {}


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_scope_compiles(backend, dynamo):
    model = net()

    def function(x):
        with abft.protected():
            return model(x) @ x.mT

    x = torch.randn(5, 16)
    expected = function(x)
    abft.report(reset=True)
    y = torch.compile(function, backend=backend)(x)
    torch.testing.assert_close(y, expected)
    assert abft.report().checks == 15


def test_a_compiled_model_inside_a_scope(dynamo):
    model = net()
    fast = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 16)
    with torch.no_grad():
        fast(x)
        assert abft.report().checks == 0
        with abft.protected() as scope:
            fast(x)
        assert scope.report().checks == 10
        fast(x)
    assert abft.report().checks == 10


@pytest.mark.parametrize("backend", COMPILERS)
def test_autocast_compiles(backend, dynamo):
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, backend)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = model(x), fast(x)
    assert y.dtype == torch.bfloat16 and oracles.bits_equal(y, expected)
    y.float().sum().backward()
    assert model.weight.grad.dtype == torch.float32 and abft.report().checks == 5 + 5 + 16


# --- recompilation ---------------------------------------------------------------------------------


def test_twenty_equal_layers_make_one_graph(dynamo):
    graphs = Graphs()
    model = abft.protect(nn.Sequential(*(nn.Linear(16, 16) for _ in range(20))), name="deep")
    for layer in model:
        layer.compile(fullgraph=True, backend=graphs)
    x = torch.randn(5, 16)
    with torch.no_grad():
        for _ in range(2):
            model(x)
    report = abft.report()
    assert len(graphs.graphs) == 1
    assert len(report.sites) == 20 and all(s.checks == 10 for s in report.sites.values())


def test_twenty_equal_blocks_make_one_graph_with_backward(dynamo):
    graphs = Graphs()
    model = abft.protect(net(20), name="deep")
    for block in model:
        block.compile(fullgraph=True, backend=graphs)
    model(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert len(graphs.graphs) == 1
    assert all(s.checks == 5 + 5 + 16 for s in abft.report().sites.values())


@pytest.mark.parametrize("inside", ["plain", "checkpointed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
def test_many_graphs_and_micro_batches_before_one_backward(backend, inside, dynamo):
    """Graphs of other layers and batches run between a graph's forward and its backward."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if inside == "checkpointed" else self.inner(x)

    model, twin = abft.protect(nn.Sequential(*(Block() for _ in range(3)))), nn.Sequential(*(Block() for _ in range(3)))
    twin.load_state_dict(model.state_dict())
    for block in model:
        block.compile(fullgraph=True, backend=backend)
    x, z = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(twin(x).sum() + twin(z).sum(), [x, z, *twin.parameters()])
    got = torch.autograd.grad(model(x).sum() + model(z).sum(), [x, z, *model.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert abft.report().checks == 2 * 6 * (5 + 5 + 16)


COLD = """
import os, torch, abft
model = abft.protect(torch.nn.Linear(16, 8))
function = model if os.fork() else lambda x: abft.linear(x, model.weight)
torch.compile(function, fullgraph=True, backend="aot_eager")(torch.randn(5, 16, requires_grad=True)).sum().backward()
assert abft.report().checks == 5 + 5 + 8, abft.report()
if function is model:
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_the_first_product_of_a_process_may_be_a_compiled_one():
    """Nothing may depend on an eager product having made ledgers and sites before. A module in one process, a function in its child."""
    subprocess.run([sys.executable, "-c", COLD], check=True, cwd=os.path.dirname(PACKAGE[:-1]))


def test_optimizer_steps_recompile_nothing(dynamo):
    graphs = Graphs()
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, graphs)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(4):
        x = torch.randn(5, 16)
        y = fast(x)
        assert oracles.bits_equal(y, F.linear(x, model.weight, model.bias))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = abft.report()
    assert len(graphs.graphs) == 1 and (report.detected, report.stale, report.false_alarms) == (0, 0, 0)


@pytest.mark.parametrize("backend", COMPILERS)
def test_dynamic_shapes(backend, dynamo):
    graphs = []
    model = abft.protect(nn.Linear(16, 16))

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    fast = torch.compile(model, fullgraph=True, backend=keep, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 8, 64):
            x = torch.randn(2, rows, 16)
            torch.testing.assert_close(fast(x), F.linear(x, model.weight, model.bias))
    assert len(graphs) == 1 and abft.report().checks == 2 * (3 + 5 + 8 + 64)


def test_a_policy_that_changes_is_obeyed(dynamo):
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, "aot_eager")
    x = torch.randn(5, 16)
    counts = []
    with torch.no_grad():
        for policy in (None, abft.Policy(level="off"), abft.Policy(redundancy="tmr"), QUIET, None):
            abft.protect(model, policy)
            abft.report(reset=True)
            y = fast(x)
            assert oracles.bits_equal(y, F.linear(x, model.weight, model.bias))
            counts.append((abft.report().checks, abft.report().executions))
    assert [c for c, _ in counts] == [5, 0, 5, 5, 5] and counts[2][1] == 3


def test_scopes_of_different_policies_are_obeyed(dynamo):
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, "aot_eager")
    x = torch.randn(5, 16)
    with torch.no_grad():
        fast(x)
        with abft.protected(abft.Policy(level="off")):
            fast(x)
        with abft.protected(abft.Policy(redundancy="dmr")) as scope:
            fast(x)
    assert abft.report().checks == 10 and scope.report().executions == 2


def test_protection_after_compilation_is_obeyed(dynamo):
    model = nn.Linear(16, 16)
    fast = torch.compile(model, backend="aot_eager")
    x, checks = torch.randn(5, 16), []
    with torch.no_grad():
        for change in (lambda m: m, abft.protect, abft.unprotect):
            change(model)
            abft.report(reset=True)
            fast(x)
            checks.append(abft.report().checks)
        assert checks == [0, 5, 0]
        abft.protect(fast)
        fast(x)
    assert set(abft.report().sites) == {"_orig_mod"} and abft.coverage(fast).covered == 1


def test_symbolic_tracing_keeps_checked_layers_whole():
    model = abft.protect(nn.Sequential(nn.Linear(16, 8), nn.ReLU()))
    x = torch.randn(5, 16)
    traced = torch.fx.symbolic_trace(model)
    assert oracles.bits_equal(traced(x), model(x)) and abft.report().checks == 10
    w = torch.randn(8, 16)
    assert torch.equal(torch.fx.symbolic_trace(lambda x: abft.linear(x, w))(x), F.linear(x, w))
    assert abft.report().bypassed == {"Proxy": 1}


def test_a_changed_weight_is_followed_by_a_compiled_model(dynamo):
    """Dynamo cannot guard on a weight's version: the panel is looked up when the product runs."""
    model = abft.protect(nn.Linear(16, 16))
    fast = compiled(model, "aot_eager")
    x = torch.randn(5, 16)
    with torch.no_grad():
        for _ in range(3):
            assert oracles.bits_equal(fast(x), F.linear(x, model.weight, model.bias))
            model.weight.mul_(1.5)
    assert abft.report().detected == abft.report().stale == 0


# --- checkpointing -------------------------------------------------------------------------------------


def test_full_checkpointing_counts_repeated_checks_apart():
    model = abft.protect(net())
    x = torch.randn(5, 16, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    report = abft.report()
    assert report.checks == 2 * (5 + 5 + 16) and report.repeated_checks == 2 * 5


def test_recomputation_inside_a_scope_is_checked_too():
    model = net()
    x = torch.randn(5, 16, requires_grad=True)
    with abft.protected() as scope:
        loss = checkpoint(model, x, use_reentrant=False, context_fn=abft.checkpoint_context).sum()
    loss.backward()
    report = scope.report()
    assert report.checks == 2 * (5 + 5 + 16) and report.repeated_checks == 10


def test_recomputation_keeps_the_policy_of_its_scope():
    model = net(1)
    x = torch.randn(5, 16, requires_grad=True)
    with abft.protected(QUIET):
        loss = checkpoint(model, x, use_reentrant=False, context_fn=abft.checkpoint_context).sum()
    with faults(Fault("nan", call=0)):
        loss.backward()  # strikes the recomputed forward, which is the first fprop inside
    assert abft.report().observed == 1


def test_checkpoint_context_outside_a_scope_does_nothing():
    model = abft.protect(net(1))
    checkpoint(model, torch.randn(5, 16, requires_grad=True), use_reentrant=False, context_fn=abft.checkpoint_context).sum().backward()
    assert (abft.report().checks, abft.report().repeated_checks) == (26, 5)


def test_a_fault_in_recomputation_is_repaired():
    model, twin = abft.protect(net()), net()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(twin(x).sum(), x)
    loss = checkpoint(model, x, use_reentrant=False).sum()
    with faults(Fault("nan", role="fprop")):
        (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, expected[0])
    assert abft.report().recomputed == 1


def selective():
    def choose(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in abft.checkpoint_ops else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


def test_selective_checkpointing_saves_the_products():
    model, twin = abft.protect(net()), net()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(twin(x).sum(), [x, *twin.parameters()])
    got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False, context_fn=selective).sum(), [x, *model.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    report = abft.report()
    assert (report.checks, report.repeated_checks, report.executions) == (52, 0, 6)


def test_the_list_of_operators_works_as_torchs_own():
    x = torch.randn(5, 16, requires_grad=True)
    context = lambda: create_selective_checkpoint_contexts(abft.checkpoint_ops)  # noqa: E731
    checkpoint(abft.protect(net()), x, use_reentrant=False, context_fn=context).sum().backward()
    assert abft.report().repeated_checks == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)])
@pytest.mark.parametrize("context", [None, selective], ids=["full", "selective"])
def test_checkpointing_compiles(backend, context, dynamo):
    model = abft.protect(net())
    more = {} if context is None else {"context_fn": context}

    def function(x):
        return checkpoint(model, x, use_reentrant=False, **more).sum()

    x = torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)
    abft.report(reset=True)
    got = torch.autograd.grad(compiled(function, backend)(x), x)
    torch.testing.assert_close(got, expected)
    assert abft.report().checks >= 20 and abft.report().detected == 0


# --- functorch, forward mode, double backward ------------------------------------------------------------


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x), "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x), "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)), "jacrev": lambda f, x: torch.func.jacrev(f)(x), "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).square().sum())(x[0]), "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_torchs_own_and_counted(name):
    model, twin = abft.protect(nn.Linear(4, 3)), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    expected = TRANSFORMS[name](twin, x)
    got = TRANSFORMS[name](model, x)
    for a, b in zip(oracles.tensors_in(got), oracles.tensors_in(expected), strict=True):
        assert torch.equal(a, b)
    report = abft.report()
    assert set(report.bypassed) <= {"functorch transform", "forward-mode AD"} and sum(report.bypassed.values()) > 0
    assert report.detected == 0


def test_functional_call_is_checked():
    model = abft.protect(nn.Linear(4, 3))
    twin = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    y = torch.func.functional_call(model, dict(twin.named_parameters()), (x,))
    assert oracles.bits_equal(y, twin(x)) and abft.report().checks == 5
    plain = {n: p.detach().clone() for n, p in twin.named_parameters()}
    assert oracles.bits_equal(torch.func.functional_call(model, plain, (x,)), twin(x)) and abft.report().checks == 10


def test_forward_mode_derivatives_are_torchs_own_and_counted():
    model = abft.protect(nn.Linear(4, 3))
    x, t = torch.randn(5, 4), torch.randn(5, 4)
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, t)))
        assert torch.equal(y.tangent, F.linear(t, model.weight))
    assert abft.report().bypassed == {"forward-mode AD": 1}
    model(x)
    assert abft.report().checks == 5


def test_double_backward_is_counted_and_right():
    model, twin = abft.protect(nn.Linear(4, 3)), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    seconds = []
    for m in (model, twin):
        (first,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, m.weight]))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b)
    report = abft.report()
    # The first backward is torch's own; the second runs back through the forward product once more, and is checked.
    assert report.bypassed == {"double backward": 1} and report.checks == 5 + 5 + 3


def test_saved_tensor_hooks_and_retain_graph():
    model = abft.protect(nn.Linear(4, 3))
    x = torch.randn(5, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.sum(), x)[0])
    assert abft.report().checks == 5 + 2 * (5 + 3) and set(abft.report().sites) == {"Linear"}


def test_a_weight_changed_between_forward_and_backward_is_torchs_error():
    model = abft.protect(nn.Linear(4, 3))
    y = model(torch.randn(5, 4, requires_grad=True))
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- the operator ---------------------------------------------------------------------------------------


def operands(shape_a, shape_b, bias=False, **more):
    from abft import ledger, sites

    a, b = torch.randn(shape_a, **more), torch.randn(shape_b, **more)
    site = sites.as_tensor(sites.functional("linear", "warn"), a.device)
    added = torch.randn(shape_b[-2], **more) if bias else None
    return (a, False, b, False, added, ledger.tensor(a.device), site, "fprop", abft.Policy().text)


@pytest.mark.parametrize("sample", [
    ((5, 8), (6, 8)), ((5, 8), (6, 8), True), ((2, 5, 8), (2, 6, 8)), ((1, 8), (1, 8)),
], ids=["matrix", "bias", "batch", "one by one"])  # fmt: skip
def test_opcheck(sample):
    torch.library.opcheck(torch.ops.abft.product.default, operands(*sample))


def test_opcheck_of_the_transposed_forms():
    for ta, tb in ((True, False), (False, True), (True, True)):
        a, _, b, _, *rest = operands((5, 8), (6, 8))
        torch.library.opcheck(torch.ops.abft.product.default, (a.mT.contiguous() if ta else a, ta, b.mT.contiguous() if tb else b, tb, *rest))


def test_opcheck_of_the_bypass():
    from abft import ledger

    torch.library.opcheck(torch.ops.abft.bypass.default, (ledger.tensor(torch.device("cpu")), "opcheck"))


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)], ids=oracles.name_of)
def test_flop_counters_count_what_they_counted(shape):
    counts = []
    for model in (net(), abft.protect(net())):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(shape, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 3 * 2 * torch.Size(shape[:-1]).numel() * 16 * 16


def test_flops_of_batches():
    counts = []
    for bmm in (torch.bmm, abft.bmm):
        a, b = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            bmm(a, b).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_fake_tensors_and_make_fx():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        model = abft.protect(net())
        assert model(torch.randn(5, 16)).shape == (5, 16)
        abft.linear(torch.randn(2, 3), torch.randn(4, 3))
    assert abft.report(reset=True).bypassed == {"fake tensor": 3}
    model = abft.protect(nn.Linear(16, 8))
    traced = make_fx(lambda x: model(x).relu(), tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(5, 16))
    assert sum(n.target is torch.ops.abft.product.default for n in traced.graph.nodes) == 1
    assert abft.report().checks == 0, "tracing computes nothing"


def test_export(dynamo):
    model = abft.protect(nn.Linear(16, 8)).eval()
    x = torch.randn(5, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert oracles.bits_equal(program.module()(x), F.linear(x, model.weight, model.bias))


# --- no waiting -----------------------------------------------------------------------------------------


WAITING = ["item", "__bool__", "tolist", "__float__", "__int__", "__index__", "__complex__"]


@pytest.fixture
def no_waiting(monkeypatch):
    """Reading a tensor on the host raises when the reader is a file of the package."""

    def forbidden(name, original):
        def read(self, *args, **kwargs):
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(PACKAGE):
                raise AssertionError(f"Tensor.{name} called from {caller.f_code.co_filename}:{caller.f_lineno}")
            return original(self, *args, **kwargs)

        return read

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, forbidden(name, getattr(torch.Tensor, name)))


def test_the_trap_works(no_waiting):
    code = compile("def wait(t):\n    return bool(t), float(t), int(t), t.item(), t.tolist()", PACKAGE + "imagined.py", "exec")
    scope = {}
    exec(code, scope)
    with pytest.raises(AssertionError, match="called from .*imagined"):
        scope["wait"](torch.ones(()))
    assert bool(torch.ones(())) and torch.ones(()).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=oracles.name_of)
def test_clean_products_wait_for_nothing(no_waiting, dtype):
    for policy in (abft.Policy(), QUIET, abft.Policy(redundancy="dmr"), abft.Policy(redundancy="tmr", level="off"), abft.Policy(weights="frozen", group=16)):
        model = abft.protect(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(dtype), policy)
        model(torch.randn(5, 16).to(dtype).requires_grad_()).sum().backward()
        a = torch.randn(2, 5, 16).to(dtype)
        abft.matmul(a, a.mT, policy=policy), abft.bmm(a, a.mT, policy=policy), abft.addmm(a[0], a[0] @ a[0].mT, a[0], policy=policy)
    assert abft.report().detected == 0


FAULTS = [
    Fault("nan"), Fault("nullify", pattern="row"), Fault("nullify", pattern="tile"), Fault("bitflip", bit=29, where="operand"), Fault("bitflip", bit=30, where="panel"),
    Fault("bitflip", bit=29, where="weight"), Fault("bitflip", bit=29, where="weight", pattern="tile"), Fault("nan", role="dgrad"), Fault("nullify", role="wgrad", pattern="row"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.what}-{f.where}-{f.pattern}-{f.role}")
@pytest.mark.parametrize("weights", ["tracked", "frozen"])
def test_faulty_products_wait_for_nothing(no_waiting, fault, weights):
    for level in ("correct", "detect"):
        model = abft.protect(nn.Linear(32, 40), abft.Policy(weights=weights, level=level, on_uncorrected="record"))
        model(torch.randn(5, 32))
        with warnings.catch_warnings(), faults(fault):
            warnings.simplefilter("ignore")
            model(torch.randn(5, 32, requires_grad=True)).sum().backward()
    assert abft.report().detected + abft.report().stale + abft.report().false_alarms > 0


def test_poisoned_and_overflowing_products_wait_for_nothing(no_waiting):
    model = abft.protect(nn.Linear(64, 8))
    model(torch.full((3, 64), float("nan")))
    abft.linear(torch.full((3, 64), 100.0).half(), torch.full((8, 64), 30.0).half())
    report = abft.report()
    assert (report.input_rows, report.overflow_rows, report.detected) == (3, 3, 0)


def test_verification_and_reports_wait_only_where_they_say(no_waiting):
    a, b = torch.randn(5, 16), torch.randn(16, 8)
    result = abft.verify_matmul(a, b, a @ b)
    assert result.ok and abft.report().checks == 0
    str(abft.report()), abft.coverage(abft.protect(net()), torch.randn(5, 16))
