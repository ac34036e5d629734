"""Write the documentation's tables, and its figure of times, from the measurements: python docs/tables.py

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->`` in a page; everything between the marks is
replaced. A table whose measurement does not exist yet says so.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.S)
ARITHMETICS = ("fp32", "tf32", "bf16", "fp16", "fp64")

Record = dict[str, Any]


# --- result files -----------------------------------------------------------------------------------


class File:
    """One file of results, JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        lines = path.read_text(encoding="utf-8").splitlines()
        # The last line of a run that was stopped may be cut short.
        self.records: list[Record] = [json.loads(line) for line in lines if line.endswith("}")]

    def kind(self, kind: str) -> list[Record]:
        return [r for r in self.records if r.get("kind") == kind]

    @property
    def summary(self) -> Record:
        """The last summary; nothing while a run is unfinished."""
        return next(iter(reversed(self.kind("summary"))), {})

    @property
    def arithmetic(self) -> str:
        return "-".join(p for p in self.name.split("-") if p in (*ARITHMETICS, "ampere")) or "fp32"

    @property
    def place(self) -> str:
        """A key of WHERE."""
        return next((p for p in ("interpreted", "emulated") if p in self.name), "cpu")

    @property
    def machine(self) -> str:
        s = next(iter(reversed(self.kind("stamp"))), {})
        if s.get("gpu") and self.name.startswith(("time-", "scaling-")) and "-cpu" not in self.name:
            return f"{s['gpu'].split(',')[0]}, torch {release(s.get('torch', '?'))}"
        threads = s.get("threads", 1)
        vectors = f" ({s['vectors']})" if "vectors" in s else ""
        return f"{s.get('cpu', '?')}{vectors}, {threads} thread{'s' * (threads != 1)}, torch {release(s.get('torch', '?'))}"

    def link(self, page: str, text: str = "") -> str:
        return f"[{text or self.name}]({os.path.relpath(self.path, (ROOT / page).parent)})"


def files(pattern: str) -> list[File]:
    """The result files of that name, fp32 first."""

    def order(f: File) -> tuple[str, int]:
        first = f.arithmetic.split("-")[0]
        return f.name.replace(f.arithmetic, ""), ARITHMETICS.index(first)

    return sorted((File(path) for path in RESULTS.glob(f"{pattern}.jsonl")), key=order)


def finished(pattern: str) -> list[File]:
    return [f for f in files(pattern) if f.summary]


def release(version: str) -> str:
    return version.split("+")[0]


# --- writing ----------------------------------------------------------------------------------------


