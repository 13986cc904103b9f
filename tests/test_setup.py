"""What is packed, what a build needs, and what setup.py refuses: `--version` runs its decisions and builds nothing."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


def refusal(**variables):
    """The error of a run of setup.py with these environment variables."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RGD_EXT_BUILD", "FORCE_CUDA", "CUDA_PATH")}
    command = [sys.executable, str(SETUP), "--version"]
    result = subprocess.run(command, env=environment | variables, cwd=SETUP.parent, capture_output=True, text=True)
    assert result.returncode != 0, result.stdout
    return result.stderr


def test_an_unknown_build_is_refused():
    assert "RGD_EXT_BUILD is 'gpu'" in refusal(RGD_EXT_BUILD="gpu")


@pytest.mark.parametrize("variables", [{"FORCE_CUDA": "1"}, {"RGD_EXT_BUILD": "cuda"}], ids=str)
def test_cuda_that_cannot_be_built_is_refused(variables, tmp_path):
    error = refusal(CUDA_HOME=str(tmp_path), **variables)
    assert "CUDA kernels were asked for, but" in error
    assert "nvcc was not found" in error if torch.version.cuda else "built without CUDA" in error


def test_cpu_kernels_without_a_compiler_are_refused():
    assert "no C++ compiler was found. Install g++" in refusal(RGD_EXT_BUILD="cpu", CXX="no-such-compiler")


needs_cuda = pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None, reason="needs nvcc and torch with CUDA"
)


@needs_cuda
def test_cuda_sources_are_compiled_first(tmp_path):
    ninja = tmp_path / "ninja"
    ninja.write_text('#!/bin/sh\n[ "$1" = --version ] || cat build.ninja\nexit 0\n')
    ninja.chmod(0o755)
    command = [sys.executable, str(SETUP), "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    variables = {"RGD_EXT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(command, env=os.environ | variables, cwd=SETUP.parent, capture_output=True, text=True)
    rules = [line.split()[2] for line in result.stdout.splitlines() if line.startswith("build ")]
    assert set(rules) == {"cuda_compile", "compile"}, result.stderr
    assert rules == sorted(rules, key=lambda rule: rule != "cuda_compile")


@needs_cuda
def test_architectures_that_are_too_old_are_refused():
    assert "TORCH_CUDA_ARCH_LIST names 7.5" in refusal(RGD_EXT_BUILD="cuda", TORCH_CUDA_ARCH_LIST="7.5;9.0")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packed, in which builds may leave files."""
    folder = tmp_path_factory.mktemp("checkout")
    leave = shutil.ignore_patterns("__pycache__", "_C.json", "*.so", "wheel.sh")
    for name in ("csrc", "rgd_ext", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def hook(checkout, call, torch=None, build="auto"):
    """What a hook of the build backend returns, in a process with this module for torch: None as if it were missing."""
    code = f"""
import json, sys
sys.modules["torch"] = {torch}
sys.path.insert(0, "tools")
import build_backend
result = build_backend.{call}
print(json.dumps(result))
"""
    environment = os.environ | {"RGD_EXT_BUILD": build}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_build_installs_the_torch_that_the_user_names(checkout, kind):
    found = hook(checkout, f"get_requires_for_build_{kind}({{'torch': '2.13.0'}})")
    assert {"torch==2.13.0", "ninja"} <= {*found}


@pytest.mark.parametrize("release", ["", "nonsense", "torch==2.13.0", ["2.13.0", "2.14.1"]])
def test_a_torch_that_is_no_release_is_refused(checkout, release):
    code = f"import sys; sys.path.insert(0, 'tools'); import build_backend as b; b._named({{'torch': {release!r}}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"torch is {release!r} in the settings of the build: pass a release, -C torch=2.13.0" in done.stderr


@pytest.mark.parametrize("settings", ["", "{'editable_mode': 'strict'}"])
def test_a_build_installs_no_torch_that_nobody_named(checkout, settings):
    assert not [name for name in hook(checkout, f"get_requires_for_build_wheel({settings})") if "torch" in name]


def test_the_source_distribution_has_all_that_a_build_needs_and_no_tests(checkout, tmp_path):
    name = hook(checkout, f"build_sdist({str(tmp_path)!r})")
    with tarfile.open(tmp_path / name) as archive:
        packed = {Path(*Path(path).parts[1:]) for path in archive.getnames()}
    needed = {path.relative_to(checkout) for path in checkout.rglob("*.*") if path.is_file()}
    needed = {path for path in needed if not path.parts[0].endswith(".egg-info")}
    assert Path("csrc", "grads.h") in needed
    assert Path("rgd_ext", "_C.pyi") in needed
    assert needed <= packed
    assert not [path for path in packed if path.parts[:1] in (("tests",), ("bench",))]


def test_a_build_without_torch_says_how_to_name_one(checkout):
    code = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("RGD_EXT_BUILD", "FORCE_CUDA")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install . -C torch=2.13.0" in done.stderr


@pytest.mark.parametrize(
    ("build", "required"),
    [("cpu", f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"), ("none", "torch>=2.11")],
)
def test_a_compiled_installation_requires_its_release_of_torch(checkout, tmp_path, build, required):
    call = f"prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    name = hook(checkout, call, torch="__import__('torch')", build=build)
    lines = (tmp_path / name / "METADATA").read_text().splitlines()
    assert [line for line in lines if line.startswith("Requires-Dist: torch")][:1] == [f"Requires-Dist: {required}"]
