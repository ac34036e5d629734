"""Panels remembered: when the checksums of a weight are still the checksums of that weight.

A panel belongs to the *source tensor object* (it lies in that object's ``__dict__`` and dies with it; never to an
address, never to a cast or contiguous copy), to its ``_version`` where it has one (of its shards, for a weight that FSDP2
gathered), and to a process-wide *weight epoch*. The epoch is advanced by every optimizer step (fused and compiled ones leave
``_version`` alone) and by announcements: ``load_state_dict`` and ``_apply`` of protected modules, ``abft.refresh``.
Under ``weights="frozen"`` only announcements count, and only those about the weight itself.

No weak reference points to a weight: ``torch.utils.swap_tensors`` refuses tensors that have one. Panels are rebuilt
in place, in the same storage: captured graphs bake addresses.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from abft import bits, encoding
from abft.checksum import Layout, Panel
from abft.encoding import bias_sums

Build = Callable[[Tensor, Layout], Panel]


class History:
    """What was said about a tensor, so that it is not said again."""

    def __init__(self) -> None:
        self.known_faults: set[tuple[object, ...]] = set()
        self.warned_sites: set[int] = set()  # told that the weight was stale

    def new_faults(self, since: tuple[int, ...], elements: Iterable[tuple[int, ...]]) -> int:
        """How many of the elements changed since that validity had not been counted; from now on they have."""
        fresh = {(since, *element) for element in elements} - self.known_faults
        self.known_faults |= fresh
        return len(fresh)


@dataclass(frozen=True)
class RememberedBias:
    """A bias as it was: its values, what they add to every row's sums, and whose they are."""

    owner: Panels
    validity: tuple[int, ...]
    values: Tensor  # in the product's dtype
    shape: torch.Size
    sums: tuple[Tensor, Tensor]


@dataclass
class Entry:
    """A remembered panel with what is needed to tell, later, who changed: the weight or the panel."""

    panel: Panel
    dtype: torch.dtype  # of W as the product sees it
    fingerprint: bits.Fingerprint | None  # of W (N, K) as the product sees it
    integrity: Tensor | int | None  # of the panel's own bits
    validity: tuple[int, ...]
    source: Source  # what the weight itself was when the entry was made
    history: History  # not the Panels: a cycle would let panels outlive their weight
    audited: bool  # whether every use compares the weight's bits
    build: Build
    total: int | None = None  # of the weight's bits, if so
    bias: RememberedBias | None = None
    quick: Any = None  # a backend's prepared judgement, as long as panel and bias are the same
    renewal: Any = None  # how a backend fills all of this anew
    uses: int = 0


Source = tuple[torch.dtype, torch.device, torch.Size]


class Panels:
    """The panels of one weight. They lie in the weight's own ``__dict__``, so they die with it."""

    def __init__(self, source: Tensor) -> None:
        self.entries: dict[tuple[object, ...], Entry] = {}
        self.latest: tuple[Layout, bool, bool, Entry] | None = None  # asked for again far more often than not
        self.lanes: dict[str, Any] = {}  # a backend's shortcuts for calls like earlier ones, by role
        self.announced = 0  # how often somebody said that this weight changed on purpose
        self.history = History()
        self.source = id(source)  # attributes may be copied or swapped to another tensor: these are not its panels
        self._gathered = _gathered_by(source)
        _all.add(self)

    def gathered_version(self, source: Tensor) -> tuple[int, ...]:
        """The version of a weight that FSDP2 gathered, which leaves the weight's own alone: that of its shards too."""
        shard = getattr(self._gathered(), "sharded_param", None)  # type: ignore[misc]
        if shard is None:
            return (source._version,)
        return source._version, id(shard), shard._version, getattr(shard, "_local_tensor", shard)._version

    def __reduce__(self) -> tuple[Any, ...]:
        # Weights are pickled with their attributes; a file must neither hold panels nor need abft to be read.
        return OrderedDict, ()


ATTRIBUTE = "_abft_panels"
_all: weakref.WeakSet[Panels] = weakref.WeakSet()
lock = threading.RLock()  # held while what is remembered of a weight is written
_epoch = 0


def advance_epoch() -> None:
    """Any weight may have changed: tracked panels are rebuilt at their next use."""
    global _epoch
    _epoch += 1


def announce(sources: Iterable[Tensor]) -> None:
    """These weights changed on purpose: their panels, frozen ones too, are rebuilt at their next use."""
    advance_epoch()
    for source in sources:
        found = source.__dict__.get(ATTRIBUTE)
        if isinstance(found, Panels):
            found.announced += 1


