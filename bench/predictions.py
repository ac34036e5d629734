"""What the check is predicted to cost on a GPU, by counting: not a measurement.

    python -m bench predict

Cycles of the slowest program of a checked product, dealt as the kernels deal their tiles (abft.triton_kernels.waves), over those of
the unchecked one (bench/twin.py) in whichever of the same tiles is best for that. A step in K takes its matrix instructions' time, its
issue slots, or what its operands take from the L2 (abft.triton_kernels.tile_time), whichever is most;
what a tile takes besides, the row sums above all, is counted from the audited machine code (``tiles`` in bench/audit.py) as issue
slots, and as if nothing overlapped it.
Not counted: latency, of barriers, shuffles and memory; the L2 being shared, and memory behind it; launches, and the verify launch that
follows. The machine code is that of m = n = k = 4096.

For few rows, which are bound by memory: bytes that a checked product moves over those of the same one unchecked, every number
counted once for each launch that reads or writes it (X comes to the tiles after the first from the L2).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from abft.backends import triton as backend
from bench import audited
from bench.results import Results
from bench.shapes import LLAMA

#: One H100 or H200 SXM: multiprocessors, fused multiply-adds of 16-bit numbers per cycle and multiprocessor (what the data
#: sheet's dense 989 TFLOP/s make at 1.83 GHz), warp instructions issued per cycle and multiprocessor (one by each of four
#: schedulers: CUDA C++ Programming Guide, "Compute Capabilities", 9.0).
MULTIPROCESSORS, MMA_PER_CYCLE, ISSUED_PER_CYCLE = 132, 2048, 4
SQUARES = {f"{s}³": (s, s, s) for s in (2048, 4096, 8192, 16384)}
TOKENS = (512, 2048, 8192)
#: Cases of the audit whose machine code a form's predictions count, the commonest first.
CASES = {"full": ("full", "half", "short", "second", "third"), "lean": ("lean", "second lean", "third lean")}
DECODED = (1, 4, 16, 64)


def shapes() -> Iterator[tuple[str, int, int, int]]:
    for name, (m, n, k) in SQUARES.items():
        yield name, m, n, k
    for model, layers in LLAMA.items():
        for layer, (n, k) in layers.items():
            for m in TOKENS:
                yield f"{model} {layer}", m, n, k


def predict(m: int, n: int, k: int, form: str = "full", group: int | None = None) -> dict[str, Any]:
    """Cycles of the slowest multiprocessor, bf16 on sm_90, and in which tiles."""
    p = backend.plan(n, k, torch.bfloat16, 90, False, form, group, m, 1, MULTIPROCESSORS)
    c, columns = p.config, p.layout.columns
    checked = _slowest(c, m, n, k, form, columns)
    alike = _slowest(c, m, n, k, form)
    best, twin = min(((t, _slowest(t, m, n, k, form)) for t in _candidates(p.layout.groups, group)), key=lambda found: found[1]["cycles"])
    return {
        "group": p.layout.groups.width, "columns": columns, "tile": f"{c.bm} × {c.bn}", "check_tile": f"{c.bm} × {c.bc}",
        "data_tiles": checked["data_tiles"], "check_tiles": checked["check_tiles"], "rounds": alike["rounds"],
        "waves": checked["cycles"] / checked["data"], "cycles": checked["cycles"],
        "unchecked_tile": f"{best.bm} × {best.bn}", "unchecked_cycles": twin["cycles"], "ratio": checked["cycles"] / twin["cycles"],
        "same_tile_ratio": checked["cycles"] / alike["cycles"], "of_sums": checked["data"] / alike["data"] - 1,
    }  # fmt: skip


def _candidates(groups: Any, group: int | None) -> list[Any]:
    """Configs that a product with these groups may have, checked or not."""
    from abft.triton_kernels import configs

    return [c for c in configs.candidates(90, "16-bit", group) if groups.count == 1 or groups.width % c.bn == 0]


def _slowest(c: Any, m: int, n: int, k: int, form: str, columns: int = 0) -> dict[str, Any]:
    """Cycles of the slowest program, and of its data tiles; ``columns`` of the panel, 0: unchecked."""
    from abft.triton_kernels import waves

    data_tiles, check_tiles = -(-m // c.bm) * -(-n // c.bn), -(-m // c.bm) * -(-columns // c.bc)
    (data, check), twin = _tiles(c.bm, c.bn, c.bk, c.bc, form)
    own = _cycles(data if columns else twin, c, c.bn, k)
    programs = min(data_tiles + check_tiles, MULTIPROCESSORS * c.resident)
    shares = waves.shares(data_tiles, check_tiles, programs, c.check_cost)
    cycles = max(d * own + t * _cycles(check, c, c.bc, k) for d, t in shares)
    return {"data_tiles": data_tiles, "check_tiles": check_tiles, "rounds": -(-data_tiles // programs), "data": own, "cycles": cycles}


def _cycles(tile: dict[str, Any], config: Any, columns: int, k: int) -> float:
    """One tile, alone on its multiprocessor."""
    from abft.triton_kernels import tile_time

    multiply = config.bm * max(columns, tile_time.MMA_FLOOR) * config.bk / MMA_PER_CYCLE
    fetch = tile_time.fetched(config.bm, columns, config.bk, 2) / tile_time.PATH
    slots = config.warps / ISSUED_PER_CYCLE
    return -(-k // config.bk) * max(multiply, fetch, tile["step"]["issued"] * slots) + tile["besides"]["issued"] * slots


@lru_cache(maxsize=64)
def _tiles(bm: int, bn: int, bk: int, bc: int, form: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The audited (data tile, check tile) of the checked product, and its twin's data tile.

    Where no product with check tiles of ``bc`` columns was audited, that of the commonest stands for it.
    """
    found: dict[str, list[dict[str, Any]]] = {"checked_product": [], "unchecked_product": []}
    for row in audited.rows(audited.newest()):
        ours = (row["operands"], row["arch"]) == ("bf16", "sm_90") and row["kernel"] in found and row["case"] in CASES[form]
        if ours and tuple(row["config"][size] for size in ("BM", "BN", "BK")) == (bm, bn, bk):
            found[row["kernel"]].append(row)
    if not all(found.values()):
        raise LookupError(f"{audited.newest().name} has no product with tiles of {bm} × {bn} × {bk}: run `python -m bench audit`")
    checked = next((row for row in found["checked_product"] if row["config"]["BC"] == bc), found["checked_product"][0])
    return checked["tiles"], found["unchecked_product"][0]["tiles"][0]


