"""Run a function on every sample by itself under `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Mapped:
    """An argument with one value per sample, (B, ...)."""

    samples: Tensor

    @classmethod
    def batches_of_one(cls, x: Tensor, dim: int) -> Mapped:
        """The samples along `dim` of `x`, each with that dimension kept as 1."""
        if x.layout not in (torch.strided, torch.sparse_coo):
            x = x.to_sparse_coo()  # the others have no batches of one
        return cls(x.movedim(dim, 0).unsqueeze(dim + 1))


def map_samples(function: Callable, args: tuple, kwargs: dict, randomness: str) -> tuple[list, pytree.TreeSpec]:
    """`function(*args, **kwargs)` for each sample.

    Args:
        function: from one sample to any nest of tensors and other values.
        args, kwargs: nests in which a `Mapped` stands for its samples; all else goes to every sample as it is.
        randomness: "same" or "different" random numbers in all samples.

    Returns:
        The leaves of the results, tensors with the samples in front, and the structure they came in.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Mapped)]
    results: list = []
    result_spec: list[pytree.TreeSpec] = []

    def one(*samples: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for slot, sample in zip(slots, samples, strict=True):
            filled[slot] = sample
        args, kwargs = pytree.tree_unflatten(filled, spec)
        results[:], structure = pytree.tree_flatten(function(*args, **kwargs))
        result_spec[:] = [structure]
        return [value for value in results if isinstance(value, Tensor)]

    # The fused attention kernels have no batching rule; vmap would loop over the samples.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = torch.func.vmap(one, randomness=randomness)(*[leaves[slot].samples for slot in slots])
    mapped = iter(outputs)
    return [next(mapped) if isinstance(value, Tensor) else value for value in results], result_spec[0]
