"""The device that is measured: its name, and how it multiplies fp32 numbers."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch


def device_name(device: torch.device) -> str:
    """cpu, interpreted (the kernels on a CPU), or the GPU's model, as a part of a file's name."""
    if device.type != "cuda":
        return "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How CUDA multiplies fp32 numbers inside: ieee or tf32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
