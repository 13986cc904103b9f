"""The per-sample gradients of a batch whose samples are in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from typing import Literal

import torch
from torch import Tensor, nn

from ..contributions.itemised import Item, ItemisedContributions
from ..gradients import Moments, PerSampleGradients, sum_of_moments, total
from ..linalg import accumulate_dtype, trace_rounding
from ..metric.stats import statistics
from .blocks import Block, UsedParameters, aligned_parts
from .buckets import Sum, all_reduced
from .difference import Difference, Part, difference_of
from .group import Group
from .lanczos import largest_eigenvalue
from .mean import MeanExchange

# The largest Gramian of the union, in samples, and the most bytes of gradients that are sent for it.
_MOST_SAMPLES, _MOST_BYTES = 4096, 4 << 30
# Rounding errors of a product with D, in ulps of mean_i |g_i|^2: half of those that were measured, so that the
# iteration neither ends before them nor goes on for long after.
_NOISE = 0.1


class AcrossRanks(PerSampleGradients):
    """The gradients of the samples of all processes, rank by rank; each process holds those of its own samples.

    The loss is the mean of the losses of the R processes, as for DistributedDataParallel. With B_r samples in process
    r, whose own gradients, those of its own loss, are G_i, and with B samples in all, g_i = s_r G_i for
    s_r = B / (R B_r), so that mean_i g_i is the mean of the gradients of the processes.

    All processes have to call the same methods in the same order: each is an exchange. Vectors of the parameter space
    are exchanged block by block.

    Args:
        blocks: the blocks, with the contributions of this process.
        used: which parameters the processes use.
        group: the processes.
        sizes: B_r of each of them.
        means: for each block the exchange of its part of g, all of which has left when it is given out.
        is_late: whether a part of g came late in any process, as for `MeanExchange.reduced_buckets`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        used: UsedParameters,
        group: Group,
        sizes: Sequence[int],
        means: Iterator[MeanExchange],
        is_late: bool,
    ) -> None:
        self._blocks, self._used, self._group, self._sizes = blocks, used, group, sizes
        self._parameters = used.anywhere()
        self._is_last = False
        self._means, self._is_late = means, is_late

    @property
    def batch_size(self) -> int:
        """B, the number of samples in all processes."""
        return sum(self._sizes)

    @property
    def own(self) -> slice:
        """The places of this process's samples among all."""
        return self._group.places(self._sizes)

    def parameters(self) -> list[nn.Parameter]:
        """Those that any process uses, in the order of vectors of the parameter space."""
        return self._parameters

    @property
    def _scale(self) -> float:
        """s_r; 0 for a process without samples."""
        return self.batch_size / (self._group.size * self._own_size) if self._own_size else 0.0

    @property
    def _own_size(self) -> int:
        return self._sizes[self._group.rank]

    def _all_gather(self, what: str, rows: Tensor) -> Tensor:
        """The rows of all samples, (B, n), given those of this process, (B_r, n)."""
        return self._group.all_gather_rows(what, rows.double(), self._sizes).to(self._dtype)

    def _of_each(self, what: str, numbers: Tensor) -> Tensor:
        """The numbers of all processes, (R, n), given those of this one, (n,)."""
        return self._group.all_gather_rows(what, numbers[None], [1] * self._group.size)

    def _zeros(self) -> Tensor:
        """(B_r,)."""
        return torch.zeros(self._own_size, dtype=self._dtype, device=self._device)

    def _weighted(self, block: Block, weights: Tensor, last: bool = False) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """The parts of sum_i w_i g_i, for the samples of this process.

        Args:
            block: the block.
            weights: w, (B,).
            last: whether the contributions to the block are used up.
        """
        if not block.local:
            return ()
        local = block.local.release() if last else block.local
        return local.combine_by_parameter(weights[self.own] * self._scale)

    @property
    def _dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, {accumulate_dtype(p.dtype) for p in self._used.parameters})

    @property
    def _device(self) -> torch.device:
        return self._used.parameters[0].device

    @cached_property
    def _difference(self) -> Difference:
        """Of g from the mean gradient of this process; found by the exchange of g."""
        part = Part(self._scale, self._own_size, self._group.size)
        return difference_of(self._blocks, self._means, self._is_late, part, self._zeros().double())

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""
        return self._in_order([each() for each in self._difference.means])

    def _in_order(self, blocks: Iterable[Mapping[nn.Parameter, Tensor]]) -> list[Tensor]:
        """The parts of a vector, given by block and parameter."""
        found = {parameter: part for block in blocks for parameter, part in block.items()}
        return [found[parameter] for parameter in self._parameters]

    def moments(self) -> Moments:
        """The statistics that need no Gramian."""
        return self._moments

    @cached_property
    def _moments(self) -> Moments:
        local = self._centred_moments()  # while the mean is on its way
        rows = torch.stack(self._own_moments(local), 1)
        squared_grad_norm = self._difference.squared_grad_norm.to(self._dtype)
        alignments, squared_norms = self._group.all_gather_rows("alignments", rows, self._sizes).unbind(1)
        # Where the g_i nearly agree, the rounding of c (see `_own_moments`) shifts all alignments of a process. They
        # have to sum to zero: weights are 1/B less multiples of them, and would not sum to one.
        alignments = alignments - alignments.mean()
        return Moments(squared_grad_norm, alignments.to(self._dtype), squared_norms.to(self._dtype))

    def _own_moments(self, local: Moments) -> tuple[Tensor, Tensor]:
        """<g_i - g, g> and |g_i - g|^2 of this process's samples, in float64.

        With G_i - mean_i G_i the rows that are centred within the process, whose moments are `local`,
        g_i - g = s_r (G_i - mean_i G_i) - c: nothing here is a difference of large numbers where the g_i agree.
        """
        found = self._difference
        products = found.products - found.products.mean()  # s_r <G_i - mean_i G_i, c>
        within = self._scale**2 * local.alignments.double() + products  # s_r <G_i - mean_i G_i, g>
        squared_norms = self._scale**2 * local.squared_norms.double() - 2 * products
        return within - found.alignment, (squared_norms + found.square).clamp(min=0)

    def _centred_moments(self) -> Moments:
        """The moments of this process's own gradients, as if there were no others."""
        parts = [statistics(block.local, with_gram=False).moments for block in self._blocks if block.local]
        return sum_of_moments(parts) if parts else Moments(self._zeros().sum(), self._zeros(), self._zeros())

    def moments_and_mean(self) -> tuple[Moments, list[Tensor]]:
        """`moments` and `mean`, by one exchange of gradients."""
        return self.moments(), self.mean()

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return self.align_by_parameter(dict(zip(self._parameters, vector, strict=True)))

    def align_by_parameter(self, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """`align` with a vector whose parts are given by parameter; those of other parameters are zero."""
        return self._gathered_products(aligned_parts(self._blocks, vectors))

    def _gathered_products(self, parts: list[Tensor]) -> Tensor:
        """<g_i, v> of all samples, (B,), given those of this process's G_i with the parts of v."""
        products = total([self._zeros(), *parts])
        return self._all_gather("products with a vector", self._scale * products[:, None])[:, 0]

    def largest_eigenvalue(self, method: Literal["lanczos", "bound"]) -> Tensor:
        """lambda_max(D), by Lanczos iteration with one exchange of gradients in each step; or a bound, by one number.

        The bound is that of the parts of which D is the sum, the covariances within the processes and those of their
        means: lambda_max(D) <= sum_r B_r / B (s_r^2 lambda_max(D_r) + |c_r|^2), with c_r as in `_own_moments`.
        """
        if method == "bound":
            return self._eigenvalue_bound()
        ulp = torch.finfo(self._dtype).eps
        squared_grad_norm, trace = self._moments.squared_grad_norm, self._moments.squared_norms.mean()
        if trace <= trace_rounding(squared_grad_norm, ulp):
            return torch.zeros_like(trace)
        noise = _NOISE * ulp * (squared_grad_norm + trace).item()
        return largest_eigenvalue(self._product, self.batch_size, self._dtype, noise).to(self._device)

    def _product(self, weights: Tensor) -> Tensor:
        """C C^T u for centred u, (B,), with C the matrix whose rows are the g_i - g."""
        there = weights.to(self._device)
        parts = [self._product_in(block, there) for block in self._blocks]
        products = self._gathered_products(parts).to(weights)
        return products - products.mean()

    def _product_in(self, block: Block, weights: Tensor) -> Tensor:
        """The products of this process's G_i with the part of sum_j u_j g_j in a block, (B_r,)."""
        vector = all_reduced(block.layout, self._group, "a Lanczos vector", self._weighted(block, weights))
        return block.local.align_by_parameter(vector.parts) if block.local else self._zeros()

    def _eigenvalue_bound(self) -> Tensor:
        own, gram = self._difference.square, self._own_gram()
        if gram is not None:
            centred = torch.ops.rgd_ext.gram_moments(gram)[3]
            largest = torch.ops.rgd_ext.largest_eigenvalue(centred, torch.finfo(gram.dtype).eps)  # B_r lambda_max(D_r)
            own = own + self._scale**2 / self._own_size * largest
        bounds = self._of_each("bounds of eigenvalues", own.view(1))[:, 0]
        return (bounds @ bounds.new_tensor(self._sizes) / self.batch_size).to(self._dtype)

    def sample_norms(self) -> Tensor:
        """|g_i|, (B,), from the Gramians of the processes."""
        norms, gram = self._zeros(), self._own_gram()
        if gram is not None:
            norms = self._scale * gram.diagonal().clamp(min=0).sqrt()
        return self._all_gather("norms of samples", norms[:, None])[:, 0]

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred: the rows of each process are sent to all others.

        Raises:
            ValueError: if that is too much to send.
        """
        self._check_gram()
        found = torch.zeros(self._own_size, self.batch_size, dtype=self._dtype, device=self._device)
        factors = {p: factor for block in self._blocks for p, factor in block.local.factors()}
        for parameter in self._parameters:
            factor, columns = factors.get(parameter), 0
            own = None if factor is None else self._rows(factor.dense())
            for rank, size in enumerate(self._sizes):
                rows = found.new_zeros(size, parameter.numel()) if own is None or rank != self._group.rank else own
                self._group.broadcast("per-sample gradients", [rows], rank)
                if own is not None and rank != self._group.rank:
                    found[:, columns : columns + size] += own @ rows.T
                columns += size
        of_own = self._own_gram()
        if of_own is not None:
            found[:, self.own] = self._scale**2 * of_own
        gram = self._group.all_gather_rows("the Gramian", found, self._sizes)
        return (gram + gram.T) / 2

    def _own_gram(self) -> Tensor | None:
        """The Gramian of this process's G_i, (B_r, B_r); None without samples."""
        grams = [block.local.gram() for block in self._blocks if block.local]
        return total(grams) if grams else None

    def _rows(self, contributions: Tensor) -> Tensor:
        rows = contributions.reshape(self._own_size, -1) if self._own_size else contributions.new_zeros(0, 0)
        return rows.to(self._dtype) * (self._scale * self._own_size)

    def _check_gram(self) -> None:
        numbers = sum(p.numel() for p in self._parameters) * self.batch_size
        if self.batch_size > _MOST_SAMPLES or numbers * self._dtype.itemsize > _MOST_BYTES:
            raise ValueError(
                f"the Gramian of the {self.batch_size} samples of {self._group.size} processes is too large:"
                f" {numbers * self._dtype.itemsize / 2**30:.3g} GiB of per-sample gradients would be sent to all of"
                f" them, and the most are {_MOST_BYTES >> 30} GiB and {_MOST_SAMPLES} samples. Use a policy without it"
                " (inverse='weak-field' with Spectral, Trace or Rayleigh), a rule without it (Clip, Normalise, or one"
                " with only_sample_norms=True or needs='norms'), mode='local', or observe without gram=True"
            )

    def release(self) -> AcrossRanks:
        """From now on the next `combine` or `combine_with_norm` uses the contributions of this process up."""
        self._is_last = True
        return self

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return self._in_order([each.parts for each in self._combination(weights)])

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """p = w^T G and |p|^2."""
        sums = self._combination(weights)
        return self._in_order([each.parts for each in sums]), self._squared_norm(sums)

    def _combination(self, weights: Tensor) -> list[Sum]:
        if self._is_last and any(isinstance(block.local, ItemisedContributions) for block in self._blocks):
            # With the Gramian nothing has computed it yet. `items` reads it later, when the contributions that it is
            # computed from are used up.
            _ = self._difference
        found = []
        for block in self._blocks:
            own = self._weighted(block, weights, self._is_last)
            found.append(block.layout.summed(self._group, "the direction", own))
        return found

    def _squared_norm(self, sums: Sequence[Sum]) -> Tensor:
        """|p|^2, given the blocks of p."""
        of_all, of_each = self._zeros().sum().double(), []
        for block, found in zip(self._blocks, sums, strict=True):
            if block.layout.is_sharded:
                of_each.append(found.square)
            else:
                of_all = of_all + found.square
        if of_each:
            of_all = of_all + self._of_each("the norm of the direction", total(of_each).view(1)).sum()
        return of_all.to(self._dtype)

    def items(self, squared_norm_of: Callable[[nn.Parameter], Tensor]) -> dict[nn.Parameter, Item]:
        """The statistics of each parameter, after those of all, if the contributions of this process note them.

        Args:
            squared_norm_of: as for `ItemisedContributions.items`, for other sources: |g|^2 of a parameter is known.

        Raises:
            RuntimeError: in all processes, if not all of them use a parameter.
        """
        self._used.check_complete()
        norms, traces = self._difference.norms, []
        notes: dict[nn.Parameter, Item] = {}
        for block in self._blocks:
            if isinstance(block.local, ItemisedContributions):
                notes |= block.local.items(lambda parameter: norms[parameter].own)
        for parameter in self._parameters:
            trace = norms[parameter].difference
            if parameter in notes:
                trace = trace + self._scale**2 * notes[parameter].trace
            traces.append(trace * self._own_size / self.batch_size)
        rows = self._of_each("the statistics of parameters", torch.stack(traces))
        return {
            p: Item(norms[p].mean.to(self._dtype), trace.to(self._dtype))
            for p, trace in zip(self._parameters, rows.sum(0).unbind(), strict=True)
        }

    def agreed(self, weights: Tensor, epsilon: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights and the epsilon of rank 0."""
        self._group.broadcast("weights", [weights, *([] if epsilon is None else [epsilon])])
        return weights, epsilon
