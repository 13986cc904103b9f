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
    blocks: Sequence[Block], means: Iterator[MeanExchange], is_late: bool, scales: tuple[float, int, int], zeros: Tensor
) -> Difference:
    """The difference, found by the exchange of g.

    Args:
        blocks: the blocks, with the contributions of this process.
        means: for each block the exchange of its part of g, all of which has left.
        is_late: of their `reduced_buckets`.
        scales: s_r, B_r and R.
        zeros: (B_r,), in float64.
    """
    # Nothing here may hold an exchange when the next one begins, which needs the memory.
    parts = [_in_block(block, next(means), is_late, scales, zeros) for block in blocks]
    if len(parts) == 1:
        return parts[0]
    return Difference(
        total([part.products for part in parts]),
        total([part.alignment for part in parts]),
        total([part.square for part in parts]),
        total([part.squared_grad_norm for part in parts]),
        {parameter: norms for part in parts for parameter, norms in part.norms.items()},
        [mean for part in parts for mean in part.means],
    )


def _in_block(
    block: Block, exchange: MeanExchange, is_late: bool, scales: tuple[float, int, int], zeros: Tensor
) -> Difference:
    scale, own_size, ranks = scales
    products, difference = [zeros], {}
    norms: dict[nn.Parameter, ParameterNorms] = {}
    factors, is_itemised = dict(block.local.factors()), isinstance(block.local, ItemisedContributions)
    for bucket in exchange.reduced_buckets(is_late):  # the next one is on its way
        for parameter, mean in exchange.mean.parts_of(bucket).items():
            own = exchange.own.pop(parameter, None)  # mean_i G_i / R
            own_square = ranks**2 * _square(own) if is_itemised and own is not None else zeros.sum()
            part = mean if own is None else torch.add(mean, own, alpha=-scale * ranks, out=own)
            difference[parameter] = part
            if is_itemised:
                norms[parameter] = ParameterNorms(_square(part), _square(mean), own_square)
            if parameter in factors:
                products.append((scale * own_size) * factors[parameter].align(part).double())
    return Difference(
        total(products),
        dot(difference, exchange.mean.parts).double(),
        squared_norm([*difference.values()]).double(),
        exchange.mean.squared_norm().double(),
        norms,
        [block.layout.keeping(exchange.mean)],
    )


def _square(vector: Tensor) -> Tensor:
    return vector.double().square().sum()
