"""The text that stands for a kernel's IR: whatever changes the code changes it, and what does not, comments and lines, does not."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

from bench import kernel_text  # noqa: E402

SOURCE = '''
from typing import NamedTuple
import triton.language as tl

SIZE = tl.constexpr(4)


class Pair(NamedTuple):
    one: int
    two: int


def callee(x):
    return x * 2.0


def kernel(out, n):
    """Says what it does."""
    # Says why.
    x = tl.arange(0, SIZE)
    pair = Pair(n, n)
    tl.store(out + x, callee(x) + pair.one)
'''
CHANGES = {
    "a function it reaches": ("x * 2.0", "x * 3.0"), "a constant": ("constexpr(4)", "constexpr(8)"), "itself": ("callee(x) +", "callee(x) -"),
    "fields": ("    two: int\n", "    two: int\n    three: int = 0\n"), "the type of a constant": ("constexpr(4)", "constexpr(4.0)"),
}  # fmt: skip
NO_CHANGES = {
    "a comment": ("# Says why.", "# Says why it does."), "a docstring": ("Says what it does.", "Says\n\n    more."),
    "lines": ("def callee", "\n\n\ndef callee"), "spaces": ("callee(x) + pair.one", "callee( x )  +\\\n        pair.one"),
}  # fmt: skip


@pytest.fixture
def text_of(tmp_path):
    def of(source: str) -> str:
        path = tmp_path / f"kernels_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.callee = JITFunction(module.callee)
        return kernel_text.text_of(JITFunction(module.kernel))

    return of


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_the_code_is_another_text(text_of, what):
    assert SOURCE.count(CHANGES[what][0]) == 1 and text_of(SOURCE) != text_of(SOURCE.replace(*CHANGES[what]))


@pytest.mark.parametrize("what", NO_CHANGES)
def test_what_does_not_is_the_same(text_of, what):
    assert SOURCE.count(NO_CHANGES[what][0]) == 1 and text_of(SOURCE) == text_of(SOURCE.replace(*NO_CHANGES[what]))


def test_what_has_no_text_is_an_error(text_of):
    with pytest.raises((TypeError, RuntimeError)):
        text_of(SOURCE.replace("constexpr(4)", "constexpr(object())"))
    source = SimpleNamespace(signature={"x": "i32"}, constants={(0,): object()}, attrs={})
    with pytest.raises(TypeError, match="address"):
        kernel_text.specialised(source)


def test_types_constants_and_alignments_are_part_of_a_launchs_text():
    def of(**changed):
        return kernel_text.specialised(SimpleNamespace(**({"signature": {"x": "*bf16"}, "constants": {(1,): 64}, "attrs": {(0,): [["tt.divisibility", 16]]}} | changed)))

    assert of() == of() and len({of(), of(signature={"x": "*fp16"}), of(constants={(1,): 32}), of(attrs={(0,): []})}) == 4
