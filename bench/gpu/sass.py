"""Reads SASS, the machine code of NVIDIA GPUs, as cuobjdump prints it: instructions, basic blocks and loops."""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"(?<![\w.])0x([0-9a-f]+)$")
# Instructions that do not continue with the next one, unless they depend on a predicate.
_LEAVES = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "BSYNC", "KILL")


def cuobjdump() -> str | None:
    """The path of the CUDA toolkit's disassembler, or of the copy that Triton brings; None without either."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


def _report(*arguments: str) -> str:
    run = subprocess.run([cuobjdump() or "cuobjdump", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"cuobjdump {arguments[0]} failed: {run.stderr.strip()}")
    return run.stdout


@dataclass(frozen=True)
class Kernel:
    """A kernel by its mangled name."""

    mangled: str

    @cached_property
    def name(self) -> str:
        found = re.search(r"\d([a-z_]+)_kernel(?=I|E|v|P)", self.mangled)
        return found[1] if found else self.mangled

    @cached_property
    def _arguments(self) -> str:
        return self.mangled.partition("_kernelI")[2]

    @property
    def dtype(self) -> str:
        """The dtype of the tensors: the first type among the template's arguments."""
        found = re.match(r"(?:L[ilbx]\d+E)*(?:N\w*?Sums)?I?(?:N\w*?(BFloat16|Half)E|([fd]))", self._arguments)
        return {"f": "float", "d": "double"}.get(found[2], found[1]) if found else ""

    @property
    def numbers(self) -> list[int]:
        """The template's arguments that are numbers, in order."""
        return [int(number) for number in re.findall(r"L[ilbx](\d+)E", self._arguments)]


def resources(binary: str) -> dict[tuple[str, Kernel], dict[str, int]]:
    """Registers and bytes of stack, shared and local memory, by architecture and kernel."""
    found, architecture, kernel = {}, "", None
    for line in _report("--dump-resource-usage", binary).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            kernel = Kernel(match[1])
        elif match := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line):
            found[architecture, kernel] = {key: int(value) for key, value in match}
    return found


def disassembly(binary: str, architecture: str) -> dict[Kernel, Function]:
    """The machine code of every kernel for one architecture."""
    text = _report("-sass", "-arch", architecture, binary)
    return {Kernel(name): function for name, function in functions(text).items()}


