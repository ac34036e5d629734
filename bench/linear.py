"""Times of single linear layers: every provider, interleaved, each beside its correctness, its floor and the faults it finds.

    python -m bench linear                                                 small shapes on a CPU, all of them on a GPU
    python -m bench linear --shapes 'llama8b-*-1' --dtypes fp32 --rounds 101
    python -m bench linear --list

forward: one product; backward: forward and the gradients of input, weight and bias. Products of at most 64 rows are decoding, and run
forward only. Ratios are against torch in the same round; ``torch-again`` is the harness's own error. bench/timing.py says how.
"""

from __future__ import annotations

import fnmatch

from bench import comparison, shapes, workloads

DECODED = 64


def main(argv: list[str]) -> int:
    parser = comparison.parser("linear", __doc__)
    parser.add_argument("--passes", nargs="+", choices=["forward", "backward"], default=["forward", "backward"])
    options = parser.parse_args(argv)
    if options.list:
        print(shapes.__doc__)
        for shape in shapes.every():
            ours = any(fnmatch.fnmatchcase(shape.name, pattern) for pattern in shapes.ON_CPU)
            print(f"  {shape.name:<24} M {shape.m:>6}  N {shape.n:>6}  K {shape.k:>6}{'   by default on a CPU' if ours else ''}")
        comparison.list_providers()
        return 0
    cuda = options.device.startswith("cuda")
    try:
        chosen = shapes.named(options.shapes or (shapes.ON_GPU if cuda else shapes.ON_CPU))
    except ValueError as error:
        parser.error(str(error))
    todo = [workloads.linear(s, passes) for s in chosen for passes in options.passes if passes == "forward" or s.m > DECODED]
    return comparison.run("linear", todo, options)
