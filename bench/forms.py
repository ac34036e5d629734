"""Forms of protection that a campaign can be run under, and what its results are then called."""

from __future__ import annotations

import argparse
import os
import warnings

import abft

#: The form that every figure is of unless it says otherwise; a result of another one carries its name.
COMMON = {"panel": "full", "timing": "immediate"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--panel`` and ``--timing``, as in a policy."""
    parser.add_argument("--panel", default=COMMON["panel"], choices=["full", "lean"])
    parser.add_argument("--timing", default=COMMON["timing"], choices=["immediate", "deferred"], help="deferred: the kernels only")


def name(options: argparse.Namespace) -> str:
    """``interpreted-fp16``, or ``lean-interpreted-fp16``: what was uncommon, the backend, the type."""
    uncommon = [getattr(options, what) for what, common in COMMON.items() if getattr(options, what) != common]
    return "-".join([*uncommon, options.backend, options.dtype])


def policy(options: argparse.Namespace, **more: str) -> abft.Policy:
    """The policy of ``--backend``, ``--panel`` and ``--timing``. Events are counted, not warned of."""
    chosen = {"backend": backend_of(options.backend), "panel": options.panel, "timing": options.timing}
    return abft.Policy(on_uncorrected="record", **chosen, **more)  # type: ignore[arg-type]


def backend_of(choice: str) -> str:
    """The policy's name of a backend; for ``interpreted``, Triton is told so. Before anything imports Triton."""
    if choice != "interpreted":
        return choice
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="triton")
    return "triton"