def functions(text: str) -> dict[str, Function]:
    """All functions of a disassembly by their mangled names."""
    _, *parts = _FUNCTION.split(text)
    return {name: Function(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1", or ""
    opcode: str  # with its modifiers, as in "LDG.E.128.CONSTANT"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    def has(self, *modifiers: str) -> bool:
        return set(modifiers) <= set(self.opcode.split(".")[1:])

    @property
    def target(self) -> int | None:
        """The address to which a branch jumps, or at which the threads that diverge after a BSSY reconverge."""
        found = _ADDRESS.search(self.operands)
        return int(found[1], 16) if found and self.name in ("BRA", "BSSY", "JMP") else None

    @property
    def bits(self) -> int:
        """The width of a memory access."""
        width = re.search(r"\.[US]?(8|16|64|128)(?![0-9])", self.opcode)
        return int(width[1]) if width else 32

    @property
    def conditional(self) -> bool:
        """Whether it depends on a predicate, before the opcode or among the operands of a branch."""
        return bool(self.predicate) or (self.name == "BRA" and "," in self.operands)


def loads_in_flight(instructions: list[Instruction]) -> int:
    """The largest number of 16-byte loads from global memory that are in flight at one time.

    A load is in flight until its result, or that of a later load, is used. As in a loop, the first instruction follows
    the last.
    """
    most, in_flight = 0, []
    for instruction in instructions * 2:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", instruction.operands)]
        used = [n for n, first in enumerate(in_flight) if any(first <= register < first + 4 for register in registers)]
        in_flight = in_flight[used[-1] + 1 :] if used else in_flight
        if instruction.name == "LDG" and instruction.bits == 128:
            in_flight.append(registers[0])
        most = max(most, len(in_flight))
    return most


@dataclass(frozen=True)
class Loop:
    """A natural loop: the basic blocks on all paths from its header back to the header."""

    function: Function
    header: int
    blocks: frozenset[int]
    ends: frozenset[int]  # the blocks that branch back to the header

    def instructions(self) -> list[Instruction]:
        return [i for block in sorted(self.blocks) for i in self.function.blocks[block]]

    def always(self) -> list[Instruction]:
        """The instructions that run in every iteration: no branch inside the loop and no predicate skips them."""
        passed = (b for b in sorted(self.blocks) if all(self.function.dominates(b, end) for end in self.ends))
        return [i for block in passed for i in self.function.blocks[block] if not i.predicate]

    def shortest_iteration(self, block: int) -> list[Instruction]:
        """The instructions of the shortest iteration that passes through `block`."""
        return [
            i
            for b in self._shortest_path(self.header, {block}) + self._shortest_path(block, self.ends)[1:]
            for i in self.function.blocks[b]
        ]

    def _shortest_path(self, start: int, ends: Collection[int]) -> list[int]:
        """The blocks of the path inside the loop with the fewest instructions."""
        queue, seen = [(0, [start])], set()
        while True:
            length, path = heapq.heappop(queue)
            if path[-1] in ends:
                return path
            if path[-1] in seen:
                continue
            seen.add(path[-1])
            for block in self.blocks.intersection(self.function.successors[path[-1]]) - {self.header}:
                heapq.heappush(queue, (length + len(self.function.blocks[block]), [*path, block]))


class Function:
    """The instructions and the control flow of one kernel."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [Instruction(int(a, 16), p, o, rest.strip()) for a, p, o, rest in _INSTRUCTION.findall(self._text)]

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        targets = {i.target for i in self.instructions}
        starts = [0]
        for index, (before, instruction) in enumerate(pairwise(self.instructions), 1):
            if before.name in _LEAVES or instruction.address in targets:
                starts.append(index)
        return [self.instructions[a:b] for a, b in pairwise([*starts, len(self.instructions)])]

    @cached_property
    def successors(self) -> list[list[int]]:
        numbers = {block[0].address: number for number, block in enumerate(self.blocks) if block}
        meeting: dict[str, int | None] = {}  # where threads reconverge, by barrier register
        found = []
        for number, block in enumerate(self.blocks):
            for instruction in block:
                if instruction.name == "BSSY":
                    meeting[instruction.operands.partition(",")[0]] = instruction.target
            last, following = block[-1], [number + 1] if number + 1 < len(self.blocks) else []
            # BRA.DIV jumps to code for a warp whose threads have diverged, which comes back: that is not counted.
            if last.name not in _LEAVES or last.has("DIV"):
                found.append(following)
                continue
            target = meeting.get(last.operands) if last.name == "BSYNC" else last.target
            taken = [numbers[target]] if target in numbers else []
            found.append(taken + (following if last.conditional else []))
        return found

    @cached_property
    def _predecessors(self) -> list[list[int]]:
        """The reachable predecessors of each block; the blocks of functions that are called are not reachable."""
        found: list[list[int]] = [[] for _ in self.blocks]
        reached, left = {0}, [0]
        while left:
            block = left.pop()
            for other in self.successors[block]:
                found[other].append(block)
                if other not in reached:
                    reached.add(other)
                    left.append(other)
        return found

    @cached_property
    def _dominators(self) -> list[int]:
        """The blocks that are on all paths to each block, as a bit mask."""
        everything = (1 << len(self.blocks)) - 1
        dominators = [1] + [everything] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                common = everything
                for other in self._predecessors[block]:
                    common &= dominators[other]
                new = common | 1 << block
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    def dominates(self, a: int, b: int) -> bool:
        return bool(self._dominators[b] >> a & 1)

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, outer loops before the inner ones."""
        loops = []
        for header, before in enumerate(self._predecessors):
            ends = [block for block in before if self.dominates(header, block)]
            if not ends:
                continue
            blocks, left = {header}, list(ends)
            while left:
                block = left.pop()
                if block not in blocks:
                    blocks.add(block)
                    left += self._predecessors[block]
            loops.append(Loop(self, header, frozenset(blocks), frozenset(ends)))
        return sorted(loops, key=lambda loop: -len(loop.blocks))

    @cached_property
    def innermost(self) -> list[Loop]:
        """The loops that contain no other loop."""
        return [loop for loop in self.loops if not any(other.blocks < loop.blocks for other in self.loops)]
