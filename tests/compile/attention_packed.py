"""Attention's kernels for packed sequences, compiled for a Hopper GPU; prints (name, bytes of local memory). In a process of its own."""

from __future__ import annotations

from unittest import mock

import torch
from abft.triton_kernels import configs

from abft import ledger, policy
from abft.backends import triton as backend
from abft.backends import triton_attention, triton_attention_backward
from bench import compiled

ARCHITECTURE, TOKENS, LONGEST, COLUMNS = 90, 4096, 1024, 64


def main() -> None:
    q, k = torch.empty(1, 4, 2, TOKENS, COLUMNS, dtype=torch.bfloat16), torch.empty(1, 4, TOKENS, COLUMNS, dtype=torch.bfloat16)
    cu = torch.zeros(8, dtype=torch.int32)
    call = triton_attention.AttentionCall(
        q, k, k, None, 0, 0.125, True, 0, None, None, 0.0, policy.Policy(), frozenset({"qk", "pv"}),
        sequences=triton_attention.Sequences(cu, cu, LONGEST, LONGEST),
    )  # fmt: skip
    given = triton_attention_backward.Given(q, q, torch.empty(2, *q.shape[:-1]))
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    choice = configs.choose_attention(ARCHITECTURE, "16-bit", COLUMNS), backend.ARITHMETIC[ARCHITECTURE, "16-bit"]
    with compiled.recorded() as launches, mock.patch.object(triton_attention, "_choice", lambda *_: choice), \
            mock.patch.object(backend, "family_of", lambda device: ARCHITECTURE), compiled._as_if_on_a_gpu():  # fmt: skip
        triton_attention.attend(call, words, site)
        triton_attention_backward.gradients(call, given, words, site, ())
    for launch in launches:
        if not launch.name.endswith("_again"):  # the same device functions, in a loop
            usage = compiled.usage(compiled.compile_launch(launch, ARCHITECTURE))
            print(launch.name, usage["STACK"] + usage["LOCAL"], flush=True)


if __name__ == "__main__":
    main()
