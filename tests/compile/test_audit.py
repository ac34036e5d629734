"""What the kernels become on GPUs that are not here: registers, spills, occupancy, matrix instructions; as audited; no trace of injection."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from abft.triton_kernels import configs

from bench import audited, sass

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = ("checked_product", "recompute")
INT_KERNELS = {"checked_int_product", "verify_exactly", "recompute_exactly", "settle_exactly"}
INT_PRODUCTS = ("checked_int_product", "recompute_exactly")
#: Left to torch on Blackwell: Triton 3.6 does not compile them there (docs/decisions/0048).
ATTENTION = {"sum_keys_and_values", "checked_attention", "settle_attention"}
GRADIENT = {"encode", "attention_dq", "attention_dq_again", "attention_dkv", "attention_dkv_again", "conclude"}
#: Attention over pages, which Blackwell has as well.
DECODING = {"decode_part", "combine_parts", "part_again", "conclude_parts", "append_tokens"}
#: The matrix instruction of every generation and kind, and that of the two shapes of tile.
MATRIX = {
    "sm_80": {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"},
    "sm_90": {"bf16": "HGMMA.64x{}x16.F32.BF16", "fp16": "HGMMA.64x{}x16.F32", "tf32": "HGMMA.64x{}x8.F32.TF32"},
    "sm_100": {"bf16": "UTCHMMA", "fp16": "UTCHMMA", "tf32": "UTCHMMA"},
}


# --- compiling: in processes of their own, for in this one Triton may be set to interpret ---------------


def start(*command: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the tests below look at. Once for all workers.

    Kernels whose text is that of the committed audit are not made again (bench/audit.py): with nothing new this takes seconds.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            twins = [start(str(Path(__file__).with_name("twins.py")), what, str(folder / what)) for what in ("as-is", "stripped")]
            for process in twins:
                finish(process)
            finish(start("-m", "bench", "audit", "--out", str(folder)))
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def table(compiled: Path) -> list[dict]:
    return audited.rows(next(compiled.glob("audit-*.jsonl")))


CASES = [("sm_90", v) for v in ("full", "lean", "transposed", "short", "narrow", "fine", "ones")] + [("sm_80", "full"), ("sm_100", "full")]
OPERANDS = ("bf16", "fp16", "tf32", "ieee")
#: The other candidates of configs.CONFIGS, where there are some.
OTHERS = dict.fromkeys(("second", "third"), ("bf16", "fp16", "tf32"))
OTHERS |= dict.fromkeys(("second transposed", "third transposed", "short transposed"), ("bf16", "tf32"))
EVERY = [(arch, case, operands) for arch, case in CASES for operands in OPERANDS]
EVERY += [("sm_90", case, operands) for case, kinds in OTHERS.items() for operands in kinds]
ON_MATRIX_UNITS = [one for one in EVERY if one[2] != "ieee"]


def select(table, arch, case, operands=None, kernels=None):
    return [
        r for r in table
        if (r["arch"], r["case"]) == (arch, case) and r["operands"] == (operands or r["operands"]) and r["kernel"] in (kernels or [r["kernel"]])
    ]  # fmt: skip


# --- what the kernels became ------------------------------------------------------------------------


def test_every_kernel_that_is_launched_is_audited(table):
    """Kernels are what the sources launch: name[grid](…)."""
    trees = [ast.parse(path.read_text()) for path in [*(ROOT / "triton_kernels").glob("*.py"), ROOT / "bench" / "twin.py"]]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    launched = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    assert {"checked_product", "unchecked_product", "settle"} <= launched
    for arch in ("sm_80", "sm_90", "sm_100"):
        here = launched - (ATTENTION | GRADIENT if arch == "sm_100" else set())
        assert {r["kernel"] for r in table if r["arch"] == arch} == here, "a new kernel needs a case in bench/audit.py"


@pytest.mark.parametrize(("arch", "case", "operands"), EVERY)
def test_no_kernel_spills(table, arch, case, operands):
    rows = select(table, arch, case, operands)
    assert rows
    for r in rows:
        assert r["spills"] == r["local"] == 0 and r["registers"] <= 255 and r["blocks"] >= 1, r


@pytest.mark.parametrize(("arch", "case", "operands"), ON_MATRIX_UNITS)
def test_data_and_check_tiles_run_on_the_same_matrix_units(table, arch, case, operands):
    product, again = (select(table, arch, case, operands, [kernel])[0] for kernel in PRODUCTS)
    # Check tiles may have other widths again, which decide no bits.
    widths, again_widths = ([MATRIX[arch][operands].format(r["config"][size]) for size in ("BN", "BC")] for r in (product, again))
    assert set(product["matrix"]) == set(widths) and set(again["matrix"]) == set(again_widths)
    # Again, and again with a weight as it was remembered: a third loop.
    assert sum(again["matrix"].values()) > sum(product["matrix"].values()) > 0
    if case != "ones":  # which has no K loop
        assert [list(tile["matrix"]) for tile in product["tiles"]] == [[width] for width in widths]


@pytest.mark.parametrize(("arch", "case", "operands"), EVERY)
def test_all_kernels_of_a_product_multiply_with_one_kind_of_instruction(table, arch, case, operands):
    """Else a repetition has other bits than the first time. N may differ (gemm.md), K per instruction and type may not."""
    found = {r["kernel"]: {sass.arithmetic_of(m) for m in r["matrix"]} for r in select(table, arch, case, operands) if r["matrix"]}
    if operands == "ieee":
        assert found == {}  # on the CUDA cores
    else:
        assert {*PRODUCTS, "unchecked_product"} <= set(found)
        assert len(set.union(*found.values())) == 1, found


@pytest.mark.parametrize(("arch", "case", "operands"), EVERY)
def test_operands_come_by_tile_where_there_are_descriptors_and_else_by_thread(table, arch, case, operands):
    possible = arch != "sm_80" and operands != "ieee" and case != "ones"  # one number is no multiple of 16 bytes
    for r in select(table, arch, case, operands, PRODUCTS):
        by_tile = possible and r["kernel"] == "checked_product"  # a repetition reads what its own launch may have written
        assert ("UTMALDG" in r["loads"]) is by_tile, r
        if case != "ones":  # what one number takes is up to the compiler
            # Of one stage, which repetitions on the CUDA cores have for want of registers, nothing is loaded ahead.
            assert ("LDGSTS" in r["loads"]) is (not by_tile and r["config"]["num_stages"] > 1), r


@pytest.mark.parametrize(("arch", "case", "operands"), EVERY)
def test_checking_takes_no_occupancy_and_no_load_from_the_product(table, arch, case, operands):
    """Beside the unchecked twin: as many blocks as a launch puts on a multiprocessor, and the same pipelined loads of a data tile."""
    (checked,), (twin,) = (select(table, arch, case, operands, [kernel]) for kernel in ("checked_product", "unchecked_product"))
    resident = max(config.resident for table in configs.CONFIGS.values() for config in table)
    assert min(checked["blocks"], resident) == min(twin["blocks"], resident) == resident
    if case != "ones":  # of one number in K there is no K loop
        for where in ("step", "besides"):
            loads = [{name: r["tiles"][0][where].get(name, 0) for name in sass.LOADS} for r in (checked, twin)]
            assert loads[0] == loads[1], where
        assert sum(twin["tiles"][0]["step"].get(name, 0) for name in sass.LOADS) > 0
        assert checked["tiles"][0]["matrix"] == twin["tiles"][0]["matrix"]


@pytest.mark.parametrize(("arch", "case"), [one for one in CASES if one[1] != "ones"])
def test_row_sums_stay_outside_of_main_loops_on_matrix_units(table, arch, case):
    for r in select(table, arch, case, kernels=[*PRODUCTS, "unchecked_product"]):
        if r["operands"] != "ieee":
            assert r["main"] == {}, r
    checked, twin = (select(table, arch, case, "bf16", [kernel])[0] for kernel in ("checked_product", "unchecked_product"))
    assert sum(checked["rest"].values()) > sum(twin["rest"].values())


@pytest.mark.parametrize(("arch", "case"), CASES)
def test_int8_kernels_do_not_spill_and_multiply_on_integer_units(table, arch, case):
    rows = select(table, arch, case, "int8")
    assert {r["kernel"] for r in rows} == INT_KERNELS
    for r in rows:
        assert r["spills"] == r["local"] == 0 and r["registers"] <= 255 and r["blocks"] >= 1, r
        if r["kernel"] not in INT_PRODUCTS:
            assert r["matrix"] == {}
            continue
        widths = (r["config"]["BN"], r["config"]["BC"])
        # Before Hopper Triton asks for the saturating form, Triton 3.6 on Blackwell, too: hence available()'s limit on K.
        saturating = {"IMMA.16832.S8.S8.SAT"}
        expected = {"sm_90": [{f"IGMMA.64x{width}x32.S8.S8" for width in widths}], "sm_100": [saturating, {"UTCIMMA"}]}
        assert set(r["matrix"]) in expected.get(arch, [saturating])


def test_the_kernels_build_for_gfx942(table):
    rows = [r for r in table if r["arch"] == "gfx942"]
    assert {r["kernel"] for r in rows} >= {"checked_product", "recompute", "verify", "settle", "sum_rows"}
    for r in rows:
        assert r["spills"] == r["local"] == 0 and r["registers"] <= 512, r
        assert bool(r["matrix"]) is (r["kernel"] in (*PRODUCTS, "unchecked_product")), r


def test_injection_leaves_no_trace_when_it_is_off(compiled):
    as_is, stripped = (json.loads((compiled / what).read_text()) for what in ("as-is", "stripped"))
    assert stripped["blocks"] >= 6 and as_is["given"] == stripped["given"]
    trees = [ast.parse(path.read_text()) for path in (ROOT / "triton_kernels").glob("*.py")]
    launched = {node.value.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)}
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    struck = {f.name for f in functions if "FAULT" in {a.arg for a in f.args.args}} & launched
    assert {name.split()[-1] for name in as_is["given"]} == struck, "a kernel with faults needs a call in twins.py"
    changed = {name.split()[-1] for name, given in as_is["struck"].items() if as_is["given"][name] != given}  # the comparison can tell
    assert changed >= {"checked_product", "checked_int_product", "deferred_product", "checked_attention", "attention_dq", "attention_dkv", "decode_part"}


# --- attention --------------------------------------------------------------------------------------

#: Heads of up to 128 columns, of every kind of operand.
NARROW = [(arch, f"{what}{size}", kind) for arch in ("sm_80", "sm_90") for what in ("attention", "gradient") for size in (" 64", "")
          for kind in ("bf16", "fp16", "ieee")]  # fmt: skip


@pytest.mark.parametrize("case", ["attention", "gradient"])
def test_whatever_a_model_asks_of_attention_compiles(table, case):
    """Masks of either kind, a window, a soft-cap, dropout, packed sequences: what the interpreter runs need not (attention_scores.mask)."""
    for asked in ("", " whole", " everything", " added", " packed"):
        assert {r["kernel"] for r in select(table, "sm_90", case + asked, "bf16")} == (ATTENTION if case == "attention" else GRADIENT)


@pytest.mark.parametrize("case", ["attention 64", "attention", "attention packed", "gradient 64", "gradient", "gradient packed"])
def test_what_every_attention_launches_does_not_spill_on_hopper(table, case):
    """Repetitions may: they are rarely more than an early exit. Their spills are in the audit."""
    rows = select(table, "sm_90", case, "bf16", ["checked_attention", "attention_dq", "attention_dkv"])
    of_each = 1 if "packed" in case else 2  # unchecked and checked
    assert len(rows) == of_each * (1 if "attention" in case else 2)
    for r in rows:
        assert r["spills"] == r["local"] == 0 and r["registers"] <= 255 and r["blocks"] >= 1, r


@pytest.mark.parametrize(("arch", "case", "operands"), NARROW)
def test_attention_multiplies_on_matrix_units_with_one_kind_of_instruction(table, arch, case, operands):
    """A repetition has the bits of the first time only if it multiplies with the same instructions."""
    found = {(r["kernel"], *map(sass.arithmetic_of, r["matrix"])) for r in select(table, arch, case, operands)}
    kinds = {instruction for _, *instructions in found for instruction in instructions}
    unit = {"sm_80": "HMMA.", "sm_90": "HGMMA."}[arch]
    assert kinds == set() if operands == "ieee" else len(kinds) == 1 and all(kind.startswith(unit) for kind in kinds), found


@pytest.mark.parametrize(("arch", "case"), [("sm_80", "decode"), ("sm_90", "decode 64"), ("sm_90", "decode"), ("sm_90", "decode everything"), ("sm_100", "decode")])
def test_attention_over_pages_does_not_spill_and_multiplies_with_one_kind_of_instruction(table, arch, case):
    """Sixteen rows are too few for the units of a warpgroup, and for Blackwell's tensor memory."""
    rows = select(table, arch, case, "bf16")
    assert {r["kernel"] for r in rows} == DECODING
    for r in rows:
        assert r["spills"] == r["local"] == 0 and r["registers"] <= 255 and r["blocks"] >= 1, r
    assert {m for r in rows for m in r["matrix"]} == {"HMMA.16816.F32.BF16"}


