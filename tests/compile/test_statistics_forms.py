"""Statistics of residuals on a GPU: nothing of them is in a kernel that does not keep them, and nothing in the data tile ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    script = str(Path(__file__).with_name("statistics_forms.py"))
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_off_they_leave_no_trace(kernels):
    changed = [name for name in kernels if name.endswith(("verify off", "deferred_product off", "verify_deferred off"))]
    assert len(changed) == 7
    for name in changed:
        without, on = (kernels[name.replace("off", form)] for form in ("stripped", "on"))
        assert kernels[name] == without and not without["fp64"]
        assert on["code"] != without["code"] and on["fp64"] == ("verify" in name)  # the comparison can tell


def test_on_nothing_spills_and_the_data_tile_is_the_same(kernels):
    assert sum(name.endswith("weigh") for name in kernels) == 5
    for name, kernel in kernels.items():
        assert kernel["STACK"] == kernel["LOCAL"] == 0 and kernel["REG"] <= 255, name
    for name in ("checked_product", "recompute", "settle"):
        assert kernels[f"90 bf16 {name} on"] == kernels[f"90 bf16 {name} off"]