def bytes_moved(m: int, n: int, k: int, timing: str, form: str = "full") -> dict[str, Any]:
    """Bytes of one product of few rows with its check, bf16 on sm_90; without a fault."""
    from abft.triton_kernels import deferred

    p = backend.plan(n, k, torch.bfloat16, 90, False, form, None, m)
    kinds, columns, tiles = len(p.layout.form.kinds), p.layout.columns, -(-n // p.config.bn)
    plain = 2 * (n * k + m * k + m * n)
    panel = 2 * columns * k
    weights = 4 * n  # the signs; the other weights are made of them
    # What is judged is written by the product, and read by the judge; of the planes that only a suspect row needs, written alone.
    judged = 4 * m * ((kinds + 1) * tiles + columns)
    more = 4 * m * deferred.MORE.value * tiles if timing == "deferred" else m * p.layout.groups.count
    evidence, more_planes = 2 * judged + more, deferred.MORE.value
    return {
        "timing": timing, "columns": columns, "bn": p.config.bn, "panel": panel, "column_weights": weights, "evidence": evidence,
        "bytes": plain + panel + weights + evidence, "unchecked_bytes": plain,
        "ratio": (plain + panel + weights + evidence) / plain, "of_workspace": 4 * m * ((kinds + 1 + more_planes) * tiles + columns),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench predict", description=__doc__).parse_args(argv)
    results = Results("predictions", fresh=True, target="sm_90", dtype="bf16", multiprocessors=MULTIPROCESSORS, audit=audited.newest().stem)
    for name, m, n, k in shapes():
        for form in ("full", "lean"):
            r = results.add("prediction", name=name, form=form, m=m, n=n, k=k, **predict(m, n, k, form))
            print(f"{name:<22} {form} {m:>6} × {n:>6} × {k:>6}: {r['tile']:>9} waves {r['waves']:.2f} of {r['rounds']}, "
                  f"{r['cycles']:.0f} cycles, unchecked {r['unchecked_tile']:>9} {r['unchecked_cycles']:.0f}, × {r['ratio']:.3f}")
    for model, layers in LLAMA.items():
        for (layer, (n, k)), m, timing in itertools.product(layers.items(), DECODED, ("immediate", "deferred")):
            r = results.add("bytes", name=f"{model} {layer}", form="full", m=m, n=n, k=k, **bytes_moved(m, n, k, timing))
            print(f"{model} {layer:<10} {timing:<9} {m:>3} × {n:>6} × {k:>6}: {r['bytes'] / 1e6:.1f} MB, × {r['ratio']:.3f}")
    return 0
