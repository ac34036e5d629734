"""The second detector on the kernels: its sums, against fp64 oracles; a marginal unit, which programs stand in for, found and named."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import triton.language as tl
from abft.triton_kernels import configs, gemm, launch, residuals, workspace
from kernel_harness import DEVICE, at, counters_of, fresh_ledger, judged, operands, run

import abft
from abft import checksum, pending
from abft.backends import triton as backend
from abft.backends.call import Call
from abft.faults import BitOperation, Strike
from abft.policy import Policy
from abft.statistics import accumulators, baseline, cusum, devices, monitor, watches
from abft.statistics.accumulators import BLOCKS, COUNT, FIELDS, KINDS, MAXIMA, MAXIMA2, MOST

UNITS = 5
BOTH = {"detector": "both"}
_descriptors = backend.descriptors
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="multiprocessors have real numbers")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """… and programs that stand in for multiprocessors, UNITS of them."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(gemm, "smid", lambda: tl.program_id(0))
        for module in (gemm, launch, configs):
            monkeypatch.setattr(module, "multiprocessors", lambda device: UNITS)
    monkeypatch.setattr(backend, "_numbered", lambda device: True)
    for pages, none in (("_open", {}), ("_full", [])):
        monkeypatch.setattr(workspace, pages, none)
    backend._programs.cache_clear()
    backend.forget_plans()
    watches.forget()
    devices._watches.clear()
    yield
    monkeypatch.undo()
    backend._programs.cache_clear()
    backend.forget_plans()
    watches.forget()
    devices._watches.clear()


def test_numbers_that_device_code_repeats():
    assert (residuals.FIELDS.value, residuals.LEVELS.value) == (devices.RECORD, devices.COUNTED) and len(FIELDS) <= devices.RECORD
    for name in ("COUNT", "SUM", "SQUARES", "MOST", "BLOCKS", "MAXIMA", "MAXIMA2"):
        assert getattr(residuals, name).value == getattr(accumulators, name), name
    assert residuals.ALL_KINDS.value == len(KINDS)
    assert residuals.ABOVE.value == accumulators.ABOVE_4 and residuals.CUT.value == accumulators.ABOVE_SOFT - accumulators.ABOVE_4 + 1
    assert residuals.Kept._fields == devices.Room._fields


def expected(x: np.ndarray, levels: np.ndarray, bm: int) -> np.ndarray:
    """The record of x (rows, kinds); NaN where a row was beyond its bound. In fp64."""
    out = np.zeros((x.shape[1], len(FIELDS)))
    for kind in range(x.shape[1]):
        blocks = [b[~np.isnan(b)] ** 2 for b in np.split(x[:, kind], range(bm, len(x), bm))]
        x2, sign = np.concatenate(blocks), np.sign(x[:, kind][~np.isnan(x[:, kind])])
        cut = np.minimum(x2, levels[kind, 4])
        maxima = np.array([b.max() for b in blocks if len(b)])
        out[kind] = [len(x2), (sign * np.sqrt(cut)).sum(), cut.sum(), np.sqrt(x2.max()), *((x2 > level).sum() for level in levels[kind, :4]),
                     len(maxima), np.sqrt(maxima).sum(), maxima.sum()]  # fmt: skip
    return out


