"""Which dimension of a tensor holds the samples of the batch, decided from its shape or refused."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

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


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors among the leaves of nested tuples, lists and dicts."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Batch:
    """One call of a captured model: B and the storages of its inputs. `size` is None where no tensor came in."""

    size: int | None
    storages: frozenset[int] = frozenset()

    @classmethod
    def of(cls, inputs: object) -> Batch:
        """The batch in the arguments of a model: dimension 0 of the first tensor that has dimensions."""
        tensors = [t for t in tensors_in(inputs) if t.ndim > 0]
        return cls(tensors[0].shape[0] if tensors else None, frozenset(_storage(t) for t in tensors))

    def dim(self, x: Tensor, module: nn.Module, name: str, sample_ndim: int) -> int | None:
        """The dimension of the samples in an input of `module`, or None where all samples share it.

        Raises:
            ValueError: where the shape does not tell, naming the module and the way to mark it.
        """
        if hasattr(module, _MARK):
            return getattr(module, _MARK)
        if self.size is None:
            return 0
        made_inside = not x.dtype.is_floating_point and not self._holds(x)  # positions, or indices of the samples
        is_sample = x.ndim <= sample_ndim
        if not is_sample and x.shape[0] == self.size:
            if made_inside and self.size > 1 and (x.ndim == 1 or x.shape[1] == self.size):
                raise ValueError(self._ambiguous(x, name))
            return 0
        if x.requires_grad or not (is_sample or x.shape[0] == 1 or made_inside):
            raise ValueError(self._ambiguous(x, name))
        return None

    def _holds(self, x: Tensor) -> bool:
        return _storage(x) in self.storages

    def _ambiguous(self, x: Tensor, name: str) -> str:
        return (
            f"module '{name}' got an input of shape {tuple(x.shape)} in a batch of {self.size} samples, which does not"
            " tell the dimension of the samples. If the input is the same for all samples, give it a leading dimension"
            " of 1 or call rgd_ext.mark(module, batch_dim=None); if the samples are along another dimension (as with"
            " batch_first=False), keep them along dimension 0 or call rgd_ext.mark(module, batch_dim=...); if they are"
            " merged with another dimension, keep the two apart or capture the enclosing module as one unit with"
            " rgd_ext.register_rule(type(enclosing), rgd_ext.unit)"
        )


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
