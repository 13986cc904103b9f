"""The mean gradient of all samples, and its difference from that of a process's own samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..contributions.itemised import ItemisedContributions
from ..gradients import squared_norm, total
from .blocks import Block
from .buckets import dot
from .mean import MeanExchange


class Part(NamedTuple):
    """The part of a batch that one process has.

    Attributes:
        scale: s_r, as in `AcrossRanks`.
        size: B_r, the number of samples.
        ranks: R, the number of processes.
    """

    scale: float
    size: int
    ranks: int


class ParameterNorms(NamedTuple):
    """Squared norms of the parts of one parameter, in float64.

    Attributes:
        difference: of c, as in `Difference`.
        mean: of g.
        own: of mean_i G_i.
    """

    difference: Tensor
    mean: Tensor
    own: Tensor


class Difference(NamedTuple):
    """c = g - s_r mean_i G_i, of which no more than a block has been in memory; with the names of `AcrossRanks`.

    It is 0 where the means of all processes agree.

    Attributes:
        products: <g_i, c> of this process's samples, (B_r,), in float64.
        alignment: <c, g>, in float64, like the following two.
        square: |c|^2.
        squared_grad_norm: |g|^2.
        norms: of each parameter, if the contributions note their statistics.
        means: give g, in the form that is written to `.grad`, block by block.
    """

    products: Tensor
    alignment: Tensor
    square: Tensor
    squared_grad_norm: Tensor
    norms: dict[nn.Parameter, ParameterNorms]
    means: list[Callable[[], dict[nn.Parameter, Tensor]]]


def difference_of(
    blocks: Sequence[Block], means: Iterator[MeanExchange], is_late: bool, part: Part, zeros: Tensor
) -> Difference:
    """The difference, found by the exchange of g.

    Args:
        blocks: the blocks, with the contributions of this process.
        means: for each block the exchange of its part of g, all of which has left when it is given out.
        is_late: whether a part of g came late in any process, as for `MeanExchange.reduced_buckets`.
        part: the part of the batch in this process.
        zeros: (B_r,), in float64.
    """
    # Nothing here may hold an exchange when the next one begins, which needs the memory.
    found = [_in_block(block, next(means), is_late, part, zeros) for block in blocks]
    if len(found) == 1:
        return found[0]
    return Difference(
        total([each.products for each in found]),
        total([each.alignment for each in found]),
        total([each.square for each in found]),
        total([each.squared_grad_norm for each in found]),
        {parameter: norms for each in found for parameter, norms in each.norms.items()},
        [mean for each in found for mean in each.means],
    )


def _in_block(block: Block, exchange: MeanExchange, is_late: bool, part: Part, zeros: Tensor) -> Difference:
    products, zero = zeros.clone(), zeros.sum()
    alignments: list[Tensor] = []
    squares: list[Tensor] = []
    norms: dict[nn.Parameter, ParameterNorms] = {}
    factors, is_itemised = dict(block.local.factors()), isinstance(block.local, ItemisedContributions)
    for bucket in exchange.reduced_buckets(is_late):  # the next one is on its way
        means, difference = exchange.mean.parts_of(bucket), {}
        for parameter, mean in means.items():
            own = exchange.take_own(parameter, factors.get(parameter))  # mean_i G_i / R
            own_square = part.ranks**2 * _square(own) if is_itemised and own is not None else zero
            c = mean if own is None else torch.add(mean, own, alpha=-part.scale * part.ranks, out=own)
            difference[parameter] = c
            if is_itemised:
                norms[parameter] = ParameterNorms(_square(c), _square(mean), own_square)
            if parameter in factors:
                products += (part.scale * part.size) * factors[parameter].align(c)
        alignments.append(dot(difference, means).double())
        squares.append(squared_norm([*difference.values()]).double())
    return Difference(
        products,
        total(alignments),
        total(squares),
        exchange.mean.squared_norm().double(),
        norms,
        [block.layout.keeping(exchange.mean)],
    )


def _square(vector: Tensor) -> Tensor:
    return vector.double().square().sum()
