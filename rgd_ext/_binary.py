"""The compiled extension, where it was built: loading it registers its kernels."""

from __future__ import annotations

import importlib.util

import torch

from . import ops  # noqa: F401  kernels are registered for operators that exist

_REMEDY = "Build it again: pip install --no-build-isolation --force-reinstall --no-deps ."


def check_torch(compiled: str, running: str) -> None:
    """Raise ImportError unless both are the same minor release: the C++ interface changes with each."""
    if compiled.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(f"rgd_ext was compiled for torch {compiled}, but torch {running} is installed. {_REMEDY}")


if importlib.util.find_spec("rgd_ext._C") is not None:
    try:
        from . import _C as _C
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of rgd_ext does not load with torch {torch.__version__}: {error}. {_REMEDY}"
        ) from error
    check_torch(_C.build_info()["torch"], torch.__version__)
else:
    _C = None  # type: ignore[assignment]  # to type checkers, which read its stub, it is always there


def build_info() -> dict[str, object]:
    """What this installation was built with.

    Returns:
        "compiled": whether there are compiled kernels; "cuda": the CUDA version they were compiled with, or None;
        "architectures": the GPU architectures in them; "torch": the torch version they were compiled for, or the one
        that runs; "compiler": the C++ compiler, or None.
    """
    if _C is None:
        return {"compiled": False, "cuda": None, "architectures": [], "torch": torch.__version__, "compiler": None}
    return {"compiled": True, **_C.build_info()}
