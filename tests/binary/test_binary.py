"""What is built, what importing it brings along, and what happens when it does not fit."""

import json
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import rgd_ext
from rgd_ext._binary import check_fit


def test_build_info():
    info = rgd_ext.build_info()
    assert set(info) == {"compiled", "cuda", "architectures", "torch", "compiler"}
    assert info["compiled"] == (info["compiler"] is not None)
    check_fit(info["torch"], info["cuda"])


@pytest.mark.parametrize("version", ["2.13.0", "2.13.1+cu130"])
def test_another_patch_of_the_same_torch_fits(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check_fit("2.13.0", None)


def test_another_patch_of_the_same_cuda_fits(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    check_fit(torch.__version__, "13.0")


@pytest.mark.parametrize(
    ("running", "found"), [("12.8", r"is for CUDA 12\.8\."), (None, r"has no CUDA\.")], ids=["another", "none"]
)
def test_kernels_for_another_cuda_are_refused(monkeypatch, running, found):
    monkeypatch.setattr(torch.version, "cuda", running)
    with pytest.raises(ImportError, match=rf"for CUDA 13\.0, but the installed torch .* {found} .*pip install"):
        check_fit(torch.__version__, "13.0")


def failed_import(folder, note):
    """The last line of `import rgd_ext`, with an extension that no linker loads and what the build has noted of it."""
    package = folder / "rgd_ext"
    shutil.copytree(Path(rgd_ext.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*"))
    package.joinpath(f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    if note is not None:
        package.joinpath("_C.json").write_text(json.dumps(note))
    done = subprocess.run([sys.executable, "-c", "import rgd_ext"], cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"torch": "2.0.1", "cuda": None}, "rgd_ext was compiled for torch 2.0.1, but torch "),
        ({"torch": torch.__version__, "cuda": "9.1"}, "rgd_ext was compiled for CUDA 9.1, but the installed torch "),
        ({"torch": torch.__version__, "cuda": None}, "the compiled extension of rgd_ext does not load with torch "),
        (None, "which says what the compiled extension of rgd_ext fits, cannot be read."),
        ({"torch": torch.__version__}, "which says what the compiled extension of rgd_ext fits, cannot be read."),
        ("x", "which says what the compiled extension of rgd_ext fits, cannot be read."),
    ],
    ids=["another torch", "another CUDA", "broken", "no note", "half a note", "another note"],
)
def test_an_extension_that_does_not_fit_is_refused_in_one_line_before_it_is_loaded(tmp_path, note, said):
    line = failed_import(tmp_path, note)
    assert said in line
    assert line.endswith("pip install --no-build-isolation --force-reinstall --no-deps .")


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