def table(header: str, rows: Iterable[Iterable[object]], missing: str = "") -> str:
    """Markdown; ``header`` as it stands in the table, and instead of an empty table the command that fills it."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if not body:
        return f"*Not measured yet: `{missing}`.*\n"
    return "\n".join([f"| {header} |", "|" + "---|" * (header.count("|") + 1), *body]) + "\n"


def share(part: float, whole: float) -> str:
    """A percentage that says 100 only if nothing is missing."""
    if not whole:
        return "–"
    digits = next((d for d in range(1, 6) if float(f"{100 * part / whole:.{d}f}") < 100), 6)
    return "100 %" if part == whole else f"{100 * part / whole:.{digits}f} %"


def small(value: Any) -> str:
    """A small number in two digits: 2.6e-7."""
    value = float(value)
    if value in (0.0, float("inf")):
        return "–"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


#: What computed: torch on a CPU, the kernels in Triton's interpreter, or their arithmetic on an emulated unit.
WHERE = {"cpu": "CPU", "interpreted": "kernels, interpreted", "emulated": "emulated tensor core"}


# --- silence ----------------------------------------------------------------------------------------


def clean(page: str) -> str:
    def row(f: File) -> tuple[object, ...]:
        s = f.summary
        worst = max(s["worst"].values()) if isinstance(s["worst"], dict) else s["worst"]
        where = "CPU, MiniLM" if "minilm" in f.name else WHERE[f.place]
        return (
            f"{where}, {f.arithmetic}", f"{s['rows']:,}", f"{s['alarms']:,}", small(s["rate_below"]), f"{worst:.2f}",
            f.machine, f.link(page),
        )  # fmt: skip

    found = finished("clean-*")
    header = "arithmetic | rows | alarms | rate below | worst | machine | file"
    return table(header, map(row, found), "python -m bench clean")


def emulated_kernels(page: str) -> str:
    def row(f: File, r: Record) -> tuple[object, ...]:
        what = {"linear": "layer", "attention": "attention"}[r["product"]]
        return (
            f.arithmetic, f"{what}, {r['part']}", f"{r['rows']:,}", f"{r['alarms']:,}", small(r["rate_below"]), f"{r['worst']:.2f}",
            f.machine, f.link(page),
        )  # fmt: skip

    rows = [row(f, r) for f in finished("kernels-emulated-*") for r in f.kind("summary")[-4:]]
    header = "operands | product | rows | alarms | rate below | worst | machine | file"
    return table(header, rows, "python -m bench emulated-kernels")


# --- faults -----------------------------------------------------------------------------------------

PLACES = {
    "accumulator": "accumulator",
    "output": "output, after rounding",
    "operand": "operand tile",
    "checksum": "the check's accumulators",
    "panel": "panel",
    "weight": "weight in memory, one element",
    "weight-multi": "weight in memory, several elements",
}


def campaign(page: str) -> str:
    def rows() -> Iterator[tuple[object, ...]]:
        for f in (*finished("faults-reference-*"), *finished("faults-interpreted-*")):
            harm = small(f.summary["harmful_from"])
            for place, s in f.summary["places"].items():
                if place in PLACES and s["trials"]:
                    yield (
                        f"{WHERE[f.place]}, {f.arithmetic}", PLACES[place], f"{s['trials']:,}", f"{s['harmful']:,} (≥ {harm})", _found(s),
                        small(s["largest_missed"]), f"{share(s['repaired'], s['detected'])} of {s['detected']:,}",
                        share(s["located_finite"], s["single_finite"]), s["false_alarms"], f.link(page),
                    )  # fmt: skip

    header = "where | place | faults | harmful | of these detected | largest missed | repaired, bit-equal | located"
    header += " | false alarms | file"
    return table(header, rows(), "python -m bench campaign")


def _found(s: Record) -> str:
    if not s["harmful"]:
        return "–"
    sys.path.insert(0, str(ROOT))
    from bench import intervals

    # Again from the counts, and cut off: rounded, a lower limit would promise too much.
    limit = math.floor(1e4 * intervals.lower_limit(s["harmful_detected"], s["harmful"])) / 100
    return f"{share(s['harmful_detected'], s['harmful'])} (at least {limit:.2f} %)"


#: How the kernels of a fault campaign ran, by what the file's name says.
KERNELS = {"emulated": "on emulated tensor cores", "triton": "on a GPU", "interpreted": "interpreted"}


def attention_faults(page: str) -> str:
    def row(f: File, r: Record) -> tuple[object, ...]:
        kind = next((kind for kind in KERNELS if kind in f.name), None)
        where = f"kernels, {f.arithmetic} {KERNELS[kind]}" if kind else "CPU, fp32"
        where = f"over pages: {where}" if "decode" in f.name else where
        return (
            where, r["key"], f"{r['trials']:,}", f"{r['harmful']:,}", _found(r), small(r["largest_missed"]),
            f"{share(r['repaired_bit_equal'], r['detected'])} of {r['detected']:,}", r["false_alarms"], f.link(page),
        )  # fmt: skip

    rows = [row(f, r) for f in files("attention-faults*") for r in f.kind("place")]
    header = "where | struck | faults | harmful (≥ 1e-3) | of these detected | largest missed | repaired, bit-equal | false alarms | file"
    return table(header, rows, "python -m bench attention-faults")


EMULATED = {
    "accumulator": "final accumulator",
    "half-way": "accumulator half-way along K",
    "operand": "operand tile",
    "weight": "weight in memory",
    "one element": "of the accumulators: one wrong element",
    "several elements": "of the accumulators: several",
}


def emulated_faults(page: str) -> str:
    def rows() -> Iterator[tuple[object, ...]]:
        for f in finished("faults-emulated-*"):
            for place, s in f.summary["table"].items():
                if place in EMULATED and s["trials"]:
                    yield (
                        f.arithmetic, EMULATED[place], f"{s['trials']:,}", f"{s['harmful']:,}", _found(s),
                        share(s["harmful_detected_e_one"], s["harmful"]), small(s["largest_missed"]), f.link(page),
                    )  # fmt: skip

    header = "unit | place | faults | harmful (≥ 1e-3) | of these detected | by ε and ones alone | largest missed"
    header += " | file"
    return table(header, rows(), "python -m bench emulated-faults")


# --- floors -----------------------------------------------------------------------------------------

SHAPES = ((384, 384), (1536, 384), (4096, 512), (4096, 4096), (4096, 16384))


def _plan(arithmetic: str, n: int, k: int, place: str) -> Any:
    """The plan of a product in an arithmetic as tables name it, ``bf16``, ``bf16-ampere``, ``tf32``, at a place of WHERE."""
    sys.path.insert(0, str(ROOT))
    import torch

    from abft.backends import reference, triton

    name, _, generation = arithmetic.partition("-")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(name, torch.float32)
    if place == "emulated":
        return triton.plan(n, k, dtype, 80 if generation == "ampere" else 90, name == "tf32", "full", None)
    if place == "interpreted":
        return triton.plan(n, k, dtype, None, False, "full", None)
    return reference.plan(n, k, dtype, "full", None)


def _expected(p: Any, k: int) -> float:
    from abft import threshold

    return threshold.expected_floor(p.arithmetic, k, p.layout.groups)


def _floor(arithmetic: str, place: str) -> str:
    """The size from which 99 % of single deviations are found, K = 512; measured, else expected."""
    for _, r in _measured_floors():
        same = r["dtype"] == arithmetic and ("emulated" if r["backend"] == "emulated" else "cpu") == place
        if same and r["k"] == 512 and r["data"] == "gauss":
            return f"{arithmetic} {small(r['99%_found'])}"
    return f"{arithmetic} {small(_expected(_plan(arithmetic, 1024, 512, place), 512))} (expected)"


def expected_floors(page: str) -> str:
    """From the package's own constants; needs no measurement."""
    units = [("kernels, Hopper or Blackwell, bf16", "bf16", "emulated"), ("kernels, Ampere, bf16", "bf16-ampere", "emulated")]
    units += [("kernels, Hopper, tf32", "tf32", "emulated")]
    units += [(f"CPU, {name}", name, "cpu") for name in ("fp32", "fp16", "bf16")]

    def cell(name: str, place: str, n: int, k: int) -> str:
        p = _plan(name, n, k, place)
        from abft import threshold

        width = p.layout.groups.width
        return f"{small(_expected(p, k))} (κ {threshold.kappa(p.arithmetic, k, width=width):.0f}, G {width})"

    header = " | ".join(["", *(f"N {n}, K {k}" for n, k in SHAPES)])
    return table(header, [(text, *(cell(name, place, n, k) for n, k in SHAPES)) for text, name, place in units])


SIZES = ("half_found", "99%_found", "largest_missed")