# --- as audited -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    found = audited.rows(audited.path(version("triton")))
    if not found:
        pytest.skip(f"TRITON {version('triton')} WAS NEVER AUDITED: run `python -m bench audit` and commit the result")
    return found


def test_the_kernels_are_as_audited(table, committed):
    changed = audited.differences(table, committed)
    assert not changed, "\n" + "\n".join(changed)


def test_what_is_compiled_afresh_is_as_audited(committed):
    """That the same source gives the same code, and the file tells it: of a product and of an attention."""
    which = [word for case in ("full", "attention 64") for word in ("--case", case)]
    which += [word for kernel in ("checked_product", "checked_attention") for word in ("--kernel", kernel)]
    output = finish(start("-m", "bench", "audit", "--compare", "--afresh", "--arch", "90", "--operands", "bf16", *which))
    assert "3 kernels as audited" in output


def test_the_processes_that_compile_know_what_was_audited(committed):
    """Else everything is compiled again, and nobody notices but the clock: numbers that they were told come back as they are."""
    program = """if __name__ == "__main__":
        from bench import audit, audited
        import triton
        case = next(case for case in audit.CASES if case.name == "ones")
        have = audit.known(audited.rows(audited.path(triton.__version__)))
        told = {key: {**row, "registers": -1} for key, row in have.items()}
        print({row["registers"] for row in audit.compile_all([("90", "bf16", case)], 1, told)})
    """
    assert finish(start("-c", program)).strip() == "{-1}"
