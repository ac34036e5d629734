"""The compiled judgement and panels: what they compute, and what happens where nothing can be compiled."""

from __future__ import annotations

import math
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import abft
from abft import bits, checksum, encoding
from abft.backends import judging, quick, reference
from abft.native import library

needs_compiler = pytest.mark.skipif(bool(library.why_not()), reason=f"nothing compiled: {library.why_not()}")
HALF = (torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)


def _random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _judged(y, a, w, *, form="full", bias=None, group=None, encode=reference.build_panel):
    p = reference.plan(w.shape[0], w.shape[1], a.dtype, form, group)
    panel = encode(w, p.layout)
    sums = None if bias is None else checksum.bias_sums(bias, p.layout)
    return quick.worst(y, a, quick.compiled(panel, sums, w.shape[1], p, a.dtype))


def test_what_there_is_a_compiler_for_compiles():
    """Everything else here is skipped without the compiled passes; sources that do not compile must not hide that way."""
    if not any(shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name):
        pytest.skip("NO C COMPILER: the compiled passes are untested")
    if os.environ.get("ABFT_NATIVE") == "0":
        pytest.skip("ABFT_NATIVE=0")
    assert library.functions() is not None, library.why_not()


# --- panels -------------------------------------------------------------------------------------


@needs_compiler
@DTYPES
@pytest.mark.parametrize("form", ["full", "lean"])
@pytest.mark.parametrize("n, k, group", [(384, 384, None), (1000, 300, 256), (33, 17, 16), (5, 1, None), (1, 9, None), (3, 3, None), (4100, 40, None)])
@pytest.mark.parametrize("adjacent", ["rows", "columns"])
def test_panels_are_sums_in_fp64(n, k, group, form, dtype, adjacent):
    w = _random(n, k, dtype=dtype) if adjacent == "columns" else _random(k, n, dtype=dtype).T
    layout = reference.plan(n, k, dtype, form, group).layout
    panel = encoding.encode(w, layout)
    assert panel is not None
    column = 0
    nu2 = torch.zeros(layout.groups.count, k, dtype=torch.float64)
    for g in range(layout.groups.count):
        start, stop = layout.groups.span(g)
        block = w[start:stop].double()
        nu2[g] = block.square().sum(0)
        for kind in layout.form.kinds:
            weights = torch.from_numpy(checksum.column_weights(kind, stop - start).copy()).double()
            exact = weights @ block
            # One rounding to fp32, of sums whose own fp64 rounding is 2⁻⁵² of what they add up.
            room = 2.0**-24 * exact.abs() + 2.0**-50 * (weights.abs() @ block.abs())
            assert ((panel.columns[column].double() - exact).abs() <= room).all()
            nu2[g] += (exact / checksum.weight_rms(kind, layout.groups.width)) ** 2
            column += 1
    nu2 = nu2.sum(0, keepdim=True) if layout.shared_sketch else nu2
    sketches = nu2.sqrt()[:, None] * checksum.sketch_coefficients(k, torch.device("cpu")).double()
    torch.testing.assert_close(panel.columns[column : column + layout.sketch_columns].double(), sketches.flatten(0, 1), rtol=1e-6, atol=0)
    if layout.form.ingress:
        assert torch.equal(panel.columns[-1], checksum.sketch_coefficients(k, torch.device("cpu"))[0].sign())


@needs_compiler
def test_equal_rows_do_not_round_the_same_way_again_and_again():
    """8192 equal rows of numbers with all 24 bits: in fp32 their sum would be off by many roundings of one sign."""
    w = (torch.rand(1, 64, generator=torch.Generator().manual_seed(1)) + 1).expand(8192, 64).contiguous()
    panel = encoding.encode(w, reference.plan(8192, 64, torch.float32, "full", None).layout)
    assert torch.equal(panel.columns[1], w[0] * 8192)


@needs_compiler
def test_a_matrix_with_gaps_in_both_directions_has_the_panel_of_its_copy():
    w = _random(64, 64)[::2, ::2]
    layout = reference.plan(32, 32, torch.float32, "full", None).layout
    assert torch.equal(encoding.encode(w, layout).columns, encoding.encode(w.contiguous(), layout).columns)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("n, group", [(300, 128), (64, None), (5, None), (1, None)])
