"""The per-sample gradients of a batch whose samples are in several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..contributions.itemised import Item, ItemisedContributions
from ..contributions.ledger import Contributions
from ..gradients import Moments, PerSampleGradients, squared_norm
from ..linalg import accumulate_dtype, trace_rounding
from ..metric.stats import statistics
from .buckets import FlatVector, Layout, all_reduced, dot
from .group import Group
from .lanczos import largest_eigenvalue
from .mean import MeanExchange

# The largest Gramian of the union, in samples, and the most bytes of gradients that are sent for it.
_MOST_SAMPLES, _MOST_BYTES = 4096, 4 << 30
# Rounding errors of a product with D, in ulps of mean_i |g_i|^2: half of those that were measured, so that the
# iteration neither ends before them nor goes on for long after.
_NOISE = 0.1
_PARTLY = (
    "per_parameter=True, and only some of the processes use parameter '{}', so that its noise scale would mix samples"
    " that use it with others that cannot: let every process use it in each backward, or observe without per_parameter"
)


class UsedParameters:
    """Which parameters the processes use in a backward.

    Args:
        layout: of the vectors that are exchanged.
        anywhere: whether any process uses each parameter of the layout.
        everywhere: whether all processes that have samples use it.

    Attributes:
        layout: as given.
    """

    def __init__(self, layout: Layout, anywhere: list[bool], everywhere: list[bool]) -> None:
        self.layout, self._anywhere, self._everywhere = layout, anywhere, everywhere

    def anywhere(self) -> list[nn.Parameter]:
        """The parameters that any process uses."""
        return [p for p, is_used in zip(self.layout.parameters, self._anywhere, strict=True) if is_used]

    def check_complete(self) -> None:
        """Raise RuntimeError if only some of the processes with samples use a parameter."""
        for name, anywhere, everywhere in zip(self.layout.names, self._anywhere, self._everywhere, strict=True):
            if anywhere and not everywhere:
                raise RuntimeError(_PARTLY.format(name))


class _Difference(NamedTuple):
    """The difference between the mean gradients of all samples and of this process's.

    Attributes:
        parts: c = g - s_r mean_i G_i, by parameter; 0 where the means of all processes agree.
        products: <g_i, c> of this process's samples, (B_r,), in float64.
    """

    parts: dict[nn.Parameter, Tensor]
    products: Tensor


class AcrossRanks(PerSampleGradients):
    """The gradients of the samples of all processes, rank by rank; each process holds those of its own samples.

    The loss is the mean of the losses of the R processes, as for DistributedDataParallel. With B_r samples in process
    r, whose own gradients, those of its own loss, are G_i, and with B samples in all, g_i = s_r G_i for
    s_r = B / (R B_r), so that mean_i g_i is the mean of the gradients of the processes.

    All processes have to call the same methods in the same order: each is an exchange.

    Args:
        local: the contributions of this process, which may have none.
        used: which parameters the processes use.
        group: the processes.
        sizes: B_r of each of them.
        mean_exchange: the exchange of g, all of which has left.
        is_late: of its `reduced_buckets`.
    """

    def __init__(
        self,
        local: Contributions,
        used: UsedParameters,
        group: Group,
        sizes: Sequence[int],
        mean_exchange: MeanExchange,
        is_late: bool,
    ) -> None:
        self._local, self._used, self._group, self._sizes = local, used, group, sizes
        self._parameters = used.anywhere()
        self._is_last = False
        self._mean_exchange, self._is_late = mean_exchange, is_late

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

    def _sum(self, what: str, weights: Tensor, last: bool = False) -> FlatVector:
        """sum_i w_i g_i.

        Args:
            what: names the vector in errors.
            weights: w, (B,).
            last: whether the contributions of this process are used up.
        """
        parts: Iterable[tuple[nn.Parameter, Tensor]] = ()
        if self._local:
            local = self._local.release() if last else self._local
            parts = local.combine_by_parameter(weights[self.own] * self._scale)
        return all_reduced(self._used.layout, self._group, what, parts)

    @property
    def _dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, {accumulate_dtype(p.dtype) for p in self._used.layout.parameters})

    @property
    def _device(self) -> torch.device:
        return self._used.layout.parameters[0].device

    @cached_property
    def _difference(self) -> _Difference:
        """c = g - s_r mean_i G_i, and its products with the gradients of this process's samples.

        The products with the part of c in one bucket are computed while the next bucket is on its way.
        """
        difference: dict[nn.Parameter, Tensor] = {}
        products, factors = self._zeros().double(), dict(self._local.factors())
        # What the process has sent of the mean is 1 / R of its gradient.
        share = self.batch_size / self._own_size if self._own_size else 0.0
        for bucket in self._mean_exchange.reduced_buckets(self._is_late):
            for parameter, mean in self._mean_exchange.mean.parts_of(bucket).items():
                own = self._mean_exchange.own.pop(parameter, None)
                part = mean if own is None else torch.add(mean, own, alpha=-share, out=own)
                difference[parameter] = part
                if parameter in factors:
                    products += (self._scale * self._own_size) * factors[parameter].align(part)
        return _Difference(difference, products)

    @property
    def _mean(self) -> FlatVector:
        """g."""
        _ = self._difference  # which waits for it
        return self._mean_exchange.mean

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i."""
        return self._mean.typed_parts(self._parameters)

    def moments(self) -> Moments:
        """The statistics that need no Gramian."""
        return self._moments

    @cached_property
    def _moments(self) -> Moments:
        local = self._centred_moments()  # while the mean is on its way
        rows = torch.stack(self._own_moments(local), 1)
        return Moments(self._mean.squared_norm().to(self._dtype), *self._all_gather("alignments", rows).unbind(1))

    def _own_moments(self, local: Moments) -> tuple[Tensor, Tensor]:
        """<g_i - g, g> and |g_i - g|^2 of this process's samples, in float64.

        With G_i - mean_i G_i the rows that are centred within the process, whose moments are `local`,
        g_i - g = s_r (G_i - mean_i G_i) - c: nothing here is a difference of large numbers where the g_i agree.
        """
        difference, products = self._difference
        products = products - products.mean()  # s_r <G_i - mean_i G_i, c>
        within = self._scale**2 * local.alignments.double() + products  # s_r <G_i - mean_i G_i, g>
        alignments = within - dot(difference, self._mean.parts).double()
        squared_norms = self._scale**2 * local.squared_norms.double() - 2 * products
        return alignments, (squared_norms + squared_norm([*difference.values()]).double()).clamp(min=0)

    def _centred_moments(self) -> Moments:
        """The moments of this process's own gradients, as if there were no others."""
        if not self._local:
            return Moments(self._zeros().sum(), self._zeros(), self._zeros())
        return statistics(self._local, with_gram=False).moments

    def _aligned(self, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """<g_i, v> for the samples of this process."""
        return self._scale * self._local.align_by_parameter(vectors) if self._local else self._zeros()

    def moments_and_mean(self) -> tuple[Moments, list[Tensor]]:
        """`moments` and `mean`, by one exchange of gradients."""
        return self.moments(), self.mean()

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return self.align_by_parameter(dict(zip(self._parameters, vector, strict=True)))

    def align_by_parameter(self, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """`align` with a vector whose parts are given by parameter; those of other parameters are zero."""
        return self._all_gather("products with a vector", self._aligned(vectors)[:, None])[:, 0]

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
        vector = self._sum("a Lanczos vector", weights.to(self._device))
        products = self.align_by_parameter(vector.parts).to(weights)
        return products - products.mean()

    def _eigenvalue_bound(self) -> Tensor:
        own = squared_norm([*self._difference.parts.values()]).double()
        if self._local:
            gram = self._local.gram()
            centred = torch.ops.rgd_ext.gram_moments(gram)[3]
            largest = torch.ops.rgd_ext.largest_eigenvalue(centred, torch.finfo(gram.dtype).eps)  # B_r lambda_max(D_r)
            own = own + self._scale**2 / self._own_size * largest
        bounds = self._of_each("bounds of eigenvalues", own.view(1))[:, 0]
        return (bounds @ bounds.new_tensor(self._sizes) / self.batch_size).to(self._dtype)

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred: the rows of each process are sent to all others.

        Raises:
            ValueError: if that is too much to send.
        """
        self._check_gram()
        found = torch.zeros(self._own_size, self.batch_size, dtype=self._dtype, device=self._device)
        factors = dict(self._local.factors())
        for parameter in self._parameters:
            factor, columns = factors.get(parameter), 0
            own = None if factor is None else self._rows(factor.dense())
            for rank, size in enumerate(self._sizes):
                rows = found.new_zeros(size, parameter.numel()) if own is None or rank != self._group.rank else own
                self._group.broadcast("per-sample gradients", [rows], rank)
                if own is not None and rank != self._group.rank:
                    found[:, columns : columns + size] += own @ rows.T
                columns += size
        if self._local:
            found[:, self.own] = self._scale**2 * self._local.gram()
        gram = self._group.all_gather_rows("the Gramian", found, self._sizes)
        return (gram + gram.T) / 2

    def _rows(self, contributions: Tensor) -> Tensor:
        rows = contributions.reshape(self._own_size, -1) if self._own_size else contributions.new_zeros(0, 0)
        return rows.to(self._dtype) * (self._scale * self._own_size)

    def _check_gram(self) -> None:
        numbers = sum(p.numel() for p in self._parameters) * self.batch_size
        if self.batch_size > _MOST_SAMPLES or numbers * self._dtype.itemsize > _MOST_BYTES:
            raise ValueError(
                f"the Gramian of the {self.batch_size} samples of {self._group.size} processes takes"
                f" {numbers * self._dtype.itemsize / 2**30:.1f} GiB of per-sample gradients to be sent to all of them;"
                f" the most are {_MOST_SAMPLES} samples and {_MOST_BYTES >> 30} GiB. Use a policy without it"
                " (inverse='weak-field' with Spectral, Trace or Rayleigh), mode='local', or observe without gram=True"
            )

    def release(self) -> AcrossRanks:
        """From now on the next `combine` or `combine_with_norm` uses the contributions of this process up."""
        self._is_last = True
        return self

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return self._combination(weights).typed_parts(self._parameters)

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """p = w^T G and |p|^2."""
        found = self._combination(weights)
        return found.typed_parts(self._parameters), found.squared_norm()

    def _combination(self, weights: Tensor) -> FlatVector:
        return self._sum("the direction", weights, self._is_last)

    def items(self, mean: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Item]:
        """The statistics of each parameter, after those of all, if the contributions of this process note them.

        Args:
            mean: g, by parameter.

        Raises:
            RuntimeError: in all processes, if not all of them use a parameter.
        """
        self._used.check_complete()
        difference, parts = self._difference.parts, self._mean.parts
        # mean_i G_i: the notes are in the scale of the G_i.
        own = {p: (parts[p] - difference[p]) / (self._scale or 1.0) for p in self._parameters}
        notes = self._local.items(own) if isinstance(self._local, ItemisedContributions) else {}
        traces = []
        for parameter in self._parameters:
            trace = difference[parameter].double().square().sum()
            if parameter in notes:
                trace = trace + self._scale**2 * notes[parameter].trace
            traces.append(trace * self._own_size / self.batch_size)
        rows = self._of_each("the statistics of parameters", torch.stack(traces))
        return {
            p: Item(squared_norm([mean[p]]), trace.to(self._dtype))
            for p, trace in zip(self._parameters, rows.sum(0).unbind(), strict=True)
        }

    def agreed(self, weights: Tensor, epsilon: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights and the epsilon of rank 0."""
        self._group.broadcast("weights", [weights, *([] if epsilon is None else [epsilon])])
        return weights, epsilon
