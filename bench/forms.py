"""Forms of protection that a campaign can be run under, and what its results are then called."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from pathlib import Path

import torch

import abft

#: The form that every figure is of unless it says otherwise; a result of another one carries its name.
COMMON = {"panel": "full", "timing": "immediate", "detector": "checksum"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--panel``, ``--timing`` and ``--detector``, as in a policy."""
    parser.add_argument("--panel", default=COMMON["panel"], choices=["full", "lean"])
    parser.add_argument("--timing", default=COMMON["timing"], choices=["immediate", "deferred"], help="deferred: the kernels only")
    parser.add_argument("--detector", default=COMMON["detector"], choices=["checksum", "both", "statistical"], help="statistical: a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")


def device(options: argparse.Namespace) -> torch.device:
    """Where a campaign runs: ``--backend triton`` on a GPU, everything else on a CPU."""
    return torch.device("cuda" if options.backend == "triton" else "cpu")


def name(options: argparse.Namespace) -> str:
    """``interpreted-fp16``, or ``lean-interpreted-fp16``: what was uncommon, the backend, the type."""
    uncommon = [getattr(options, what) for what, common in COMMON.items() if getattr(options, what) != common]
    return "-".join([*uncommon, options.backend, options.dtype])


def policy(options: argparse.Namespace, **more: str) -> abft.Policy:
    """The policy of ``--backend`` and of what ``add_options`` added. Events are counted, not warned of."""
    chosen = {"backend": backend_of(options.backend), "panel": options.panel, "timing": options.timing, "detector": options.detector}
    return abft.Policy(on_uncorrected="record", **chosen, **more)  # type: ignore[arg-type]


def backend_of(choice: str) -> str:
    """The policy's name of a backend; for ``interpreted``, Triton is told so. Before anything imports Triton."""
    if choice != "interpreted":
        return choice
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="triton")
    return "triton"
