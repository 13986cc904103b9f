"""The arguments of a call in forms that further forwards may change: copies, some with noise or of some samples."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..batch import is_list
from ..copies import detached_copy, with_tensors
from ..model_call import ModelCall
from .ragged import ragged_readings
from .random_numbers import is_generator
from .readings import Reading, readings


class Arguments:
    """The arguments of a call of a captured model.

    Attributes:
        is_listed: whether the first tensor is one of a list.
    """

    def __init__(self, call: ModelCall) -> None:
        self._args, self._kwargs = call.args, call.kwargs
        self._batch_dim = call.context.options.batch_dim
        self.is_listed = is_list(call.args, call.kwargs)

    def copied(self) -> tuple[tuple, dict]:
        """The positional and the keyword arguments, with tensors of their own."""
        return with_tensors(detached_copy, (self._args, self._kwargs))

    def noisy(self, size: float) -> tuple[tuple, dict]:
        """A copy of the arguments with relative noise of this size on real numbers."""
        generator = torch.Generator().manual_seed(0)
        return with_tensors(partial(_noisy, size, generator), (self._args, self._kwargs))

    def readings(self, batch_size: int) -> list[Reading]:
        """Ways to take samples out of the arguments."""
        arguments = self._args, self._kwargs, batch_size
        ragged = ragged_readings(*arguments) if self._batch_dim == 0 else ()
        return [*ragged, *readings(*arguments, self._batch_dim)]

    def generators(self) -> list[object]:
        """The random number generators among the arguments."""
        return [leaf for leaf in pytree.tree_leaves((self._args, self._kwargs)) if is_generator(leaf)]


def _noisy(size: float, generator: torch.Generator, x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.layout != torch.strided:
        return detached_copy(x)
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
    return detached_copy(x.detach() * (1 + size * noise)).requires_grad_(x.requires_grad)
