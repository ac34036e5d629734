"""The kernels, interpreted on a CPU and native on a GPU.

Triton decides at import, function by function, whether it compiles or interprets. Without a GPU it is therefore imported here,
at collection, with the interpreter on; outside these tests the variable is as it was. Tests that compile (tests/compile) do so
in a process of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

NATIVE = torch.cuda.is_available()


def _interpreted() -> None:
    """Import Triton and the kernels for the interpreter, whatever was imported before."""
    import triton.language as tl

    if type(tl.sum).__name__ != "InterpretedFunction":
        # Somebody was here first (torch.utils.flop_counter imports Triton); its own library is @triton.jit, too.
        importlib.reload(tl.standard)
        importlib.reload(tl)
    assert type(tl.sum).__name__ == "InterpretedFunction"
    import abft.triton_kernels.attention_decode
    import abft.triton_kernels.attention_gradients
    import abft.triton_kernels.attention_settle
    import abft.triton_kernels.integer_check
    import abft.triton_kernels.launch
    import abft.triton_kernels.panel
    import abft.triton_kernels.workspace

    import bench.twin  # noqa: F401

    kernel = abft.triton_kernels.panel.sum_rows
    assert type(kernel).__name__ == "InterpretedFunction", "the kernels were imported for compiling; set TRITON_INTERPRET=1"


if not NATIVE:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _interpreted()


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """The backend asks the environment how it runs, and Triton asks again when it imports more of itself at a launch.

    Of a module, so that fixtures of a module launch kernels under it, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not NATIVE:
            patch.setenv("TRITON_INTERPRET", "1")
        yield
