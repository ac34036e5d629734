"""Times of a training step: the demo's GPT, forward, backward and AdamW; as ``bench linear``.

    python -m bench train [--list]
"""

from __future__ import annotations

from bench import comparison, providers, workloads

#: A step that replays what could not be repaired; the forms that differ in inference alone are left out.
PROVIDERS = (*(name for name in providers.ON_CPU if name != "abft:frozen"), "abft:guarded")


def main(argv: list[str]) -> int:
    return comparison.run_named("train", __doc__, workloads.training, ["step"], argv, PROVIDERS)
