"""Calibration of the bounds on the device at hand: what fault-free residuals are, relative to their bounds, and how the unit accumulates.

    python -m bench calibrate                          on a GPU
    python -m bench calibrate --interpreted            the kernels in Triton's interpreter, a few rows

For each operand type, K and family of activations: residual over bound of the e check, z = κ · that, its rms and its largest. Accepted if
the rms is within 1.5 of the fit and the largest |z| below κ/2 (docs/explanation/thresholds.md); what is not calls for another κ, and is
said. Before that, the probe (bench/probe.py): which published model of a matrix unit answers as the kernel and the vendor's product do.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from bench import devices, families, forms, probe, residuals
from bench.results import UNFINISHED, Results
from bench.workloads import DTYPES

DEPTHS = (64, 256, 1024, 4096, 16384)
#: After docs/explanation/thresholds.md: without and with a mean, energy at one end of K, a probability, single large channels.
FAMILIES = ("gauss", "shifted", "k-decay", "softmax", "outlier-channels")
WEIGHTS = ("gauss", "offset")
COLUMNS = 512
#: Largest share of the fit that a measured rms may exceed, and of κ that a single z may reach.
RMS, LARGEST = 1.5, 0.5


def fit(steps: float) -> float:
    """σ of z, fitted to emulated tensor cores: T = K / L accumulation steps."""
    return math.sqrt(0.2 + 0.0155 * steps + 2.6e-5 * steps**2)


def measure(dtype: torch.dtype, k: int, family: str, weight: str, rows: int, batch: int, device: torch.device) -> dict[str, Any]:
    """z of ``rows`` fault-free rows, in products of at most ``batch``."""
    from abft import threshold

    g = families.generator(k, *family.encode(), *weight.encode(), device=device)
    w = families.weights(weight, COLUMNS, k, g, dtype)
    squares, largest, worst, count = 0.0, 0.0, 0.0, 0
    for start in range(0, rows, batch):
        plan, ratio = residuals.ratios(families.activations(family, min(batch, rows - start), k, g, dtype), w)
        kappa = threshold.kappa(plan.arithmetic, k, "e", width=plan.layout.groups.width)
        z = ratio[..., 0].double() * kappa
        squares, largest, count = squares + float(z.square().sum()), max(largest, float(z.abs().max())), count + z.numel()
        worst = max(worst, float(ratio.abs().max()))
    rms, expected = math.sqrt(squares / count), fit(k / plan.arithmetic.depth)
    # What rounds to nearest at every product is noisier: its κ₀ says by how much (threshold.KAPPA_BASE_FMA).
    expected *= plan.arithmetic.base / threshold.KAPPA_BASE
    return {
        "rows": rows, "arithmetic": plan.arithmetic.name, "kappa": kappa, "rms": rms, "fit": expected, "largest": largest,
        "worst_of_all_kinds": worst, "accepted": rms < RMS * expected and largest < LARGEST * kappa,
    }  # fmt: skip


def answers(dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Any]]:
    """What the kernel and the vendor's product answer to the probe."""
    from bench import twin_layer

    asked = {"kernel": lambda a, w: twin_layer.multiply(a, w, None), "vendor": lambda a, w: a @ w.mT}
    found = {}
    for who, multiply in asked.items():
        said = probe.ask(multiply, dtype, device)
        found[who] = {"answers": said, "steps": probe.steps(said), "models": probe.recognised(said)}
    return found


def main(argv: list[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench calibrate", description=__doc__, formatter_class=raw)
    parser.add_argument("--interpreted", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bf16 fp16 tf32 fp32; interpreted: fp16 fp32")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--rows", type=float, help="for each (default: 1e6; interpreted: 256)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, help="folder of the result (default: bench/results)")
    options = parser.parse_args(argv)
    if options.interpreted:
        forms.backend_of("interpreted")
    device = torch.device("cpu" if options.interpreted else "cuda")
    rows = int(options.rows or (256 if options.interpreted else 1e6))
    dtypes = options.dtypes or (["fp16", "fp32"] if options.interpreted else ["bf16", "fp16", "tf32", "fp32"])
    results = Results(f"calibration-{devices.device_name(device)}", folder=options.out, rows=rows, columns=COLUMNS)
    deadline = time.monotonic() + options.seconds
    for name in dtypes:
        if results.find(f"probe {name}") is None:
            with devices.fp32_products(DTYPES[name][1]):
                found = answers(DTYPES[name][0], device)
            results.add("probe", key=f"probe {name}", dtype=name, **found)
            said = (f"{who} {' or '.join(f['models']) or 'no model known'}" for who, f in found.items())
            print(f"probe {name}: {'; '.join(said)}", flush=True)
    # Every type early, long products last.
    for k in options.depths:
        for name in dtypes:
            for family in FAMILIES:
                for weight in WEIGHTS:
                    key = f"{name} k{k} {family} × {weight}"
                    if results.find(key) is not None:
                        continue
                    if time.monotonic() > deadline:
                        return UNFINISHED
                    dtype, precision = DTYPES[name]
                    with devices.fp32_products(precision):
                        # 2²⁸ numbers of activations at a time: half a GB, and their fp32 originals.
                        r = measure(dtype, k, family, weight, max(64, rows * 64 // k), max(64, (1 << 28) // k), device)
                    results.add("calibration", key=key, dtype=name, k=k, family=family, weight=weight, **r)
                    print(_line(key, r), flush=True)
    return 0


def _line(key: str, r: dict[str, Any]) -> str:
    said = "" if r["accepted"] else "   NOT ACCEPTED"
    z = f"z rms {r['rms']:.2f} (fit {r['fit']:.2f}), largest {r['largest']:.1f} of κ {r['kappa']:.0f}"
    return f"{key:<40} {r['rows']:>9,} rows  {z}; worst ratio {r['worst_of_all_kinds']:.2f}{said}"
