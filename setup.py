"""The user's build: `pip install --no-build-isolation .`. Metadata stands in pyproject.toml.

RGD_EXT_BUILD chooses what is compiled:
    auto (default)  CUDA kernels where torch has CUDA and nvcc is there, else CPU kernels, else (no C++ compiler) none
    cuda | cpu      exactly that, or an error
    none            pure Python: every operator runs its plain PyTorch definition
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cuda", "cpu", "none")
SOURCES = Path(__file__).parent.joinpath("csrc", "sources.txt").read_text().split()
CUDA_SOURCES = [source for source in SOURCES if source.endswith(".cu")]
# -fopenmp: at::parallel_for is a header, and serial without it.
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo"]


def fail(reason: str, remedy: str) -> None:
    """Stop the build with one line that says what to do."""
    sys.exit(f"rgd_ext: {reason}. {remedy}")


def missing_for_cuda() -> tuple[str, str] | None:
    """Why CUDA kernels cannot be built, and the remedy; None if they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA", "Install a CUDA build of torch (https://pytorch.org)."
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc was not found", "Install the CUDA toolkit or set CUDA_HOME to it."
    if not CUDA_SOURCES:
        return "csrc/sources.txt lists no .cu file", "Build with RGD_EXT_BUILD=cpu."
    return None


def cxx_compiler() -> str | None:
    """The C++ compiler that torch's BuildExtension runs, if it is installed."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def chosen_build() -> str:
    """`cuda`, `cpu` or `none`, from RGD_EXT_BUILD and what is installed."""
    choice = os.environ.get("RGD_EXT_BUILD", "auto")
    if choice not in CHOICES:
        fail(f"RGD_EXT_BUILD is {choice!r}", f"Set it to one of {', '.join(CHOICES)}.")
    if choice == "none":
        return choice
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        fail(
            "torch is not installed where this build runs",
            "First `pip install torch`, then `pip install --no-build-isolation .` (or set RGD_EXT_BUILD=none).",
        )
    missing = missing_for_cuda()
    if choice == "cuda" and missing:
        fail(f"RGD_EXT_BUILD=cuda, but {missing[0]}", missing[1])
    if choice == "auto" and cxx_compiler() is None:
        print(
            "rgd_ext: WARNING: no C++ compiler was found; installing without compiled kernels, which is slower."
            " Install g++ or clang++ and reinstall.",
            file=sys.stderr,
        )
        return "none"
    return "cpu" if choice == "cpu" or missing else "cuda"


def build_arguments(build: str) -> dict:
    """The arguments of `setup` that compile `rgd_ext._C`."""
    if build == "none":
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    arguments = {"extra_compile_args": {"cxx": CXX_FLAGS}, "extra_link_args": ["-fopenmp"]}
    if build == "cuda":
        arguments["define_macros"] = [("RGD_EXT_CUDA", f'"{torch.version.cuda}"')]
        arguments["extra_compile_args"]["nvcc"] = NVCC_FLAGS
        extension = CUDAExtension("rgd_ext._C", SOURCES, **arguments)
    else:
        sources = [source for source in SOURCES if source not in CUDA_SOURCES]
        extension = CppExtension("rgd_ext._C", sources, **arguments)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**build_arguments(chosen_build()))