def floors(page: str) -> str:
    """Two depths of a width of 1024; the file has more."""

    def row(f: File, r: Record, worst: Record) -> tuple[object, ...]:
        where = f"emulated {r['dtype']}" if r["backend"] == "emulated" else f"CPU, {r['dtype']}"
        sizes = (small(data[name]) for data in (r, worst) for name in SIZES)
        return where, r["k"], r["group"], small(r["expected"]), *sizes, f.link(page)

    measured = [(f, r) for f, r in _measured_floors() if r["k"] in (512, 4096)]
    dominated = {(r["backend"], r["dtype"], r["k"]): r for _, r in measured if r["data"] != "gauss"}
    pairs = [(f, r, dominated.get((r["backend"], r["dtype"], r["k"]))) for f, r in measured if r["data"] == "gauss"]
    rows = [row(f, r, worst) for f, r, worst in pairs if worst]
    header = "arithmetic | K | G | expected | half found | 99 % found | largest missed"
    header += " | half, one output dominates | 99 % | largest missed | file"
    return table(header, rows, "python -m bench floors")


def _measured_floors() -> list[tuple[File, Record]]:
    return [(f, r) for f in files("floors*") for r in f.kind("floor") if r["n"] == 1024]


# --- cost -------------------------------------------------------------------------------------------


def host(page: str) -> str:
    def row(f: File, r: Record) -> tuple[object, ...]:
        low, high = r["quartiles"]
        times = f"{r['one_us']:.1f} µs", f"{r['other_us']:.1f} µs", f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})"
        return r["name"], *times, f.machine, f.link(page)

    header = "16 × 384 × 384 | without | with abft | ratio (quartiles) | machine | file"
    return table(header, [row(f, r) for f in files("host*") for r in f.kind("host")], "python -m bench host")


def times(page: str) -> str:
    """Every case of the timed layers, models and steps: abft and repetition over torch, beside what the harness itself varies by."""

    def row(f: File, case: str) -> tuple[object, ...]:
        found = {r["provider"]: r for r in f.kind("timing") if r["case"] == case}
        ours = next(r for name, r in found.items() if name.startswith("abft"))
        again = found["torch-again"]
        dmr = f"{found['dmr']['ratio']:.2f}" if "dmr" in found else "–"
        seen = f"{ours['found']} of {ours['harmful']}" if ours["trials"] else "–"
        return (
            case, _duration(found["torch"]["seconds"]), f"**{ours['ratio']:.3f}** ({ours['low']:.3f} to {ours['high']:.3f})",
            f"{again['low']:.3f} to {again['high']:.3f}", dmr, small(ours["expected_floor"]), seen, f.machine, f.link(page),
        )  # fmt: skip

    found = [(f, case) for f in files("time-*") for case in dict.fromkeys(r["case"] for r in f.kind("timing"))]
    header = "case | torch | with abft × torch (95 %) | torch × torch (95 %) | DMR × | floor | harmful flips found | machine | file"
    return table(header, [row(*one) for one in found], TIMED)


def in_step(page: str) -> str:
    """Whole models beside torch's, part by part."""

    def row(f: File, workload: str, clock: str) -> tuple[object, ...]:
        found = {r["provider"]: r for r in f.kind("in step") if (r["workload"], r["clock"]) == (workload, clock)}
        ratios = []
        for name in ("abft", "abft:whole", "torch-again"):
            low, high = found[name]["interval"]
            ratios.append(f"{found[name]['ratio']:.3f} ({low:.3f} to {high:.3f})")
        first = next(iter(found.values()))
        what = f"{workload}, {first['passes']}"
        return what, _duration(first["baseline_seconds"]), f"**{ratios[1]}**", ratios[0], ratios[2], clock, f.machine, f.link(page)

    cases = [(f, *case) for f in files("in-step*") for case in dict.fromkeys((r["workload"], r["clock"]) for r in f.kind("in step"))]
    header = "case, fp32 | torch | all checked × torch (95 %) | linear layers × torch | torch × torch | clock | machine | file"
    return table(header, [row(*case) for case in cases], "python -m bench in-step [--threads 1]")


def _duration(seconds: float) -> str:
    sys.path.insert(0, str(ROOT))
    from bench import timing_table

    return timing_table.duration(seconds)


TIMED = "python -m bench linear, layer, model, train"


def compared() -> dict[str, list[tuple[File, Any]]]:
    """By device, the cases that are shown of ours beside repetition, each with its file; layers, then models, then steps."""
    sys.path.insert(0, str(ROOT))
    from bench import protection

    found: dict[str, list[tuple[File, Any]]] = {}
    for f in sorted(files("time-*"), key=lambda f: [f.name.startswith(f"time-{c}-") for c in protection.COMMANDS], reverse=True):
        of = protection.device_of(f.name)
        if of is not None and not of[1].endswith("-1-thread"):  # the same again; all are in the table of times
            found.setdefault(of[1], []).extend((f, row) for row in protection.shown(f.records, *of))
    return {device: rows for device, rows in found.items() if rows}


def protection(page: str) -> str:
    """What protection costs beside repetition: the figures, and their numbers."""

    def row(f: File, r: Any) -> tuple[object, ...]:
        bars = [r.ours, *(r.others.get(name) for name in ("DMR", "TMR", "torch again"))]
        ratios = [f"{b.ratio:.2f} ({b.low:.2f} to {b.high:.2f})" if b else "–" for b in bars]
        return r.name, _duration(r.seconds), f"**{ratios[0]}**", *ratios[1:], small(r.expected_floor or 0), f.machine, f.link(page)

    every = [one for rows in compared().values() for one in rows]
    header = "× torch, with intervals | torch | abft | DMR | TMR | torch again | floor of abft | machine | file"
    return "\n".join([*_pictures(page), table(header, [row(*one) for one in every], TIMED)])


def protection_figure(page: str) -> str:
    """The figures alone."""
    return "\n".join(_pictures(page)) or table("", [], TIMED)


