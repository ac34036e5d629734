"""The unchecked twin: the bits of the checked product, from the same tiles, and nothing of its check."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from abft.triton_kernels import gemm
from kernel_harness import DTYPES, NULLIFY, Strike, at, operands, run

from bench import twin


def with_twin(a, w, bias=None, **options):
    """(checked run, the twin's Y of the same product)"""
    found = {}
    checked = gemm.multiply

    def both(product, faults):
        found["y"] = twin.multiply(product)
        return checked(product, faults)

    with mock.patch.object(gemm, "multiply", both):
        return run(a, w, bias, **options), found["y"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(130, 272, 144), (1, 16, 8), (3, 577, 40)], ids=str)
def test_the_twin_has_the_same_bits(shape, with_bias, dtype):
    a, w = operands(*shape, dtype)
    checked, y = with_twin(a, w, torch.randn(shape[1]).to(dtype) if with_bias else None)
    assert torch.equal(y, checked.y)


def test_the_twin_multiplies_batches_and_transposed_operands():
    a, w = torch.randn(2, 5, 24), torch.randn(2, 24, 33).mT
    checked, y = with_twin(a, w)
    assert y.shape == (2, 5, 33) and torch.equal(y, checked.y)


def test_the_twin_sees_nothing():
    """The checked product repairs what struck it; the twin was not struck, and would not know."""
    a, w = operands(130, 272, 144, torch.float32)
    checked, y = with_twin(a, w, strikes=(Strike("accumulator", at(7, 9), NULLIFY),))
    assert checked.detected == 1 and torch.equal(y, checked.y)
