"""What the compiler's input follows from: a kernel's text, and of one launch the types and constants that it was specialised for.

Making Triton's IR takes a second of a kernel, this milliseconds. Two launches of equal text have equal IR, for Triton knows nothing of
them besides: functions as they stand, without comments, docstrings and lines; every function they reach; the values of all that they read
outside of themselves; types, alignments and constants of the arguments; the options and the target. The reverse does not hold: a renamed
variable is another text of the same IR, so what has another text is asked for its IR (bench/audit.py).
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

#: What a global of a kernel may be, besides functions and tuples with names.
PLAIN = (int, float, str, bool, type(None))
#: Words without letters of their own.
LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.ENDMARKER)


@cache
def text_of(kernel: Any) -> str:
    """A kernel and every function it reaches, with the values of what they read."""
    parts, todo, seen = [], [kernel], set()
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        words, tree = _parsed(function)
        parts.append(f"{words} {getattr(function, 'noinline', None)}")
        for name, value in _read(tree, function.fn):
            if _is_kernel(value):
                todo.append(value)
            else:
                parts.append(f"{name} = {_value(name, value)}")
    return "\n".join(parts)


def specialised(source: Any) -> str:
    """Types, constants and alignments of a launch (triton.compiler.ASTSource)."""
    text = f"{_sorted(source.signature)} {_sorted(source.constants)} {_sorted(source.attrs)}"
    if re.search(r" at 0x[0-9a-f]+", text):
        raise TypeError(f"a constant has no text of its own, only an address: {text}")
    return text


def _sorted(table: dict[Any, Any]) -> str:
    return repr(sorted((repr(key), repr(value)) for key, value in table.items()))


def _parsed(function: Any) -> tuple[str, ast.Module]:
    """(its words, its tree) from ``def`` on. Words are those of the language, so that every version of Python finds the same."""
    source = textwrap.dedent("".join(inspect.getsourcelines(function.fn)[0]))
    source = source[re.search(r"^def\s", source, re.MULTILINE).start() :]  # type: ignore[union-attr]
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    first = definition.body[0]
    said = range(first.lineno, (first.end_lineno or 0) + 1) if ast.get_docstring(definition) is not None else range(0)
    words = [
        tokenize.tok_name[token.type] if token.type in LAYOUT else token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL) and token.start[0] not in said
    ]
    return " ".join(words), tree


def _is_kernel(value: Any) -> bool:
    """Of ours; Triton's own belong to its version."""
    return isinstance(getattr(value, "fn", None), FunctionType) and not value.fn.__module__.startswith("triton.")


def _read(tree: ast.Module, function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads outside of itself, each with a name, in a fixed order."""
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {node.arg for node in nodes if isinstance(node, ast.arg)}
    outside = dict(function.__globals__)
    outside.update(inspect.getclosurevars(function).nonlocals)
    for name in sorted({node.id for node in names} - own):
        if name in outside:
            yield name, outside[name]


def _value(name: str, value: Any) -> str:
    """In words; an error for what has none: its changes would go unnoticed."""
    if isinstance(value, ModuleType) and value.__name__.split(".")[0] == "triton":
        return value.__name__
    if isinstance(value, type) and hasattr(value, "_fields"):
        return f"{value.__name__}{value._fields}{value._field_defaults}"
    if type(value).__name__ == "constexpr":
        return f"constexpr {_value(name, value.value)}"
    if isinstance(value, PLAIN):
        return repr(value)
    if (getattr(value, "__module__", None) or "").startswith("triton.") or getattr(value, "fn", None) is not None:
        return f"{value.__module__}.{getattr(value, '__name__', value)}"
    raise TypeError(f"a kernel reads {name}, a {type(value).__name__}: say in bench/kernel_text.py what of it decides the code")