def _pictures(page: str) -> list[str]:
    """A line of Markdown for each device that was measured."""
    words = "Times of torch, abft, DMR and TMR over torch's, by layer, model and training step"
    return [f"![{words}; {device}]({os.path.relpath(picture(device), (ROOT / page).parent)})\n" for device in compared()]


def picture(device: str) -> Path:
    return IMAGES / f"cost_of_protection_{device}.png"


def draw() -> None:
    """Draw the figures that are not those of the results."""
    sys.path.insert(0, str(ROOT))
    from bench import protection

    for device, rows in compared().items():
        path, cases = picture(device), [r for _, r in rows]
        if not path.exists() or protection.digest(cases).encode() not in path.read_bytes():
            protection.draw(cases, path, "; ".join(dict.fromkeys(f.machine for f, _ in rows)))
            print(f"drew {path.name}")
    if not compared():
        print("no figure of times: not measured yet")


def scaling(page: str) -> str:
    """Cost against K, N, M and G, beside what was counted."""

    def row(f: File, r: Record) -> tuple[object, ...]:
        held = ", ".join(f"{letter} {r[letter.lower()]:,}" for letter in "MNK" if letter != r["sweep"])
        counted = ", ".join(f"{ratio:.2f} by {how}" for how, ratio in r["predicted"].items()) or "–"
        times = f"**{r['ratio']:.2f}** ({float(r['low']):.2f} to {float(r['high']):.2f})"
        return f"{r['sweep']} = {r['value']:,}", held, r["dtype"], r["against"], times, counted, f.machine, f.link(page)

    rows = [row(f, r) for f in files("scaling-*") for r in f.kind("scaling")]
    return table("swept | held | type | against | × (95 %) | counted | machine | file", rows, "python -m bench scaling")


def memory(page: str) -> str:
    def row(f: File, r: Record) -> tuple[object, ...]:
        names = "kernel_panel", "kernel_fingerprints", "forward_panels", "backward_panels", "default_group_forward_panels"
        shares = (f"{100 * r[name]:.2f} %" for name in (*names, "forward_fingerprints"))
        return r["dtype"], f"{r['n']} × {r['k']}", *shares, f.link(page)

    header = "weights | shape | panel, kernels | its integers | panel, CPU | backward's | panel, CPU, default G | fingerprints | file"
    rows = [row(f, r) for f in files("memory*") for r in f.kind("memory")]
    return table(header, rows, "python -m bench memory")


def adaptive(page: str) -> str:
    """The adaptive policy beside every fixed level, at each rate."""

    def row(f: File, rate: Record, r: Record) -> tuple[object, ...]:
        low, high = (float(v) / 1e6 for v in r["interval"])
        plan = r["level"] if "plan" not in r else "adaptive: " + ", ".join(dict.fromkeys(r["plan"].values()))
        within = "yes" if r["met"] else "no"
        escapes = f"{float(r['per_billion']) / 1e6:.2f} ({low:.2f} to {high:.2f})"
        return f"{rate['rate']:g}", plan, r["faults"], escapes, within, _duration(r["seconds"]), f.link(page)

    rows = [row(f, rate, r) for f in files("adaptive*") for rate in f.kind("rate") for r in rate["rows"]]
    header = "faults per product | level | faults that struck | escapes per 1000 products (95 %) | within the target | a pass | file"
    return table(header, rows, "python -m bench adaptive")


def adaptive_summary(page: str) -> str:
    """Whether the goals were met."""

    def rows(f: File) -> Iterator[tuple[object, ...]]:
        for r in f.kind("rate"):
            own = r["rows"][-1]
            over = "–" if r["over_cheapest"] is None else f"{100 * (float(r['over_cheapest']) - 1):+.1f} %"
            yield f"{r['rate']:g}", "yes" if r["met"] else "no", r["cheapest_fixed"] or "–", over, own["changes"], f.link(page)
        for r in f.kind("step"):
            rates = f"{r['low']:g}, then {r['high']:g}, then {r['low']:g}"
            yield rates, "–", "–", f"turned back {r['turns']} times", r["changes"], f.link(page)

    header = "faults per product | target met | cheapest fixed level that meets it | time over that one's | changes of plan | file"
    return table(header, [row for f in files("adaptive*") for row in rows(f)], "python -m bench adaptive")


def fleets(page: str) -> str:
    """Failure prediction on simulated fleets, as assumed and otherwise."""

    def row(f: File, r: Record) -> tuple[object, ...]:
        def interval(name: str) -> str:
            low, high = (100 * float(v) for v in r[f"{name}_interval"])
            return f"{100 * float(r[name]):.1f} % ({low:.1f} to {high:.1f})"

        saved, most = f"{100 * float(r['downtime_saved']):.0f} %", f"{100 * float(r['limit']):.1f} %"
        failures = f"{r['failures']}, {r['sudden']} sudden"
        return r["key"], r["fleets"], failures, r["alarms"], interval("precision"), interval("recall"), most, saved, f.link(page)

    rows = [row(f, r) for f in files("prediction") for r in f.kind("fleets")]
    header = "fleets | how many | failures | alarms | precision | recall | recall at most | downtime saved | file"
    return table(header, rows, "python -m bench prediction")


def reliability(page: str) -> str:
    """What was said, and what came true."""
    rows = [
        (b["windows"], f"{float(b['said']):.3f}", f"{float(b['was']):.3f}", f.link(page))
        for f in files("prediction") for r in f.kind("fleets") if r["key"] == "as assumed" for b in r["reliability"]
    ]  # fmt: skip
    return table("windows | mean probability said | share that failed within the horizon | file", rows, "python -m bench prediction")


