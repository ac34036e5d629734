"""Times of one transformer layer: of MiniLM, and on a GPU of Llama 3 with prompts and with one token after 1024; as ``bench linear``.

    python -m bench layer [--list]
"""

from __future__ import annotations

from bench import comparison, workloads


def main(argv: list[str]) -> int:
    return comparison.run_named("layer", __doc__, workloads.layers, ["forward", "backward"], argv)
