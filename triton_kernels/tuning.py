"""Launch shapes that were measured: what ``python -m bench tune`` found on a GPU, in place of what configs.py says.

    {"format": 1, "tables": [{"architecture": 90, "triton": "3.6.0", "measured": {…}, "entries": [
        {"kind": "16-bit", "height": null, "n": 4096, "k": 4096, "config": {"bm": 128, "bn": 256, "stages": 3}, "ratio": 0.97}, …]}]}

An entry names the fields of a config that differ. ``height``: of the tiles for few rows that it is about, null: of those for many.
``n`` and ``k`` null: of every shape without an entry of its own. Shapes have no M: a weight's groups, and so its panel, are cut in
units of ``bn``, and every number of rows shares them. A table holds for one architecture (a row of configs.CONFIGS) and one version
of Triton; others are left alone. The file is read once in a process, so the bits of a product do not change while it runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")
FORMAT = 1
KINDS = ("16-bit", "tf32", "ieee")
#: What an entry may say of a config, and the values that a launch accepts. Precision and check tiles are not among them: they are
#: not a matter of time alone.
SIZES = (16, 32, 64, 128, 256)
FIELDS: dict[str, tuple[Any, ...]] = {
    "bm": SIZES, "bn": SIZES, "bk": SIZES, "warps": (4, 8, 16), "stages": tuple(range(1, 13)), "resident": (1, 2, 3, 4),
    "descriptors": (False, True), "repair_stages": tuple(range(13)),
}  # fmt: skip
#: (architecture, kind, height, shape) → fields of a config; shape (N, K), None: of all others.
Entries = Mapping[tuple[int | None, str, int | None, tuple[int, int] | None], dict[str, Any]]
REMEDY = "write it anew with `python -m bench tune`, or delete it: the built-in table is used without it"

_instead: Entries | None = None


def find(architecture: int | None, kind: str, height: int | None = None, shape: tuple[int, int] | None = None) -> dict[str, Any] | None:
    """The fields of a config that a measurement changed, maybe none of them; None where nothing was measured.

    ``height``: of tiles for few rows. ``shape``: (N, K). ValueError if there is a file and it is not such a table.
    """
    entries = _instead if _instead is not None else {} if architecture is None else _entries(FILE)
    found = entries.get((architecture, kind, height, shape)) if shape is not None else None
    return found if found is not None else entries.get((architecture, kind, height, None))


@contextlib.contextmanager
def instead(entries: Entries) -> Iterator[None]:
    """These entries, and no file, inside. For whoever measures; plans made before are remembered elsewhere."""
    global _instead
    before, _instead = _instead, entries
    try:
        yield
    finally:
        _instead = before


@lru_cache(maxsize=4)
def _entries(file: Path) -> Entries:
    if not file.exists():
        return {}
    import triton

    return read(file, triton.__version__)


def read(file: Path, version: str) -> dict[tuple[int | None, str, int | None, tuple[int, int] | None], dict[str, Any]]:
    """The entries of a file for a version of Triton, of every architecture. ValueError: what is wrong with it."""
    out: dict[tuple[int | None, str, int | None, tuple[int, int] | None], dict[str, Any]] = {}
    for table in tables(file):
        if table["triton"] == version:
            for entry in table["entries"]:
                key = (table["architecture"], *_checked(file, entry))
                out[key] = entry["config"]
    return out


def tables(file: Path) -> list[dict[str, Any]]:
    """The tables in a file, whatever they are for; their entries not looked at."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} should hold JSON and cannot be read ({error}): {REMEDY}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("tables"), list):
        raise ValueError(f'{file.name} should hold {{"format": {FORMAT}, "tables": […]}} and does not: {REMEDY}')
    for table in content["tables"]:
        named = isinstance(table, dict) and isinstance(table.get("architecture"), int | str) and isinstance(table.get("triton"), str)
        if not named or not isinstance(table.get("entries"), list):
            raise ValueError(f"{file.name}: a table should have architecture, triton and entries; got {str(table)[:80]}: {REMEDY}")
    return list(content["tables"])


def _checked(file: Path, entry: Any) -> tuple[str, int | None, tuple[int, int] | None]:
    """(kind, height, shape) of an entry that is one."""

    def wrong(what: str, expected: object, got: object) -> ValueError:
        return ValueError(f"{file.name}: {what} should be {expected}; got {got!r}: {REMEDY}")

    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise wrong("an entry", "an object with a config", entry)
    kind, height, shape = entry.get("kind"), entry.get("height"), (entry.get("n"), entry.get("k"))
    if kind not in KINDS:
        raise wrong("kind", f"one of {KINDS}", kind)
    if height is not None and not _whole(height):
        raise wrong("height", "a number of rows or null", height)
    if shape != (None, None) and not all(map(_whole, shape)):
        raise wrong("(n, k)", "two sizes or two nulls", shape)
    for name, value in entry["config"].items():
        # By type as well: to Python, JSON's true is 1.
        if not any(type(value) is type(allowed) and value == allowed for allowed in FIELDS.get(name, ())):
            raise wrong(f"config.{name}", FIELDS.get(name, f"one of {tuple(FIELDS)}"), value)
    if height is not None and "bm" in entry["config"]:
        raise wrong("bm of tiles for few rows", "their height, which is not repeated", entry["config"]["bm"])
    return str(kind), height, None if shape == (None, None) else (int(entry["n"]), int(entry["k"]))


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0
