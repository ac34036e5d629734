"""Who computes a product: torch, abft in every form, repetition, and the unchecked twin of abft's own kernel.

    torch, torch-again    torch's modules, twice: what separates the two is the harness (A/A)
    abft                  Policy(): the backend that ``auto`` takes, correction on, full panel
    torch:KERNEL          attention by one of torch's kernels: flash, efficient, cudnn, math
    abft:WORDS            words of a policy after a colon, with commas: a backend (triton, reference, vendor), off, detect, lean, deferred,
                          frozen, g=WIDTH; guarded: the step under StepGuard (train); whole: a model's attention, too; paged: attention
                          of few queries over abft.PagedCache, written before it is timed
    dmr, tmr              two or three executions, compared bit for bit, and no checksum
    twin                  the kernel without its check (bench/twin.py): checked over twin is what the check costs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import abft
from abft import floating
from bench import attention_layer

BASELINE, AGAIN, TWIN = "torch", "torch-again", "twin"
WORDS: dict[str, dict[str, str]] = {
    "triton": {"backend": "triton"},
    "reference": {"backend": "reference"},
    "vendor": {"backend": "vendor"},
    "off": {"level": "off"},
    "detect": {"level": "detect"},
    "lean": {"panel": "lean"},
    "deferred": {"timing": "deferred"},
    "frozen": {"weights": "frozen"},
}
REPETITIONS = ("dmr", "tmr")
MEANINGS = {
    BASELINE: "torch's own modules",
    AGAIN: "the same again: what separates it from torch is the harness (A/A)",
    "abft": "checked and repaired, backend auto, full panel; abft:triton|reference|vendor,detect,lean,deferred,frozen,g=256,guarded,whole",
    "abft:off": "attention: the same code without its checks",
    "abft:paged": "attention of few queries over pages that remember their sums; abft:paged,off: the same kernels without checks",
    "torch:flash": "attention by torch's kernel of that name; also efficient, cudnn, math",
    "dmr": "every product executed twice and compared bit for bit, a third time where they differ; no checksum",
    "tmr": "every product executed three times and voted on; no checksum",
    TWIN: "the checked kernel without its check (CUDA, or the interpreter)",
}
ON_CPU = (BASELINE, AGAIN, "abft", "abft:frozen", "abft:detect", "abft:lean", "abft:vendor", "dmr", "tmr")
ON_GPU = (
    BASELINE, AGAIN, TWIN, "abft:triton", "abft:triton,detect", "abft:triton,lean", "abft:triton,deferred", "abft:reference",
    "abft:reference,detect", "abft:vendor,detect", "dmr", "tmr",
)  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """policy None: nothing of abft's is in the way."""

    name: str
    policy: abft.Policy | None = None
    guarded: bool = False
    whole: bool = False  # attention within a model is checked, too
    paged: bool = False  # attention alone, over pages
    kernel: str | None = None  # of torch's attention

    @property
    def checks(self) -> bool:
        """Whether it can find anything."""
        return self.policy is not None and (self.policy.level != "off" or self.policy.redundancy != "none")


def parse(name: str) -> Provider:
    """The provider of that name; ValueError if there is none."""
    head, _, tail = name.partition(":")
    if head in (BASELINE, AGAIN, TWIN) and not tail:
        return Provider(name)
    if head == BASELINE and tail in attention_layer.KERNELS:
        return Provider(name, kernel=tail)
    if head in REPETITIONS and not tail:
        return Provider(name, abft.Policy(level="off", redundancy=head, on_uncorrected="record"))  # type: ignore[arg-type]
    words = tail.split(",") if tail else []
    choices: dict[str, object] = {}
    for word in words:
        if word.startswith("g=") and word[2:].isdigit():
            choices["group"] = int(word[2:])
        elif word in WORDS:
            choices |= WORDS[word]
        elif word not in ("guarded", "whole", "paged"):
            head = ""
    if head != "abft":
        raise ValueError(
            f"no provider is called {name!r}; there are {', '.join(MEANINGS)}, and abft: with {', '.join(WORDS)}, g=, guarded, whole, paged"
        )
    policy = abft.Policy(on_uncorrected="record", **choices)  # type: ignore[arg-type]
    return Provider(name, policy, guarded="guarded" in words, whole="whole" in words, paged="paged" in words)


def unavailable(provider: Provider, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products of ``dtype`` on ``device`` cannot be timed with this provider; None: they can."""
    if dtype not in floating.UNIT_ROUNDOFF and provider.name not in (BASELINE, AGAIN):
        return f"{str(dtype)[6:]} is not checked"
    if provider.name == TWIN or (provider.policy is not None and provider.policy.backend == "triton"):
        try:
            from abft.backends import triton
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return triton.available(device, dtype)
    return None
