"""Launch shapes that ``bench tune`` would time, compiled: what they are compared by, and what rules them out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
#: In a process of its own, for in this one Triton may be set to interpret.
CODE = """
from dataclasses import replace
from bench import candidates, tune
from bench.candidates import Row
from bench.shapes import Shape

if __name__ == "__main__":
    few, many = Row(90, "16-bit", 64), Row(90, "16-bit")
    one, shape = Shape("one", 1, 4096, 4096), Shape("s", 4096, 4096, 4096)
    other = replace(few.built_in, warps=8, stages=6)
    cases = [tune.Case(few, "bf16", one), tune.Case(many, "bf16", shape)]
    compiling = tune.Compiling(1)
    try:
        asked = [compiling.ask(cases[0], few.built_in), compiling.ask(cases[0], other), compiling.ask(cases[0], other)]
        assert asked[1] is asked[2]
        same, changed, _ = (future.result() for future in asked)
        assert same == changed and same.reason is None and same.arithmetic == ("HGMMA.64xNx16.F32.BF16",), (same, changed)
        wide = compiling(cases[1], replace(many.built_in, bn=256, warps=4))
        assert wide.reason and "spills" in wide.reason, wide
        twice = compiling(cases[1], replace(many.built_in, resident=2))
        assert twice.reason == "1 at once on a multiprocessor, not 2", twice
    finally:
        compiling.close()
"""


def test_candidates_are_compiled_and_what_is_wrong_with_them_is_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CODE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
