"""The two texts of the demo, both from the Python that runs it: nothing is downloaded, and a hash names what was used.

passages()   one per documented object of the standard library, "name: first paragraph of its docstring"
sources()    the source code of a fixed list of its modules, as one string
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

# Fixed by name and not "whatever is installed", so that one Python version always gives one corpus.
DOCUMENTED_MODULES = (
    "argparse", "base64", "bisect", "builtins", "calendar", "collections", "configparser", "contextlib",
    "copy", "csv", "dataclasses", "datetime", "difflib", "fnmatch", "fractions", "functools", "getpass",
    "glob", "gzip", "hashlib", "heapq", "html", "io", "ipaddress", "itertools", "json", "keyword",
    "linecache", "math", "mimetypes", "operator", "os.path", "pathlib", "pickle", "platform", "pprint",
    "queue", "random", "re", "secrets", "shelve", "shlex", "shutil", "statistics", "string", "struct",
    "subprocess", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback",
    "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "webbrowser", "zipfile", "zlib",
)  # fmt: skip
# Their methods are what most beginners' questions are about.
DOCUMENTED_CLASSES = {
    "builtins": ("dict", "list", "set", "str"),
    "collections": ("deque",),
    "pathlib": ("Path",),
}
# Made to be replaced, and replaced by test runners and debuggers: whoever runs the demo would change its corpus.
HOOKS = {"threading.excepthook", "warnings.showwarning", "warnings.formatwarning"}
SOURCE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "collections", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "enum", "fractions", "functools", "heapq", "inspect", "logging", "pathlib",
    "pickle", "random", "shutil", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "tokenize", "typing", "zipfile",
)  # fmt: skip

LONGEST_PASSAGE = 300  # characters; a first paragraph says what the object is for, a list of options only adds time
SHORTEST_DOC = 20  # characters; anything shorter ("helper") answers no question


class Passage(NamedTuple):
    name: str
    text: str


def passages(limit: int | None = None, keep: Iterable[str] = ()) -> list[Passage]:
    """Every documented public object, sorted by name; two objects that share a docstring appear once.

    ``limit`` keeps an evenly spaced part of them, so that a short run sees every module, and the names in ``keep``.
    """
    seen: set[str] = set()
    found = []
    for name, obj in sorted(_documented_names(), key=itemgetter(0)):
        doc = _first_paragraph(obj)
        if len(doc) >= SHORTEST_DOC and doc not in seen and name not in HOOKS:
            seen.add(doc)
            found.append(Passage(name, f"{name}: {doc}"[:LONGEST_PASSAGE]))
    if limit is None or limit >= len(found):
        return found
    names = {found[index * len(found) // limit].name for index in range(limit)} | set(keep)
    return [passage for passage in found if passage.name in names]


def sources() -> str:
    """The concatenated source files, printable ASCII only, so that a character is one of about a hundred symbols."""
    texts = []
    for module in SOURCE_MODULES:
        spec = importlib.util.find_spec(module)
        # A frozen or zipped standard library has no files to learn from.
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
    text = "\n".join(texts)
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")


def fingerprint(texts: Iterable[str]) -> str:
    """SHA-256 over the texts, each closed by a zero byte so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _documented_names() -> Iterator[tuple[str, object]]:
    for module_name in DOCUMENTED_MODULES:
        module = importlib.import_module(module_name)
        # builtins has no __all__, and vars() of it is what the interpreter offers
        for attribute in getattr(module, "__all__", None) or vars(module):
            obj = getattr(module, attribute, None)
            if not attribute.startswith("_") and (inspect.isclass(obj) or inspect.isroutine(obj)):
                yield f"{module_name}.{attribute}", obj
        for class_name in DOCUMENTED_CLASSES.get(module_name, ()):
            for attribute, method in vars(getattr(module, class_name)).items():
                if not attribute.startswith("_"):
                    yield f"{module_name}.{class_name}.{attribute}", method


def _first_paragraph(obj: object) -> str:
    doc = ""
    # Some C objects compute their documentation and may refuse.
    with contextlib.suppress(Exception):
        doc = inspect.getdoc(obj) or ""
    return " ".join(doc.split("\n\n")[0].split())
