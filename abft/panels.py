"""Panels remembered: when the checksums of a weight are still the checksums of that weight.

A panel belongs to the *source tensor object* (weakly; never to an address, never to a cast or contiguous
copy), to its ``_version`` where it has one, and to a process-wide *weight epoch*. The epoch is advanced by every
optimizer step (fused and compiled ones leave ``_version`` alone), by ``load_state_dict`` and ``_apply`` of
protected modules and by ``abft.refresh``. Under ``weights="frozen"`` only the last three count.

Panels are rebuilt in place, in the same storage: captured graphs bake addresses.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from abft import bits
from abft.checksum import Layout, Panel, bias_sums

Build = Callable[[Tensor, Layout], Panel]


@dataclass
class Entry:
    """A remembered panel with what is needed to tell, later, who changed: the weight or the panel."""

    panel: Panel
    dtype: torch.dtype  # of W as the product sees it
    fingerprint: bits.Fingerprint | None  # of W (N, K) as the product sees it
    integrity: Tensor | None  # of the panel's own bits
    validity: tuple[int, ...]
    bias_key: tuple[int, int, int] | None = None
    bias_sums: tuple[Tensor, Tensor] | None = None
    stale_warned: bool = False
    quick: object | None = None  # a backend's prepared judgement, as long as panel and bias are the same
    uses: int = 0
    known_faults: list[bits.ChangedElement] = field(default_factory=list)  # named before, not counted again


_lock = threading.RLock()
_epoch = 0
_frozen_epoch = 0


def advance_epoch(*, announced: bool = False) -> None:
    """Weights may have changed: tracked panels are rebuilt at their next use; frozen ones too if ``announced``."""
    global _epoch, _frozen_epoch
    _epoch += 1
    if announced:
        _frozen_epoch += 1


register_optimizer_step_post_hook(lambda *_: advance_epoch())


def version_of(tensor: Tensor) -> int:
    """The tensor's version; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def validity(source: Tensor, *, frozen: bool) -> tuple[int, ...]:
    """What must be unchanged for a panel to be believed. The address is here only to notice ``.data =`` swaps."""
    if frozen:
        return (_frozen_epoch,)
    return (_epoch, version_of(source), source.data_ptr())


class _Panels:
    """The panels of one source tensor; dies with it."""

    def __init__(self) -> None:
        self.entries: dict[tuple[object, ...], Entry] = {}
        self.latest: tuple[Layout, bool, bool, Entry] | None = None  # asked for again far more often than not


_by_id: dict[int, tuple[weakref.ref[Tensor], _Panels]] = {}


def _panels_of(source: Tensor) -> _Panels:
    key = id(source)
    found = _by_id.get(key)
    if found is not None and found[0]() is source:
        return found[1]
    with _lock:
        panels = _Panels()
        # The id may be reused only after the callback ran or the reference is dead; both are checked above.
        _by_id[key] = (weakref.ref(source, lambda ref: _forget(key, ref)), panels)
        return panels


def _forget(key: int, ref: weakref.ref[Tensor]) -> None:
    found = _by_id.get(key)
    if found is not None and found[0] is ref:
        del _by_id[key]


def entry_for(source: Tensor, matrix: Tensor, layout: Layout, *, transposed: bool, frozen: bool, build: Build) -> Entry:
    """The valid panel entry of ``matrix`` (N, K), which is ``source`` seen as the product sees it; built if need be."""
    panels = _panels_of(source)
    latest = panels.latest
    now = validity(source, frozen=frozen)
    if (
        latest is not None
        and latest[0] is layout
        and latest[1] is transposed
        and latest[2] is frozen
        and latest[3].validity == now
        and latest[3].dtype is matrix.dtype
    ):
        return latest[3]
    key = (layout, transposed, matrix.dtype, matrix.device, tuple(matrix.shape), frozen)
    entry = panels.entries.get(key)
    if entry is None or entry.validity != now:
        with _lock, torch.no_grad():
            if entry is None:
                entry = panels.entries[key] = Entry(build(matrix, layout), matrix.dtype, None, None, now)
                _remember(entry, matrix, now)
            else:
                rebuild(entry, matrix, now, build)
    panels.latest = (layout, transposed, frozen, entry)
    return entry


def rebuild(entry: Entry, matrix: Tensor, now: tuple[int, ...], build: Build) -> None:
    """Fill the entry from the present weight, in the same storage."""
    fresh = build(matrix, entry.panel.layout)
    entry.panel.columns.copy_(fresh.columns)
    if entry.panel.scales is not None and fresh.scales is not None:
        entry.panel.scales.copy_(fresh.scales)
    entry.bias_key = entry.quick = None
    _remember(entry, matrix, now)


def _remember(entry: Entry, matrix: Tensor, now: tuple[int, ...]) -> None:
    entry.fingerprint = bits.fingerprint(matrix) if matrix.dim() == 2 else None
    entry.integrity = integrity(entry.panel)
    entry.validity = now


def integrity(panel: Panel) -> Tensor:
    """A number that changes when any bit of the panel does (sum of its bit patterns, modulo 2**64)."""
    total = bits.as_integers(panel.columns).sum(dtype=torch.int64)
    return total if panel.scales is None else total + bits.as_integers(panel.scales).sum(dtype=torch.int64)


def intact(entry: Entry) -> bool:
    """Whether the panel's bits are those that were stored. On host memory only."""
    return entry.integrity is None or bool((integrity(entry.panel) == entry.integrity).numpy())


def live_bytes() -> int:
    """Bytes that remembered panels and fingerprints hold."""
    total = 0
    for _, panels in list(_by_id.values()):
        for entry in panels.entries.values():
            total += entry.panel.nbytes + (entry.fingerprint.nbytes if entry.fingerprint is not None else 0)
    return total


def bias_sums_for(entry: Entry | None, bias: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """What the bias adds to every row's sums; remembered beside the weight's panel as long as the bias is the same."""
    if bias is None:
        if entry is not None and entry.bias_key is not None:
            entry.bias_key = entry.bias_sums = entry.quick = None
        return None
    if entry is None:
        return bias_sums(bias, layout)
    key = (id(bias), _epoch, version_of(bias))
    if entry.bias_key != key or entry.bias_sums is None:
        entry.bias_sums, entry.bias_key, entry.quick = bias_sums(bias, layout), key, None
    return entry.bias_sums
