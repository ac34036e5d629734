"""What every test starts from: fixed seeds, an empty report, and compiler tests that say why they were skipped."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

import abft

try:
    import hypothesis
except ImportError:
    pass  # the kernels' tests do without: on a rented GPU there is what the image holds (bench/gpu.py)
else:
    # The same examples everywhere and always; no deadline on machines that do other things as well.
    hypothesis.settings.register_profile("abft", deadline=None, derandomize=True, max_examples=50)
    hypothesis.settings.load_profile("abft")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # several processes share the cores


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor would call, or None."""
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = []
    if cpp_compiler() is None:
        missing.append(("compiler", "NO C++ COMPILER: what inductor makes of this on a CPU is untested"))
    if not torch.cuda.is_available():
        missing.append(("gpu", "NO GPU: untested on the device"))
    for item in items:
        for marker, reason in missing:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh_start():
    """Seeds, and a report that counts from here."""
    torch.manual_seed(0)
    abft.report(reset=True)


@pytest.fixture
def dynamo():
    """A compiler that remembers nothing of other tests."""
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()
