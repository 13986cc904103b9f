"""The table of compiled kernels, compared with docs/kernels.md, the sources and the binary."""

import re
from pathlib import Path

import pytest
import torch

import rgd_ext
from rgd_ext.ops import KERNELS

ROOT = Path(__file__).parent.parent
BUILT = {"CPU": rgd_ext.build_info()["compiled"], "CUDA": rgd_ext.build_info()["cuda"] is not None}


def registered_in_sources(device):
    """Operators with a kernel for `device`, from the registrations in csrc/."""
    found = set()
    for source in (ROOT / "csrc").rglob("*.c*"):
        # One operator in the line of the registration, or several in its block.
        for block in re.findall(rf"(?ms)^TORCH_LIBRARY_IMPL\(rgd_ext, {device}, m\) .*?}}$", source.read_text()):
            found |= set(re.findall(r'm\.impl\("(\w+)"', block))
    return found


def test_every_operator_is_in_the_table():
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rgd_ext::")}
    assert names == set(KERNELS)


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
