"""The `info` command: what is installed, for what it was built, and what goes slower without the rest."""

from __future__ import annotations

import argparse
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import torch

from .errors import OPTIONAL

_FOLDER = Path(__file__).resolve().parents[1]


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="print version, build and devices, and what is slower as things are")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a line for each fact about the installation."""
    from .. import __version__, build_info

    build = build_info()
    facts = {"rgd_ext": __version__, "folder": _FOLDER, **build}
    facts |= {"running": _running(), "missing": _missing(), "slower": _slower(build)}
    for name, value in facts.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        print(f"{name:<14}{value or 'none'}")


def _running() -> str:
    """What is here to compute with."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads with {capability}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(found)


def _missing() -> str:
    """The optional packages that are not installed."""
    missing = [package for module, package in OPTIONAL.items() if find_spec(module) is None]
    return f"{', '.join(missing)}: pip install 'rgd_ext[all]'" if missing else ""


def _slower(build: dict[str, object]) -> str:
    """What the installation goes without, with the remedy."""
    installed = Path(str(distribution("rgd_ext").locate_file("rgd_ext"))).resolve()
    if not build["compiled"] and installed != _FOLDER and (installed / "_C.json").exists():
        return (
            "all models, small ones most: this is a source without compiled kernels, in place of the package that is"
            f" installed in {installed}. Run Python in another folder"
        )
    if not build["compiled"]:
        return (
            "all models, small ones most: nothing was compiled for this torch."
            " Install a wheel for it, or build with a C++ compiler (RGD_EXT_BUILD=cpu)"
        )
    if build["cuda"] is None and torch.version.cuda and torch.cuda.is_available():
        return (
            "models on the GPU: the CUDA kernels were not compiled."
            " Install a wheel with them, or build with nvcc (RGD_EXT_BUILD=cuda)"
        )
    return ""
