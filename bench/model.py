"""Times of whole models: the architecture of all-MiniLM-L6-v2; as ``bench linear``.

    python -m bench model [--list]
"""

from __future__ import annotations

from bench import comparison, workloads


def main(argv: list[str]) -> int:
    return comparison.run_named("model", __doc__, workloads.models, ["forward", "backward"], argv)
