"""setup.py refuses what it cannot build. `--version` runs all of its decisions and builds nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parents[1] / "setup.py"


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
