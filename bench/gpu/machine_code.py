"""Counts the instructions that the CUDA kernels issue per 16 bytes of G, for the table in csrc/cuda/README.md.

    python -m bench.gpu.machine_code [path of _C.so] [--write]

Needs an extension built for sm_90 (by default the one that is installed), cuobjdump and a C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..measuring.pages import refilled
from .sass import Function, Instruction, Kernel, Loop, disassembly, resources

ROOT = Path(__file__).parents[2]
README = ROOT / "csrc" / "cuda" / "README.md"
BEGIN, END = "<!-- python -m bench.gpu.machine_code --write -->\n", "<!-- end -->"
ARCHITECTURE, ROWS = "sm_90", 128
THREADS, REGISTERS, SHARED_BYTES, RESIDENT_THREADS = 256, 65536, 228 << 10, 2048
DTYPES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}


@dataclass(frozen=True)
class Phase:
    """One of the loops over a tile, identified by a kind of instruction that its iterations contain."""

    name: str
    counted: Callable[[Instruction], bool]
    for_element: int = 0  # how many of these instructions an element takes; 0 for one per 16 bytes
    subtracts: bool = False


def _copies(instruction: Instruction) -> bool:
    return instruction.name == "LDGSTS" and instruction.bits == 128


def _multiplies(instruction: Instruction) -> bool:
    return instruction.name in ("FFMA", "DFMA")


COPY = Phase("copy", _copies)
CENTRED = Phase("centred products", _multiplies, 2, subtracts=True)
# The loops of each kernel, by its `launch_name`.
KERNELS = {
    "moments": [COPY, Phase("mean", _multiplies, 1), CENTRED],
    "combine": [Phase("sum", _multiplies, 1)],
    "combine of four": [Phase("sums", _multiplies, 4)],
    "products": [COPY, Phase("products", _multiplies, 1)],
    "products with four": [COPY, Phase("products", _multiplies, 4)],
    "centred": [COPY, CENTRED],
    # Their instructions per 16 bytes grow with the number of samples, so they have no entry.
    "gram": [],
    "gram by matrix units": [],
}


def launch_name(kernel: Kernel) -> str:
    """The name of a kernel in tests/cpp/launches.cpp, which names those of four vectors differently."""
    if kernel.name in ("combine", "products") and kernel.numbers[-1] == 4:
        return kernel.name + {"combine": " of four", "products": " with four"}[kernel.name]
    return kernel.name + " by matrix units" * ("MatrixUnitSums" in kernel.mangled)


def is_measured(kernel: Kernel) -> bool:
    """Whether this instance of a template is launched for ROWS samples and few matrices."""
    return (
        launch_name(kernel) in KERNELS
        and 800 not in kernel.numbers
        and (kernel.name != "gram" or kernel.numbers[0] == ROWS)
    )


def _subtracts(loop: Loop) -> bool:
    return any(i.name in ("FADD", "DADD") for i in loop.instructions())


def instructions_for_packet(function: Function, phase: Phase, element_bytes: int) -> float:
    """Instructions per 16 bytes in the loop that takes the most packets per iteration; others are for remainders."""
    of_packet = phase.for_element * 16 // element_bytes or 1

    def candidates() -> Iterator[tuple[float, float]]:
        for loop in function.innermost:
            if phase.for_element and _subtracts(loop) != phase.subtracts:
                continue
            for block in loop.blocks:
                if any(map(phase.counted, function.blocks[block])):
                    iteration = loop.shortest_iteration(block)
                    packets = sum(map(phase.counted, iteration)) / of_packet
                    yield -packets, len(iteration) / packets

    return min(candidates())[1]


def shared_bytes_of_launches() -> dict[tuple[str, str], int]:
    """Bytes of shared memory of each launch, by its name and dtype, as tests/cpp/launches.cpp prints them."""
    compiler = shutil.which((os.environ.get("CXX") or "c++").split()[0])
    if compiler is None:
        raise RuntimeError("no C++ compiler was found: install g++ or clang++")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "launches")
        flags = ["-std=c++20", "-DRGD_EXT_EMULATION", "-Wno-unknown-pragmas"]
        folders = [f"-I{ROOT / path}" for path in ("csrc/cuda", "tests/cpp")]
        subprocess.run([compiler, *flags, *folders, str(ROOT / "tests/cpp/launches.cpp"), "-o", program], check=True)
        printed = subprocess.run([program, str(ROWS)], check=True, capture_output=True, text=True).stdout
    lines = [line.split(",") for line in printed.splitlines()]
    return {(name, dtype): int(shared) for on, name, dtype, shared, *_ in lines if on == ARCHITECTURE}


def resident_blocks(registers: int, shared_bytes: int) -> int:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * THREADS)
    return min(by_registers, SHARED_BYTES // (shared_bytes + 1024), RESIDENT_THREADS // THREADS)


def table(uses: dict[tuple[str, Kernel], dict[str, int]], code: dict[Kernel, Function]) -> str:
    """The table in Markdown, from the resources of the kernels and their machine code."""
    functions = {(launch_name(kernel), kernel.dtype): (kernel, f) for kernel, f in code.items() if is_measured(kernel)}
    shared = shared_bytes_of_launches()
    lines = [
        f"| kernel ({', '.join(DTYPES)}) | instructions for 16 bytes | registers | shared memory, KB | blocks |",
        "|---|---|---|---|---|",
    ]
    for name, phases in KERNELS.items():
        rows = []
        for dtype, size in DTYPES.items():
            if (name, dtype) not in functions:
                rows.append("----")
                continue
            kernel, function = functions[name, dtype]
            issued = sum(instructions_for_packet(function, phase, size) for phase in phases)
            registers, bytes_shared = uses[ARCHITECTURE, kernel]["REG"], shared[name, dtype]
            blocks = resident_blocks(registers, bytes_shared)
            rows.append((round(issued) or "-", registers, round(bytes_shared / 1024), blocks))
        columns = [", ".join(map(str, column)) for column in zip(*rows, strict=True)]
        lines.append(f"| {' | '.join([name, *columns])} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table that is in the README now."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.machine_code", description=__doc__.partition("\n")[0])
    parser.add_argument("binary", nargs="?", help="the compiled extension; by default the one that is installed")
    parser.add_argument("--write", action="store_true", help=f"write the table into {README.relative_to(ROOT)}")
    arguments = parser.parse_args()
    binary = arguments.binary or importlib.import_module("rgd_ext._C").__file__
    new = table(resources(binary), disassembly(binary, ARCHITECTURE))
    print(new, end="")
    if arguments.write:
        README.write_text(refilled(README.read_text(), lambda command: new if command in BEGIN else None))


if __name__ == "__main__":
    main()
