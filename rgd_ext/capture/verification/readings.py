"""Ways to take some samples of a batch out of the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, islice, product
from typing import TypeAlias

import torch
from torch import Tensor

from ...nests import tensors_in
from ..copies import detached_copy, with_tensors

# The largest number of readings that are tried.
_MOST = 32
# The indices of some samples -> the positional and the keyword arguments of a call of these alone.
Reading: TypeAlias = Callable[[Tensor], tuple[tuple, dict]]
# A tensor of a batch, and the indices of some samples -> the tensor of these.
Cut: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def readings(args: tuple, kwargs: dict, batch_size: int, at: int = 0) -> Iterator[Reading]:
    """Ways to take samples out of the arguments, the usual one first.

    The samples of a tensor lie along dimension 0 in all of them, or 1; or along `at`, if that is another than 0, and
    along 0 in some. All but the first tensor may be shared.
    """
    tensors = tensors_in((args, kwargs))
    for dims in ((at, 0),) if at else ((0,), (1,)):
        places = [[d for d in dims if x.ndim > d and x.shape[d] == batch_size] for x in tensors]
        first = next((n for n, found in enumerate(places) if found), None)
        if first is not None:
            choices = [found[:1] if n == first else [*found, None] for n, found in enumerate(places)]
            for chosen in islice(_by_rank(choices), _MOST):
                cuts = [None if dim is None else partial(_selected, dim) for dim in chosen]
                yield partial(taken, (args, kwargs), cuts)


def _by_rank(choices: Sequence[Sequence[int | None]]) -> Iterator[list[int | None]]:
    """All ways to take one item of each of `choices`; those come first that take the first item most often."""
    others = [n for n, found in enumerate(choices) if len(found) > 1]
    for number in range(len(others) + 1):
        for changed in combinations(others, number):
            for chosen in product(*[found[1:] if n in changed else found[:1] for n, found in enumerate(choices)]):
                yield list(chosen)


def taken(tree: tuple[tuple, dict], cuts: Sequence[Cut | None], samples: Tensor) -> tuple[tuple, dict]:
    """The arguments of a call of some samples, given the cut of each tensor in them, or None where all share it."""
    found = iter(cuts)

    def of_tensor(x: Tensor) -> Tensor:
        cut = next(found)
        return detached_copy(x) if cut is None else cut(x.detach(), samples).requires_grad_(x.requires_grad)

    return with_tensors(of_tensor, tree)


def _selected(dim: int, x: Tensor, samples: Tensor) -> Tensor:
    samples = samples.to(x.device)
    if x.layout in (torch.strided, torch.sparse_coo):
        return x.index_select(dim, samples)
    if x.is_nested:
        return torch.nested.as_nested_tensor([x[i] for i in samples.tolist()], layout=x.layout)
    return x.to_sparse_coo().index_select(dim, samples).to_sparse(layout=x.layout)
