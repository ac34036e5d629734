"""Attention's kernels compiled for a Hopper GPU with masks of either kind, a window, a soft-cap and dropout; prints their names.

Run in a process of its own, in which Triton does not interpret. What the interpreter runs need not compile: see attention_scores.mask.
"""

from __future__ import annotations

from unittest import mock

import torch
from abft.triton_kernels import configs

from abft import ledger, policy
from abft.backends import triton as backend
from abft.backends import triton_attention, triton_attention_backward
from bench import compiled

ARCHITECTURE, LENGTH, COLUMNS = 90, 512, 64
BOOL, FLOAT = torch.empty(1, 1, 1, LENGTH, LENGTH, dtype=torch.bool), torch.empty(2, 1, 1, 1, LENGTH)
#: (name, mask, window, soft-cap, dropout)
FORMS = (("everything", BOOL, 128, 30.0, 0.1), ("float", FLOAT, None, None, 0.0))


def main() -> None:
    q, k = torch.empty(2, 4, 2, LENGTH, COLUMNS, dtype=torch.bfloat16), torch.empty(2, 4, LENGTH, COLUMNS, dtype=torch.bfloat16)
    given = triton_attention_backward.Given(q, q, torch.empty(2, *q.shape[:-1]))
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    choice = configs.choose_attention(ARCHITECTURE, "16-bit", COLUMNS), backend.ARITHMETIC[ARCHITECTURE, "16-bit"]
    for name, mask, window, softcap, dropout in FORMS:
        call = triton_attention.AttentionCall(
            q, k, k, mask, 2**40, 0.125, mask is None, 0, window, softcap, dropout, policy.Policy(), frozenset({"qk", "pv"})
        )
        with compiled.recorded() as launches, mock.patch.object(triton_attention, "_choice", lambda *_: choice), \
                mock.patch.object(backend, "family_of", lambda device: ARCHITECTURE), compiled._as_if_on_a_gpu():  # fmt: skip
            triton_attention.attend(call, words, site)
            triton_attention_backward.gradients(call, given, words, site, ())
        for launch in launches:
            compiled.compile_launch(launch, ARCHITECTURE)
            print(name, launch.name, flush=True)


if __name__ == "__main__":
    main()
