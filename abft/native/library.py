"""The compiled passes: found or made at first use.

The sources beside this file are compiled for the processor at hand, by the C compiler that is found ($CC, cc, gcc, clang),
and kept in a folder of the user's own ($ABFT_CACHE, or abft in the user's cache). Without a compiler, or with
``ABFT_NATIVE=0`` in the environment, torch and numpy do the same in more passes: what is detected is the same, the time is
not (docs/explanation/cost.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

FILES = (
    "vectors.h", "rowsums.h", "judge.c", "encode.c", "fingerprint.c", "renew.c", "measure.c", "attention.h", "attention.c",
    "attention_backward.c", "batch.c",
)  # fmt: skip
#: No -ffast-math: a NaN has to stay one.
FLAGS = ("-O2", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-std=gnu11")
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
#: What each function returns and takes.
SIGNATURES = {
    "abft_worst": (ctypes.c_double, _POINTER, _POINTER, _INT),
    "abft_encode": (_INT, _POINTER, _POINTER, _SIZE, _INT, _POINTER, _INT),
    "abft_bias": (None, _POINTER, _POINTER, _POINTER, _POINTER),
    "abft_measure": (None, _POINTER, _SIZE, _INT, _POINTER),
    "abft_total": (_SIZE, _POINTER, _SIZE),
    "abft_fingerprint": (_INT, _POINTER, _SIZE, _SIZE, _SIZE, _INT, _INT, _POINTER, _POINTER, _INT),
    "abft_renew": (_INT, _POINTER, _POINTER, _POINTER, _INT, _INT),
    "abft_attention": (_INT, _POINTER, _INT),
    "abft_attention_backward": (_INT, _POINTER, _INT),
    "abft_multiply": (_INT, _POINTER, _INT),
    "abft_batch": (_INT, _POINTER),
    "abft_exponentials": (None, _POINTER, _SIZE, _INT),
    "abft_row_sums": (None, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _INT),
}

_log = logging.getLogger("abft")
_lock = threading.Lock()
_loaded: Library | None = None


@dataclass(frozen=True)
class Library:
    """The compiled functions, or why there are none."""

    functions: ctypes.CDLL | None
    reason: str  # for people; empty where there are functions


def _load() -> Library:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _library()
    return _loaded


def _library() -> Library:
    if os.environ.get("ABFT_NATIVE", "1") == "0":
        return Library(None, "ABFT_NATIVE=0")
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return Library(None, f"not tried on {sys.platform}, {8 * ctypes.sizeof(ctypes.c_void_p)} bit")
    try:
        functions = ctypes.CDLL(str(_compiled()))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        # Whatever is wrong with it: a product is checked all the same.
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = f"{type(error).__name__}: {said[0] if said else error}"
        _log.info("abft checks CPU products with torch alone, which costs more time: %s", reason)
        return Library(None, reason)
    return Library(functions, "")


def functions() -> ctypes.CDLL | None:
    """The compiled functions; None where products are judged by torch and numpy."""
    return _load().functions


def why_not() -> str:
    """Why products on this CPU are judged by torch and numpy; empty if they are not."""
    return _load().reason


def _compiled() -> Path:
    """The shared library; compiled if it is not there yet for these sources, this compiler and this processor."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc, clang, or the one that $CC names)")
    sources = {name: (resources.files("abft.native") / name).read_bytes() for name in FILES}
    said = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    key = hashlib.sha256(repr((sources, FLAGS, compiler, said, platform.machine(), _processor())).encode()).hexdigest()[:16]
    folder = _folder()
    target = folder / f"native-{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, text in sources.items():
            (Path(scratch) / name).write_bytes(text)
        made = Path(scratch) / "native.so"
        files = [name for name in FILES if name.endswith(".c")]
        subprocess.run([compiler, *FLAGS, "-o", made.name, *files, "-lm"], cwd=scratch, capture_output=True, check=True, timeout=300)
        os.replace(made, target)  # whole or not at all, whoever else compiles it now
    return target


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(wanted))


def _folder() -> Path:
    """A folder that nobody else can write: what lies there is loaded and run."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("ABFT_CACHE") or os.path.join(home, "abft"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(_own_folder())


@lru_cache(maxsize=1)
def _own_folder() -> str:
    return tempfile.mkdtemp(prefix="abft-")