def test_what_a_bias_adds(n, group, dtype):
    bias = _random(n, dtype=dtype)
    layout = reference.plan(n, 8, dtype, "full", group).layout
    sums, noise2 = encoding.bias_sums(bias, layout)
    for g in range(layout.groups.count):
        start, stop = layout.groups.span(g)
        b = bias[start:stop].double()
        exact = [torch.from_numpy(checksum.column_weights(kind, stop - start).copy()).double() @ b for kind in layout.form.kinds]
        torch.testing.assert_close(sums[g].double(), torch.stack(exact), rtol=1e-6, atol=1e-6)
        rms = [checksum.weight_rms(kind, layout.groups.width) for kind in layout.form.kinds]
        expected = b.square().sum() + sum((s / r) ** 2 for s, r in zip(exact, rms, strict=True))
        torch.testing.assert_close(noise2[g].double(), expected, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.int32], ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (16, 16), (33, 40), (200, 17), (70000, 2)])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_fingerprints_are_exact_sums_of_halves(n, k, dtype, order):
    size = torch.empty(0, dtype=dtype).element_size()
    whole = torch.randint(-(2**31), 2**31, (n, k), generator=torch.Generator().manual_seed(n)).to(torch.int32)
    whole = whole if size == 4 else whole.to(torch.int16)
    patterns = (whole if order == "rows" else whole.T.contiguous().T).view(dtype)
    found = bits._fingerprint_compiled(patterns)
    halves = whole.contiguous().view(torch.int16).reshape(n, k, size // 2).to(torch.int64) & 0xFFFF
    index = torch.arange(1, n + 1)[:, None, None]
    for have, exact in ((found.plain, halves.sum(0).T), (found.weighted, (halves * index).sum(0).T)):
        assert torch.equal(have.to(torch.int64) % 2**32, exact % 2**32)


# --- judgement ----------------------------------------------------------------------------------


@needs_compiler
@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 15, 16, 31, 33, 100])
def test_every_row_is_judged(rows, dtype):
    a, w = _random(rows, 130, dtype=dtype), _random(96, 130, dtype=dtype, seed=1)
    y = F.linear(a, w)
    assert _judged(y, a, w) <= 1.0
    for row in range(rows):
        for column in (0, 47, 95):
            struck = y.clone()
            struck[row, column] += 64
            assert _judged(struck, a, w) > 1.0, (row, column)
            for poison in (math.nan, math.inf, -math.inf):
                struck[row, column] = poison
                assert math.isnan(_judged(struck, a, w)), (row, column, poison)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("rows", [5, 40, 200])
def test_operands_of_any_strides(rows, dtype):
    w = _random(80, 72, dtype=dtype, seed=1)
    whole = _random(2 * rows, 2 * 72, dtype=dtype)
    plain = whole[::2, ::2].contiguous()
    y = F.linear(plain, w)
    wide = torch.zeros(rows, 200, dtype=dtype)
    wide[:, 60:140] = y
    along, gaps, across = ({_judged(result, a, w) for result in (y, wide[:, 60:140])} for a in (plain, whole[::2, ::2], plain.T.contiguous().T))
    assert max(along | gaps | across) <= 1.0
    # Numbers are added in one order along rows, in another down columns, and pairs of bf16 are multiplied together where they are adjacent.
    assert len(along) == len(gaps) == len(across) == 1
    assert along == gaps or dtype == torch.bfloat16
    assert max(along | gaps | across) - min(along | gaps | across) < (0.1 if dtype == torch.float32 else 0.01)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("rows", [3, 64, 257])
def test_threads_do_not_change_the_judgement(rows, dtype):
    a, w = _random(rows, 640, dtype=dtype), _random(384, 640, dtype=dtype, seed=1)
    y = F.linear(a, w)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_judged(y, a, w))
            y_struck = y.clone()
            y_struck[rows - 1, 383] += 64
            assert _judged(y_struck, a, w) > 1.0
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


@needs_compiler
@pytest.mark.parametrize("rows, k", [(64, 640), (50, 130), (33, 257)])
def test_pairs_of_bf16_see_what_fp32_sees(rows, k):
    """Faults just above the bound and just below it, in every group, by a panel in two parts where the processor has pairs."""
    a, w = _random(rows, k, dtype=torch.bfloat16), _random(128, k, dtype=torch.bfloat16, seed=1)
    y = F.linear(a, w)
    y[:, 3] += 40.0
    strided = torch.zeros(rows, 2 * k, dtype=torch.bfloat16)[:, ::2].copy_(a)  # which is widened to fp32
    assert _judged(y, a, w) == pytest.approx(_judged(y, strided, w), rel=2.0**-9)


