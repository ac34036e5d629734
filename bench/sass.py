"""Reading machine code (SASS) as cuobjdump prints it: instructions, loops, and what stands inside and outside of main loops.

A loop is what compilers call a natural loop: a jump back to a block that all ways to the jump pass through, and the blocks
between. (A jump back alone is not enough: waiting for a barrier is laid out behind the kernel's end, and jumps back into it.)
Main loops are the innermost ones that hold matrix instructions or, in a kernel without any, fused multiply-adds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

#: Matrix instructions of all generations: by warp (sm_80), by warpgroup (sm_90), by the tensor memory's unit (sm_100).
MATRIX = re.compile(r"(?:[HIQBD]MMA|[HIQB]GMMA|UTC[HIQO]MMA)\b")
#: fp32 arithmetic; with a 2, two at once (sm_100). MUFU: square roots, reciprocals.
ARITHMETIC = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "MUFU")
#: Asynchronous copies, by tile (descriptors) and by thread.
LOADS = ("UTMALDG", "LDGSTS")
#: Registers that went to local memory and came back.
SPILLS = ("STL", "LDL")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][^;]*?)\s*;")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_UNCONDITIONAL_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # predicate, "" if always executed
    text: str

    @property
    def mnemonic(self) -> str:
        """With all its modifiers: HGMMA.64x128x16.F32.BF16."""
        return self.text.split()[0]

    @property
    def name(self) -> str:
        return self.mnemonic.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes to."""
        found = _TARGET.search(self.text) if self.name in ("BRA", "CALL", "JMP") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A uniform branch has its predicate among its operands."""
        if self.name in ("BRA", "JMP"):
            return bool(self.guard) or "," in self.text
        return bool(self.guard) or self.name not in _UNCONDITIONAL_ENDS


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def loops(self) -> tuple[frozenset[int], ...]:
        """Every loop as indices of its instructions, outer ones first."""
        starts, successors = _blocks(self.instructions)
        bodies: dict[int, set[int]] = {}
        dominators = _dominators(successors)
        before: dict[int, list[int]] = {}
        for block in dominators:
            for following in successors[block]:
                before.setdefault(following, []).append(block)
        for block, above in dominators.items():
            for head in successors[block]:
                if head in above:
                    bodies.setdefault(head, {head}).update(_up_to(head, block, before))
        ends = [*starts[1:], len(self.instructions)]
        loops = [frozenset(i for block in body for i in range(starts[block], ends[block])) for body in bodies.values()]
        return tuple(sorted(loops, key=lambda loop: (-len(loop), min(loop))))

    @cached_property
    def main_loops(self) -> tuple[frozenset[int], ...]:
        """In the order of their addresses; a copy of a loop that the compiler peeled off is none."""
        matrix = {i for i, one in enumerate(self.instructions) if MATRIX.match(one.name)}
        hot = matrix or {i for i, one in enumerate(self.instructions) if one.name in ("FFMA", "FFMA2")}
        holding = [loop for loop in self.loops if loop & hot]
        return tuple(sorted((loop for loop in holding if not any(other < loop for other in holding)), key=min))

    def around(self, loop: frozenset[int]) -> frozenset[int]:
        """The instructions of the next larger loop that are not in this one; without one, all others outside of loops."""
        larger = [other for other in self.loops if loop < other]
        if larger:
            return min(larger, key=len) - loop
        return frozenset(range(len(self.instructions))) - frozenset().union(*self.loops)

    def count(self, names: Iterable[str], indices: Iterable[int] | None = None) -> dict[str, int]:
        """How many instructions of these names there are, among these indices; those that do not occur are left out."""
        chosen = range(len(self.instructions)) if indices is None else indices
        found = Counter(self.instructions[i].name for i in chosen)
        return {name: found[name] for name in names if found[name]}

    def matrix(self, indices: Iterable[int] | None = None) -> dict[str, int]:
        """Matrix instructions, as written."""
        chosen = range(len(self.instructions)) if indices is None else indices
        written = (self.instructions[i].mnemonic for i in chosen if MATRIX.match(self.instructions[i].name))
        return dict(sorted(Counter(written).items()))

    def issued(self, indices: Iterable[int]) -> int:
        """Instructions that take an issue slot of a warp that comes past all of them once."""
        return sum(self.instructions[i].name != "NOP" for i in indices)


def arithmetic_of(mnemonic: str) -> str:
    """A matrix instruction without its N, which may differ between tiles of one result: unit, M, K per instruction, types.

    On sm_100 a mnemonic names the unit and the kind of operand alone; shape and type are in a descriptor, made at run time.
    """
    return re.sub(r"\.(\d+)x\d+x(\d+)\b", r".\1xNx\2", mnemonic)


def read(text: str) -> Code:
    """The code of one kernel from cuobjdump's text."""
    return Code(tuple(Instruction(int(a, 16), guard or "", words) for a, guard, words in _LINE.findall(text)))


def _blocks(code: tuple[Instruction, ...]) -> tuple[list[int], list[list[int]]]:
    """(first instruction of every block, the blocks that may follow each)"""
    at = {one.address: i for i, one in enumerate(code)}
    leaders = {0}
    for i, one in enumerate(code):
        if one.target is not None or not one.falls_through:
            leaders.update({i + 1, at.get(one.target, 0)})  # type: ignore[arg-type]
    starts = sorted(i for i in leaders if i < len(code))
    block_of = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate([*starts[1:], len(code)]):
        last = code[end - 1]
        following = [block + 1] if last.falls_through and end < len(code) else []
        if last.target in at:
            following.append(block_of[at[last.target]])
        successors.append(following)
    return starts, successors


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
    """For every block that can be reached, the blocks that all ways to it pass through, itself among them."""
    order, stack, seen = [], [(0, iter(successors[0]))], {0}
    while stack:  # depth first; blocks are listed when all that follows them is
        block, rest = stack[-1]
        following = next((s for s in rest if s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    order.reverse()
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            before[following].append(block)
    found = {block: set(order) for block in order}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[b] for b in before[block])) | {block}
            changed |= new != found[block]
            found[block] = new
    return found


def _up_to(head: int, block: int, before: dict[int, list[int]]) -> set[int]:
    """The blocks from which ``block`` is reached without passing ``head``."""
    body, stack = {head}, [block]
    while stack:
        one = stack.pop()
        if one not in body:
            body.add(one)
            stack.extend(before.get(one, []))
    return body
