"""What the kernels become on GPUs that are not here: registers, spills, matrix instructions, and no trace of injection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"sum_rows", "checked_product", "verify", "recompute", "settle"}
PRODUCTS = ("checked_product", "recompute")
#: Shared memory of one block: A100, H100, B200.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
#: The matrix instruction of every generation and kind, and that of the two shapes of tile.
MATRIX = {
    "sm_80": {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"},
    "sm_90": {"bf16": "HGMMA.64x{}x16.F32.BF16", "fp16": "HGMMA.64x{}x16.F32", "tf32": "HGMMA.64x{}x8.F32.TF32"},
    "sm_100": {"bf16": "UTCHMMA", "fp16": "UTCHMMA", "tf32": "UTCHMMA"},
}


def start(*command: str) -> subprocess.Popen[str]:
    """A process that compiles: in this one, Triton may be set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> None:
    output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything the tests below look at, compiled by two processes at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    table = ("-m", "bench.cubins", "--out")
    twins = str(Path(__file__).with_name("twins.py"))
    jobs = {
        "hopper": (*table, str(folder / "hopper"), "--arch", "90"),
        "others": (*table, str(folder / "others"), "--arch", "80", "--arch", "100", "--arch", "gfx942", "--variant", "full"),
        **{what: (twins, what, str(folder / what)) for what in ("as-is", "stripped", "struck")},
    }
    running = {"hopper": start(*jobs.pop("hopper"))}
    for name, job in jobs.items():  # one after the other, beside the longest
        running[name] = start(*job)
        finish(running[name])
    finish(running["hopper"])
    return {name: folder / name for name in running}


@pytest.fixture(scope="module")
def table(compiled: dict[str, Path]) -> list[dict]:
    lines = [json.loads(line) for name in ("hopper", "others") for line in compiled[name].read_text().splitlines()]
    return [line for line in lines if "kernel" in line]


CASES = [("sm_90", v) for v in ("full", "lean", "transposed", "narrow", "fine", "ones")] + [("sm_80", "full"), ("sm_100", "full")]


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_no_kernel_spills(table, arch, variant, kind):
    rows = [r for r in table if (r["arch"], r["variant"], r["kind"]) == (arch, variant, kind)]
    assert {r["kernel"] for r in rows} == KERNELS | ({"pack_scaled"} if kind == "fp16" else set())
    for r in rows:
        assert r["spills"] == r["stack"] == 0, r
        assert r["shared"] <= SHARED[arch] and r["registers"] <= 255, r


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_data_and_check_tiles_run_on_the_same_matrix_units(table, arch, variant, kind):
    product, again = ([r for r in table if (r["arch"], r["variant"], r["kind"], r["kernel"]) == (arch, variant, kind, k)] for k in PRODUCTS)
    config = product[0]["config"]
    expected = {MATRIX[arch][kind].format(width) for width in (config["BN"], config["BC"])}
    assert set(product[0]["matrix"]) == set(again[0]["matrix"]) == expected
    name = min(expected).split(".")[0]
    assert product[0][name] == again[0][name] > 0


@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_operands_come_by_tile_where_there_are_descriptors_and_else_by_thread(table, arch, variant, kind):
    by_tile = arch != "sm_80" and kind != "ieee" and variant != "ones"  # one number is no multiple of 16 bytes
    for r in table:
        if (r["arch"], r["variant"], r["kind"]) == (arch, variant, kind) and r["kernel"] in PRODUCTS:
            assert (r["UTMALDG"] > 0) is by_tile, r
            if variant != "ones":  # what one number takes is up to the compiler
                assert (r["LDGSTS"] > 0) is not by_tile, r


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_ieee_products_stay_on_the_cuda_cores(table, arch, variant):
    rows = [r for r in table if (r["arch"], r["variant"], r["kind"]) == (arch, variant, "ieee")]
    assert rows and all(r["matrix"] == [] for r in rows)


def test_checking_does_not_touch_the_matrix_units(table):
    assert all(r["matrix"] == [] for r in table if r["arch"] != "gfx942" and r["kernel"] not in PRODUCTS)


def test_the_kernels_build_for_gfx942(table):
    rows = [r for r in table if r["arch"] == "gfx942"]
    assert {r["kernel"] for r in rows} == KERNELS and all(r["spills"] == 0 for r in rows)
    assert all(r["MFMA"] > 0 for r in rows if r["kernel"] in PRODUCTS)


def test_injection_leaves_no_trace_when_it_is_off(compiled):
    as_is, stripped, struck = (json.loads(compiled[what].read_text()) for what in ("as-is", "stripped", "struck"))
    assert stripped["blocks"] >= 4 and len(as_is["ptx"]) == 4
    assert as_is["ptx"] == stripped["ptx"]
    products = [name for name in as_is["ptx"] if "checked_product" in name]
    assert all(struck["ptx"][name] != as_is["ptx"][name] for name in products)  # the comparison can tell
