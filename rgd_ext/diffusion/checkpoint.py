"""A folder of results that stays intact if the process is killed, and that belongs to one model and its weights."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..bits import flat_bits


def fingerprint(tree: object) -> str:
    """A hash of the tensors, numbers and text in a nest; objects of other types do not contribute to it."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(flat_bits(leaf.cpu(), torch.uint8).numpy().data)
        elif isinstance(leaf, Mapping):
            digest.update(fingerprint(dict(leaf)).encode())
        elif isinstance(leaf, (str, bytes, int, float, complex, type(None))):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


class Checkpoint:
    """Named nests of tensors and numbers, each in a file that is replaced as a whole.

    Args:
        folder: made if it is missing.
        identity: a fingerprint of what all results depend on; it is saved with them.

    Raises:
        ValueError: if `folder` is a file, or holds results with another identity or without one.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint {self.folder} is a file: pass the path of a folder, which may be missing")
        if any(self.folder.glob("*.pt")) and self.load("identity") != identity:
            raise ValueError(
                f"checkpoint {self.folder} belongs to another model or other weights: pass another path, or delete it"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save("identity", identity)

    def load(self, name: str) -> Any:
        """The content that was last saved under `name`, or None. Raises ValueError if the file is damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"checkpoint file {path} is damaged: delete it, and what it held is computed again"
            ) from error

    def save(self, name: str, content: object) -> None:
        """Replace the content under `name`. A crash leaves either the old content or the new one."""
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"
