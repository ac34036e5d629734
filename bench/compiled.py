"""Compile kernels for GPUs that need not be there.

The launchers run with CPU tensors while the launches themselves are recorded; what would have been launched, with Triton's own
specialisation of its arguments, is what is compiled. Triton's wheel carries ptxas and cuobjdump. Triton must not interpret.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from abft import ledger, policy, threshold
from abft.attention.pages import Pages
from abft.backends import triton as backend
from abft.backends import triton_attention, triton_attention_backward, triton_decode, triton_integer
from abft.backends.call import Call
from abft.checksum import Panel
from abft.faults import BitOperation, Region, Strike
from bench import kernel_text, twin

#: Operand types of products, as the audit names them.
OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def config(self) -> dict[str, Any]:
        """What the launch was compiled with, but for types and alignments."""
        asked = {k: v for k, v in self.kwargs.items() if k.isupper() or k in ("num_warps", "num_stages")}
        return {k: v if v is None or isinstance(v, (int, float, str)) else type(v).__name__ for k, v in asked.items()}


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are listed, not run."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launches_of(operands: str, architecture: int, *, m: int = 4096, n: int = 4096, k: int = 4096, form: str = "full",
                group: int | None = None, transposed: bool = False, bias: bool = True, strike: bool = False,
                batch: int | None = None, timing: str = "immediate", candidate: int = 0, detector: str = "checksum",
                numbered: bool = True) -> list[Launch]:  # fmt: skip
    """The launches of one checked product with a weight, and before the product its unchecked twin (of int8 and of deferred checks
    there is none); of a deferred check also its judgement.

    candidate: which config of the table, whatever the shape; none is launched if there are fewer. numbered: multiprocessors have
    numbers that device code can read.
    """
    from abft.triton_kernels import configs, decode, gemm, workspace

    kind = operands if operands in ("tf32", "ieee", "int8") else "16-bit"
    if candidate:
        table = configs.CONFIGS[architecture, kind][candidate : candidate + 1]
        if not table:
            return []
        # Alone in the table, it would be the unit of groups, too; every candidate's columns divide the first one's.
        unit = configs.unit(architecture, kind, group)
        with mock.patch.dict(configs.CONFIGS, {(architecture, kind): table}), mock.patch.object(configs, "unit", lambda *_: unit):
            backend.forget_plans()
            found = launches_of(operands, architecture, m=m, n=n, k=k, form=form, group=group, transposed=transposed, bias=bias,
                                strike=strike, batch=batch, timing=timing, detector=detector, numbered=numbered)  # fmt: skip
        backend.forget_plans()
        return found

    lead = () if batch is None else (batch,)
    dtype = OPERANDS[operands]
    a, w = torch.empty(*lead, m, k, dtype=dtype), torch.empty(*lead, n, k, dtype=dtype)
    if transposed:
        a, w = torch.empty(*lead, k, m, dtype=dtype).mT, torch.empty(*lead, k, n, dtype=dtype).mT
    strikes = (Strike("accumulator", Region(0, 1, 0, 1), BitOperation(flip=1)),) if strike else ()
    if operands == "int8":
        return _integer_launches(Call(a, w, None, None, False, "fprop", policy.Policy(panel=form, group=group), 0, strikes), architecture)
    source = torch.nn.Parameter(w, requires_grad=False) if batch is None else None
    call = Call(a, w, torch.empty(n, dtype=dtype) if bias else None, source, False, "fprop",
                policy.Policy(panel=form, group=group, timing=timing, detector=detector), 0, strikes)  # type: ignore[arg-type]  # fmt: skip
    rows = m if m <= decode.FEW_ROWS else None
    plan = backend.plan(n, k, dtype, architecture, operands == "tf32", form, group, rows)
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    checked = gemm.multiply

    def both(product: gemm.Product, *faults: Any) -> gemm.Evidence:
        twin.multiply(product)
        return checked(product, *faults)

    on_the_device = mock.patch.multiple(backend, plan_for=lambda call: plan, _numbered=lambda device: numbered)
    alone = mock.patch.object(workspace, "_open", {})
    with recorded() as launches, on_the_device, alone, mock.patch.object(gemm, "multiply", both):
        backend.product(call, words, site)
        backend._flush()
    return launches


def weighing_launches(operands: str, architecture: int, *, numbered: bool = True) -> list[Launch]:
    """Of a product whose residuals are statistics the one launch that others have not: what tells whether a row is harmless."""
    found = launches_of(operands, architecture, detector="statistical", numbered=numbered)
    return [launch for launch in found if launch.name == "weigh"]


def _integer_launches(call: Call, architecture: int) -> list[Launch]:
    """Those of a checked int8 product; its panel is built by torch."""
    plan = triton_integer.plan(call.w.shape[0], architecture, call.policy.panel, call.policy.group)
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    panel = Panel(plan.layout, torch.empty(plan.layout.columns, call.w.shape[1], dtype=torch.int8), None)
    of_this_plan = mock.patch.multiple(triton_integer, plan_for=lambda call: plan, panel_of=lambda call, plan: panel)
    with recorded() as launches, of_this_plan:
        triton_integer.product(call, words, site)
    return launches


#: What a model may ask of attention besides: (dtype of a mask, window, soft-cap, dropout). What the interpreter runs need not compile.
ASKED: dict[str, tuple[torch.dtype | None, int | None, float | None, float]] = {
    "": (None, None, None, 0.0), "everything": (torch.bool, 1024, 30.0, 0.1), "added": (torch.float32, None, None, 0.0),
    "packed": (None, None, None, 0.0),
}  # fmt: skip
#: Of "packed": sequences, and tokens of the longest.
PACKED, LONGEST = 7, 1024


def attention_launches(operands: str, architecture: int, *, columns: int = 128, length: int = 4096, form: str = "full", causal: bool = True,
                       asked: str = "", strike: bool = False, numbered: bool = True) -> list[Launch]:  # fmt: skip
    """The launches of one checked attention of 2 × 8 heads, two to each of keys, and before it its unchecked twin.

    columns: of every head. asked: of ASKED; "packed": sequences one after the other, without a twin. numbered: as in ``launches_of``.
    """
    from abft.triton_kernels import attention_forward, configs

    strikes = tuple((role, Strike("accumulator", Region(0, 1, 0, 1), BitOperation(flip=1))) for role in ("qk", "pv")) if strike else ()
    call = replace(_attention(operands, columns, length, form, causal, asked), strikes=strikes)
    kind = "ieee" if operands == "ieee" else "16-bit"
    config = configs.choose_attention(architecture, kind, attention_forward.padded(columns), triton_attention.laden(call))
    choice = config, backend.ARITHMETIC.get((architecture, kind), threshold.FMA_32)
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    on_the_device = mock.patch.object(backend, "_numbered", lambda device: numbered)
    with recorded() as launches, on_the_device, mock.patch.object(triton_attention, "_choice", lambda *_: choice):
        if call.sequences is None:
            twin.attend(triton_attention.plan(call))
        triton_attention.attend(call, words, site)
    return launches


def attention_gradient_launches(operands: str, architecture: int, *, columns: int = 128, length: int = 4096, causal: bool = True,
                                asked: str = "", strike: bool = False, numbered: bool = True) -> list[Launch]:  # fmt: skip
    """The launches of the gradient of such an attention, after those of its unchecked twin: the same kernels without checks."""
    call = _attention(operands, columns, length, "full", causal, asked)
    given = triton_attention_backward.Given(call.q, call.q, torch.empty(2, *call.q.shape[:-1]))
    hits = tuple(
        triton_attention_backward.Hit(Strike(place, Region(0, 1, 0, 1), BitOperation(flip=1)))  # type: ignore[arg-type]
        for place in (("S", "dV") if strike else ())
    )
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    with recorded() as launches, mock.patch.object(backend, "family_of", lambda device: architecture), _as_if_on_a_gpu():
        for roles in (frozenset(), call.roles) if call.sequences is None else (call.roles,):
            triton_attention_backward.gradients(replace(call, roles=roles), given, words, site, hits)
    return launches


#: What may be asked of decoding besides: (tokens of a page, window, soft-cap).
ASKED_OF_DECODING: dict[str, tuple[int, int | None, float | None]] = {"": (64, None, None), "everything": (32, 1024, 30.0)}


def decoding_launches(operands: str, architecture: int, *, columns: int = 128, group: int = 8, asked: str = "", strike: bool = False,
                      numbered: bool = True) -> list[Launch]:  # fmt: skip
    """The launches of one checked attention of 4 sequences over pages, 2 heads of keys with ``group`` queries each, after those of its
    unchecked twin: the same kernels without checks; and of appending to the pages. numbered: all the same to them."""
    from abft.triton_kernels import attention_decode

    dtype, (length, window, softcap) = OPERANDS[operands], ASKED_OF_DECODING[asked]
    strikes = tuple((role, Strike("accumulator", Region(0, 1, 0, 1), BitOperation(flip=1))) for role in ("qk", "pv")) if strike else ()
    pages = Pages.empty(16, length, 2, columns, columns, dtype, torch.device("cpu"))
    call = triton_decode.DecodeCall(
        torch.empty(4, 2, group, 1, columns, dtype=dtype), pages.tensors(),
        torch.zeros(4, 512, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), columns**-0.5, window, softcap, policy.Policy(),
        frozenset({"qk", "pv"}), strikes,
    )  # fmt: skip
    new = torch.empty(4, 2, 1, columns, dtype=dtype)
    arithmetic = backend.ARITHMETIC.get((architecture, "ieee" if operands == "ieee" else "16-bit"), threshold.FMA_32)
    words, site = torch.zeros(ledger.WORDS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    with recorded() as launches, mock.patch.object(triton_decode, "_arithmetic", lambda *_: arithmetic):
        attention_decode.unchecked(triton_decode.plan(call))
        triton_decode.attend(call, words, site)
        triton_decode.append(call.pages, new, new, call.table, call.lengths, None)
    return launches


def _attention(operands: str, columns: int, length: int, form: str, causal: bool, asked: str) -> triton_attention.AttentionCall:
    dtype, (masked, window, softcap, dropout) = OPERANDS[operands], ASKED[asked]
    batch = 1 if asked == "packed" else 2
    q, k = torch.empty(batch, 4, 2, length, columns, dtype=dtype), torch.empty(batch, 4, length, columns, dtype=dtype)
    mask = None if masked is None else torch.empty(2, 1, 1, length, length, dtype=masked)
    cu = torch.zeros(PACKED + 1, dtype=torch.int32)
    return triton_attention.AttentionCall(
        q, k, torch.empty_like(k), mask, 2**40, columns**-0.5, causal, 0, window, softcap, dropout, policy.Policy(panel=form),  # type: ignore[arg-type]
        frozenset({"qk", "pv"}), sequences=triton_attention.Sequences(cu, cu, LONGEST, LONGEST) if asked == "packed" else None,
    )  # fmt: skip


def _as_if_on_a_gpu() -> contextlib.AbstractContextManager[Any]:
    """Host tensors choose what a GPU's would."""
    return mock.patch.object(triton_attention_backward, "on_host", lambda device: False)


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The compiled kernel of a recorded launch, specialised as Triton would at that launch."""
    return _compile(launch, _nvidia(architecture))


def compile_for_amd(launch: Launch, name: str) -> Any:
    """The same for one of AMD's GPUs; a launch without descriptors. What only NVIDIA's assembler knows is left out."""
    return _compile(_as_amd_takes_it(launch), _amd(name))


def given(launch: Launch, architecture: int) -> str:
    """All that the machine code follows from, besides Triton's version: the kernel in Triton's IR, inlined and simplified, without
    names or lines, for a target, and the options of its compilation. Takes a small part of the time of compiling."""
    return _given(launch, _nvidia(architecture))


def given_for_amd(launch: Launch, name: str) -> str:
    """The same of one of AMD's GPUs."""
    return _given(_as_amd_takes_it(launch), _amd(name))


