"""What the compiler is given of the kernels, as they are or with every trace of injection cut out of their source.

Triton's IR, inlined and simplified, without lines and names, and the options: PTX follows from it.

    python twins.py as-is|stripped FILE          as-is: and of each kernel one launch with a fault

Run in a process of its own: the copy takes the place of abft.triton_kernels.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAME = "FAULT"


class Stripper(ast.NodeTransformer):
    """Removes the parameter FAULT, what is passed for it, and every block that depends on it."""

    def __init__(self, takes_fault: dict[str, int]) -> None:
        self.takes_fault = takes_fault  # function → position of the parameter
        self.removed = 0

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        if any(isinstance(n, ast.Name) and n.id == NAME for n in ast.walk(node.test)):
            assert not node.orelse
            self.removed += 1
            return []
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.args = [a for a in node.args.args if a.arg != NAME]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) else None
        if called in self.takes_fault:
            del node.args[self.takes_fault[called]]
        node.args = [a for a in node.args if not (isinstance(a, ast.Call) and getattr(a.func, "id", "") == "fault_argument")]
        return node


def parsed(source: Path) -> tuple[dict[str, ast.Module], dict[str, int]]:
    """(file → its tree, function that knows of faults → position of the parameter)"""
    trees = {path.name: ast.parse(path.read_text()) for path in source.glob("*.py")}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = {node.name: [a.arg for a in node.args.args] for node in functions}
    return trees, {name: names.index(NAME) for name, names in arguments.items() if NAME in names}


def strip(source: Path, target: Path) -> int:
    """Write a copy of the kernels without injection; returns how many blocks were cut."""
    trees, takes_fault = parsed(source)
    stripper = Stripper(takes_fault)
    for name, tree in trees.items():
        (target / name).write_text(ast.unparse(ast.fix_missing_locations(stripper.visit(tree))))
        assert NAME not in {n.id for n in ast.walk(ast.parse((target / name).read_text())) if isinstance(n, ast.Name)}
    return stripper.removed


def load(folder: Path) -> None:
    """Make ``folder`` the package abft.triton_kernels."""
    spec = importlib.util.spec_from_file_location("abft.triton_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["abft.triton_kernels"] = module
    spec.loader.exec_module(module)


def launches(strike: bool) -> dict[str, Any]:
    """Launches of the kernels that know of faults, by call, place in the stream and kernel; ``strike``: with a fault in every call."""
    from bench import compiled

    few, everything = {"m": 64, "n": 8192, "timing": "deferred"}, {"columns": 64, "asked": "everything", "strike": strike}
    calls = {
        "product": compiled.launches_of("fp16", 90, strike=strike), "deferred": compiled.launches_of("fp16", 90, strike=strike, **few),
        "int8": compiled.launches_of("int8", 90, strike=strike), "attention": compiled.attention_launches("fp16", 90, **everything),
        "gradient": compiled.attention_gradient_launches("fp16", 90, **everything),
        "decoding": compiled.decoding_launches("fp16", 90, **everything),
    }  # fmt: skip
    _, struck = parsed(ROOT / "triton_kernels")
    return {f"{call} {i} {one.name}": one for call, all_ in calls.items() for i, one in enumerate(all_) if one.name in struck}


def given(launches: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """What the compiler is given of each."""
    from bench import compiled

    return {name: compiled.given(one, 90) for name, one in launches}


def one_of_each(launches: dict[str, Any]) -> list[tuple[str, Any]]:
    """The last launch of every kernel: where it is compiled without checks, too, that comes first."""
    return list({one.name: (name, one) for name, one in launches.items()}.values())


def main() -> None:
    what, out = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    if what == "stripped":
        import abft

        with tempfile.TemporaryDirectory() as folder:
            blocks = strip(ROOT / "triton_kernels", Path(folder))
            load(Path(folder))
            assert abft.triton_kernels.__file__.startswith(folder) if hasattr(abft, "triton_kernels") else True
            out.write_text(json.dumps({"blocks": blocks, "given": given(launches(False).items())}))
    else:
        out.write_text(json.dumps({"given": given(launches(False).items()), "struck": given(one_of_each(launches(True)))}))


if __name__ == "__main__":
    main()
