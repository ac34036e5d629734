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
from unittest import mock

from abft.triton_kernels import verify

from abft import policy
from bench import compiled

OPERANDS = {90: ("bf16", "tf32", "ieee"), 80: ("bf16",), 100: ("bf16",)}
PARAMETERS = ("kept", "units", "multiprocessors")
KERNELS = ("checked_product", "recompute", "settle", "verify")


class Stripper(ast.NodeTransformer):
    """Removes the parameters, and the block that depends on them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.args = [a for a in node.args.args if a.arg not in PARAMETERS]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        return [] if any(isinstance(n, ast.Name) and n.id == PARAMETERS[0] for n in ast.walk(node.test)) else self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module == "residuals" else node


def stripped_kernel(folder: str) -> Any:
    source = ast.unparse(ast.fix_missing_locations(Stripper().visit(ast.parse(Path(verify.__file__).read_text()))))
    assert "add_residuals" not in source
    path = Path(folder) / "stripped.py"
    path.write_text(source.replace(", 'multiprocessors'", ""))
    spec = importlib.util.spec_from_file_location("abft.triton_kernels.stripped", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.verify


def main() -> None:
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        without = stripped_kernel(folder)
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
    print(json.dumps(out))


def launches(operands: str, architecture: int, form: str) -> list[compiled.Launch]:
    def with_statistics(**choices: Any) -> policy.Policy:
        return Policy(**choices, detector="both" if form == "on" else "checksum")

    Policy = policy.Policy
    with mock.patch.object(compiled.policy, "Policy", with_statistics):
        return compiled.launches_of(operands, architecture)


def described(launch: compiled.Launch, architecture: int) -> dict[str, Any]:
    kernel = compiled.compile_launch(launch, architecture)
    code = re.sub(r"^\s*(\.loc|//|\.file).*$", "", kernel.asm["ptx"], flags=re.MULTILINE).split(".section")[0]
    code = re.sub(r"\$L__[a-z_0-9]+|\n\s*\n", "\n", code)  # labels of debugging, which come with .loc
    return compiled.usage(kernel) | {"code": hashlib.sha256(code.encode()).hexdigest(), "fp64": ".f64" in code}


if __name__ == "__main__":
    main()
