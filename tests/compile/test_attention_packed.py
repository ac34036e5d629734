"""Attention's kernels for packed sequences compile for a Hopper GPU, and the large ones keep everything in registers."""

from __future__ import annotations

from pathlib import Path

from tests.compile.test_audit import finish, start

LARGE = {"checked_attention", "attention_dq", "attention_dkv"}


def test_packed_sequences_compile_and_do_not_spill() -> None:
    lines = finish(start(str(Path(__file__).with_name("attention_packed.py")))).split("\n")
    local = {name: int(size) for name, size in (line.split() for line in lines if line)}
    assert local.keys() == LARGE | {"sum_keys_and_values", "settle_attention", "encode", "conclude"}
    assert all(local[name] == 0 for name in LARGE), local
