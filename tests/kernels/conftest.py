"""The kernels, interpreted on a CPU and native on a GPU.

Triton decides at import, function by function, whether it compiles or interprets. Without a GPU it is therefore imported here,
at collection, with the interpreter on; outside these tests the variable is as it was. Tests that compile (tests/compile) do so
in a process of their own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

NATIVE = torch.cuda.is_available()

if not NATIVE:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language

        import abft.triton_kernels.launch
        import abft.triton_kernels.panel  # noqa: F401
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    if type(triton.language.sum).__name__ != "InterpretedFunction":
        raise pytest.UsageError(
            "Triton was imported, for compiling, before the kernels' tests could have it interpret; set TRITON_INTERPRET=1 "
            f"for this run, or run tests/kernels on its own. Already imported: {sorted(m for m in sys.modules if m.startswith('abft'))}"
        )


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend asks the environment how it runs."""
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
