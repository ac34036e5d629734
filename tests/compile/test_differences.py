"""Comparing with the committed audit: a row that was doctored is named, and what was not compiled is left alone. Compiles nothing."""

from __future__ import annotations

import copy

import pytest

from bench import audited

#: Field of a row → a wrong value, and what the line says.
DOCTORED = {
    "registers": (138, "registers 138 -> "),
    "local": (16, "local 16 -> 0"),
    "spills": (2, "spills 2 -> 0"),
    "shared": (1, "shared 1 -> "),
    "warps": (32, "warps 32 -> "),
    "blocks": (7, "blocks 7 -> "),
    "loads": ({"UTMALDG": 1}, "UTMALDG 1 -> "),
    "matrix": ({"HMMA.16816.F32": 1}, "HMMA.16816.F32 1 -> none"),
}


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    return audited.rows(audited.newest())


def test_an_audit_agrees_with_itself(committed):
    assert committed and audited.differences(committed, committed) == []


@pytest.mark.parametrize("field", DOCTORED)
def test_a_doctored_row_is_noticed(committed, field):
    """In a line with kernel, config, architecture, both values and what to do."""
    wrong, said = DOCTORED[field]
    nth = next(i for i, r in enumerate(committed) if (r["kernel"], r["arch"], r["operands"]) == ("checked_product", "sm_90", "bf16"))
    doctored = copy.deepcopy(committed)
    doctored[nth][field] = wrong
    (line,) = audited.differences(committed, doctored)
    assert line.startswith("checked_product, full bf16 128 × 128 × 64, sm_90: ") and said in line and line.endswith(audited.ADVICE)


def test_a_line_reads_like_one():
    row = {"kernel": "recompute", "case": "full", "operands": "bf16", "arch": "sm_90", "config": {"BM": 128, "BN": 128, "BK": 64}, "registers": 152}
    assert audited.differences([row], [row | {"registers": 138}]) == [
        "recompute, full bf16 128 × 128 × 64, sm_90: registers 138 -> 152; "
        "run `python -m bench audit` and commit the result, or find out why"
    ]


def test_kernels_that_came_or_went_are_noticed_and_what_was_not_compiled_is_left_alone():
    row = {"kernel": "verify", "case": "full", "operands": "bf16", "arch": "sm_90", "config": {}, "registers": 40}
    other, elsewhere = row | {"kernel": "settle"}, row | {"kernel": "settle", "arch": "sm_100"}
    assert audited.differences([row], [row, elsewhere]) == []
    (came,), (went,) = audited.differences([row, other], [row]), audited.differences([row], [row, other])
    assert came.startswith("settle, full bf16, sm_90: not in the committed audit;")
    assert went.startswith("settle, full bf16, sm_90: in the committed audit, but no longer launched;")


def test_launches_of_one_kernel_are_compared_in_their_order():
    row = {"kernel": "verify", "case": "full", "operands": "bf16", "arch": "sm_90", "config": {}, "registers": 40}
    assert audited.differences([row, row], [row, row]) == []
    (second,) = audited.differences([row, row | {"registers": 41}], [row, row])
    assert "registers 40 -> 41" in second
    (third,) = audited.differences([row, row, row], [row, row])
    assert "not in the committed audit" in third


def test_the_newest_triton_is_not_the_last_in_the_alphabet(tmp_path, monkeypatch):
    monkeypatch.setattr(audited, "FOLDER", tmp_path)
    for version in ("3.9.0", "3.10.1", "3.6.0"):
        audited.path(version).touch()
    assert audited.newest() == audited.path("3.10.1")