def predictions(page: str) -> str:
    def row(f: File, r: Record) -> tuple[object, ...]:
        size = f"{r['m']:,} × {r['n']:,} × {r['k']:,}"
        waves, cycles = f"{r['waves']:.2f} of {r['rounds']}", f"{r['cycles'] / 1e3:,.0f} of {r['unchecked_cycles'] / 1e3:,.0f}"
        tiles = r["tile"] if r["tile"] == r["unchecked_tile"] else f"{r['tile']}, {r['unchecked_tile']}"
        return r["name"], size, tiles, waves, f"{100 * r['of_sums']:.1f} %", cycles, f"**{r['ratio']:.3f}**", f.link(page)

    rows = [row(f, r) for f in files("predictions*") for r in f.kind("prediction") if r["form"] == "full"]
    header = (
        "product | M × N × K | tile (unchecked, if another) | rounds with check tiles, of without | row sums | "
        "thousand cycles, of unchecked | predicted × unchecked | file"
    )
    return table(header, rows, "python -m bench predict")


def bytes_moved(page: str) -> str:
    """Few rows: how much more memory traffic the check is, by rows and timing."""

    def of(f: File, name: str, timing: str) -> list[str]:
        found = {r["m"]: r["ratio"] for r in f.kind("bytes") if (r["name"], r["timing"]) == (name, timing)}
        return [f"**{found[m]:.3f}**" for m in sorted(found)]

    rows = []
    for f in files("predictions*"):
        shapes = {r["name"]: f"{r['n']:,} × {r['k']:,}" for r in f.kind("bytes")}
        for name, size in shapes.items():
            rows += [(name, size, timing, *of(f, name, timing), f.link(page)) for timing in ("immediate", "deferred")]
    header = "product | N × K | timing | M = 1 | 4 | 16 | 64 | file"
    return table(header, rows, "python -m bench predict")


def work(page: str) -> str:
    """What a repair computes again."""

    def row(f: File, r: Record) -> tuple[object, ...]:
        said = ", ".join(f"{n:,} {verdict.replace('_', ' ')}" for verdict, n in r["verdicts"].items()) or "–"
        return r["name"], f"{r['again']} of {r['data_tiles']}", said, f.link(page)

    rows = [row(f, r) for f in files("work*") for r in f.kind("work")]
    return table("what happens, M = 8,192 | tiles computed again | rows | file", rows, "python -m bench work")


def statistics(page: str) -> str:
    """What the second detector reached."""
    rows: list[tuple[object, ...]] = []
    for f in files("statistics*"):
        for r in f.kind("training"):
            asked = f"{r['alarms']} alarm(s), {r['quarantines']} for quarantine; {r['above_soft']} residuals above the soft threshold"
            rows.append((f"a training run, {r['dtype']}, {r['residuals']:,} rows watched, no fault", asked, f.link(page)))
            (low, high), (a, b) = r["drift_of_mean"], r["drift_of_ln_variance"]
            drift = f"mean {low:+.3f} … {high:+.3f} σ; variance × {math.exp(a):.2f} … {math.exp(b):.2f}"
            rows.append(("… drift over it, of e", drift, f.link(page)))
        for r in f.kind("marginal"):
            what = f"bias {r['size']} σ" if r["defect"] == "bias" else f"noise + {100 * r['size']:.0f} %"
            tiles = f"median {r['tiles_median']:,.0f}, longest {r['tiles_most']:,.0f} tiles"
            found = f"{r['found']} of {r['trials']} within 10,000 tiles; {tiles}"
            rows.append((f"{what} on one unit of 132", found, f.link(page)))
        rows += [(*row, f.link(page)) for row in _false_quarantines(f)]
        for r in f.kind("severity"):
            (low, high), group = r["saved_interval"], r["group"] or "default"
            saved = f"{100 * r['saved']:.0f} % of {r['flagged']:,} flagged rows left ({100 * low:.0f} … {100 * high:.0f} %)"
            kept = f"{r['harmful_left']} of {r['harmful']:,} harmful ones (below {100 * r['harmful_left_below']:.2g} %)"
            could = f" of {100 * r['could_save']:.0f} % that harm nobody" if r["pattern"] == "element" else ""
            struck = "random flips" if r["pattern"] == "element" else "flips of several elements of a row"
            rows.append((f"{struck}, fp32, N = {r['n']:,}, group {group}", f"{saved}{could}; {kept}", f.link(page)))
    for f in files("statistics*"):
        for r in f.kind("weighed"):
            struck = "random flips" if r["pattern"] == "element" else "flips of several elements of a row"
            kept = f"{r['harmful_left']} of {r['harmful']} harmful ones (below {100 * r['harmful_left_below']:.2g} %)"
            saved = f"{100 * r['saved']:.0f} % of {r['flagged']} flagged rows left; {kept}"
            where = "interpreted" if r["dtype"] == "fp32" else "on emulated tensor cores"
            rows.append((f"{struck}, {r['dtype']}, the kernels, {where}, N = {r['n']:,}, group {r['group']}", saved, f.link(page)))
    for f in files("statistics-cost*") or files("statistics*"):
        for r in f.kind("cost"):
            (low, high), clock = r["interval"], f" ({r['clock']} clock)" if "clock" in r else ""
            what = f"time{clock}, {r['what']}, {r['size']} × {r['size']}"
            rows.append((what, f"× {r['ratio']:.4f} ({low:.4f} … {high:.4f})", f.link(page)))
    return table("what | result | file", rows, "python -m bench statistics")


