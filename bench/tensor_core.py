"""Products as a tensor core computes them, bit for bit by the published model; compiled with the machine's C compiler (tensor_core.c).

bench/emulator.py binds an outside emulator of the same model, which is faster and needs AVX-512. This one runs everywhere.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from bench.emulator import MODELS, EmulatorUnavailable

SOURCE = Path(__file__).with_name("tensor_core.c")
#: Nothing traps, so that truncation is an instruction; nothing else may be reordered or fused.
FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-shared", "-std=gnu11")


class TensorCore:
    """``gemm``: X (M, K) times W (K, N), finite fp32 arrays that hold numbers of the operand type."""

    def __init__(self, function: ctypes._CFuncPtr) -> None:  # type: ignore[name-defined]
        self._function = function

    def gemm(self, x: np.ndarray, w: np.ndarray, model: str, start: np.ndarray | None = None) -> np.ndarray:
        """fp32 (M, N), continuing from ``start``. model: a key of ``emulator.MODELS``."""
        x, w = (np.ascontiguousarray(v, np.float32) for v in (x, w))
        (m, k), n = x.shape, w.shape[1]
        depth, bits = MODELS[model]
        if w.shape[0] != k or k % depth:
            raise ValueError(f"a {model} multiplies (M, K) by (K, N) with K % {depth} == 0; got {x.shape}, {w.shape}")
        out = np.zeros((m, n), np.float32) if start is None else np.array(start, np.float32, order="C")
        at = [ctypes.c_void_p(array.ctypes.data) for array in (x, w, out)]
        if self._function(*at, *map(ctypes.c_long, (m, n, k)), ctypes.c_int(depth), ctypes.c_int(bits)):
            raise MemoryError(f"no memory for a product of {x.shape} and {w.shape}")
        return out


@lru_cache(maxsize=1)
def load() -> TensorCore:
    """Compile it, once a process; ``EmulatorUnavailable`` says why that failed."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise EmulatorUnavailable("there is no C compiler (cc, gcc, clang, or the one that $CC names)")
    with tempfile.TemporaryDirectory(prefix="abft-tensor-core-") as folder:
        target = Path(folder) / "tensor_core.so"
        done = subprocess.run([compiler, *FLAGS, "-o", str(target), str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise EmulatorUnavailable(f"{compiler} could not compile {SOURCE.name}: {done.stderr.strip()[-400:]}")
        return TensorCore(ctypes.CDLL(str(target)).tensor_core)  # loaded, the file is not needed any more
