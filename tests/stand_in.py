"""A device without one: ledgers that only one function may bring to the host, and products that go to them.

Products take the path for devices (abft.backends.masked, which holds no host decision) on host memory. The ledgers are
tensors of a class that refuses every way of looking at their values, so a test that passes has read them through
``ledger.to_host`` alone, which is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import abft
from abft import ledger, reporting
from abft.ops import checked

#: What would make the host wait for a device.
LOOKS = (
    "cpu", "numpy", "item", "tolist", "to", "type", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__", "nonzero",
)  # fmt: skip


class OnDevice(Tensor):
    """A tensor whose values nobody on the host may see."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOOKS:
            raise AssertionError(f"the host looked at a ledger on a device through {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Devices:
    """Ledgers of devices that are not there, and how often the host read one."""

    def __init__(self) -> None:
        self.transfers = 0
        self.names: list[str] = []

    def add(self) -> Tensor:
        """Another device, with an empty ledger, as ``ledger.make`` would add it."""
        device = torch.device("xpu", len(self.names))
        words = torch.zeros(ledger.WORDS, dtype=torch.int64).as_subclass(OnDevice)
        self.names.append(str(device))
        ledger._device_ledgers[device] = words
        return words

    @property
    def present(self) -> Tensor:
        """Where products go: the ledger made last."""
        return ledger._device_ledgers[torch.device(self.names[-1])]

    def to_host(self, values: Tensor) -> np.ndarray:
        assert isinstance(values, OnDevice)
        self.transfers += 1
        return values.as_subclass(Tensor).clone().numpy()


@contextmanager
def devices(count: int = 1) -> Iterator[Devices]:
    """So many stand-in devices; products on CPU tensors keep their books on the last of them."""
    out = Devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "_device_ledgers", dict(ledger._device_ledgers))
        patch.setattr(ledger, "_last", {})
        patch.setattr(ledger, "to_host", out.to_host)
        patch.setattr(checked, "_device_words", lambda a, words, backend: out.present)
        for _ in range(count):
            out.add()
        try:
            yield out
        finally:
            abft.report(reset=True)
            # The next stand-ins of these names begin with empty rings.
            for name in out.names:
                reporting._read.pop(name, None)
            reporting._events[:] = [entry for entry in reporting._events if entry[0] not in out.names]
