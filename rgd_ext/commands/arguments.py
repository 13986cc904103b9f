"""Types of arguments that several commands share."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

FACTORY = (
    "MODULE:FACTORY names a function that takes no arguments, in a module that is installed or in the current"
    " directory."
)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: pass a whole number of at least 1")
    return int(text)


def png(text: str) -> Path:
    """The path of a PNG file that can be written."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise ArgumentTypeError(f"{text!r}: pass a path that ends in .png")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text!r} cannot be written: pass a file in a folder that exists")
    return path


def folder(text: str) -> Path:
    """The path of a folder that can be written, or made."""
    path = Path(text)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ArgumentTypeError(f"{text!r} cannot be written: pass a folder, which may be missing")
    return path
