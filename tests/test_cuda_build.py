"""The compiled CUDA kernels, as far as they can be judged without running them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import rgd_ext

BUILD = rgd_ext.build_info()
pytestmark = pytest.mark.skipif(BUILD["cuda"] is None, reason="built without CUDA")

# Threads of a block, and registers that let so many blocks of them run on a multiprocessor (65,536 registers each).
THREADS = 256
BLOCKS = {
    **{"combine": 2, "moments": 4, "products": 2, "centred": 2, "gram": 1, "ghost_products": 1},
    "squared_norm": 8,
    **dict.fromkeys(("reduce", "reduce_gram", "reduce_layers", "weights"), 4),
    **{"group_norm_grads": 3, "layer_norm_grads": 3, "add_runs": 4, "embedding_gram": 4},
    **dict.fromkeys(("row_means", "centre_gram", "sample_weights", "largest_eigenvalue"), 1),
}


def cuobjdump():
    """The toolkit's, or the one that comes with torch's Triton."""
    triton = pytest.importorskip("triton")
    found = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not Path(found).exists():
        pytest.skip("cuobjdump is not installed")
    return found


@pytest.fixture(scope="module")
def resources():
    """By architecture and mangled name of the kernel: registers, bytes of stack, shared and local memory."""
    from rgd_ext import _C

    report = subprocess.run([cuobjdump(), "--dump-resource-usage", _C.__file__], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    found, architecture, name = {}, None, None
    for line in report.stdout.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line):
            found[architecture, name] = {key: int(value) for key, value in match}
    return found


def is_of(kernel, mangled):
    """Whether a function is an instance of `kernel`: its name stands behind its length."""
    return f"{len(kernel) + len('_kernel')}{kernel}_kernel" in mangled


def test_build_info_names_the_architectures(resources):
    assert BUILD["architectures"]
    assert {a.partition("+")[0] for a in BUILD["architectures"]} == {architecture for architecture, _ in resources}


def test_all_kernels_are_there_for_every_architecture(resources):
    for architecture in {architecture for architecture, _ in resources}:
        names = [name for a, name in resources if a == architecture]
        for kernel in BLOCKS:
            assert any(is_of(kernel, name) for name in names), (architecture, kernel)


def test_no_kernel_spills_registers(resources):
    spilling = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not spilling


def test_registers_leave_room_for_several_blocks(resources):
    for (_, name), use in resources.items():
        for kernel, blocks in BLOCKS.items():
            if is_of(kernel, name):
                assert use["REG"] * THREADS * blocks <= 65536, (name, use)


def test_static_shared_memory_is_left_to_the_launch(resources):
    # One KB is the system's own.
    assert all(use["SHARED"] <= 1024 for use in resources.values())
