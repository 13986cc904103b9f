"""What is built, what importing it brings along, and what happens when it does not fit."""

import subprocess
import sys

import pytest
import torch

import rgd_ext
from rgd_ext._binary import check_torch


def test_build_info():
    info = rgd_ext.build_info()
    assert set(info) == {"compiled", "cuda", "architectures", "torch", "compiler"}
    assert info["compiled"] == (info["compiler"] is not None)
    check_torch(info["torch"], torch.__version__)


def test_kernels_for_another_torch_are_refused():
    check_torch("2.13.0", "2.13.1+cu130")
    with pytest.raises(ImportError, match=r"compiled for torch 2\.13\.0, but torch 2\.14\.1 .*pip install"):
        check_torch("2.13.0", "2.14.1")


def test_operators_are_defined_whatever_is_built():
    for name in ("moments", "combine", "diffusion_mv", "gram", "precondition"):
        operator = getattr(torch.ops.rgd_ext, name)
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"rgd_ext::{name}", "CPU")
        assert compiled == rgd_ext.build_info()["compiled"]
        assert operator.default is not None


def test_first_step_brings_neither_the_compiler_nor_the_search_for_nvcc(tmp_path, monkeypatch):
    # torch._dynamo takes longer to import than torch, and torch.utils.cpp_extension warns where no GPU is.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = """
import sys
import torch
before = set(sys.modules)
import rgd_ext
model = torch.nn.Linear(3, 2)
rgd_ext.precondition(model)
model(torch.ones(4, 3)).sum().backward()
print(*{"torch._dynamo", "torch.utils.cpp_extension", "setuptools"} & (set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