def text(launch: Launch, architecture: int) -> str:
    """What that follows from (kernel_text.py): found at once."""
    return _text(launch, _nvidia(architecture))


def text_for_amd(launch: Launch, name: str) -> str:
    """The same of one of AMD's GPUs."""
    return _text(_as_amd_takes_it(launch), _amd(name))


def _nvidia(architecture: int) -> GPUTarget:
    return GPUTarget("cuda", architecture, 32)


def _amd(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64)


def _as_amd_takes_it(launch: Launch) -> Launch:
    kwargs = {k: v for k, v in launch.kwargs.items() if k != "maxnreg"} | {"num_stages": 2}
    return replace(launch, kwargs=kwargs)


def _specialised(launch: Launch, target: GPUTarget) -> tuple[Any, ASTSource, dict[str, Any]]:
    """(compiler, source, options) of a launch, as Triton's own launcher finds them."""
    compiler = make_backend(target)
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
    bound, specialization, options = binder(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = launch.kernel._pack_args(compiler, launch.kwargs, bound, specialization, options)
    return compiler, ASTSource(launch.kernel, signature, constexprs, attrs), options.__dict__


def _compile(launch: Launch, target: GPUTarget) -> Any:
    _, source, options = _specialised(launch, target)
    return triton.compile(source, target=target, options=options)


def _given(launch: Launch, target: GPUTarget) -> str:
    """The first steps of ``triton.compile``."""
    compiler, source, options = _specialised(launch, target)
    parsed, context, stages = compiler.parse_options(options | source.parse_options()), ir.context(), {}
    ir.load_dialects(context)
    compiler.load_dialects(context)
    module = source.make_ir(target, parsed, compiler.get_codegen_implementation(parsed), compiler.get_module_map(), context)
    compiler.add_stages(stages, parsed, source.language)
    return f"{stages['ttir'](module, {}).str_nodebug()}\n{target}\n{parsed.hash()}"


def _text(launch: Launch, target: GPUTarget) -> str:
    compiler, source, options = _specialised(launch, target)
    parsed = compiler.parse_options(options | source.parse_options())
    return f"{kernel_text.text_of(launch.kernel)}\n{kernel_text.specialised(source)}\n{target}\n{parsed.hash()}"


def sass(compiled: Any) -> str:
    """The machine code of a compiled kernel, as text."""
    return _cuobjdump(compiled, "-sass")


def usage(compiled: Any) -> dict[str, int]:
    """Registers of a thread (REG), bytes of its frame (STACK) and of its other local memory (LOCAL)."""
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump(compiled, "-res-usage"))}


def _cuobjdump(compiled: Any, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
