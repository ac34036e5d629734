"""Progress for people: a bar on a terminal; in a log file, which has no use for one, two lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """``with Progress("reading", 100) as bar: bar.advance()``."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._start = time.perf_counter()
        self._bar = _terminal_bar(what, total) if sys.stderr.isatty() else None
        if self._bar is None:
            print(f"  {what} …", flush=True)

    def advance(self, note: str = "") -> None:
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            print(f"  {self._what}: {time.perf_counter() - self._start:.1f} s", flush=True)


def _terminal_bar(what: str, total: int):
    try:
        from tqdm import tqdm
    except ImportError:  # a convenience, never a reason to stop
        return None
    return tqdm(total=total, desc=f"  {what}", leave=True, dynamic_ncols=True, file=sys.stderr)
