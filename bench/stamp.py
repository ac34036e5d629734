"""What a measured number belongs to: code, versions and kind of machine; nothing that names a particular machine."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from abft.native import library

ROOT = Path(__file__).resolve().parents[1]


def stamp() -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "sources": sources(),
        "cpu": cpu_model(),
        "vectors": vector_units(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": library.why_not() or "compiled",  # how products on a CPU are judged
        "triton": _version("triton"),
        "gpu": gpu_model(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def sources() -> str:
    """A hash of the package's sources: which code was measured, whether or not it was committed."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "abft").rglob("*") if path.suffix in (".py", ".c", ".h")):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def vector_units() -> str:
    """What the CPU multiplies with: two of one name may differ in that, most of all in bf16."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next(line.split() for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = []
    pairs = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *pairs])


def gpu_model() -> str | None:
    """Name, multiprocessors and memory; CUDA's version."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    return f"{found.name}, {found.multi_processor_count} multiprocessors, {memory}, CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "--", "abft") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except OSError:
        return "unknown"
