"""The triton backend: the checked product in two stages on the device, its plan made on the host.

Only this module, triton_attention.py and triton_integer.py import Triton and the kernels, and only when a product asks for it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from abft import checksum, digits, floating, ledger, panels, pending, sites, threshold
from abft.backends import reference
from abft.backends.call import Call
from abft.checksum import FORMS, Groups, Layout, Memory, Panel
from abft.faults import Strike
from abft.statistics import devices
from abft.threshold import Arithmetic

if TYPE_CHECKING:
    from abft.triton_kernels.configs import Config

#: Columns of the widest tile that configs may name.
WIDEST_TILE = 256
KERNEL_PLACES = ("accumulator", "operand", "output", "checksum")  # in the order of the kernels' own numbers
KIND = {torch.float16: "16-bit", torch.bfloat16: "16-bit", torch.float32: "ieee"}
#: Parts of a panel's checksums per kind of arithmetic: what carries fp32 accuracy through the operand's type.
TF32_PARTS = 2
ARITHMETIC = {
    (80, "16-bit"): threshold.AMPERE_16,
    (90, "16-bit"): threshold.HOPPER_16,
    (100, "16-bit"): threshold.HOPPER_16,
    (80, "tf32"): threshold.AMPERE_TF32,
    (90, "tf32"): threshold.HOPPER_TF32,
    (100, "tf32"): threshold.HOPPER_TF32,
}  # fmt: skip


# --- what runs here -------------------------------------------------------------------------------


def available(device: torch.device, dtype: torch.dtype, depth: int = 0) -> str | None:
    """None if products of ``dtype`` on ``device`` run here, else the reason in words; ``depth``: K, if it is known."""
    if dtype not in KIND and dtype != torch.int8:
        return f"the kernels compute fp16, bf16, fp32 and int8, not {str(dtype)[6:]}"
    if dtype == torch.int8 and depth > digits.DEPTH:
        return f"int8 products of K > {digits.DEPTH} may leave int32, where tensor cores saturate and torch wraps; K is {depth}"
    missing = _triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the bounds of AMD's matrix units have not been measured yet"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need compute capability 8.0 or later"
        return "TRITON_INTERPRET is set: the interpreter would copy every tensor" if interpreting() else None
    if device.type != "cpu":
        return f"there are no kernels for device type {device.type!r}"
    return _interpreter_unavailable(dtype)


@lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install 'abft[triton]'"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"Triton {triton.__version__} is older than 3.6"


def interpreting() -> bool:
    """Whether the kernels were, or would be, made for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _interpreter_unavailable(dtype: torch.dtype) -> str | None:
    if not interpreting():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 numbers wrongly; fp16 and fp32 run in it"
    import triton

    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return f"the interpreter of Triton {triton.__version__} needs numpy < 2.4; there is {np.__version__}"
    return None


# --- plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything about a product's checks that its shapes, dtype, device and policy decide."""

    config: Config
    arithmetic: Arithmetic
    layout: Layout
    coefficients: threshold.Coefficients
    tiles_per_group: int

    @property
    def tf32(self) -> bool:
        return self.config.precision == "tf32"