@pytest.mark.parametrize(("dtype", "panel", "shape"), [
    (torch.float32, "full", (130, 400, 40)), (torch.float16, "lean", (40, 300, 40)),
])  # fmt: skip
def test_sums_are_those_of_the_residuals(dtype, panel, shape):
    """Two products, one with a row beyond its bound, which is left out; every check by its group, every tile by its unit."""
    m, n, k = shape
    a, w = operands(m, n, k, dtype)
    words = fresh_ledger()
    flip = Strike("accumulator", at(1, 20), BitOperation(flip=1 << 28))
    results = [run(a, w, words=words, panel=panel, **BOTH), run(a, w, words=words, panel=panel, strikes=(flip,), **BOTH)]
    (watch,) = devices._watches.values()
    room, plan = watch.room, results[0].plan
    kinds, bm, tiles = len(plan.layout.form.kinds), plan.config.bm, -(-n // plan.config.bn)
    levels = room.levels.cpu().numpy().astype(np.float64)
    groups = np.zeros((plan.layout.groups.count, len(KINDS), len(FIELDS)))
    units, shares = np.zeros((watch.units, len(KINDS), len(FIELDS))), np.zeros(room.shares.shape, int)
    pairs = np.zeros(room.pairs.shape, int)
    for result in results:
        sums, tau = judged(result, k)
        x = ((sums.actual.double() - sums.predicted.double()) / tau)[0].numpy()
        x = np.where((result.status[0].cpu().numpy().T >= 2)[..., None], np.nan, x)
        of_tile = result.evidence.units.cpu().numpy().reshape(-1, tiles)
        for block in range(len(of_tile)):
            for g in range(x.shape[1]):
                part = x[block * bm : (block + 1) * bm, g]
                record = expected(part, levels[:kinds], bm)
                mine = of_tile[block, g * plan.tiles_per_group : (g + 1) * plan.tiles_per_group]
                checks = int(record[0, COUNT])
                for target, index in ((groups, g), *((units, u) for u in mine)):
                    most = np.maximum(target[index, :kinds, MOST], record[:, MOST])
                    target[index, :kinds] += record
                    target[index, :kinds, MOST] = most
                for u in mine:
                    shares[u, g] += checks
                    for v in mine:
                        pairs[u, v] += checks
    assert groups[0, 0, COUNT] == 2 * m - 1
    assert np.array_equal(room.shares.cpu(), shares) and np.array_equal(room.pairs.cpu(), pairs)
    for kept, right in ((room.groups, groups), (room.units, units)):
        kept = kept.cpu().numpy()
        assert not kept[..., len(FIELDS) :].any() and np.array_equal(kept[..., COUNT], right[..., COUNT])
        # x of the oracle's own sums differs by their rounding: a few of fp32's, of 1.
        assert np.allclose(kept[..., : len(FIELDS)], right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("dtype", "panel"), [(torch.float32, "full"), (torch.float16, "lean")])
def test_deferred_checks_keep_the_sums_of_immediate_ones(dtype, panel):
    """Products of two sites, one of them twice and in a batch, with a row beyond its bound: one launch judges all, and charges each."""
    flip = Strike("accumulator", at(1, 20), BitOperation(flip=1 << 28))
    calls = [(1, (130, 200, 24), ()), (2, (9, 70, 17), (flip,)), (1, (130, 200, 24), (flip,))]

    def kept(timing: str) -> dict[int, devices.Watch]:
        devices._watches.clear()
        words = fresh_ledger()
        for seed, (site, shape, strikes) in enumerate(calls):
            a, w = (x.to(DEVICE) for x in operands(*shape, dtype, seed))
            call = Call(a, w, None, None, False, "fprop", Policy(panel=panel, timing=timing, level="detect", **BOTH), site, strikes)
            backend.product(call, words, torch.tensor(site, device=DEVICE))
        for _ in range(2):  # the second time there is nothing to judge
            pending.flush()
        assert [counters_of(words, site)["observed"] for site in (1, 2)] == [1, 1]
        return {watch.key[0]: watch for watch in devices._watches.values()}

    immediate, later = kept("immediate"), kept("deferred")
    assert later.keys() == immediate.keys() == {1, 2}
    blocks = [BLOCKS, MAXIMA, MAXIMA2]  # deferred ones are judged in lower blocks
    for site, (of_now, of_later) in ((site, (immediate[site].room, later[site].room)) for site in later):
        assert of_now.shares.any() and torch.equal(of_now.shares, of_later.shares) and torch.equal(of_now.pairs, of_later.pairs), site
        for right, found in ((of_now.groups, of_later.groups), (of_now.units, of_later.units)):
            right, found = np.delete(right.cpu(), blocks, -1), np.delete(found.cpu(), blocks, -1)
            assert np.array_equal(found[..., COUNT], right[..., COUNT]) and found[..., COUNT].any()
            assert np.allclose(found, right, rtol=1e-4, atol=1e-4)  # fp32 sums of as many terms as rows, in another order
        assert bool((of_later.groups[..., BLOCKS] >= of_now.groups[..., BLOCKS]).all())


@interpreted
def test_a_marginal_unit_is_found_named_and_quarantined(monkeypatch):
    """Six tiles, five programs; one adds eight units in the last place to one column of its tiles, which no bound sees.

    With a short memory and a low threshold, for the interpreter is slow; those in force: tests/test_unmixing.py.
    """
    monkeypatch.setattr(monitor, "Baseline", functools.partial(baseline.Baseline, warm_up=5))
    monkeypatch.setattr(devices, "BATCH", 64)
    monkeypatch.setattr(monitor, "Cusum", functools.partial(monitor.Cusum, threshold=9.0))
    monkeypatch.setattr(cusum, "APART", 2.0)
    bad, m, n, k, tile = 3, 300, 256, 24, 128
    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
    torch.nn.init.uniform_(layer.weight, 0, 1)  # positive sums: a unit in the last place moves them all one way
    abft.protect(layer, abft.Policy(backend="triton", panel="lean", group=tile, on_uncorrected="record", detector="both"), name="marginal")
    products, multiply, strikes = [], gemm.multiply, []

    def remembered(*args):
        products.append(multiply(*args))
        return products[-1]

    monkeypatch.setattr(gemm, "multiply", remembered)
    monkeypatch.setattr(backend, "descriptors", lambda *_: _descriptors(tuple(strikes), DEVICE))
    g = torch.Generator().manual_seed(1)

    def steps(count: int) -> abft.Report:
        for _ in range(count):
            with torch.no_grad():
                layer(torch.rand(m, k, generator=g).half())
            seen = abft.report()
        return seen

    clean = steps(7)
    (seen,) = clean.statistics
    assert clean.alarms == () == clean.events and seen.warm and seen.residuals == 7 * m * 2
    assert set(seen.severities) == {"S1"}, "nobody weighs rows beyond their bound here: none is not zero"
    units = products[-1].units.view(-1, n // tile)
    signs = checksum.signs(tile)
    column = int(np.flatnonzero(signs > 0)[5])
    for block, of in (units == bad).nonzero().tolist():
        region = at(block * tile, of * tile + column, rows=min(tile, m - block * tile))
        strikes.append(Strike("accumulator", region, BitOperation(add=8)))
    assert len(strikes) == 1
    marginal = steps(5)
    assert marginal.detected == 0 and marginal.worst < 0.5
    assert {(a.site, a.test, a.unit, a.quarantine) for a in marginal.alarms} == {("marginal", "bias", bad, True)}
    assert f"multiprocessor {bad} of " in marginal.alarms[0].message
