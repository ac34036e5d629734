"""Kernels that judge, compiled with statistics of residuals, without, and with every trace of them cut out of the source; prints JSON.

Run in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from abft.triton_kernels import deferred, verify, verify_deferred

from bench import compiled

OPERANDS = {90: ("bf16", "tf32", "ieee"), 80: ("bf16",), 100: ("bf16",)}
#: What statistics add: parameters, what the blocks that depend on them ask, modules that they import from.
PARAMETERS = ("kept", "units", "multiprocessors")
FLAGS = ("NOTED", "STATISTICS")
KERNELS = ("checked_product", "recompute", "settle", "verify")
DEFERRED = ("deferred_product", "verify_deferred")


class Stripper(ast.NodeTransformer):
    """Removes the parameters, and the blocks that depend on them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node.name in ("_keep_residuals", "_address"):
            return None
        names = PARAMETERS if node.name == "verify" else FLAGS
        if node.args.args and node.args.args[-1].arg in FLAGS:
            node.args.defaults = []
        node.args.args = [a for a in node.args.args if a.arg not in names]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        asked = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        return [] if asked & {PARAMETERS[0], *FLAGS} else self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module == "residuals" else node


def stripped(module: Any, folder: str) -> Any:
    """The module without a trace of statistics."""
    source = ast.unparse(ast.fix_missing_locations(Stripper().visit(ast.parse(Path(module.__file__).read_text()))))
    assert "add_residuals" not in source and "note_unit(" not in source
    name = module.__name__.rsplit(".", 1)[1]
    path = Path(folder) / f"stripped_{name}.py"
    path.write_text(source.replace(", 'multiprocessors'", ""))
    spec = importlib.util.spec_from_file_location(f"abft.triton_kernels.stripped_{name}", path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def main() -> None:
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        without = stripped(verify, folder).verify
        for architecture, kinds in OPERANDS.items():
            for operands in kinds:
                for form in ("off", "on"):
                    for launch in launches(operands, architecture, form):
                        if launch.name in KERNELS[-1 if operands != "bf16" or architecture != 90 else 0 :]:
                            out[f"{architecture} {operands} {launch.name} {form}"] = described(launch, architecture)
                        if launch.name == "verify" and form == "off":
                            # The launcher passes three more, after what the kernel had before.
                            assert launch.args[-len(PARAMETERS) :] == (None,) * len(PARAMETERS)
                            cut = replace(launch, kernel=without, args=launch.args[: -len(PARAMETERS)])
                            out[f"{architecture} {operands} verify stripped"] = described(cut, architecture)
                for launch in launches(operands, architecture, "statistical"):
                    if launch.name == "weigh":
                        out[f"{architecture} {operands} weigh"] = described(launch, architecture)
        cut_deferred = {name: getattr(stripped(module, folder), name) for name, module in zip(DEFERRED, (deferred, verify_deferred), strict=True)}
        for form in ("off", "on"):
            for launch in launches("bf16", 90, form, timing="deferred"):
                if launch.name not in DEFERRED:
                    continue
                out[f"90 bf16 {launch.name} {form}"] = described(launch, 90)
                if form == "off":
                    assert not set(launch.kwargs) & set(FLAGS)
                    out[f"90 bf16 {launch.name} stripped"] = described(replace(launch, kernel=cut_deferred[launch.name]), 90)
    print(json.dumps(out))


def launches(operands: str, architecture: int, form: str, timing: str = "immediate") -> list[compiled.Launch]:
    detector = {"on": "both", "off": "checksum"}.get(form, form)
    return compiled.launches_of(operands, architecture, timing=timing, detector=detector)


def described(launch: compiled.Launch, architecture: int) -> dict[str, Any]:
    kernel = compiled.compile_launch(launch, architecture)
    code = re.sub(r"^\s*(\.loc|//|\.file).*$", "", kernel.asm["ptx"], flags=re.MULTILINE).split(".section")[0]
    code = re.sub(r"\$L__[a-z_0-9]+|\n\s*\n", "\n", code)  # labels of debugging, which come with .loc
    return compiled.usage(kernel) | {"code": hashlib.sha256(code.encode()).hexdigest(), "fp64": ".f64" in code}


if __name__ == "__main__":
    main()
