"""The results that all arms are compared with, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

SLAB = 2**23  # elements that are converted to float64 at a time


def exact(grads: list[Tensor], epsilon: Tensor) -> dict[str, object]:
    """Direction, moments and Gramian in float64, from a slab of the columns of G at a time."""
    batch_size = len(grads[0])
    alignments, squared_norms = epsilon.new_zeros(2, batch_size, dtype=torch.float64)
    gram = epsilon.new_zeros(batch_size, batch_size, dtype=torch.float64)
    columns = max(1, SLAB // batch_size)
    means = []
    for grad in grads:
        slabs = []
        for slab in grad.split(columns, 1):
            slab = slab.double()
            slabs.append(slab.mean(0))
            gram += slab @ slab.T
            slab -= slabs[-1]
            alignments += slab @ slabs[-1]
            squared_norms += slab.square_().sum(1)
        means.append(torch.cat(slabs))
    weights = (1 - epsilon.double() * alignments) / batch_size
    direction = [torch.cat([weights @ slab.double() for slab in grad.split(columns, 1)]) for grad in grads]
    return {"direction": direction, "moments": (means, alignments, squared_norms), "gram": gram}
