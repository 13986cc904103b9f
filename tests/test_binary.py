"""What is built, and what happens when it does not fit."""

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