@lru_cache(maxsize=8192)
def plan(n: int, k: int, dtype: torch.dtype, architecture: int | None, tf32: bool, form: str, group: int | None,
         rows: int | None = None, batch: int = 1, programs: int | None = None) -> Plan:  # fmt: skip
    """The plan of a product; ``architecture`` as in the table of configs, None: interpreted. ``rows`` None: as many as keep any GPU
    busy. programs: multiprocessors, by default those of a common GPU of the architecture.

    Groups, and with them the panel, do not depend on the rows: prompts of every length and decoding share it.
    """
    from abft.triton_kernels import configs, decode

    kind = "tf32" if tf32 else KIND[dtype]
    arithmetic = ARITHMETIC.get((architecture, kind), threshold.FMA_32)  # type: ignore[arg-type]
    layout = _layout(n, k, dtype, architecture, kind, form, group)
    groups = layout.groups
    height = None if rows is None else decode.height(architecture, kind, rows)
    if height is None:
        config = configs.choose(
            architecture, kind, group, n, k, groups.width, layout.columns, rows=rows, batch=batch, programs=programs
        )
    else:
        config = decode.choose(architecture, kind, height, n, layout.columns, configs.unit(architecture, kind, group, (n, k)), k)
    coefficients = threshold.coefficients(arithmetic, k, FORMS[form].kinds, groups.width)
    return Plan(config, arithmetic, layout, coefficients, -(-groups.width // config.bn))


@lru_cache(maxsize=8192)
def _layout(n: int, k: int, dtype: torch.dtype, architecture: int | None, kind: str, form: str, group: int | None) -> Layout:
    """How the panel of a weight is laid out: one object for all its products, by which the panel is found (abft.panels)."""
    from abft.triton_kernels import configs

    groups = Groups.near_equal(n, group or configs.default_group(kind), unit=configs.unit(architecture, kind, group, (n, k)))
    return Layout(groups, FORMS[form], dtype, TF32_PARTS if kind == "tf32" else floating.PARTS[dtype])


def forget_plans() -> None:
    """For whoever changes what plans are made from."""
    plan.cache_clear()
    _layout.cache_clear()


def plan_for(call: Call) -> Plan:
    """The plan of a call on its own device."""
    return plan(*situation(call))


def situation(call: Call) -> tuple[Any, ...]:
    """The arguments of ``plan`` for a call on its own device."""
    device, a = call.a.device, call.a
    architecture = None if device.type == "cpu" else family_of(device)
    tf32 = architecture is not None and a.dtype == torch.float32 and _tf32_allowed()
    rows = _rows(architecture, "tf32" if tf32 else KIND[a.dtype], a.shape[-2])
    batch = a.shape[0] if a.dim() == 3 else 1
    policy = call.policy
    return call.w.shape[-2], a.shape[-1], a.dtype, architecture, tf32, policy.panel, policy.group, rows, batch, _programs(device)


@lru_cache(maxsize=8192)
def _rows(architecture: int | None, kind: str, rows: int) -> int:
    """Rows as far as they decide about tiles, so that prompts of nearly the same length share a plan."""
    from abft.triton_kernels import decode

    return decode.height(architecture, kind, rows) or -(-rows // decode.FEW_ROWS) * decode.FEW_ROWS


@lru_cache(maxsize=64)
def _programs(device: torch.device) -> int:
    from abft.triton_kernels import configs

    return configs.multiprocessors(device)


def _tf32_allowed() -> bool:
    # Not ``allow_tf32``: it raises where the newer setting was used.
    own = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if own == "none" else own) == "tf32"  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def family_of(device: torch.device) -> int:
    from abft.triton_kernels import configs

    return configs.family(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=1024)
def column_weights(groups: Groups, kinds: tuple[checksum.Kind, ...], device: torch.device) -> Tensor:
    """w_kind[n] of every column, (kinds, N) fp32: the weights of checksum.column_weights, group after group.

    A view of memory that goes on behind it: kernels read the signs of whole tiles, unmasked.
    """
    memory = np.zeros(len(kinds) * groups.columns + WIDEST_TILE, np.float32)
    table = memory[: len(kinds) * groups.columns].reshape(len(kinds), groups.columns)
    for g in range(groups.count):
        start, stop = groups.span(g)
        for j, kind in enumerate(kinds):
            table[j, start:stop] = checksum.column_weights(kind, stop - start)
    return torch.from_numpy(memory).to(device)[: table.size].view(table.shape)


# --- panel ----------------------------------------------------------------------------------------


def build_panel(matrix: Tensor, layout: Layout, *, remember: bool = False) -> Panel:
    """The panel of W (N, K) or (B, N, K), built by a kernel. remember: W (N, K) is a weight, whose bits are compared later."""
    from abft.triton_kernels import panel as kernels

    form, width = layout.form, layout.groups.width
    weights = column_weights(layout.groups, form.kinds, matrix.device)
    coefficients = checksum.sketch_coefficients(matrix.shape[-1], matrix.device)
    with quiet():
        built = kernels.build(
            matrix.detach(), weights, coefficients, _rms(layout), width, layout.parts, layout.scaled, form.ingress, _panel_config(),
            remember=remember,
        )  # fmt: skip
    known = torch.zeros(layout.groups.count, dtype=torch.int64, device=matrix.device) if remember else None
    return Panel(layout, built.columns, built.scales, Memory(built.integrity, built.fingerprint, known))


def _build_weight_panel(matrix: Tensor, layout: Layout) -> Panel:
    return build_panel(matrix, layout, remember=matrix.dim() == 2)


def _panel_config() -> Any:
    from abft.triton_kernels import configs

    return configs.PANEL_INTERPRETED if interpreting() else configs.PANEL


@lru_cache(maxsize=1024)
def _rms(layout: Layout) -> Any:
    from abft.triton_kernels.panel import rms_of

    return rms_of(tuple(checksum.weight_rms(kind, layout.groups.width) for kind in layout.form.kinds))


# --- the product ----------------------------------------------------------------------------------


def product(call: Call, words: Tensor, site: Tensor) -> Tensor:
    """Y = A Wᵀ (+ bias), checked and, if the policy says so, repaired; nothing is read back to the host.

    words: the ledger's int64 words, on the device of ``call.a``; site: 0-d int64 tensor, read on the device.
    """
    if call.policy.level == "off" or call.role not in call.policy.roles:
        return reference.execute(call, call.strikes)
    from abft.triton_kernels import gemm, launch
    from abft.triton_kernels.residuals import Kept

    p = plan_for(call)
    panel = panel_of(call, p)
    strike_panel(call, panel)
    groups, kinds = p.layout.groups, p.layout.form.kinds
    weights = column_weights(groups, kinds, call.a.device)
    bias = None if call.bias is None else call.bias.contiguous()
    operands = gemm.Product(call.a, call.w, bias, panel.columns, weights, groups.count, p.config, numbered=_numbered(call.a.device))
    watch = _watch_of(call, p)
    judge = launch.Judge(
        _bound(p, call.a.shape[-1]), _memory(call, panel), p.layout.parts, groups.width, p.tiles_per_group,
        correct=call.policy.level == "correct", repeat=is_repeated(call), kept=None if watch is None else Kept(*watch.room),
        gate=watch.gate if watch is not None and _may_tolerate(call, p) else None,
    )  # fmt: skip
    labels, faults = labels_of(call), descriptors(call.strikes, call.a.device)
    if call.policy.timing == "deferred":
        with quiet(), host_ledger(words):  # where the workspace is full, it is judged
            return _leave(operands, judge, p, labels, words, site, faults)
    with quiet(), host_ledger(words):
        evidence = gemm.multiply(operands, faults)
        launch.check(operands, evidence, judge, words, site, labels)
    return evidence.y


# --- deferred checks ------------------------------------------------------------------------------


def _leave(operands: Any, judge: Any, p: Plan, labels: Any, words: Tensor, site: Tensor, faults: Tensor | None) -> Tensor:
    """The product, whose evidence waits in a workspace until ``pending.flush``."""
    from abft.triton_kernels import workspace

    pending.register(_HOLDER)
    kept = None if judge.kept is None else tuple(0 if sums is None else sums.data_ptr() for sums in judge.kept)
    template = _slot_template(p, labels.role, labels.dtype, labels.n, labels.k, judge.correct, judge.repeat, operands.a.device, kept)
    statistics = 0 if judge.kept is None else 1 if judge.kept.units is None else 2
    return workspace.leave(operands, judge.memory.scales, template, words, site, judge.parts, sites.CAPACITY, faults, statistics)


@lru_cache(maxsize=4096)
def _slot_template(p: Plan, role: int, dtype: int, n: int, k: int, correct: bool, repeat: bool, device: torch.device,
                   kept: tuple[int, ...] | None) -> Tensor:  # fmt: skip
    """What a slot says of every product of this kind (triton_kernels/deferred.py). kept: addresses of statistics, which never move."""
    from abft.triton_kernels import deferred

    words = np.zeros(deferred.SLOT.value, np.int64)
    record = {"role": role, "col": -1, "n": n, "k": k, "dtype": dtype, "backend": ledger.BACKEND_NAMES.index("triton")}
    for name, value in record.items():
        words[ledger.RECORD_NAMES.index(name)] = value
    words[deferred.REPEAT.value], words[deferred.CORRECT.value] = repeat, correct
    words[deferred.CHECKS_WORD.value], words[deferred.GROUPS.value] = p.layout.columns, p.layout.groups.count
    words[deferred.TILES_PER_GROUP.value], words[deferred.TILES.value] = p.tiles_per_group, -(-n // p.config.bn)
    words[deferred.LARGEST.value] = ledger.float_bits(torch.finfo(ledger.DTYPES[dtype]).max)
    for word, values in ((deferred.ACCUMULATE, p.coefficients.accumulate), (deferred.ABSOLUTE, p.coefficients.absolute)):
        words[word.value : word.value + len(values)] = [ledger.float_bits(value) for value in values]
    if kept is not None:
        words[deferred.KEPT.value : deferred.KEPT.value + len(kept)] = kept
        words[deferred.HEIGHT.value], words[deferred.MULTIPROCESSORS.value] = p.config.bm, _programs(device)
    return torch.from_numpy(words).to(device)


def _flush() -> None:
    from abft.triton_kernels import workspace

    with quiet():
        workspace.flush(host_ledger)


def _waiting() -> int:
    from abft.triton_kernels import workspace

    return workspace.waiting()


_HOLDER = pending.Holder(_flush, _waiting)


def panel_of(call: Call, p: Plan) -> Panel:
    """The panel of a call's W, remembered if W is a weight."""
    return build_panel(call.w, p.layout) if call.source is None else remembered_panel(call, p.layout, _build_weight_panel)


def remembered_panel(call: Call, layout: Layout, build: Callable[[Tensor, Layout], Panel]) -> Panel:
    """The panel of a weight, built once for each of its versions."""
    assert call.source is not None
    frozen = call.policy.weights == "frozen"
    return panels.entry_for(call.source, call.w, layout, transposed=call.transposed, frozen=frozen, build=build).panel


def strike_panel(call: Call, panel: Panel) -> None:
    """Let the call's faults that lie in a panel happen."""
    for strike in call.strikes:
        if strike.place == "panel":
            strike.hit(panel.columns)


def labels_of(call: Call) -> Any:
    """What the records of a call will say of it."""
    from abft.triton_kernels.record import Labels

    role, dtype, backend = ledger.ROLE_NAMES.index(call.role), ledger.DTYPES.index(call.a.dtype), ledger.BACKEND_NAMES.index("triton")
    return Labels(role, dtype, backend, call.rows, call.w.shape[-2], call.a.shape[-1], sites.CAPACITY)


def _memory(call: Call, panel: Panel) -> Any:
    from abft.triton_kernels.launch import Memory as Remembered

    memory = panel.memory
    assert memory is not None  # of every panel that a kernel built
    sketch = checksum.sketch_coefficients(call.w.shape[-1], call.a.device)
    return Remembered(
        panel.scales, memory.integrity, memory.fingerprint, memory.known, sketch, _rms(panel.layout), _panel_config(),
        frozen=call.policy.weights == "frozen", transposed=call.transposed,
    )  # fmt: skip


def _numbered(device: torch.device) -> bool:
    """Whether multiprocessors have numbers that device code can read."""
    return device.type == "cuda" and torch.version.hip is None


def _bound(p: Plan, k: int) -> Any:
    from abft.triton_kernels.judgement import Bound

    c = p.coefficients
    reach = 4.0 * max(k, 1) * p.layout.groups.width
    return Bound(c.accumulate, c.absolute, reach, 16.0 * math.sqrt(max(k, 1)))


def _watch_of(call: Call, p: Plan) -> devices.Watch | None:
    """To whom the kernels add this product's residuals, if its policy asks for statistics."""
    if call.policy.detector == "checksum":
        return None
    device, groups = call.a.device, p.layout.groups
    units = _programs(device) if _numbered(device) else 0
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return devices.of(
        call.site, call.role, groups.columns, call.a.shape[-1], call.a.dtype, device, groups=groups.count, tiles=p.tiles_per_group,
        units=units, rows=call.rows, capturing=capturing, weighs=_may_tolerate(call, p),
    )  # fmt: skip


def _may_tolerate(call: Call, p: Plan) -> bool:
    """Whether a harmless row may be left: by the policy, where rows are repaired, and by a panel that tells where an error is."""
    policy = call.policy
    repairs = policy.level == "correct" and policy.timing == "immediate"
    return policy.detector == "statistical" and repairs and p.layout.form.kinds == checksum.FULL.kinds


def is_repeated(call: Call) -> bool:
    """A forward product inside a backward pass: recomputation under activation checkpointing."""
    return call.role == "fprop" and torch._C._current_graph_task_id() != -1


# --- injection ------------------------------------------------------------------------------------


def descriptors(strikes: tuple[Strike, ...], device: torch.device) -> Tensor | None:
    """The faults that strike inside the kernel, (count, 12) int32 as tiles.strike reads them, or None.

    Bit operations act on the fp32 pattern of an accumulator and on the operand type's pattern elsewhere. A
    wrong operand is seen by every tile that touches columns [tile0, tile1).
    """
    rows = []
    for s in strikes:
        if s.place in KERNEL_PLACES:
            r, op = s.region, s.operation
            place = KERNEL_PLACES.index(s.place)
            tile0, tile1 = (s.tile0, s.tile1) if s.place == "operand" else (0, 2**31 - 1)
            words = (place, r.batch, r.row0, r.row1, r.col0, r.col1, r.stride, tile0, tile1, op.keep, op.flip, op.add)
            rows.append([(word + 2**31) % 2**32 - 2**31 for word in words])
    return torch.tensor(rows, dtype=torch.int32).to(device) if rows else None


# --- under the interpreter ------------------------------------------------------------------------


def quiet() -> contextlib.AbstractContextManager[Any]:
    # numpy, which the interpreter computes with, warns of every overflow that a fault is there to cause.
    return np.errstate(all="ignore") if interpreting() else contextlib.nullcontext()


@contextlib.contextmanager
def host_ledger(words: Tensor) -> Any:
    """On a host ledger, records carry the process's step and sequence numbers, like those of other backends."""
    if words.device.type != "cpu":
        yield
        return
    host = words.numpy()
    before = int(host[ledger.HEAD])
    host[ledger.STEP] = ledger._step
    yield
    ring = host[ledger.HEADER + sites.CAPACITY * ledger.COUNTERS :].reshape(ledger.RING, ledger.RECORD)
    for slot in range(before, int(host[ledger.HEAD])):
        ring[slot % ledger.RING][ledger.RECORD_NAMES.index("sequence")] = ledger.next_sequence()
