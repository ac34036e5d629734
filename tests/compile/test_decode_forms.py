"""The kernels of attention over pages compile for every architecture, and spill nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compile.test_audit import finish, start

pytest.importorskip("triton")
KERNELS = {"decode_part", "combine_parts", "part_again", "conclude_parts", "append_tokens"}


@pytest.mark.parametrize("architecture, forms", [("80", ["wide"]), ("90", ["narrow", "wide"]), ("100", ["wide"])], ids=["sm_80", "sm_90", "sm_100"])
def test_heads_of_64_and_128_columns_spill_nothing(architecture: str, forms: list[str]) -> None:
    lines = [line.split() for line in finish(start(str(Path(__file__).with_name("decode_forms.py")), architecture, *forms)).splitlines()]
    rows = [(form, kernel, int(spilled)) for form, kernel, checked, _, spilled, _ in lines if checked == "checked"]
    assert {(form, kernel) for form, kernel, _ in rows} == {(form, kernel) for form in forms for kernel in KERNELS}
    assert not [row for row in rows if row[2]]