def _false_quarantines(f: File) -> list[tuple[str, str]]:
    """How often sound units are blamed, by all tests and by each; and how long a test of a unit lasts between false alarms."""
    every, together, out = f.kind("quarantines"), f.kind("together"), []
    for what, found in (("", [*every, *together]), ("; of these of the test of all kinds' noise", together)):
        day, worst = (sum(r[key] for r in found) for key in ("per_day", "per_day_worst_site"))
        said = f"{day:.1e} a day; {worst:.1e} with the worst site's residuals"
        if found:
            out.append((f"false quarantines, 132 units × 3·10⁴ tiles a second{what}", said))
    by_test = {test: [r for r in f.kind("false alarms") if r["test"] == test] for test in ("bias", "noise")}
    by_test["noise of all kinds"] = [r["worst"] for r in together if "worst" in r]
    for test, found in by_test.items():
        if found:
            r = min(found, key=lambda r: r["arl"])
            said = f"{r['arl']:.1e} ({r['low']:.1e} … {r['high']:.1e}) batches of {r['tiles']:,.0f} tiles"
            out.append((f"… between false alarms of one unit, {test}, the worst site", said))
    return out


def spans(page: str) -> str:
    """A marginal unit whose checks are several tiles wide."""

    def row(f: File, r: Record) -> tuple[object, ...]:
        what = f"bias {r['size']} σ of its tile" if r["defect"] == "bias" else f"noise + {100 * r['size']:.0f} %"
        low, high = r["found_interval"]
        found = f"{r['found']} of {r['trials']} ({100 * low:.0f} … {100 * high:.0f} %)"
        least = f"{r['least_of_one_kind']:,.0f}"
        if r["defect"] == "noise":
            least += f"; {r['least_of_all_kinds']:,.0f}"
        tiles = [f"{t:,.0f}" if isinstance(t, float | int) else "beyond 20,000" for t in (r["tiles_median"], r["tiles_most"])]
        clean = f"{r['clean_alarms']} in {r['clean_batches']:,} batches"
        return r["span"], what, found, "; ".join(tiles), least, r["others"], clean, f.link(page)

    rows = [row(f, r) for f in files("statistics*") for r in f.kind("span")]
    header = "tiles of a check | the unit | found within 10,000 tiles | median; longest | at least"
    header += " | others blamed | alarms without a fault | file"
    return table(header, rows, "python -m bench statistics spans --trials 76")


def statistical_campaigns(page: str) -> str:
    """What the statistical detector lets through: single faults in a product."""

    def row(f: File) -> tuple[object, ...]:
        places = [f.summary["places"][place] for place in ("accumulator", "output", "operand")]
        s = {key: sum(place[key] for place in places) for key in ("trials", "harmful", "harmful_detected", "detected", "repaired")}
        harm, repaired = small(f.summary["harmful_from"]), f"{share(s['repaired'], s['detected'])} of {s['detected']:,}"
        return f.arithmetic, f"{s['trials']:,}", f"{s['harmful']:,} (≥ {harm})", _found(s), repaired, f.link(page)

    header = "type | faults | harmful | of these detected | repaired, bit-equal | file"
    return table(header, [row(f) for f in finished("faults-statistical-reference-*")], "python -m bench campaign --detector statistical")


def training_faults(page: str) -> str:
    """Trainings under faults beside the spread of fault-free seeds."""
    rows: list[tuple[object, ...]] = []
    for f in files("training-faults*"):
        for s in f.kind("summary"):
            for a in s["arms"]:
                low, high = a["spread"]
                if a["arm"] == "fault-free":
                    spread = f"{a['runs']} of {a['runs']} ({low} … {high})"
                    rows.append((a["arm"], "–", a["runs"], "–", "–", spread, "–", "–", f.link(page)))
                    continue
                worst = "NaN or ∞" if isinstance(a["worst_off"], str) else small(a["worst_off"])
                cells = (
                    f"{a['harmful']:,} of {a['faults']:,}",
                    f"{a['all_repaired_bit_equal']} of {a['all_repaired']}" if a["arm"] == "protected" else "–",
                    _of(a, "inside"),
                    _of(a, "elsewhere"),
                    worst,
                )
                rows.append((a["arm"], f"{a['rate']:.0%}", a["runs"], *cells, f.link(page)))
    header = (
        "arm | steps struck | runs | harmful of all faults | bit-equal, of runs in which all were repaired | "
        "inside the fault-free spread | ended elsewhere | largest change of the held-out loss | file"
    )
    return table(header, rows, "python -m bench training-faults")


def _of(a: Record, what: str) -> str:
    low, high = (100 * float(v) for v in a[f"{what}_interval"])
    return f"{a[what]} of {a['runs']} ({low:.0f} to {high:.0f} %)"


# --- kernels ----------------------------------------------------------------------------------------


def audit(page: str) -> str:
    """The product kernel of every target and operand type beside its unchecked twin: what they take of a multiprocessor."""

    def row(f: File, r: Record, twin: Record) -> tuple[object, ...]:
        c = r["config"]
        matrix = "<br>".join(f"{n} {mnemonic}" for mnemonic, n in r["matrix"].items()) or "–"
        loads = ", ".join(f"{n} {name}" for name, n in r.get("loads", {}).items()) or "–"
        return (
            r["arch"], r["operands"], f"{c['BM']} × {c['BN']} × {c['BK']}", _beside(twin, r, "registers"), f"{r['shared'] // 1024} KB",
            r["local"], _beside(twin, r, "blocks"), matrix, loads, _triton(f), f.link(page),
        )  # fmt: skip

    header = (
        "target | operands | tile | registers, unchecked → checked | shared memory | spilled bytes | blocks per multiprocessor | "
        "matrix instructions | loads | Triton | file"
    )
    return table(header, [row(*found) for found in _products()], "python -m bench audit")


def _products() -> Iterator[tuple[File, Record, Record]]:
    """(file, checked product, unchecked twin) of the commonest case."""
    for f in files("audit*"):
        found = {(r["arch"], r["operands"], r["kernel"]): r for r in f.kind("audit") if r["case"] == "full"}
        for (arch, operands, kernel), r in found.items():
            if kernel == "checked_product":
                yield f, r, found[arch, operands, "unchecked_product"]


