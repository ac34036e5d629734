"""Attention over pages compiled for GPUs that need not be there; prints registers, spilled bytes and shared memory.

    decode_forms.py ARCHITECTURE FORM...

Run in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
from abft.triton_kernels import attention_decode

from abft import ledger, policy, threshold
from abft.attention.pages import Pages
from abft.backends import triton as backend
from abft.backends import triton_decode
from bench import compiled

#: (name, tokens of a page, columns, queries of a head of keys, window, soft-cap)
FORMS = (("narrow", 64, 64, 1, None, None), ("wide", 64, 128, 8, 1024, None), ("capped", 32, 128, 17, None, 30.0))


def call_of(length: int, columns: int, group: int, window: int | None, cap: float | None) -> triton_decode.DecodeCall:
    pages = Pages.empty(16, length, 2, columns, columns, torch.bfloat16, torch.device("cpu"))
    return triton_decode.DecodeCall(
        torch.empty(4, 2, group, 1, columns, dtype=torch.bfloat16), pages.tensors(), torch.zeros(4, 512, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32), columns**-0.5, window, cap, policy.Policy(), frozenset({"qk", "pv"}),
    )  # fmt: skip


def main(architecture: int, *names: str) -> None:
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    arithmetic = backend.ARITHMETIC.get((architecture, "16-bit"), threshold.FMA_32)
    for name, *sizes in (form for form in FORMS if form[0] in names):
        call = call_of(*sizes)  # type: ignore[arg-type]
        new = torch.empty(4, 2, 1, sizes[1], dtype=torch.bfloat16)
        with compiled.recorded() as launches, mock.patch.object(triton_decode, "_arithmetic", lambda *_: arithmetic):
            attention_decode.unchecked(triton_decode.plan(call))
            triton_decode.attend(call, words, site)
            triton_decode.append(call.pages, new, new, call.table, call.lengths, None)
        for i, launch in enumerate(launches):
            kernel = compiled.compile_launch(launch, architecture)
            used = compiled.usage(kernel)
            form = "unchecked" if i < 2 else "checked"
            print(name, launch.name, form, used["REG"], used["STACK"] + used["LOCAL"], kernel.metadata.shared, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