def sources_of(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of a model that may have panels: its parameters, those that FSDP2 gathers in their place, and int8 buffers."""
    yield from model.parameters()
    yield from (b for b in model.buffers() if b.dtype == torch.int8)
    mine = {id(p) for p in model.parameters()}
    for shards in _fsdp_parameters():
        if id(shards.sharded_param) in mine and hasattr(shards, "_unsharded_param"):
            yield shards._unsharded_param


register_optimizer_step_post_hook(lambda *_: advance_epoch())


def _fsdp_parameters() -> Iterator[Any]:
    """FSDP2's own records of its parameters. It gathers into a tensor whose version and address never change."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference()
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            yield from getattr(group, "fsdp_params", ())


def is_shard(weight: Tensor) -> bool:
    """Whether FSDP2 holds this as the shard of a weight that it gathers for every product."""
    return any(p.sharded_param is weight for p in _fsdp_parameters())


def _gathered_by(source: Tensor) -> weakref.ref[Any] | None:
    return next((weakref.ref(p) for p in _fsdp_parameters() if getattr(p, "_unsharded_param", None) is source), None)


def validity(source: Tensor, owner: Panels, frozen: bool) -> tuple[int, ...]:
    """What must be unchanged for a panel to be believed. The address is here only to notice ``.data =`` swaps."""
    if frozen:
        return (owner.announced,)
    if owner._gathered is None:
        try:
            return _epoch, source.data_ptr(), source._version
        except RuntimeError:  # an inference tensor has none (asking first would cost every call)
            return _epoch, source.data_ptr(), 0
    return (_epoch, source.data_ptr(), *owner.gathered_version(source))


def panels_of(source: Tensor) -> Panels:
    """The panels of a weight; made if need be."""
    attributes = source.__dict__
    found = attributes.get(ATTRIBUTE)
    if type(found) is Panels and found.source == id(source):
        return found
    with lock:
        made = attributes[ATTRIBUTE] = Panels(source)
        return made


def forget(sources: Iterable[Tensor]) -> None:
    """Leave no trace on these weights."""
    for source in sources:
        source.__dict__.pop(ATTRIBUTE, None)


def entry_for(source: Tensor, matrix: Tensor, layout: Layout, *, transposed: bool, frozen: bool, build: Build) -> Entry:
    """The valid panel entry of ``matrix`` (N, K), which is ``source`` seen as the product sees it; built if need be."""
    panels = panels_of(source)
    latest = panels.latest
    now = validity(source, panels, frozen)
    if (
        latest is not None
        and latest[0] is layout
        and latest[1] is transposed
        and latest[2] is frozen
        and latest[3].validity == now
        and latest[3].dtype is matrix.dtype
        and latest[3].panel.columns.shape[-1] == matrix.shape[-1]
    ):
        return latest[3]
    key = (layout, transposed, matrix.dtype, matrix.device, tuple(matrix.shape), frozen)
    entry = panels.entries.get(key)
    if entry is None or entry.validity != now:
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            # Outside inference mode: an inference tensor could not be written in place later, outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return entry_for(source, matrix, layout, transposed=transposed, frozen=frozen, build=build)
        with lock:
            entry = panels.entries.get(key)  # another thread may have been faster
            if entry is None:
                kind = (source.dtype, source.device, source.shape)
                for old in [k for k, e in panels.entries.items() if e.source != kind]:
                    del panels.entries[old]  # the weight was moved or cast since
                    panels.lanes.clear()
                audited = _is_audited(matrix, frozen)
                entry = Entry(build(matrix, layout), matrix.dtype, None, None, now, kind, panels.history, audited, build)
                _remember(entry, matrix, now)
                panels.entries[key] = entry
            elif entry.validity != now:
                rebuild(entry, matrix, now, build)
    panels.latest = (layout, transposed, frozen, entry)
    return entry


def rebuild(entry: Entry, matrix: Tensor, now: tuple[int, ...], build: Build) -> None:
    """Fill the entry from the present weight, in the same storage."""
    panel = entry.panel
    if panel.memory is not None or encoding.encode(matrix.detach(), panel.layout, panel) is None:
        for old, new in zip(_tensors(panel), _tensors(build(matrix, panel.layout)), strict=True):
            old.copy_(new)
    entry.bias = entry.quick = None
    _remember(entry, matrix, now)


def _tensors(panel: Panel) -> list[Tensor]:
    memory = panel.memory
    held = (panel.columns, panel.scales, *((memory.integrity, memory.fingerprint, memory.known) if memory is not None else ()))
    return [t for t in held if t is not None]


def _remember(entry: Entry, matrix: Tensor, now: tuple[int, ...]) -> None:
    # A panel with a memory of its own was built by kernels, which compare it on the device.
    here = entry.panel.memory is None
    entry.fingerprint = bits.fingerprint(matrix) if here and matrix.dim() == 2 else None
    entry.integrity = integrity(entry.panel) if here else None
    entry.total = bits.total(matrix) if entry.audited else None
    entry.validity = now


def _is_audited(matrix: Tensor, frozen: bool) -> bool:
    # A product that arrives rounded to half precision hides small changes of its weight. On a host its bits can be
    # looked at every time: a fraction of what the product costs.
    return frozen and matrix.device.type == "cpu" and matrix.dtype in (torch.float16, torch.bfloat16)


def unchanged(entry: Entry, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether an audited weight and its bias have the remembered bits."""
    if not entry.audited:
        return True
    if bias is not None and entry.bias is not None and bits.total(bias) != bits.total(entry.bias.values):
        return False
    return bits.total(matrix) == entry.total


def integrity(panel: Panel) -> Tensor | int:
    """A number that changes when any bit of the panel does (sum of its bit patterns, modulo 2**64)."""
    if panel.columns.is_cpu and panel.scales is None and panel.columns.dtype == torch.float32:
        return bits.total_of_words(panel.columns)
    total = bits.as_integers(panel.columns).sum(dtype=torch.int64)
    return total if panel.scales is None else total + bits.as_integers(panel.scales).sum(dtype=torch.int64)


def intact(entry: Entry) -> bool:
    """Whether the panel's bits are those that were stored. On host memory only."""
    return entry.integrity is None or bool(np.asarray(integrity(entry.panel) == entry.integrity))


def fingerprint_bytes(entry: Entry) -> int:
    """Bytes by which changed bits are noticed and named, beside the panel itself."""
    here = entry.fingerprint.nbytes if entry.fingerprint is not None else 0
    return here + (entry.panel.memory.nbytes if entry.panel.memory is not None else 0)


#: Of a tracked weight, what a fault in memory may touch at once (decision 5): rows and columns.
_FRAGMENT = 16, 8


def changed_elements(source: Tensor) -> list[tuple[int, int, int]] | None:
    """(row, column, remembered bit pattern) of every element whose bits differ from what valid panels remember; None: they
    differ, but cannot be named. Reads the device; for use on request only."""
    panels = source.__dict__.get(ATTRIBUTE)
    found: list[tuple[int, int, int]] = []
    if not isinstance(panels, Panels) or panels.source != id(source):
        return found
    for key, entry in list(panels.entries.items()):
        transposed, frozen = bool(key[1]), bool(key[5])
        if entry.dtype != source.dtype or entry.validity != validity(source, panels, frozen):
            continue  # of a cast, or of a weight that was edited since
        matrix = source.detach().mT if transposed else source.detach()
        for start, block, then in _fingerprinted(entry, matrix):
            now = bits.fingerprint(block)
            if not bool(bits.changed_columns(now, then).any().cpu().numpy()):
                continue
            elements = bits.changed_elements(block, now, then)
            if elements is None:
                return None
            # Changes together may look like another one; the panel of the restored matrix is then not the remembered one.
            named = [bits.ChangedElement(start + e.row, e.column, e.bits) for e in elements]
            fresh = entry.build(bits.restored(matrix, named), entry.panel.layout)
            if not bool(bits.same(fresh.columns, entry.panel.columns).all().cpu().numpy()):
                return None
            found += [(e.column, e.row, e.bits) if transposed else (e.row, e.column, e.bits) for e in named]
            if not frozen and len({(row // _FRAGMENT[0], column // _FRAGMENT[1]) for row, column, _ in found}) > 1:
                return None  # wider than a fault in memory: an edit
    changed = sorted(set(found))
    return changed if len({(row, column) for row, column, _ in changed}) == len(changed) else None


def _fingerprinted(entry: Entry, matrix: Tensor) -> Iterator[tuple[int, Tensor, bits.Fingerprint]]:
    """(first row, rows, their remembered fingerprint) of the parts of W that were fingerprinted apart."""
    if entry.fingerprint is not None:
        yield 0, matrix, entry.fingerprint
    memory, groups = entry.panel.memory, entry.panel.layout.groups
    if memory is not None and memory.fingerprint is not None:
        for g in range(groups.count):
            start, stop = groups.span(g)
            planes = memory.fingerprint[g]  # plain, weighted and squared of the low halves, then of the high ones
            yield start, matrix[start:stop], bits.Fingerprint(planes[0::3], planes[1::3])


def live_bytes() -> int:
    """Bytes that remembered panels, fingerprints and biases hold."""
    total = 0
    for panels in list(_all):
        for entry in panels.entries.values():
            total += entry.panel.nbytes + fingerprint_bytes(entry)
            total += entry.bias.values.nbytes if entry.bias is not None else 0
    return total


def bias_sums_for(
    entry: Entry | None, source: Tensor | None, bias: Tensor | None, layout: Layout, *, frozen: bool
) -> tuple[Tensor, Tensor] | None:
    """What the bias adds to every row's sums; remembered beside the weight's panel as long as the bias is the same.

    ``bias`` is the parameter ``source`` as the product sees it, or has none; then it is not remembered.
    """
    if entry is None or bias is None or source is None:
        if entry is not None and (entry.bias is not None or bias is not None):
            entry.bias = entry.quick = None
        return None if bias is None else bias_sums(bias, layout)
    owner = panels_of(source)
    now = validity(source, owner, frozen)
    kept = entry.bias
    if kept is None or kept.owner is not owner or kept.validity != now or kept.values.dtype != bias.dtype:
        kept = remember_bias(entry, owner, now, bias)
    return kept.sums


def remember_bias(entry: Entry, owner: Panels, now: tuple[int, ...], bias: Tensor) -> RememberedBias:
    """Take the bias as it is now for the right one."""
    if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return remember_bias(entry, owner, now, bias)
    kept = RememberedBias(owner, now, bias.clone(), bias.shape, bias_sums(bias, entry.panel.layout))
    entry.bias, entry.quick = kept, None
    return kept
