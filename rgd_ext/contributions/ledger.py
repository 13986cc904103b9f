"""The ledger of a backward: what the layers contributed to the per-sample gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ..gradients import Moments, PerSampleGradients, moments_of, squared_norm, sum_of_moments, total
from ..linalg import accumulate_dtype
from .bucket import Bucket, in_shapes, layer_factors, moments_and_sums, split_by_owner
from .factor import Dense, Factor, moments_from_gram
from .outline import Outline
from .vectors import VectorLayers


class Contributions(PerSampleGradients):
    """Contributions h_i of B samples to the parameters of a model, entered as layers give them; g_i = B h_i.

    What has only one strategy is kept by dtype and device and never becomes a factor, and one operator serves all of a
    kind: small models pay for each operation here.

    Args:
        batch_size: B.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._buckets: dict[tuple[torch.dtype, torch.device], Bucket] = {}
        # The ids of the parameters in the buckets: the hash of a parameter is a call of Python.
        self._entered: set[int] = set()
        # Until the ledger is closed, the contributions of other uses of parameters.
        self._uses: dict[nn.Parameter, list[Factor]] = {}
        self._factors: dict[nn.Parameter, Factor] = {}
        self._order: list[int] | None = None
        self._is_last = self._is_used_up = False

    @classmethod
    def of(cls, factors: Iterable[tuple[nn.Parameter, Factor]], batch_size: int) -> Contributions:
        """A closed ledger of the contributions to different parameters."""
        found = cls(batch_size)
        for parameter, factor in factors:
            found._place(parameter, factor)
        return found

    def __bool__(self) -> bool:
        return bool(self._buckets or self._uses or self._factors)

    @property
    def batch_size(self) -> int:
        """B, the number of samples."""
        return self._batch_size

    # Entering

    def add_vectors(self, parameters: Sequence[nn.Parameter], layers: VectorLayers) -> None:
        """Linear layers that met one vector per sample.

        Args:
            parameters: the trainable ones, the bias of a layer before its weight.
            layers: of one dtype and device.
        """
        if self._enter(parameters):
            self._bucket(layers.output_grads[0]).add_vectors(parameters, layers)
        else:
            again = Bucket()
            again.add_vectors(parameters, layers)
            for parameter, factor in again.vector_factors():
                self.add_factor(parameter, factor)

    def add_tensor(self, owners: Sequence[nn.Parameter], contributions: Tensor) -> None:
        """Contributions of one parameter, (B, *shape), or of several, flattened and side by side, (B, D)."""
        if self._enter(owners):
            self._bucket(contributions).add_tensor(owners, contributions)
        else:
            for parameter, part in split_by_owner(owners, contributions):
                self.add_factor(parameter, Dense(part))

    def add_factor(self, parameter: nn.Parameter, factor: Factor) -> None:
        """Contributions of one use of a parameter, which may have others."""
        self._uses.setdefault(parameter, []).append(factor)

    def _enter(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether none of the parameters is in the buckets yet; then they are from now on."""
        ids = {*map(id, parameters)}
        if len(ids) < len(parameters) or not ids.isdisjoint(self._entered):
            return False
        self._entered |= ids
        return True

    def _bucket(self, tensor: Tensor) -> Bucket:
        kind = tensor.dtype, tensor.device
        bucket = self._buckets.get(kind)
        if bucket is None:
            bucket = self._buckets[kind] = Bucket()
        return bucket

    def close(self, total_of: Callable[[nn.Parameter, list[Factor]], Factor]) -> None:
        """End the entries: from now on the ledger may be asked.

        Args:
            total_of: gives the sum of the contributions of several uses of a parameter.
        """
        uses, self._uses = self._uses, {}
        if any(id(parameter) in self._entered for parameter in uses):
            self._separate(uses)
        for parameter, factors in uses.items():
            factor = factors[0] if len(factors) == 1 else total_of(parameter, factors)
            self._place(parameter, factor)

    def _place(self, parameter: nn.Parameter, factor: Factor) -> None:
        """Enter vectors and tensors into their bucket, and anything else as a factor."""
        layer = factor.as_vectors()
        if layer is not None:
            self.add_vectors([parameter], layer)
        elif (tensor := factor.as_tensor()) is not None:
            self.add_tensor([parameter], tensor)
        else:
            self._factors[parameter] = factor

    def _separate(self, uses: dict[nn.Parameter, list[Factor]]) -> None:
        """Take the parameters of `uses` out of the buckets."""
        buckets, self._buckets, self._entered = self._buckets, {}, set()
        shared = set(map(id, uses))
        for bucket in buckets.values():
            for weight, bias, x, e in bucket.layers():
                parameters = [p for p in (bias, weight) if p is not None]
                if shared.isdisjoint(map(id, parameters)):
                    self.add_vectors(parameters, VectorLayers([x], [e], [bias is not None]))
                else:
                    for parameter, factor in layer_factors(weight, bias, x, e):
                        uses.setdefault(parameter, []).insert(0, factor)
            for owners, tensor in zip(bucket.owners, bucket.tensors, strict=True):
                if shared.isdisjoint(map(id, owners)):
                    self.add_tensor(owners, tensor)
                else:
                    for parameter, part in split_by_owner(owners, tensor):
                        uses.setdefault(parameter, []).insert(0, Dense(part))

    def without(self, ids: Collection[int]) -> Contributions:
        """The contributions to other parameters than those with these ids, in a ledger of its own."""
        return Contributions.of([pair for pair in self.factors() if id(pair[0]) not in ids], self._batch_size)

    def split(self, blocks: Iterable[Sequence[nn.Parameter]]) -> list[Contributions]:
        """The contributions to each of some lists of parameters, in ledgers of their own; none stay in this one."""
        factors = dict(self.factors())
        self._buckets.clear()  # others may share them
        self._factors.clear()
        self._entered, self._order = set(), None
        return [
            Contributions.of([(p, factors[p]) for p in block if p in factors], self._batch_size) for block in blocks
        ]

    def arrange(self, order: Sequence[nn.Parameter]) -> None:
        """From now on the parameters are in this order; those without contributions have zeros."""
        own = {id(parameter) for parameter in self.parameters()}
        for parameter in order:
            if id(parameter) not in own:
                self.add_tensor([parameter], parameter.new_zeros(self._batch_size, *parameter.shape))
        places = {id(parameter): place for place, parameter in enumerate(self.parameters())}
        self._order = [places[id(parameter)] for parameter in order]

    # Asking

    def parameters(self) -> list[nn.Parameter]:
        """Those with contributions, in the order of vectors of the parameter space."""
        buckets = self._buckets.values()
        found = [parameter for bucket in buckets for parameter in bucket.vector_parameters]
        found += self._factors
        found += [parameter for bucket in buckets for owners in bucket.owners for parameter in owners]
        return self._ordered(found)

    def _ordered(self, found: list) -> list:
        return found if self._order is None else [found[place] for place in self._order]

    def factors(self) -> list[tuple[nn.Parameter, Factor]]:
        """The contributions parameter by parameter, in the order of `parameters`."""
        buckets = self._buckets.values()
        found = [each for bucket in buckets for each in bucket.vector_factors()]
        found += self._factors.items()
        found += [each for bucket in buckets for each in bucket.tensor_factors()]
        return self._ordered(found)

    def outline(self) -> Outline:
        """The shapes of what has only one strategy."""
        buckets = [(bucket.vector_parameters, bucket.owners) for bucket in self._buckets.values()]
        return Outline(self._batch_size, buckets)

    def mean(self) -> list[Tensor]:
        """g = mean_i g_i, which is the gradient of the loss."""
        return self.combine(self._equal_weights())

    def dense(self) -> list[Tensor]:
        """G as (B, *shape) tensors."""
        return [self._batch_size * factor.dense() for _, factor in self.factors()]

    def _equal_weights(self) -> Tensor:
        parameter = self.parameters()[0]
        dtype = accumulate_dtype(parameter.dtype)
        return parameter.new_full((self._batch_size,), 1 / self._batch_size, dtype=dtype, requires_grad=False)

    def align(self, vector: list[Tensor]) -> Tensor:
        """G v = <g_i, v>, shape (B,), not centred."""
        return self.align_by_parameter(dict(zip(self.parameters(), vector, strict=True)))

    def align_by_parameter(self, vectors: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """`align` with a vector whose parts are given by parameter; those of other parameters are zero."""
        parts = [factor.align(vectors[parameter]) for parameter, factor in self.factors() if parameter in vectors]
        if not parts:
            return torch.zeros_like(self._equal_weights())
        return self._batch_size * total(parts)

    def gram(self) -> Tensor:
        """K = G G^T, shape (B, B), not centred."""
        grams = [torch.ops.rgd_ext.gram(bucket.tensors) for bucket in self._tensor_buckets()]
        grams += self._vector_grams()
        grams += self._factor_grams()
        # Of a float: torch converts an int first, with an operator of its own.
        return total(grams).mul_(float(self._batch_size**2))

    def _tensor_buckets(self) -> list[Bucket]:
        return [bucket for bucket in self._buckets.values() if bucket.tensors]

    def _vector_grams(self) -> list[Tensor]:
        return [bucket.vectors.gram() for bucket in self._buckets.values() if bucket.vectors]

    def _factor_grams(self) -> list[Tensor]:
        return [factor.gram() for factor in self._factors.values()]

    def moments(self) -> Moments | None:
        """The statistics that need no Gramian; None where the Gramian costs no more."""
        buckets = self._tensor_buckets()
        if not buckets and all(factor.gram_is_free for factor in self._factors.values()):
            return None
        return self._moments_with([self._tensor_moments(bucket) for bucket in buckets])

    def _tensor_moments(self, bucket: Bucket) -> Moments:
        return moments_of(bucket.tensors)

    def _tensor_moments_and_sums(self, bucket: Bucket) -> tuple[Moments, list[Tensor]]:
        return moments_and_sums(bucket.tensors)

    def _factor_moments(self) -> list[Moments]:
        return [factor.moments() for factor in self._factors.values()]

    def _moments_with(self, of_tensors: list[Moments]) -> Moments:
        """The moments of all, given those of the tensors."""
        parts = [*of_tensors, *self._factor_moments()]
        parts += [moments_from_gram(gram) for gram in self._vector_grams()]
        squared, alignments, squared_norms = sum_of_moments(parts)
        scale = float(self._batch_size**2)  # as in `gram`
        return Moments(scale * squared, scale * alignments, scale * squared_norms)

    def moments_and_mean(self) -> tuple[Moments, list[Tensor]] | None:
        """`moments` and `mean`, in one read of the tensors; None where that takes no fewer reads, or has other bits."""
        buckets = self._tensor_buckets()
        if not buckets or not all(bucket.has_exact_sums for bucket in buckets):
            return None
        moments, sums = zip(*(self._tensor_moments_and_sums(bucket) for bucket in buckets), strict=True)
        found = self._moments_with([*moments])  # before the ledger is used up
        joined = self._combine_others(self._start_combination(self._equal_weights()))
        return found, self._cut([*joined, *chain.from_iterable(sums)])

    def combine(self, weights: Tensor) -> list[Tensor]:
        """w^T G = sum_i w_i g_i."""
        return self._cut(self._combine_joined(weights))

    def combine_by_parameter(self, weights: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parts of `combine`, each as soon as it is computed."""
        weights, last = self._start_combination(weights), self._is_last
        for bucket in self._buckets.values():
            yield from zip([*bucket.vector_parameters], bucket.combine_vectors_one_by_one(weights, last), strict=True)
        for parameter in list(self._factors):
            yield parameter, self._factor_step(parameter, weights)
        for bucket in self._buckets.values():
            for owners, step in zip(bucket.owners, bucket.combine_tensors(weights, last), strict=True):
                yield from zip(owners, _pieces(owners, step), strict=True)

    def combine_with_norm(self, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        """`combine`, and |w^T G|^2: that of joined parameters takes fewer operations."""
        joined = self._combine_joined(weights)
        return self._cut(joined), squared_norm(joined)

    def release(self) -> Contributions:
        """From now on the next `combine`, `combine_with_norm` or `mean` uses the ledger up.

        It frees what it has read, so that the direction takes that memory, and nothing can be asked afterwards. Where
        the ordinary gradient of a parameter is a sparse tensor, so is the combination.
        """
        self._is_last = True
        return self

    def _combine_joined(self, weights: Tensor) -> list[Tensor]:
        """`combine`, but with one tensor for parameters that lie side by side. What gives memory back comes first."""
        weights = self._start_combination(weights)
        found = self._combine_others(weights)
        buckets = self._buckets.values()
        return found + [step for bucket in buckets for step in bucket.combine_tensors(weights, self._is_last)]

    def _start_combination(self, weights: Tensor) -> Tensor:
        """The weights of the h_i, w_i B; RuntimeError if there can be no other combination."""
        if self._is_used_up:
            raise RuntimeError("the contributions are used up: ask for all but the last combination before release()")
        self._is_used_up = self._is_last
        return weights * float(self._batch_size)

    def _combine_others(self, weights: Tensor) -> list[Tensor]:
        """The weighted sums of all but the tensors in the buckets."""
        last = self._is_last
        result = [step for bucket in self._buckets.values() for step in bucket.combine_vectors(weights, last)]
        return result + [self._factor_step(parameter, weights) for parameter in list(self._factors)]

    def _factor_step(self, parameter: nn.Parameter, weights: Tensor) -> Tensor:
        factor = self._factors.pop(parameter) if self._is_last else self._factors[parameter]
        there = weights.to(factor.example.device, accumulate_dtype(factor.example.dtype))
        return factor.combine_sparse(there) if self._is_last and factor.is_sparse else factor.combine(there)

    def _cut(self, joined: list[Tensor]) -> list[Tensor]:
        """One tensor per parameter of what `_combine_joined` gives."""
        owners = [each for bucket in self._buckets.values() for each in bucket.owners]
        whole = len(joined) - len(owners)
        if owners:
            found = joined[:whole]
            for each, row in zip(owners, joined[whole:], strict=True):
                found += _pieces(each, row)
            joined = found
        return self._ordered(joined)


def _pieces(owners: Sequence[nn.Parameter], row: Tensor) -> list[Tensor]:
    """The part of each parameter in the combination of contributions that lie side by side, in its shape."""
    # What changes one in place does not count as a change of the others.
    parts = [row] if len(owners) == 1 else row.unsafe_split_with_sizes([p.numel() for p in owners])
    return in_shapes(parts, owners)
