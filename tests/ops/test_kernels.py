"""The table of compiled kernels, compared with what else lists operators: docs/kernels.md, sources, binary, tests."""

import re
from pathlib import Path

import pytest
import torch

import rgd_ext
from bench.gpu.operator_inputs import INPUTS
from rgd_ext.ops import DEFAULTS, KERNELS

ROOT = Path(__file__).parents[2]
BUILT = {"CPU": rgd_ext.build_info()["compiled"], "CUDA": rgd_ext.build_info()["cuda"] is not None}


def registered_in_sources(device):
    """Operators with a kernel for `device`, from the registrations in csrc/."""
    found = set()
    for source in (ROOT / "csrc").rglob("*.c*"):
        # One operator in the line of the registration, or several in its block.
        for block in re.findall(rf"(?ms)^TORCH_LIBRARY_IMPL\(rgd_ext, {device}, m\) .*?}}$", source.read_text()):
            found |= set(re.findall(r'm\.impl\("(\w+)"', block))
    return found


def test_every_operator_is_in_the_tables():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rgd_ext::")}
    assert names == set(KERNELS) == set(DEFAULTS)


def test_the_checks_on_a_gpu_have_arguments_for_every_operator():
    assert INPUTS.keys() == KERNELS.keys()


def schemas_of_the_cpp_tests():
    source = (ROOT / "tests" / "cpp" / "operators" / "main.cpp").read_text()
    for literals in re.findall(r"m\.def\(([^;]*)\);", source):
        yield torch._C.parse_schema("rgd_ext::" + "".join(re.findall('"([^"]*)"', literals)))


def test_the_cpp_tests_define_the_operators_with_a_cpu_kernel_as_the_package_does():
    schemas = {schema.name.partition("::")[2]: schema for schema in schemas_of_the_cpp_tests()}
    assert schemas.keys() == {name for name, devices in KERNELS.items() if "CPU" in devices}
    for name, schema in schemas.items():
        assert schema == getattr(torch.ops.rgd_ext, name).default._schema


@pytest.mark.parametrize("device", BUILT)
def test_sources_register_the_kernels_of_the_table(device):
    assert registered_in_sources(device) == {name for name, devices in KERNELS.items() if device in devices}


@pytest.mark.parametrize("device", [device for device, built in BUILT.items() if built])
@pytest.mark.parametrize("name", KERNELS)
def test_the_binary_has_the_kernels_of_the_table(name, device):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"rgd_ext::{name}", device)
    assert has_kernel == (device in KERNELS[name])


def test_the_page_has_the_table():
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \|$", (ROOT / "docs" / "kernels.md").read_text(), re.M)
    assert {name: tuple(d for d, has in zip(BUILT, row, strict=True) if has == "yes") for name, *row in rows} == KERNELS
