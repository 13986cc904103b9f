"""The user's build: `pip install --no-build-isolation .`. Metadata stands in pyproject.toml, but for the dependencies.

RGD_EXT_BUILD chooses what is compiled:
    auto (default)  CUDA kernels where torch has CUDA and nvcc is there, else CPU kernels, else (no C++ compiler) none
    cuda | cpu      exactly that, or an error; FORCE_CUDA=1 stands for cuda, as in other extensions
    none            pure Python: every operator runs its plain PyTorch definition
TORCH_CUDA_ARCH_LIST chooses the GPU architectures: by default those of the GPUs that are there, else those of torch.
A compiled installation requires the release of torch that it was compiled with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cuda", "cpu", "none")
SOURCES = Path(__file__).parent.joinpath("csrc", "sources.txt").read_text().split()
CUDA_SOURCES = [source for source in SOURCES if source.startswith("csrc/cuda/")]
# -fopenmp: at::parallel_for is a header, and serial without it.
# -g0: the flags of Python itself ask for debug information, a fifth of the time it takes to compile.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo"]
# Asynchronous copies and the matrix instructions on bfloat16.
OLDEST_ARCHITECTURE = 8.0


def fail(reason: str, remedy: str) -> None:
    """Stop the build with one line that says what to do."""
    sys.exit(f"rgd_ext: {reason}. {remedy}")


def warn(reason: str, remedy: str) -> None:
    """Say what the installation goes without."""
    print(f"rgd_ext: WARNING: {reason}. {remedy} and reinstall.", file=sys.stderr)


def find_toolkit() -> None:
    """Set CUDA_HOME to where nvcc says it is: torch would take the folder of a wrapper script for it."""
    nvcc = shutil.which("nvcc")
    if "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ or nvcc is None:
        return
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if top:
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def missing_for_cuda() -> tuple[str, str] | None:
    """Why CUDA kernels cannot be built, and the remedy; None if they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA", "Install a CUDA build of torch (https://pytorch.org)."
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return "nvcc was not found", "Install the CUDA toolkit or set CUDA_HOME to it."
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        found = f"CUDA {release[1]}" if release else "an unknown CUDA"
        return (
            f"{nvcc} is of {found}, but this torch was built with CUDA {torch.version.cuda}",
            "Install the toolkit of that CUDA and set CUDA_HOME to it, or a torch for yours.",
        )
    if not architectures():
        return (
            f"no GPU here has compute capability {OLDEST_ARCHITECTURE}",
            "Set TORCH_CUDA_ARCH_LIST to build for others.",
        )
    return None


def architectures() -> list[str]:
    """Architectures to compile for, as TORCH_CUDA_ARCH_LIST names them."""
    import torch

    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in chosen:
        number = re.match(r"\d+\.\d+", name)
        if number and float(number[0]) < OLDEST_ARCHITECTURE:
            fail(
                f"TORCH_CUDA_ARCH_LIST names {name}",
                f"The CUDA kernels need compute capability {OLDEST_ARCHITECTURE} or newer: leave it out.",
            )
    if chosen:
        return chosen
    there = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    known = [divmod(int(number), 10) for number in re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or "")]
    numbers = sorted({f"{major}.{minor}" for major, minor in there or known}, key=float)
    numbers = [number for number in numbers if float(number) >= OLDEST_ARCHITECTURE]
    if numbers and not there:
        numbers[-1] += "+PTX"  # for GPUs to come
    return numbers


def cxx_compiler() -> str | None:
    """The C++ compiler that torch's BuildExtension runs, if it is installed."""
    return shutil.which((os.environ.get("CXX") or "c++").split()[0])


def chosen_build() -> str:
    """`cuda`, `cpu` or `none`, from RGD_EXT_BUILD and what is installed."""
    choice = os.environ.get("RGD_EXT_BUILD", "cuda" if os.environ.get("FORCE_CUDA") == "1" else "auto")
    if choice not in CHOICES:
        fail(f"RGD_EXT_BUILD is {choice!r}", f"Set it to one of {', '.join(CHOICES)}.")
    if choice == "none":
        return choice
    find_toolkit()
    try:
        import torch.utils.cpp_extension
    except ImportError:
        fail(
            "torch is not installed where this build runs",
            "First `pip install torch`, then `pip install --no-build-isolation .`; or name a release of torch,"
            " `pip install . -C torch=2.13.0`; or set RGD_EXT_BUILD=none.",
        )
    if choice == "cpu":
        if cxx_compiler() is None:
            fail("CPU kernels were asked for, but no C++ compiler was found", "Install g++ or clang++, or set CXX.")
        return choice
    missing = missing_for_cuda()
    if choice == "cuda" and missing:
        fail(f"CUDA kernels were asked for, but {missing[0]}", missing[1])
    if choice == "auto" and cxx_compiler() is None:
        warn(
            "no C++ compiler was found; installing without compiled kernels, which is slower", "Install g++ or clang++"
        )
        return "none"
    if missing and torch.version.cuda:
        warn(f"{missing[0]}; installing without CUDA kernels, which is slower on a GPU", missing[1].rstrip("."))
    return "cpu" if missing else "cuda"


def build_arguments(build: str) -> dict:
    """The arguments of `setup` that depend on what is compiled."""
    if build == "none":
        return {"install_requires": ["torch>=2.11", "numpy"]}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """Records beside the module what it fits, to be read before it is loaded."""

        def run(self):
            super().run()
            fits = {"torch": torch.__version__, "cuda": torch.version.cuda if build == "cuda" else None}
            Path(self.get_ext_fullpath("rgd_ext._C")).with_name("_C.json").write_text(json.dumps(fits))

        def build_extension(self, extension):
            """Compile the CUDA sources first: they take longest. setuptools would sort all sources by name."""
            compile_all = self.compiler.compile
            self.compiler.compile = lambda sources, **options: compile_all(
                sorted(sources, key=lambda source: not source.endswith(".cu")), **options
            )
            super().build_extension(extension)

    arguments = {"extra_compile_args": {"cxx": CXX_FLAGS}, "extra_link_args": ["-fopenmp"]}
    if build == "cuda":
        chosen = architectures()
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen)
        names = " ".join(f"sm_{name.replace('.', '')}" for name in chosen)
        arguments["define_macros"] = [
            ("RGD_EXT_CUDA", f'"{torch.version.cuda}"'),
            ("RGD_EXT_ARCHITECTURES", f'"{names}"'),
        ]
        arguments["extra_compile_args"]["nvcc"] = NVCC_FLAGS
        extension = CUDAExtension("rgd_ext._C", SOURCES, **arguments)
    else:
        sources = [source for source in SOURCES if source not in CUDA_SOURCES]
        extension = CppExtension("rgd_ext._C", sources, **arguments)
    release = ".".join(torch.__version__.split(".")[:2])
    dependencies = [f"torch=={release}.*", "numpy"]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}, "install_requires": dependencies}


# A source distribution, and what pip has to know before it installs torch for a build, are the same for all builds.
is_describing = sys.argv[-1] == "egg_info" or {"sdist", "bdist_wheel"} & {*sys.argv} == {"sdist"}
setup(**build_arguments("none" if is_describing else chosen_build()))
