"""Times of attention alone: torch's kernels, abft's with its checks and without, repetition; each beside its evidence.

    python -m bench attention [--list]
    python -m bench attention --shapes 'attention-1x8x2048x64*' --providers abft abft:off dmr

Names are batch × heads × queries × width, then the keys where they are others (``decode``: few queries, a cache, eight query heads
to a key head). torch:flash, efficient, cudnn, math: one kernel of torch's; ``torch`` is the one that it chooses.
A decoding step over pages:

    python -m bench attention --shapes 'decode-*' --providers abft:paged abft:paged,off torch:flash
"""

from __future__ import annotations

from bench import comparison, workloads

ON_CPU = ("abft", "abft:off", "abft:detect", "dmr", "torch:flash", "torch:math")
ON_GPU = ("abft", "abft:off", "abft:detect", "dmr", "torch:flash", "torch:cudnn", "torch:efficient", "torch:math")


def main(argv: list[str]) -> int:
    return comparison.run_named("attention", __doc__, workloads.attentions, ["forward", "backward"], argv, ON_CPU, ON_GPU)
