"""The one call for a rented GPU: everything that waits for one, in order of worth, within a given time, whatever fails.

    python -m bench gpu --minutes 8 --out DIR

Needs a checkout, torch, triton, numpy, scipy and pytest; no network, no installation. Every part is a command of its own
(``python -m bench`` lists them), in its own process, within its share of the time (bench/supervisor.py). Results are JSON lines
in DIR, written as they come. The same call goes on where the last one stopped. Status 0 unless nothing could be measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import gpu_summary, supervisor
from bench.supervisor import Part

#: Told to every part that can end by itself.
UNTIL = ("--seconds", "{seconds}", "--out", "{out}")
#: Beside times; the campaigns look for more.
FEW_FAULTS = ("--trials", "10")
LARGE = ("square-4096", "square-8192", "llama8b-*-8192", "llama70b-qo-8192", "llama8b-gateup-512")
SMALL = ("square-1024", "llama8b-qo-512", "llama8b-kv-512", "llama70b-qo-512")
DECODING = ("llama8b-qo-1", "llama8b-*-16", "llama8b-qo-64", "llama8b-gateup-1", "llama70b-qo-1", "llama8b-*-4")
TRAINED = ("square-4096", "llama8b-qo-8192", "llama8b-gateup-8192")
FORWARD = (
    "torch", "twin", "abft:triton", "abft:triton,detect", "abft:triton,lean", "abft:vendor,detect", "abft:reference,detect", "dmr", "tmr",
)  # fmt: skip
WAYS = ("eager", "graph", "compiled")  # compiling takes longest
FEW = ("torch", "twin", "abft:triton", "abft:triton,deferred", "dmr", "tmr")


def _timed(name: str, shapes: tuple[str, ...], who: tuple[str, ...], weight: float, *more: str) -> Part:
    return Part(name, ("linear", "--shapes", *shapes, "--providers", *who, *more, *FEW_FAULTS, *UNTIL), weight)


#: A short run has to reach the times; tests and campaigns go on in a second one.
ON_GPU = (
    Part("ceilings", ("ceilings", "--out", "{out}"), 3),
    Part("kernel-tests", ("kernel-tests", *UNTIL), 22),
    Part("calibration", ("calibrate", "--rows", "1e6", *UNTIL), 8),
    _timed("times-large", LARGE, FORWARD, 14, "--passes", "forward", "--ways", "eager", "--dtypes", "bf16", "fp16"),
    _timed("times-decode", DECODING, FEW, 8, "--passes", "forward", "--ways", "graph", "eager", "--dtypes", "bf16"),
    _timed("times-backward", TRAINED, FEW, 6, "--passes", "backward", "--ways", "eager", "--dtypes", "bf16"),
    Part("times-layer", ("layer", "--providers", *FEW, "--dtypes", "bf16", *FEW_FAULTS, *UNTIL), 6),
    Part(
        "times-attention",
        ("attention", "--shapes", "*-8x16x2048x128-causal", "*-1x16x16384x128-causal", "*-4x32x4096x64", "decode-*", "--dtypes", "bf16",
         "--ways", "eager", *FEW_FAULTS, *UNTIL),
        6,
    ),
    Part(
        "times-paged-attention",
        ("attention", "--shapes", "decode-*", "--providers", "abft:paged", "abft:paged,off", "--dtypes", "bf16", "--passes", "forward",
         "--ways", "graph", "eager", *FEW_FAULTS, *UNTIL),
        3,
    ),
    Part("clean-bf16", ("clean", "--backend", "triton", "--dtype", "bf16", "--rows", "1e9", *UNTIL), 8),
    Part("faults-bf16", ("campaign", "--backend", "triton", "--dtype", "bf16", "--trials", "10", *UNTIL), 8),
    Part("clean-attention", ("attention-clean", "--backend", "triton", "--dtype", "bf16", *UNTIL), 4),
    Part("faults-attention", ("attention-faults", "--backend", "triton", "--dtype", "bf16", "--trials", "100", *UNTIL), 4),
    _timed("times-small", SMALL, FORWARD, 4, "--passes", "forward", "--ways", "graph", "eager", "--dtypes", "bf16", "fp16"),
    Part("times-model", ("model", "--providers", *FEW, "--ways", *WAYS, "--dtypes", "bf16", "fp32", *FEW_FAULTS, *UNTIL), 4),
    Part("times-train", ("train", "--providers", "torch", "abft", "abft:guarded", "dmr", "--dtypes", "fp32", *FEW_FAULTS, *UNTIL), 3),
    Part("clean-fp16", ("clean", "--backend", "triton", "--dtype", "fp16", "--rows", "3e8", *UNTIL), 3),
    Part("clean-fp32", ("clean", "--backend", "triton", "--dtype", "fp32", "--rows", "1e8", *UNTIL), 3),
    Part("faults-fp16", ("campaign", "--backend", "triton", "--dtype", "fp16", "--trials", "5", *UNTIL), 3),
    Part("sanitizer", ("kernel-tests", "--sanitizer", *UNTIL), 4),
    Part("scaling", ("scaling", *UNTIL), 3),
    # Last: what it finds is for the next run. Its table is read once it lies beside triton_kernels/configs.py.
    Part("tuning", ("tune", *UNTIL), 6),
)
_INTERPRETED = {"TRITON_INTERPRET": "1"}
#: The same on a CPU, for trying it out: the kernels in Triton's interpreter, a few numbers each.
ON_CPU = (
    Part("ceilings", ("ceilings", "--out", "{out}"), 2),
    Part("kernel-tests", ("kernel-tests", "--select", "twin", *UNTIL), 3),
    Part("calibration", ("calibrate", "--interpreted", "--rows", "64", "--depths", "64", "--dtypes", "fp16", *UNTIL), 3, _INTERPRETED),
    Part(
        "times",
        ("linear", "--shapes", "minilm-qkvo-16", "--providers", "twin", "abft:triton", "dmr", "--dtypes", "fp32", "--rounds", "6",
         "--trials", "2", *UNTIL),
        3, _INTERPRETED,
    ),
    Part("clean-fp16", ("clean", "--backend", "interpreted", "--dtype", "fp16", "--rows", "2e3", *UNTIL), 2),
    Part("faults-fp16", ("campaign", "--backend", "interpreted", "--dtype", "fp16", "--trials", "1", "--place", "accumulator", *UNTIL), 2),
    Part("tuning", ("tune", "--interpreted", "--shapes", "minilm-qkvo-16", "--tiles", "2", "--rounds", "6", *UNTIL), 2, _INTERPRETED),
)  # fmt: skip


def main(argv: list[str], parts: tuple[Part, ...] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; the same one again: what is not finished")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = parts or (ON_GPU if torch.cuda.is_available() else ON_CPU)
    chosen = [part for part in every if options.only is None or part.name in options.only]
    if not chosen:
        parser.error(f"there is no part of that name; there are {', '.join(part.name for part in every)}")
    # Some seconds for the summary.
    done = supervisor.run(chosen, out, 60 * options.minutes - 5)
    text = gpu_summary.of(out, done)
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print(text, flush=True)
    return 0 if gpu_summary.measured(out) else 1
