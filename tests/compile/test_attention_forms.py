"""Attention's kernels compile with everything that a model may ask of them."""

from __future__ import annotations

from pathlib import Path

from tests.compile.test_audit import finish, start

KERNELS = {
    "sum_keys_and_values", "checked_attention", "settle_attention",
    "encode", "attention_dq", "attention_dkv", "attention_dq_again", "attention_dkv_again", "conclude",
}  # fmt: skip


def test_masks_windows_caps_and_dropout_compile() -> None:
    lines = finish(start(str(Path(__file__).with_name("attention_forms.py")))).split("\n")
    assert {line for line in lines if line} >= {f"{form} {kernel}" for form in ("everything", "float") for kernel in KERNELS}


def test_packed_sequences_compile_and_do_not_spill() -> None:
    lines = finish(start(str(Path(__file__).with_name("attention_packed.py")))).split("\n")
    local = {name: int(size) for name, size in (line.split() for line in lines if line)}
    assert local.keys() == {name for name in KERNELS if not name.endswith("_again")}
    assert all(local[name] == 0 for name in ("checked_attention", "attention_dq", "attention_dkv")), local