#: A kernel of attention, and the one that computes its suspect blocks again.
AGAIN = {
    "checked_attention": "settle_attention", "attention_dq": "attention_dq_again", "attention_dkv": "attention_dkv_again",
    "decode_part": "part_again",
}  # fmt: skip


def attention_audit(page: str) -> str:
    """Attention's kernels beside the same compiled without checks; "lean" is without products of exponentials."""
    rows = []
    for f in files("audit*"):
        found: dict[tuple[str, ...], list[Record]] = {}
        for r in f.kind("audit"):
            found.setdefault((r["arch"], r["case"], r["operands"], r["kernel"]), []).append(r)
        for (arch, case, operands, kernel), launches in found.items():
            if kernel in AGAIN:
                twin, r = launches if len(launches) == 2 else ({}, *launches)  # packed sequences have none
                (again,) = found[arch, case, operands, AGAIN[kernel]]
                steps = " → ".join(str(one["tiles"][0]["step"]["issued"]) if one.get("tiles") else "–" for one in (twin, r))
                tile = f"{r['config']['BM']} × {r['config'].get('BN') or r['config']['LENGTH']}"
                rows.append((arch, case, operands, kernel, tile, _beside(twin, r, "registers"), r["local"], again["local"],
                             _beside(twin, r, "blocks"), steps, _triton(f), f.link(page)))  # fmt: skip
    header = (
        "target | case | operands | kernel | queries × keys | registers, unchecked → checked | spilled bytes | in a repetition | "
        "blocks per multiprocessor | instructions of a block's step | Triton | file"
    )
    return table(header, rows, "python -m bench audit")


def _beside(twin: Record, r: Record, what: str) -> str:
    return f"{twin.get(what, '–')} → {r[what]}" if what in r else "–"


def _triton(f: File) -> str:
    return str(f.kind("stamp")[-1]["configuration"]["triton"])


# --- the README's first screen ------------------------------------------------------------------------


def headline(page: str) -> str:
    rows = [
        *_silence("false alarms on fault-free data, CPU", "clean-reference-*", page),
        *_silence("… on emulated tensor cores", "clean-emulated-*", page),
        *_silence("… on a real encoder's activations and gradients", "clean-minilm-*", page),
        *_silence("… in the kernels, interpreted", "clean-interpreted-*", page),
        *_detection("CPU", "faults-reference-*", page),
        *_detection("in the kernels, interpreted", "faults-interpreted-*", page),
        *_emulated(page),
        *_small_layer(page),
        *_panels(page),
        *_compiled(page),
        ("cost on a GPU", "**not measured**", "–", "–", "–"),
    ]
    return table(" | figure | floor | machine | file", rows)


def _silence(what: str, pattern: str, page: str) -> Iterator[tuple[object, ...]]:
    found = finished(pattern)
    if found:
        texts = [
            f"{f.arithmetic} **{f.summary['alarms']:,}** in {f.summary['rows']:,} rows "
            f"(rate below {small(f.summary['rate_below'])})"
            for f in found
        ]
        yield (what, "; ".join(texts), *_circumstances(found, page))


def _detection(where: str, pattern: str, page: str) -> Iterator[tuple[object, ...]]:
    found = finished(pattern)
    if found:
        totals = [(f.arithmetic, f.summary["places"]["all single"]) for f in found]
        seen = [f"{name} **{share(s['harmful_detected'], s['harmful'])}** of {s['harmful']:,}" for name, s in totals]
        repaired = [f"{name} **{share(s['repaired'], s['detected'])}** of {s['detected']:,}" for name, s in totals]
        harm = ", ".join(f"{f.arithmetic} ≥ {small(f.summary['harmful_from'])}" for f in found)
        circumstances = _circumstances(found, page)
        yield (f"single faults that change a row (L2, {harm}), detected, {where}", "; ".join(seen), *circumstances)
        yield (f"detected single faults repaired bit for bit, {where}", "; ".join(repaired), *circumstances)


def _emulated(page: str) -> Iterator[tuple[object, ...]]:
    found = finished("faults-emulated-*")
    if found:
        totals = [(f.arithmetic, f.summary["table"]["all"]) for f in found]
        texts = [f"{name} **{share(s['harmful_detected'], s['harmful'])}** of {s['harmful']:,}" for name, s in totals]
        harm = small(found[0].summary["harmful_from"])
        what = f"faults that change a row (L2, ≥ {harm}), detected on emulated tensor cores"
        yield (what, "; ".join(texts), *_circumstances(found, page))


def _small_layer(page: str) -> Iterator[tuple[object, ...]]:
    for f in files("host*"):
        found = {r["name"]: r for r in f.kind("host")}
        r = found.get("module, no grad")
        if r:
            text = f"**{r['ratio']:.2f} ×** torch's ({r['one_us']:.0f} µs → {r['other_us']:.0f} µs)"
            what = "time of a small checked layer, 16 × 384 × 384, fp32, CPU"
            yield what, text, _floor("fp32", "cpu"), f.machine, f.link(page)


def _panels(page: str) -> Iterator[tuple[object, ...]]:
    for f in files("memory*"):
        found = {(r["dtype"], r["n"], r["k"]): r for r in f.kind("memory")}
        r = found.get(("bf16", 4096, 4096))
        if r:
            both = f"**{100 * r['kernel_panel']:.1f} %**, and {100 * r['kernel_fingerprints']:.1f} % to name changed elements,"
            text = f"{both} of the weights per direction (bf16, G = {r['group']})"
            floor = _floor("bf16", "emulated")
            yield "memory of the kernels' panels, 4096 × 4096", text, floor, "–", f.link(page)


