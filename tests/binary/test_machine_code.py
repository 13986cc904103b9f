"""The loops of the compiled CUDA kernels, read from their machine code: no GPU is needed."""

import re

import pytest

import rgd_ext
from bench.gpu import machine_code, sass

BUILD = rgd_ext.build_info()
pytestmark = pytest.mark.skipif(BUILD["cuda"] is None, reason="built without CUDA")

STREAMING = ("moments", "products", "centred", "combine")
PRODUCTS = ("gram", "ghost_products")
NORMS = ("layer_norm_grads", "group_norm_grads")
ARCHITECTURES = [name.partition("+")[0] for name in BUILD["architectures"] or ()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    return request.param


@pytest.fixture(scope="module")
def code(architecture):
    from rgd_ext import _C

    return sass.disassembly(_C.__file__, architecture)


@pytest.fixture(scope="module")
def kernels(code):
    """The functions of an architecture by kernel, those for few matrices: those for many have the same loops."""
    return {k: f for k, f in code.items() if k.name in STREAMING + PRODUCTS + NORMS and 800 not in k.numbers}


def of(kernels, *names):
    found = {kernel: function for kernel, function in kernels.items() if kernel.name in names}
    assert {kernel.name for kernel in found} == set(names)
    return found


def is_multiply_add(instruction):
    return instruction.name in ("FFMA", "DFMA")


def test_every_kernel_writes_something(code):
    """nvcc silently drops code that takes the address of a host constant, as std::min does."""
    for kernel, function in code.items():
        assert "probe" in kernel.name or any(i.name == "STG" for i in function.instructions), kernel


def test_shared_memory_is_read_in_words(kernels):
    for kernel, function in of(kernels, "moments", "products", "centred", *PRODUCTS).items():
        narrow = [i.opcode for i in function.instructions if i.name == "LDS" and i.bits < 32]
        assert not narrow, kernel


def test_combine_has_several_loads_in_flight(kernels):
    for kernel, function in of(kernels, "combine").items():
        one_vector = kernel.numbers[-1] == 1
        most = max(sass.loads_in_flight(loop.instructions()) for loop in function.innermost)
        assert most >= (5 if one_vector else 3), kernel


def float_and_double(loop):
    """The numbers of operations on float and on double in the iteration with the most operations on float.

    Only operations that run whenever those on float do are counted: none in a branch or under a predicate of its own.
    """

    def floats(instructions):
        return [i for i in instructions if i.name in ("FADD", "FMUL", "FFMA")]

    most = max(loop.blocks, key=lambda block: len(floats(loop.function.blocks[block])))
    iteration = loop.shortest_iteration(most)
    predicates = {i.predicate for i in floats(iteration)} | {""}
    on_double = [
        i for i in iteration if i.opcode.startswith(("DADD", "DMUL", "DFMA", "F2F.F64")) and i.predicate in predicates
    ]
    return len(floats(iteration)), len(on_double)


def test_elements_are_not_added_in_double_precision_one_by_one(kernels):
    """Some GPUs have one unit for double precision to 64 for float."""
    for kernel, function in of(kernels, *NORMS).items():
        if kernel.dtype == "double":
            continue
        loops = [(float_and_double(loop), loop) for loop in function.innermost]
        counts = [(counted, hex(loop.instructions()[0].address)) for counted, loop in loops if counted[0]]
        assert counts, kernel
        assert all(8 * doubles <= floats for (floats, doubles), _ in counts), (kernel, counts)


def test_tiles_are_copied_asynchronously_16_bytes_at_a_time(kernels):
    for kernel, function in of(kernels, "moments", "products", "centred", *PRODUCTS).items():
        copies = {i.bits for loop in function.loops for i in loop.instructions() if i.name == "LDGSTS"}
        assert 128 in copies, kernel


def test_matrix_units_multiply_where_they_should(kernels):
    for kernel, function in of(kernels, *PRODUCTS).items():
        by_matrix_units = {i.name for i in function.instructions if i.name.endswith("MMA") and i.name != "HFMA2"}
        assert ("HMMA" in by_matrix_units) == ("MatrixUnitSums" in kernel.mangled), kernel
        if "PlainSums" in kernel.mangled:
            assert any(is_multiply_add(i) for i in function.instructions), kernel


def test_no_local_memory_is_used(kernels):
    for kernel, function in kernels.items():
        assert not [i.opcode for i in function.instructions if i.name in ("LDL", "STL")], kernel


def test_the_table_in_the_readme_is_that_of_the_kernels(architecture, kernels):
    from rgd_ext import _C

    if architecture != machine_code.ARCHITECTURE:
        pytest.skip(f"the table is about {machine_code.ARCHITECTURE}")
    table = machine_code.table(sass.resources(_C.__file__), kernels)
    found, wanted = ([int(number) for number in re.findall(r"\d+", text)] for text in (machine_code.written(), table))
    hint = f"python -m bench.gpu.machine_code {_C.__file__} --write\n{table}"
    assert found == pytest.approx(wanted, rel=0.1, abs=1), hint
