"""Tensor-core arithmetic on a CPU: binding to the bit-accurate emulator (T-FDPA, the published MMA-Sim model).

The emulator's C source is not part of this repository. ``--emulator FOLDER`` or ABFT_EMULATOR names the folder that holds
its ``mma.c``; it is compiled with ``cc`` into a temporary folder (a CPU with AVX-512 is needed).
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

#: model → (products per step L, fraction bits F); hopper also stands for data-centre Blackwell.
MODELS = {"hopper16": (16, 25), "ampere16": (8, 24), "hopper_tf32": (8, 25), "ampere_tf32": (4, 24)}
_UNMASKED = 0xFFFFFFFF


class EmulatorUnavailable(Exception):
    """Says what is missing."""


class Emulator:
    """``gemm``: X (M, K) times W (K, N) as a tensor core accumulates it; ``row_sums``: an epilogue's sums in register order."""

    def __init__(self, source: Path) -> None:
        folder = Path(tempfile.mkdtemp(prefix="abft-emulator-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        library = folder / "libmma.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorUnavailable(f"cc could not compile the emulator: {done.stderr.strip()[-400:]}")
        self._library = ctypes.CDLL(str(library))

    def gemm(self, x: np.ndarray, w: np.ndarray, model: str, start: np.ndarray | None = None, *, slow: bool = False) -> np.ndarray:
        """fp32 (M, N), continuing from ``start``. ``slow``: scalar, for values outside the normal range."""
        x, w = (np.ascontiguousarray(v, np.float32) for v in (x, w))
        (m, k), n = x.shape, w.shape[1]
        depth, bits = MODELS[model]
        if w.shape[0] != k or n % 16 or k % depth:
            raise ValueError(f"the emulator multiplies (M, K) by (K, N) with K % {depth} == 0 and N % 16 == 0; got {x.shape}, {w.shape}")
        out = np.zeros((m, n), np.float32) if start is None else np.array(start, np.float32)
        sizes = [ctypes.c_long(v) for v in (m, n, k)]
        if slow:
            output_bits, smallest_exponent = ctypes.c_int(23), ctypes.c_int(-126)
            unit = (ctypes.c_int(depth), ctypes.c_int(bits), output_bits, smallest_exponent)
            self._library.tc_slow(_at(x), _at(w), _at(out), *sizes, *unit)
        else:
            self._library.tc_gemm(_at(x), _at(w), _at(out), *sizes, ctypes.c_int(depth), ctypes.c_int(bits), ctypes.c_uint32(_UNMASKED))
        return out

    def row_sums(self, values: np.ndarray, start: int, stop: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Σ v, Σ w v) of columns [start, stop), fp32, in the register order of an MMA epilogue."""
        m, row = values.shape
        plain, weighted, magnitude, peak = (np.empty(m, np.float32) for _ in range(4))
        squares = np.empty(m, np.float64)  # the emulator forms them in fp64; a kernel does not, so they are not used
        weights = np.ascontiguousarray(weights, np.float32)
        first = ctypes.c_void_p(values.ctypes.data + 4 * start)
        self._library.rowred_fast(
            first, ctypes.c_long(m), ctypes.c_long(stop - start), ctypes.c_long(row),
            _at(weights), _at(plain), _at(weighted), _at(magnitude), _at(squares), _at(peak),
        )  # fmt: skip
        return plain, weighted


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--emulator", default=os.environ.get("ABFT_EMULATOR"), help="folder of the emulator's mma.c (or ABFT_EMULATOR)")


def load(folder: str | None) -> Emulator:
    if folder is None:
        raise EmulatorUnavailable("the emulator's folder is not known: give --emulator FOLDER or set ABFT_EMULATOR")
    source = Path(folder) / "mma.c"
    if not source.is_file():
        raise EmulatorUnavailable(f"there is no mma.c in {folder}")
    return Emulator(source)
