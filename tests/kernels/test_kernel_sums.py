"""What the kernels sum and judge is what abft.checksum and abft.threshold say."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from kernel_harness import DEVICE, DTYPES, at, judged, operands, run

from abft import checksum, ledger
from abft.backends import triton as backend
from abft.faults import BitOperation, Strike


@pytest.mark.parametrize(
    ("shape", "group"),
    [((5, 100, 64), None), ((130, 700, 300), None), ((3, 1, 5), None), ((4, 3, 8), None), ((4, 17, 8), None), ((5, 300, 16), 16),
     ((5, 300, 16), 48), ((70, 500, 16), 96), ((70, 1100, 16), 208)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_partial_sums_are_those_of_the_accumulators(form, shape, group, dtype):
    """Results without bias are the accumulators themselves, of 16-bit numbers where they are small integers.

    Groups of one tile and of several, ragged ones, too narrow for signs.
    """
    a, w = operands(*shape, torch.float32)
    if dtype != torch.float32:
        a, w = a.clamp(-3, 3).round(), w.mul(3 / w.abs().max()).round()
        assert float((a @ w.mT).abs().max()) < 2048
    result = run(a.to(dtype), w.to(dtype), panel=form, group=group)
    groups = result.plan.layout.groups
    y = result.y.cpu().double()
    sums, _ = judged(result, shape[2])
    exact, squares = checksum.actual_sums(y, groups, sums.kinds, torch.float64)
    reach = checksum.actual_sums(y.abs(), groups, ("one",), torch.float64)[0]
    unit = max(groups.width, 16) * 2.0**-24  # recursive summation of as many numbers errs by at most this, relative to Σ |w acc|
    heaviest = torch.tensor([max(1.0, float(np.abs(checksum.column_weights(kind, groups.width)).max())) for kind in sums.kinds])
    assert ((sums.actual[0].double() - exact).abs() <= unit * heaviest * reach).all()
    assert ((sums.squares[0].double() - squares).abs() <= unit * squares).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("form", ["full", "lean"])
def test_the_worst_clean_ratio_is_that_of_the_torch_maths(form, dtype):
    result = run(*operands(70, 700, 300, dtype), panel=form)
    sums, tau = judged(result, 300)
    ratio = ((sums.actual - sums.predicted).abs() / tau).max().item()
    assert result.worst == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
def test_residual_and_bound_of_a_record_are_those_of_the_torch_maths(dtype):
    result = run(*operands(70, 700, 300, dtype), strikes=(Strike("accumulator", at(9, 600), BitOperation(flip=1 << 29)),))
    sums, tau = judged(result, 300)
    ratio = ((sums.actual - sums.predicted).abs() / tau)[0, 9].numpy()
    g, kind = np.unravel_index(ratio.argmax(), ratio.shape)
    (record,) = result.records
    assert ledger.bits_float(record["residual"]) == pytest.approx(float((sums.actual - sums.predicted)[0, 9, g, kind]), rel=1e-5)
    assert ledger.bits_float(record["bound"]) == pytest.approx(float(tau[0, 9, g, kind]), rel=1e-5)


# --- panel ----------------------------------------------------------------------------------------


def value_of(panel):
    """(checksums as fp64 (groups, kinds, K), sketches (groups, 4, K)) that a panel stands for."""
    layout, columns = panel.layout, panel.columns.cpu().double()
    if panel.scales is not None:
        columns = columns * panel.scales.cpu().double().unsqueeze(-1)
    checks = columns[..., : layout.checksum_columns, :].unflatten(-2, (layout.groups.count, len(layout.form.kinds), layout.parts)).sum(-2)
    sketches = columns[..., layout.checksum_columns : layout.checksum_columns + layout.sketch_columns, :]
    return checks, sketches.unflatten(-2, (-1, checksum.SKETCHES))


@pytest.mark.parametrize("dtype", DTYPES, ids=oracles.name_of)
@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (577, 300), (1200, 130)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "transposed"])
def test_panels_are_those_of_encode(shape, form, dtype, strided):
    n, k = shape
    w = 3 * torch.randn(k, n).mT.to(dtype) if strided else 3 * torch.randn(n, k).to(dtype)
    layout = backend.plan(n, k, dtype, None, False, form, None).layout
    panel, expected = backend.build_panel(w.to(DEVICE), layout), checksum.encode(w, layout)
    assert panel.columns.shape == expected.columns.shape and panel.columns.dtype == dtype
    if expected.scales is not None:
        # The largest number of a column may fall on either side of a power of two.
        assert ((panel.scales.cpu() / expected.scales).log2().abs() <= 1).all()
    checks, sketches = value_of(panel)
    # Exact weighted sums, independently: recursive fp32 summation and then the split's own resolution.
    for g in range(layout.groups.count):
        start, stop = layout.groups.span(g)
        for j, kind in enumerate(layout.form.kinds):
            weights = torch.from_numpy(checksum.column_weights(kind, stop - start).astype(np.float64))
            terms = weights[:, None] * w[start:stop].double()
            allowed = (stop - start) * 2.0**-24 * terms.abs().sum(0) + 2.0**-20 * terms.sum(0).abs().max()
            assert ((checks[g, j] - terms.sum(0)).abs() <= allowed).all()
    _, expected_sketches = value_of(expected)
    relative = 2 * oracles.ROUNDOFF[dtype] + layout.groups.width * 2.0**-23
    assert ((sketches - expected_sketches).abs() <= relative * expected_sketches.abs() + 1e-7).all()
    if layout.form.ingress:
        assert torch.equal(panel.columns[-1].cpu(), expected.columns[-1])


def test_three_kinds_of_numbers_that_are_not_finite_stay_where_they_are():
    w = torch.randn(40, 70).to(torch.float16)
    w[3, 5], w[4, 6], w[5, 7] = float("nan"), float("inf"), float("-inf")
    panel = backend.build_panel(w.to(DEVICE), backend.plan(40, 70, torch.float16, None, False, "full", None).layout)
    checks, sketches = value_of(panel)
    poisoned = (~torch.isfinite(checks)).any(0).any(0) | (~torch.isfinite(sketches)).any(0).any(0)
    assert poisoned.nonzero().flatten().tolist() == [5, 6, 7]


def test_batched_panels_are_panels_side_by_side():
    w = torch.randn(2, 300, 50).to(torch.float16)
    layout = backend.plan(300, 50, torch.float16, None, False, "full", None).layout
    panel = backend.build_panel(w.to(DEVICE), layout)
    for i in range(2):
        single = backend.build_panel(w[i].to(DEVICE), layout)
        assert torch.equal(panel.columns[i], single.columns) and torch.equal(panel.scales[i], single.scales)