@needs_compiler
def test_ragged_groups_are_judged_by_their_own_weights():
    a, w = _random(20, 64), _random(300, 64, seed=1)
    y = F.linear(a, w)
    assert reference.plan(300, 64, torch.float32, "full", 128).layout.groups.ragged
    assert _judged(y, a, w, group=128) <= 1.0
    y[7, 299] += 1
    assert _judged(y, a, w, group=128) > 1.0


@needs_compiler
def test_panels_too_wide_to_be_copied_for_each_call_are_left_to_torch():
    wide, narrow = (reference.plan(n, 64, torch.float32, "full", 16) for n in (4096, 1024))
    assert judging.judge_for(wide, 64, torch.float32) is None and judging.judge_for(narrow, 64, torch.float32) is not None
    layer = abft.Linear(64, 4096, policy=abft.Policy(group=16))
    x = _random(20, 64)
    with torch.no_grad():
        clean = layer(x)
        with abft.inject.faults(abft.inject.Fault("nullify", pattern="row")):
            assert torch.equal(layer(x), clean)
    assert abft.report().corrected == 1


@needs_compiler
@DTYPES
def test_ratios_are_those_of_the_specification(dtype):
    """Of a fault far above the noise; the compiled bound leaves out cross products, so its ratio is never the smaller one."""
    a, w, bias = _random(40, 384, dtype=dtype), _random(256, 384, dtype=dtype, seed=1), _random(256, dtype=dtype, seed=2)
    p = reference.plan(256, 384, dtype, "full", None)
    y = F.linear(a, w, bias)
    y[11, 200] += 32
    panel, sums = checksum.encode(w, p.layout), checksum.bias_sums(bias, p.layout)
    specified = reference.judge(y, reference.sums(y, a, panel, sums, p), 384, p).worst
    found = _judged(y, a, w, bias=bias, encode=checksum.encode)
    # (x + y)² ≤ 2 (x² + y²): at most a root of two for two terms; the third, absolute one is nothing here.
    assert specified * (1 - 1e-3) <= found <= specified * math.sqrt(2)


@needs_compiler
def test_weight_gradients_are_judged_compiled_too(monkeypatch):
    seen = []
    for name in ("worst", "worst_of_fresh"):
        original = getattr(judging, name)
        monkeypatch.setattr(judging, name, lambda judge, *rest, f=original: seen.append(judge) or f(judge, *rest))
    layer = abft.Linear(96, 64)
    layer(_random(200, 96).requires_grad_()).sum().backward()
    assert len(seen) == 3  # fprop, dgrad, wgrad


