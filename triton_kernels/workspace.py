"""Where deferred products leave their evidence until it is judged: bounded pages, one per stream (and panel form) at a time.

A page is used from its beginning until it is full or somebody asks (``flush``); then one launch judges all that lies in it, in
stream order, and it is used again: the next product of the stream overwrites evidence only after the launch that read it. The
host waits for nothing.

CUDA graphs: a graph writes to the same addresses at every replay, so what is captured has pages of its own, whose room is never
given out twice. Judging passes over slots that nothing has written since, so it may be captured with the products (``flush``
while capturing), launched after every replay, or both. Evidence that a replay overwrites before it was judged is
counted on the device (deferred.LOST).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .deferred import SLOT, Place, floats, multiply_deferred
from .gemm import Product
from .verify_deferred import NONE, OF_UNITS, judge_slots

#: Of a page: floats of evidence (32 MiB) and slots. A product that is larger than that is judged at once, in memory of its own.
FLOATS = 8 << 20
SLOTS = 512


@dataclass
class Page:
    """Evidence of products of one stream, with panels of one form, for one ledger."""

    evidence: Tensor  # (FLOATS,) fp32
    slots: Tensor  # (SLOTS, SLOT) int64
    words: Tensor
    form: tuple[int, int, int, int]  # kinds, parts, sites of the ledger, which statistics are kept
    stream: Any  # torch.cuda.Stream, or on a CPU the thread's number
    captured: bool
    used: int = 0  # floats
    products: int = 0  # … that have left their evidence here since it was last begun anew

    def judge(self) -> None:
        if self.products:
            judge_slots(self.slots[: self.products], self.evidence, self.words, *self.form)
        if not self.captured:
            self.used = self.products = 0

    def has_room(self, size: int) -> bool:
        return self.products < len(self.slots) and self.used + size <= len(self.evidence)


_lock = threading.RLock()
_open: dict[Any, Page] = {}
_full: list[Page] = []  # of captured products: their graphs may be replayed for ever


def leave(product: Product, scales: Tensor | None, template: Tensor, words: Tensor, site: Tensor, parts: int, sites: int,
          faults: Tensor | None = None, statistics: int = NONE.value) -> Tensor:  # fmt: skip
    """Compute a product, whose evidence waits to be judged; returns Y. statistics: which are kept when it is (verify_deferred.py)."""
    noted = statistics == OF_UNITS.value
    device, size = product.a.device, floats(product, noted)
    form = (product.kinds, parts, sites, statistics)
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else threading.get_ident()
    with _lock:  # nobody may judge a slot whose product is yet to be launched
        if size > FLOATS:
            page = _page(device, words, form, stream, captured, size, 1)
            if captured:
                _full.append(page)
        else:
            page = _page_with_room(device, words, form, stream, captured, size)
        place = Place(page.evidence, page.used, page.slots[page.products], words)
        y = multiply_deferred(product, scales, template, place, site, faults, noted)
        page.used, page.products = page.used + size, page.products + 1
        if size > FLOATS:
            page.judge()
    return y


def _page_with_room(device: torch.device, words: Tensor, form: tuple[int, int, int, int], stream: Any, captured: bool, size: int) -> Page:
    key = (device, stream, form, words.data_ptr(), captured)
    page = _open.get(key)
    if page is not None and not page.has_room(size):
        page.judge()
        if captured:
            _full.append(page)
            page = None
    if page is None:
        page = _open[key] = _page(device, words, form, stream, captured, FLOATS, SLOTS)
    return page


def _page(device: torch.device, words: Tensor, form: tuple[int, int, int, int], stream: Any, captured: bool, size: int, slots: int) -> Page:
    with torch.inference_mode(False), torch.no_grad():
        evidence = torch.empty(size, dtype=torch.float32, device=device)
        return Page(evidence, torch.empty(slots, SLOT.value, dtype=torch.int64, device=device), words, form, stream, captured)


def flush(around: Callable[[Tensor], AbstractContextManager[Any]]) -> None:
    """Judge all that waits, without waiting; ``around``: what each ledger wants around its launches.

    While a stream is capturing: what it has captured, as a part of its graph. Else each stream judges its own and the current
    stream waits for it; what graphs have left is judged on the current stream, which has to be the one that replays them, or to
    wait for it.
    """
    with _lock:
        if not _open and not _full:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            here = torch.cuda.current_stream()
            for page in [*_full, *_open.values()]:
                if page.captured and page.stream == here:
                    page.judge()
            return
        for page in [*_full, *_open.values()]:
            with around(page.words):
                _judge_on_its_stream(page)


def _judge_on_its_stream(page: Page) -> None:
    if page.words.device.type != "cuda":
        page.judge()
    elif page.captured:
        with torch.cuda.device(page.words.device):
            page.judge()
    elif page.products:
        with torch.cuda.stream(page.stream):
            page.judge()
        torch.cuda.current_stream(page.words.device).wait_stream(page.stream)


def waiting() -> int:
    """Products that left evidence which nobody has judged, as far as the host knows: replays of graphs it does not see."""
    with _lock:
        return sum(page.products for page in _open.values() if not page.captured)
