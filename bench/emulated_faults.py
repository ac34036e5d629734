"""Faults in emulated tensor-core products: every row is a trial; whatever changes a row by 1e-3 must be found.

    python -m bench emulated-faults --unit bf16 --emulator FOLDER

Struck are final accumulators, accumulators half-way along K (the rest of the product runs on the wrong value), operand
tiles, and weights in memory after their panel was built. Effect: relative L2 change of the row of fp32 accumulators. What
was missed is written out, with the row's own floor: the promise a bound makes of one wrong element, which several that
cancel do not keep.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from abft.checksum import FULL
from bench import emulator, families, intervals
from bench.emulated import E_ONE, TILE, UNITS, Checks, Product, Unit
from bench.results import Results

HARM = 1e-3
ROWS = {64: 40000, 512: 16000, 2048: 4000, 4096: 2000}
FAMILIES = (
    ("gauss", "gauss", 512),
    ("post-norm", "output-scales", 1024),
    ("post-gelu", "offset", 512),
    ("outlier-channels", "half-offset", 128),
    ("row-scales", "big-output", 512),
    ("softmax", "student-t3", 256),
    ("k-decay", "gauss", 384),
)
Values = np.ndarray
Operation = Callable[[Values, np.random.Generator], Values]


def flip(count: int, *, low: bool = False) -> Operation:
    def apply(values: Values, rng: np.random.Generator) -> Values:
        bits = values.view(np.uint32).copy()
        weight = np.arange(32, 0, -1.0) if low else np.ones(32)
        for _ in range(count):
            bits ^= (np.uint32(1) << rng.choice(32, bits.shape, p=weight / weight.sum()).astype(np.uint32))
        return bits.view(np.float32)

    return apply


def carry(values: Values, rng: np.random.Generator) -> Values:
    """A wrong carry: ± one bit of the pattern, the same bit in all struck elements."""
    step = np.uint32(1) << np.uint32(rng.integers(0, 31))
    bits = values.view(np.uint32)
    return (bits + step if rng.random() < 0.5 else bits - step).view(np.float32)


def constant(value: float) -> Operation:
    return lambda values, rng: np.full_like(values, value)


OPERATIONS: dict[str, Operation] = {
    "nullify": constant(0.0),
    "flip1": flip(1),
    "flip2-lsb": flip(2, low=True),
    "flip4-lsb": flip(4, low=True),
    "carry": carry,
    "nan": constant(float("nan")),
    "inf": constant(float("inf")),
    "near-inf": constant(3.4e38),
}
#: columns struck in a row: one, every n-th of a tile, a fragment, a tile, all
PATTERNS = ("element", "warp2", "warp16", "fragment", "tile", "row")


@dataclass
class Tally:
    trials: int = 0
    harmful: int = 0
    harmful_detected: int = 0
    harmful_detected_e_one: int = 0  # by two of the four sums alone
    above_floor: int = 0  # harmful, and above what the row's own bound promises of one wrong element
    above_floor_detected: int = 0
    detected: int = 0
    floor: float = float("inf")
    largest_missed: float = 0.0
    misses: list[dict[str, Any]] = field(default_factory=list)  # the harmful ones: where, and what the four sums said

    def add(self, effect: Values, checks: Checks, subject: dict[str, Any]) -> None:
        for row in np.flatnonzero((effect >= HARM) & ~checks.suspect):
            group = checks.ratio[row].max(1).argmax()
            found = {"row": int(row), "effect": effect[row], "floor": checks.floor[row], "ratios": list(checks.ratio[row, group])}
            self.misses.append(subject | found)
        struck = effect > 0
        floors = checks.floor[struck]
        suspect, by_two = checks.suspect[struck], checks.suspect_by(len(E_ONE))[struck]
        effect = effect[struck]
        harmful = effect >= HARM
        self.trials += len(effect)
        self.harmful += int(harmful.sum())
        self.harmful_detected += int((harmful & suspect).sum())
        # A row without a finite floor was wiped out or is not finite: it has to be found.
        above = harmful & ((effect > floors) | ~np.isfinite(floors))
        self.above_floor += int(above.sum())
        self.above_floor_detected += int((above & suspect).sum())
        self.harmful_detected_e_one += int((harmful & by_two).sum())
        self.detected += int(suspect.sum())
        self.floor = min(self.floor, float(effect[suspect].min(initial=np.inf)))
        self.largest_missed = max(self.largest_missed, float(effect[~suspect].max(initial=0.0)))


def struck_columns(pattern: str, rows: int, n: int, rng: np.random.Generator) -> Values:
    """bool (rows, n): where each row is struck."""
    at = rng.integers(0, n, rows)[:, None]
    columns = np.arange(n)[None, :]
    same_tile = columns // TILE == at // TILE
    if pattern == "element":
        return columns == at
    if pattern.startswith("warp"):
        stride = int(pattern[4:])
        return same_tile & (columns % stride == at % stride)
    return {"fragment": columns // 8 == at // 8, "tile": same_tile, "row": np.ones((rows, n), bool)}[pattern]


def strike(acc: Values, pattern: str, operation: Operation, rng: np.random.Generator) -> Values:
    """Every row struck on its own."""
    where = struck_columns(pattern, *acc.shape, rng)
    out = acc.copy()
    for row, columns in zip(out, where, strict=True):
        row[columns] = operation(row[columns], rng)
    return out


def effect(clean: Values, wrong: Values) -> Values:
    """Relative L2 change per row; Inf if what changed is not finite; 0 where nothing did, or where the row is zero."""
    with np.errstate(all="ignore"):
        change = np.linalg.norm(wrong.astype(np.float64) - clean, axis=1)
        size = np.linalg.norm(clean.astype(np.float64), axis=1)
        same = (wrong == clean).all(1) | (size == 0)
        return np.where(same, 0.0, np.nan_to_num(change / size, nan=np.inf))


def accumulators(product: Product, x: torch.Tensor, what: str, pattern: str, k: int, rng: np.random.Generator) -> tuple[Values, Checks]:
    """Faults in final accumulators: (effect, checks) per row."""
    clean = product.multiply(x)
    wrong = strike(clean, pattern, OPERATIONS[what], rng)
    return effect(clean, wrong), product.judge(wrong, product.predict(x), k)


def half_way(product: Product, x: torch.Tensor, what: str, pattern: str, k: int, rng: np.random.Generator) -> tuple[Values, Checks]:
    """Faults in accumulators after half of K."""
    em, model, half = product.emulator, product.unit.model, k // 2
    w, left, right = product.w.T.contiguous().numpy(), x[:, :half].numpy(), x[:, half:].numpy()
    start = em.gemm(left, w[:half], model)
    clean = em.gemm(right, w[half:], model, start)
    # The emulator holds no NaN or Inf: those are struck at the end, everything else half-way.
    wrong = em.gemm(right, w[half:], model, _finite(strike(start, pattern, OPERATIONS[what], rng)))
    return effect(clean, wrong), product.judge(wrong, product.predict(x), k)


def _finite(acc: Values) -> Values:
    return np.where(np.abs(acc) < 1e30, acc, np.float32(1e30)).astype(np.float32)


def operand(product: Product, x: torch.Tensor, what: str, pattern: str, k: int, rng: np.random.Generator) -> tuple[Values, Checks]:
    """A wrong number of X in the shared memory of one tile: the tile's columns are products of it."""
    clean = product.multiply(x)
    wrong_x = x.numpy().copy()
    at = rng.integers(0, k, len(x))
    wrong_x[np.arange(len(x)), at] = _operand_fault(wrong_x[np.arange(len(x)), at], what, product.unit, rng)
    tile = int(rng.integers(-(-clean.shape[1] // TILE))) * TILE
    columns = slice(tile, min(tile + TILE, clean.shape[1]))
    wrong = clean.copy()
    wrong[:, columns] = product.emulator.gemm(wrong_x, product.w.T[:, columns].contiguous().numpy(), product.unit.model)
    return effect(clean, wrong), product.judge(wrong, product.predict(x), k)


def weight(product: Product, x: torch.Tensor, what: str, pattern: str, k: int, rng: np.random.Generator) -> tuple[Values, Checks]:
    """One number of W changed in memory after its panel was built: one column of every row is wrong."""
    clean, prediction = product.multiply(x), product.predict(x)
    effects, judged = [], []
    for _ in range(WEIGHT_FAULTS):
        n, at = int(rng.integers(len(product.w))), int(rng.integers(k))
        tile = n // 16 * 16
        w = product.w[tile : tile + 16].clone()
        w[n - tile, at] = float(_operand_fault(w[n - tile, at].numpy()[None], what, product.unit, rng)[0])
        wrong = clean.copy()
        wrong[:, tile : tile + 16] = product.emulator.gemm(x.numpy(), w.T.contiguous().numpy(), product.unit.model)
        effects.append(effect(clean, wrong))
        judged.append(product.judge(wrong, prediction, k))
    return np.concatenate(effects), Checks(np.concatenate([c.ratio for c in judged]), np.concatenate([c.floor for c in judged]))


WEIGHT_FAULTS = 12


def _operand_fault(values: Values, what: str, unit: Unit, rng: np.random.Generator) -> Values:
    """The operation on the operand type's own bits: the upper half of bf16's fp32 pattern, 19 bits of tf32, fp16 itself."""
    if what == "nullify":
        return np.zeros_like(values)
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(unit.dtype)
    width, unread = (16, 0) if unit.dtype != torch.float32 else (32, 13)
    integer = np.uint16 if width == 16 else np.uint32
    pattern = tensor.view(torch.int16 if width == 16 else torch.int32).numpy().view(integer)
    wrong = pattern ^ (integer(1) << rng.integers(unread, width, pattern.shape).astype(integer))
    out = torch.from_numpy(wrong.view(np.int16 if width == 16 else np.int32)).view(unit.dtype).float().numpy()
    # The emulator holds no NaN and Inf; a wrong number as large as it can hold stands for them.
    return np.nan_to_num(out, nan=1e30, posinf=1e30, neginf=-1e30).clip(-1e30, 1e30)


PLACES = {
    "accumulator": (accumulators, tuple(OPERATIONS), PATTERNS),
    "half-way": (half_way, ("nullify", "flip1", "flip2-lsb", "carry"), ("element", "fragment")),
    "operand": (operand, ("nullify", "flip1"), ("element",)),
    "weight": (weight, ("nullify", "flip1"), ("element",)),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench emulated-faults", description=__doc__)
    parser.add_argument("--unit", default="bf16", choices=UNITS)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    emulator.add_option(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    em, unit = emulator.load(options.emulator), UNITS[options.unit]
    results = Results(f"faults-emulated-{unit.name}", fresh=options.fresh, scale=options.scale, seed=options.seed, model=unit.model)
    todo = [(p, w, t, k) for k in ROWS for p, (_, whats, patterns) in PLACES.items() for w in whats for t in patterns]
    for i, (place, what, pattern, k) in enumerate(todo):
        key = f"{place} {what} {pattern} k{k} scale{options.scale:g} seed{options.seed}"
        if results.find(key) is None:
            tally = measure(em, unit, place, what, pattern, k, options.scale, options.seed)
            results.add("class", key=key, place=place, what=what, pattern=pattern, k=k, **vars(tally))
        results.progress(i + 1, len(todo), key)
    print(summarise(results))
    return 0


def measure(em: emulator.Emulator, unit: Unit, place: str, what: str, pattern: str, k: int, scale: float, seed: int) -> Tally:
    tally = Tally()
    run = PLACES[place][0]
    for i, (activation, family, n) in enumerate(FAMILIES):
        rows = max(16, int(ROWS[k] * scale / len(FAMILIES) / (WEIGHT_FAULTS if place == "weight" else 1)))
        g = families.generator(seed, k, i)
        product = Product(em, unit, unit.operand(families.weights(family, n, k, g)), FULL.kinds)
        x = unit.operand(families.ACTIVATIONS[activation](rows, k, g), activation)
        rng = np.random.default_rng([seed, k, i, *f"{place} {what} {pattern}".encode()])
        subject = {"activations": activation, "weights": family, "n": n, "group": product.groups.width}
        tally.add(*run(product, x, what, pattern, k, rng), subject)
    return tally


def summarise(results: Results) -> str:
    classes = [r for r in results.records if r["kind"] == "class"]
    table: dict[str, Any] = {place: _sum([r for r in classes if r["place"] == place]) for place in PLACES}
    table["one element"] = _sum([r for r in classes if r["place"] in ("accumulator", "half-way") and r["pattern"] == "element"])
    table["several elements"] = _sum([r for r in classes if r["place"] in ("accumulator", "half-way") and r["pattern"] != "element"])
    table |= {f"k{k}": _sum([r for r in classes if r["k"] == k]) for k in ROWS}
    table["all"] = _sum(classes)
    results.replace("summary", harmful_from=HARM, confidence=0.95, table=table)
    lines = [f"{results.path.stem}: harmful = effect ≥ {HARM:g}"]
    for name, s in table.items():
        found = f"{s['harmful_detected']:>8} found (≥ {s['harmful_detected_at_least']:.6f}), {s['harmful_detected_e_one']} by e and one"
        if "above_floor" in s:
            found += f", above the row's floor {s['above_floor_detected']} of {s['above_floor']}"
        sizes = f"smallest found {s['floor']:.2g}, largest missed {s['largest_missed']:.2g}"
        share = s["detected"] / max(1, s["trials"])
        lines.append(f"  {name:<12} {s['trials']:>8} faults, {s['harmful']:>8} harmful, {found}; of all {share:.3f}; {sizes}")
    return "\n".join(lines)


NAMES = ("trials", "harmful", "harmful_detected", "harmful_detected_e_one", "above_floor", "above_floor_detected", "detected")


def _sum(classes: list[dict[str, Any]]) -> dict[str, Any]:
    # Files of an earlier form lack what was not counted then.
    out: dict[str, Any] = {name: sum(r[name] for r in classes) for name in NAMES if all(name in r for r in classes)}
    out["e_one_at_least"] = intervals.lower_limit(out["harmful_detected_e_one"], out["harmful"]) if out["harmful"] else 0.0
    out["harmful_detected_at_least"] = intervals.lower_limit(out["harmful_detected"], out["harmful"]) if out["harmful"] else 0.0
    out["floor"] = min((float(r["floor"]) for r in classes), default=float("inf"))
    out["largest_missed"] = max((float(r["largest_missed"]) for r in classes), default=0.0)
    return out
