"""The compiled extension, where it was built: loading it registers its kernels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch

from . import ops  # noqa: F401  kernels are registered for operators that exist

_REMEDY = (
    "Install its wheel for this torch, or build it again in a checkout:"
    " pip install --no-build-isolation --force-reinstall --no-deps ."
)


def check_fit(compiled: str, cuda: str | None) -> None:
    """Check the torch that runs against the one that the extension was compiled for.

    The C++ interface changes with each minor release of torch, and CUDA's with each major release.

    Args:
        compiled: the version of torch that it was compiled for.
        cuda: the CUDA version that its CUDA kernels were compiled for; None without CUDA kernels.

    Raises:
        ImportError: if another one runs.
    """
    running = torch.__version__
    if compiled.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(f"rgd_ext was compiled for torch {compiled}, but torch {running} is installed. {_REMEDY}")
    if cuda is not None and cuda.split(".")[0] != (torch.version.cuda or "").split(".")[0]:
        found = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise ImportError(f"rgd_ext was compiled for CUDA {cuda}, but the installed torch {running} {found}. {_REMEDY}")


if importlib.util.find_spec("rgd_ext._C") is not None:
    # With another torch the linker would complain of symbols first, so setup.py has noted what the extension fits.
    _note = Path(__file__).with_name("_C.json")
    try:
        _fits = json.loads(_note.read_text())
        _compiled, _cuda = _fits["torch"], _fits["cuda"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ImportError(
            f"{_note}, which says what the compiled extension of rgd_ext fits, cannot be read. {_REMEDY}"
        ) from error
    check_fit(_compiled, _cuda)
    try:
        from . import _C as _C
    except ImportError as error:
        raise ImportError(
            f"the compiled extension of rgd_ext does not load with torch {torch.__version__}: {error}. {_REMEDY}"
        ) from error
else:
    _C = None  # type: ignore[assignment]  # to type checkers, which read its stub, it is always there


def build_info() -> dict[str, object]:
    """What this installation was built with.

    Returns:
        "compiled" says whether there are compiled kernels. "cuda" is the CUDA version that they were compiled with, or
        None, and "architectures" has the GPU architectures in them. "torch" is the version of torch that they were
        compiled for, or the one that runs, and "compiler" the C++ compiler, or None.
    """
    if _C is None:
        return {"compiled": False, "cuda": None, "architectures": [], "torch": torch.__version__, "compiler": None}
    return {"compiled": True, **_C.build_info()}
