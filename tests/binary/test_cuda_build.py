"""The compiled CUDA kernels, as far as they can be judged without running them."""

import pytest

import rgd_ext
from bench.gpu import sass
from bench.gpu.machine_code import launch_name

BUILD = rgd_ext.build_info()
pytestmark = pytest.mark.skipif(BUILD["cuda"] is None, reason="built without CUDA")

# Threads of a block, and registers that let so many blocks of them run on a multiprocessor (65,536 registers each).
THREADS = 256
BLOCKS = {
    **{"moments": 4, "combine": 4, "squared_norm": 8},
    **dict.fromkeys(("combine of four", "products", "products with four", "centred"), 2),
    **{"gram": 1, "gram by matrix units": 2, "ghost_products": 1, "ghost_products by matrix units": 2},
    **dict.fromkeys(("reduce", "reduce_gram", "reduce_layers", "weights"), 4),
    **{"group_norm_grads": 3, "layer_norm_grads": 3, "add_runs": 4, "embedding_gram": 4},
    **dict.fromkeys(("row_means", "centre_gram", "sample_weights", "largest_eigenvalue"), 1),
}


# Where shared memory has room for one block, which may then have more registers.
ONE_BLOCK = {"sm_86", "sm_89", "sm_120"}, {"gram by matrix units", "ghost_products by matrix units"}


@pytest.fixture(scope="module")
def resources():
    from rgd_ext import _C

    if sass.cuobjdump() is None:
        pytest.skip("cuobjdump is not installed")
    return sass.resources(_C.__file__)


def test_build_info_names_the_architectures(resources):
    assert BUILD["architectures"]
    assert {a.partition("+")[0] for a in BUILD["architectures"]} == {architecture for architecture, _ in resources}


def test_all_kernels_are_there_for_every_architecture(resources):
    for architecture in {architecture for architecture, _ in resources}:
        assert BLOCKS.keys() <= {launch_name(kernel) for a, kernel in resources if a == architecture}, architecture


def test_no_kernel_spills_registers(resources):
    spilling = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not spilling


def test_registers_leave_room_for_several_blocks(resources):
    architectures, one_block = ONE_BLOCK
    for (architecture, kernel), use in resources.items():
        name = launch_name(kernel)
        blocks = 1 if architecture in architectures and name in one_block else BLOCKS.get(name, 1)
        assert use["REG"] * THREADS * blocks <= 65536, (architecture, kernel, use)


def test_static_shared_memory_is_left_to_the_launch(resources):
    # One KB is the system's own.
    assert all(use["SHARED"] <= 1024 for use in resources.values())
