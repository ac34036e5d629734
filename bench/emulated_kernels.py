"""The kernels themselves on emulated tensor cores, fault-free: the largest residual over bound of products and of attention, both ways.

    python -m bench emulated-kernels --dtype bf16

Interpreted, with the blocks and the bounds of an architecture (emulated_units.py). What emulated-clean counts in millions of rows with a
model of the kernel, this runs in some thousand rows with the kernel.
"""

from __future__ import annotations

import argparse

import torch

import abft
from bench import emulated_units, forms, kernel_rows, tensor_core
from bench.results import Results

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: (queries, keys, columns of a head)
ATTENTIONS = ((64, 64, 64), (128, 512, 128), (64, 2048, 64), (16, 4096, 64))
#: (rows, N, K)
PRODUCTS = ((96, 160, 256), (64, 128, 2048))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench emulated-kernels", description=__doc__)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--architecture", type=int, default=90, choices=emulated_units.ARCHITECTURES)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(argv)
    policy = abft.Policy(backend=forms.backend_of("interpreted"), on_uncorrected="record")  # type: ignore[arg-type]
    torch.set_num_threads(1)
    dtype = DTYPES[options.dtype]
    results = Results(f"kernels-emulated-{options.dtype}", fresh=options.fresh, architecture=options.architecture)
    families = kernel_rows.families_of(dtype)
    todo: list[tuple[str, str, tuple[int, ...], bool]] = [("linear", f, s, False) for f in families for s in PRODUCTS]
    todo += [("attention", f, s, causal) for f in families for s in ATTENTIONS for causal in (False, True) if not causal or s[0] == s[1]]
    with emulated_units.tensor_cores(tensor_core.load(), options.architecture):
        for i, (product, family, shape, causal) in enumerate(todo):
            key = f"{product} {family} {'x'.join(map(str, shape))}{' causal' if causal else ''} sm_{options.architecture}"
            if results.find(key) is None:
                found = kernel_rows.measure(product, family, shape, causal, dtype, policy)
                results.add("cell", key=key, product=product, family=family, shape=list(shape), causal=causal, **found)
            results.progress(i + 1, len(todo), key)
    print(kernel_rows.summarise(results))
    return 0