@needs_compiler
def test_threads_that_call_at_once_keep_their_own_scratch():
    cases = [(_random(m, 256, seed=m), _random(128, 256, seed=m + 1)) for m in (3, 40, 90, 300)]
    wanted = [_judged(F.linear(a, w), a, w) for a, w in cases]
    failed = []

    def repeat(i):
        a, w = cases[i]
        y = F.linear(a, w)
        failed.extend(i for _ in range(50) if abs(_judged(y, a, w) - wanted[i]) > 0.05)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# --- what surrounds a product ---------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_default_dtype_changes_nothing(default):
    """Model loaders set it; what C writes into must not be as long as it says."""
    torch.set_default_dtype(default)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            layer = abft.protect(torch.nn.Linear(256, 4096, dtype=dtype))
            layout = reference.plan(4096, 256, dtype, "full", None).layout
            for _ in range(10):
                sums, noise2 = encoding.bias_sums(layer.bias.detach(), layout)
                expected = checksum.bias_sums(layer.bias.detach(), layout)
                torch.testing.assert_close(sums, expected[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(noise2, expected[1], rtol=1e-4, atol=0)
            x = _random(20, 256, dtype=dtype)
            with torch.no_grad():
                clean = layer(x)
                with abft.inject.faults(abft.inject.Fault("nullify", pattern="row")):
                    assert torch.equal(layer(x), clean)
        assert abft.report().corrected == 2
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
def test_another_default_device_changes_nothing():
    layer = abft.protect(torch.nn.Linear(128, 64))
    x = _random(4, 128)
    with torch.no_grad():
        layer(x)
        with torch.device("meta"):
            assert abft.restore(layer) == 0
        layer.weight.data[3, 5] *= 3
        with torch.device("meta"):
            assert abft.restore(layer) == 1


@needs_compiler
def test_tensors_whose_numbers_are_only_implied():
    w = torch.nn.Parameter(_random(48, 64))
    x = _random(32, 64)
    zeros = torch._efficientzerotensor
    for _ in range(3):
        y = abft.linear(x, w)
    y.backward(zeros((32, 48)))
    assert not w.grad.any()
    with torch.no_grad():
        assert not abft.linear(zeros((32, 64)), w).any()
        negative = torch._neg_view(x)
        assert torch.equal(abft.linear(negative, w), F.linear(negative, w))
    assert abft.verify_matmul(x[:8], zeros((64, 48)), torch.zeros(8, 48)).ok
    assert abft.report().detected == 0


@needs_compiler
def test_verification_under_vmap():
    a, b = _random(3, 8, 64), _random(3, 64, 48, seed=1)
    c = a @ b
    c[1, 5, 7] += 1
    suspect = torch.func.vmap(lambda a, b, c: abft.verify_matmul(a, b, c).suspect)(a, b, c)
    assert suspect.nonzero().tolist() == [[1, 5]]


@needs_compiler
def test_a_weight_with_gaps_is_restored():
    layer = torch.nn.Linear(128, 64, bias=False)
    layer.weight = torch.nn.Parameter(_random(64, 256)[:, ::2])
    abft.protect(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer(_random(4, 128))
        layer.weight.data[3, 5] *= 3
    assert abft.restore(layer) == 1 and torch.equal(layer.weight, before)


@needs_compiler
def test_threads_that_end_leave_nothing():
    w = torch.nn.Parameter(_random(64, 4096, dtype=torch.bfloat16))
    x = _random(256, 4096, dtype=torch.bfloat16)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def several(count):
        for _ in range(count):
            thread = threading.Thread(target=lambda: abft.linear(x, w.detach()))
            thread.start()
            thread.join()

    several(20)
    before = resident()
    several(100)
    # Each thread's scratch is about a megabyte, so that leaving it would take a hundred; the allocator's arenas alone grow by up to 30.
    assert resident() - before < 50 << 20


@needs_compiler
def test_lengths_that_never_come_again_leave_little():
    """A weight gradient's panel has a column for each token: every length has an encoder, but no table of its own."""
    layout = reference.plan(32, 8200, torch.float32, "full", None).layout
    one, another = (encoding.encoder_for(layout, rows, torch.float32).kept for rows in (8200, 8300))
    pairs = [(x, y) for x, y in zip(one, another, strict=True) if isinstance(x, np.ndarray)]
    assert len(pairs) == 5 and all(np.shares_memory(x, y) for x, y in pairs)


def test_sources_are_read_whatever_the_locale(tmp_path):
    assert _run(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", ABFT_CACHE=str(tmp_path)) == repr(library.why_not())


# --- where nothing can be compiled ----------------------------------------------------------------

PROGRAM = """
import torch, abft
from abft.native import library
layer = abft.protect(torch.nn.Linear(64, 48))
for rows in (4, 100):
    layer(torch.randn(rows, 64, requires_grad=True)).sum().backward()
report = abft.report()
assert report.checks == 2 * 104 + 2 * 48 and report.detected == 0, report
with abft.inject.faults(abft.inject.Fault("nullify", pattern="row")):
    layer(torch.randn(100, 64))
assert abft.report().corrected == 1
print(repr(library.why_not()))
"""


def _run(**environment):
    settings = {key: value for key, value in os.environ.items() if key not in ("CC", "ABFT_CACHE", "ABFT_NATIVE")} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=settings, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_switched_off():
    assert _run(ABFT_NATIVE="0") == "'ABFT_NATIVE=0'"


def test_without_a_compiler(tmp_path):
    assert "no C compiler" in _run(PATH=str(tmp_path))


def test_a_compiler_that_fails(tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "out of order" in _run(CC=str(broken), ABFT_CACHE=str(tmp_path))
    assert not list(tmp_path.glob("*.so"))


@needs_compiler
def test_compiled_once_and_kept(tmp_path):
    assert _run(ABFT_CACHE=str(tmp_path)) == "''"
    (made,) = tmp_path.glob("*.so")
    before = made.stat().st_mtime_ns
    assert _run(ABFT_CACHE=str(tmp_path)) == "''"
    assert made.stat().st_mtime_ns == before and [path.name for path in tmp_path.iterdir()] == [made.name]


@needs_compiler
def test_nothing_is_loaded_from_a_folder_that_others_can_write(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("ABFT_CACHE", str(tmp_path))
    folder = library._folder()
    assert folder != tmp_path and not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
