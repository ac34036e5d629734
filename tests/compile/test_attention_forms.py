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
