"""What the machine can do at best, measured: copying memory, the vendor's product of each type, and issuing a call.

    python -m bench ceilings

Times elsewhere are read against these, not against data sheets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import devices, timing
from bench.results import Results
from bench.workloads import DTYPES

#: (bytes copied, M = N = K of the products), of a GPU and of a CPU.
SIZES = {"cuda": (1 << 30, 8192), "cpu": (1 << 26, 512)}
ROUNDS = 15


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench ceilings", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    copied, size = SIZES[device.type]
    results = Results(f"ceilings-{devices.device_name(device)}", fresh=True, folder=options.out, copied=copied, size=size, rounds=ROUNDS)
    seconds = _seconds(_copy(copied, device), device)
    # Each byte is read once and written once.
    print(results.add("ceiling", what="copy", seconds=seconds, bytes_per_second=2 * copied / seconds))
    for name, (dtype, precision) in DTYPES.items():
        if name == "tf32" and device.type == "cpu":
            continue
        with devices.fp32_products(precision):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds = _seconds(lambda a=a, b=b: torch.mm(a, b), device)  # type: ignore[misc]
        print(results.add("ceiling", what=f"mm {name}", seconds=seconds, flops_per_second=2 * size**3 / seconds))
    small = torch.zeros(1, device=device)
    lap = timing.clock_of(device).lap(lambda: small.add_(1), 200)
    print(results.add("ceiling", what="issue", seconds=lap.host))
    return 0


def _copy(size: int, device: torch.device) -> timing.Work:
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _seconds(work: timing.Work, device: torch.device) -> float:
    times = timing.race({"work": work}, clock=timing.clock_of(device), rounds=ROUNDS)
    return float(times["work"].summary()["seconds"])
