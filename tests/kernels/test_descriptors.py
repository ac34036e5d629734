"""Operands through tile descriptors: the same bits as through pointers, and pointers where no descriptor can be had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from abft.triton_kernels import configs, decode, gemm, tiles
from kernel_harness import DTYPES, NULLIFY, Strike, at, operands, run

LAYOUTS = {
    "rows": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.fixture
def by_tile(monkeypatch):
    """Switches descriptors on; tells what every launch was given."""
    given = []
    genuine = gemm.Product.operands

    def switch(on):
        monkeypatch.setattr(configs, "INTERPRETED", tuple(replace(c, descriptors=on) for c in configs.INTERPRETED))
        monkeypatch.setattr(decode, "INTERPRETED_DECODE", tuple(replace(c, descriptors=on) for c in configs.INTERPRETED_DECODE))
        monkeypatch.setattr(decode, "DECODE", {k: tuple(replace(c, descriptors=on) for c in cs) for k, cs in configs.DECODE.items()})
        monkeypatch.setattr(configs, "CONFIGS", {k: tuple(replace(c, descriptors=on) for c in cs) for k, cs in configs.CONFIGS.items()})
        from abft.backends import triton

        triton.forget_plans()

    def operands(self):
        found = genuine(self)
        given.append(found[0][3] is not None)
        return found

    def matmul(left, right, **how):
        return multiplied(np.ascontiguousarray(left), np.ascontiguousarray(right), **how)

    # The interpreter multiplies with numpy, whose BLAS takes a transposed tile by another kernel, to other bits. Matrix units do not.
    multiplied = np.matmul
    monkeypatch.setattr(np, "matmul", matmul)
    monkeypatch.setattr(gemm.Product, "operands", operands)
    yield switch, given
    monkeypatch.undo()
    from abft.backends import triton

    triton.forget_plans()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("w_layout", ["rows", "transposed"])
@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(130, 272, 144), (40, 272, 144), (1, 16, 8)], ids=str)
def test_the_same_bits(by_tile, shape, a_layout, w_layout, dtype):
    switch, given = by_tile
    a, w = operands(*shape, dtype)
    a, w = LAYOUTS[a_layout](a), LAYOUTS[w_layout](w)
    bias = torch.randn(shape[1]).to(dtype)
    switch(False)
    pointers = run(a, w, bias)
    switch(True)
    found = run(a, w, bias)
    assert torch.equal(found.y, pointers.y)
    assert torch.equal(found.evidence.partials, pointers.evidence.partials)
    assert torch.equal(found.evidence.raw, pointers.evidence.raw)
    possible = a_layout != "unaligned" and (a_layout != "transposed" or shape[0] == 1 or shape[0] * dtype.itemsize % 16 == 0)
    assert given == [False, possible]  # a repetition takes pointers


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_fault_is_repaired_to_the_same_bits(by_tile, dtype):
    switch, given = by_tile
    a, w = operands(130, 272, 144, dtype)
    switch(True)
    clean = run(a, w)
    for strike in (Strike("accumulator", at(77, 200), NULLIFY), Strike("operand", at(77, 40, cols=8), NULLIFY, 128, 256)):
        found = run(a, w, strikes=(strike,))
        assert found.detected == 1 and found.suspect_rows == [77] and torch.equal(found.y, clean.y)
    assert all(given)


def test_what_has_no_descriptor():
    matrix = torch.zeros(64, 64, dtype=torch.float16)
    assert tiles.descriptor(matrix, 16, 16)[1] is True
    assert tiles.descriptor(matrix.mT, 16, 16)[1] is False
    assert tiles.descriptor(matrix[:, 8:], 16, 16)[1] is True
    for without in (matrix[:, 1:], matrix[:, ::2], matrix[:0], matrix.view(2, 32, 64), torch.zeros(64, 63, dtype=torch.float16), matrix[:1].expand(64, 64)):
        assert tiles.descriptor(without, 16, 16) is None