def _compiled(page: str) -> Iterator[tuple[object, ...]]:
    found = files("audit*")
    kernels = [r for f in found for r in f.kind("audit")]
    if kernels:
        spilling = sum(r["local"] + r["spills"] > 0 for r in kernels)
        targets = ", ".join(sorted({r["arch"] for r in kernels}, key=lambda arch: int(arch[3:])))
        text = f"**{len(kernels)}** for {targets}; with spills: {spilling}"
        versions = ", ".join(map(_triton, found))
        yield "kernels compiled", text, "–", f"none needed; Triton {versions}", ", ".join(f.link(page, _triton(f)) for f in found)


def _circumstances(found: list[File], page: str) -> tuple[str, str, str]:
    """Floor, machine and files: a figure is worth what the sensitivity beside it is."""
    floors = [_floor(f.arithmetic, f.place) for f in found]
    machines = dict.fromkeys(f.machine for f in found)
    return ", ".join(floors), "; ".join(machines), ", ".join(f.link(page, f.arithmetic) for f in found)


# --- the demo -----------------------------------------------------------------------------------------

PICTURES = {
    "wrong_answers.png": "Wrong answers delivered by a sentence encoder while faults strike its products",
    "loss_20_percent.png": "Loss curves of a small GPT, a fifth of the steps struck",
    "marginal_unit.png": "One of four devices turns marginal: losses with and without it, and what the statistics say of each device",
}


def demo(page: str) -> str:
    """The demo's plots, if they were copied to docs/images, and its counts, if they were kept."""
    pictures = [(words, IMAGES / name) for name, words in PICTURES.items() if (IMAGES / name).exists()]
    parts = [f"![{words}]({os.path.relpath(path, (ROOT / page).parent)})\n" for words, path in pictures]
    for f in files("demo*"):
        arms = [a for a in f.kind("retrieval_arm") if a["rate"] > 0]
        if arms:
            parts.append(_retrieval(f, arms, page))
    for f in files("demo*"):
        runs = list(f.kind("marginal_run"))
        if runs:
            parts.append(_marginal(f, runs, page))
    return "\n".join(parts) or "*Plots stand here after `./run demo`.*\n"


def _retrieval(f: File, arms: list[Record], page: str) -> str:
    def row(a: Record) -> tuple[object, ...]:
        watched = f"{a['detected']:,}" if a["arm"] in ("protected", "DMR") else "–"
        counts = f"{a['rate']:.0%}", f"{a['requests']:,}", f"{a['harmful']:,}", watched, f"**{a['wrong']:,}**"
        return a["arm"], *counts, f.link(page)

    run = next(iter(f.kind("run")))
    torch = release(run["versions"]["torch"])
    where = f"{run['machine']['cpu']}, {run['torch_threads']} threads, torch {torch}, fp32"
    header = f"retrieval ({where}) | forwards struck | requests | harmful faults | detected | wrong answers | file"
    return table(header, map(row, arms))


def _marginal(f: File, runs: list[Record], page: str) -> str:
    def row(r: Record) -> tuple[object, ...]:
        watched, named = r["arm"] == "watched", r["blamed"] >= 0
        checks = (f"{r['checks']:,}", f"**{r['detected']:,}**") if watched else ("–", "–")
        found = f"{r['named']} at step {r['found']}, back to {r['resumed']}" if named else "–"
        off = r["distance"]["max_loss"]
        same = "bit-equal" if r["distance"]["bit_equal"] else small(off)
        return r["arm"], *checks, found, same, f"{r['held_out']:.4f}", f.link(page)

    run = next(iter(f.kind("run")))
    where = f"{run['machine']['cpu']}, threads: {run['torch_threads']}, torch {release(run['versions']['torch'])}, fp32"
    counts = "rows checked | beyond their bounds | named | largest change of the loss | held-out loss | file"
    return table(f"one of four devices turns marginal ({where}) | {counts}", map(row, runs))


# --- the commands -------------------------------------------------------------------------------------


def commands(page: str) -> str:
    """What ``python -m bench`` has."""
    sys.path.insert(0, str(ROOT))
    from bench import __main__ as bench

    return table("`python -m bench …` | ", [(f"`{name}`", meaning.replace("|", "\\|")) for name, meaning in bench.COMMANDS.items()])


TABLES: dict[str, Callable[[str], str]] = {
    "headline": headline,
    "demo": demo,
    "clean": clean,
    "emulated-kernels": emulated_kernels,
    "campaign": campaign,
    "attention-faults": attention_faults,
    "emulated-faults": emulated_faults,
    "expected-floors": expected_floors,
    "floors": floors,
    "host": host,
    "times": times,
    "in-step": in_step,
    "protection": protection,
    "protection-figure": protection_figure,
    "scaling": scaling,
    "commands": commands,
    "adaptive": adaptive,
    "adaptive-summary": adaptive_summary,
    "fleets": fleets,
    "reliability": reliability,
    "memory": memory,
    "predictions": predictions,
    "audit": audit,
    "attention-audit": attention_audit,
    "bytes": bytes_moved,
    "work": work,
    "statistics": statistics,
    "spans": spans,
    "statistical-campaigns": statistical_campaigns,
    "training-faults": training_faults,
}


def rewritten(text: str, page: str) -> str:
    """A page's text with its tables made anew; ``page`` is its path from the root."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]](page) + m[4], text)


def main() -> None:
    draw()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        page = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, page)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote the tables of {page}")
    for f in files("*"):
        measured = [r["sources"] for r in f.kind("stamp")]
        if measured and measured[-1] != _sources():
            print(f"{f.name} was measured with other sources than those here")


def _sources() -> str:
    sys.path.insert(0, str(ROOT))
    from bench import stamp

    return stamp.sources()


if __name__ == "__main__":
    main()
