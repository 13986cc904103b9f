"""Marks on modules, by which users say where the samples are."""

from __future__ import annotations

from torch import nn

# The attribute of a module that has its mark.
_MARK = "_rgd_ext_batch_dim"


def mark(module: nn.Module, batch_dim: int | None) -> None:
    """Say where the samples are in the inputs of a module, where shapes alone cannot tell.

    Args:
        module: a module with parameters inside a model to be captured; the mark stays on it, copies included.
        batch_dim: the dimension of the samples in the module's inputs and output, or None where the inputs are the
            same for all samples (positions, for example).

    Raises:
        TypeError: if `module` is not a module or `batch_dim` is neither an int nor None.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: pass a torch.nn.Module")
    if batch_dim is not None and (not isinstance(batch_dim, int) or isinstance(batch_dim, bool)):
        raise TypeError(f"batch_dim is {batch_dim!r}: pass an int, or None for inputs shared by all samples")
    setattr(module, _MARK, batch_dim)


def mark_of(module: nn.Module, default: int | None) -> int | None:
    """The `batch_dim` that `module` was marked with, or `default`."""
    return module.__dict__.get(_MARK, default)


def is_marked(module: nn.Module) -> bool:
    """Whether `mark` was called for `module`."""
    return _MARK in module.__dict__
