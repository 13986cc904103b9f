"""Modules that are captured as one function of a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import _StopRecomputationError

from ...batch_norm import REMEDIES_IN_UNIT, batch_norms, check_frozen
from ...nests import modules_in
from ..batch import Batch, check_not_empty
from ..parametrizations import cache_suspended, power_iterations_done
from ..values.loops import loops_of
from ..values.samples import MappedArgument, UnequalSamples, each_sample
from ..values.shared_tensor import SharedTensor, shared_tensor
from ..values.shared_value import new_leaf
from ..values.shared_value_mode import SharedValueMode
from .recorder import Recorder
from .recurrent import FORWARDS, RecurrentRecorder
from .sample_loop import SampleLoop
from .unit_checks import buffers_checked, check_objects, check_output, plain_output


class UnitRecorder(Recorder):
    """Records any module, with all it contains, as one function that every sample is given to by itself.

    The module sees each sample as a batch of one, with that sample's copy of its parameters: for all samples at once
    under `torch.func.vmap`, or in a loop if vmap cannot run it.
    """

    def __init__(self, context, module, name, places) -> None:
        super().__init__(context, module, name, places)
        self.batch_norms = batch_norms(module, name)
        self._recurrent = [
            RecurrentRecorder(context, each, name, []) for each in modules_in(module) if type(each).forward in FORWARDS
        ]
        # The error with which vmap refused the module, if it did, and whether the user was warned of it.
        self._obstacle: str | None = None
        self._has_warned = False

    def check_batch_norm(self):
        # With one sample at a time, the statistics of the batch would silently become those of the sample.
        check_frozen(self.batch_norms, REMEDIES_IN_UNIT)

    def record(self, batch, parameters, args, kwargs):
        batch = self.batch_with_size(batch, args, kwargs)
        if batch.batch_dim is None:
            return self._run_with_copies(parameters, self.original, args, kwargs)
        check_not_empty(batch.size, self.name)
        is_compared = batch.size != 1 and self.context.is_proving
        plain = plain_output(self.module, self.original, args, kwargs) if is_compared else None
        args, kwargs, output_dims = self._map_arguments(batch, args, kwargs)
        is_parametrized = parametrize.is_parametrized(self.module)
        with cache_suspended(), power_iterations_done(self.module) if is_parametrized else nullcontext():
            results = self._run_samples(batch.size, parameters, args, kwargs)
        results, spec = ([results], None) if isinstance(results, Tensor) else pytree.tree_flatten(results)
        if spec is not None or kwargs or len(args) != 1:
            check_objects(self.module, self.name, (args, kwargs), results)
        dims = iter(output_dims(sum(isinstance(r, Tensor) for r in results)))
        output = [self._joined(batch, r, next(dims)) if isinstance(r, Tensor) else r for r in results]
        if plain is not None:
            check_output(self.module, self.name, output, plain)
        return output[0] if spec is None else pytree.tree_unflatten(output, spec)

    def _run_samples(self, size: int, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict) -> object:
        """The results with the samples in front: for all samples at once, or in a loop where vmap fails."""
        copies, obstacle = self._copies(parameters, size), self._obstacle
        noted = loops_of(self.context.model).noted(f"module '{self.name}' ({type(self.module).__name__})")
        if obstacle is None:
            try:
                unrolled = self._unrolled() if self._recurrent else nullcontext()
                with buffers_checked(self.module, self.name), unrolled, noted:
                    return self._run_under_vmap(parameters, copies, args, kwargs)
            except (UnequalSamples, _StopRecomputationError):
                raise
            except Exception as error:  # whatever the module does that vmap cannot
                obstacle = str(error)
        found = self._run_in_loop(parameters, copies, args, kwargs)
        self._obstacle = obstacle
        if not self._has_warned and not self.context.is_proving:
            self._has_warned = True
            warnings.warn(
                f"module '{self.name}' ({type(self.module).__name__}) runs for one sample after the other, which is"
                f" exact but slow, since torch.func.vmap cannot run it: {obstacle}\nTo make it fast, write it"
                " without data-dependent control flow, or teach the capture its gradient with rgd_ext.register_rule",
                stacklevel=2,
            )
        return found

    def _run_under_vmap(
        self, parameters: dict[str, nn.Parameter], copies: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> object:
        size = len(next(iter(copies.values())))
        make_call = partial(self._make_call, batch_size=size)
        leaves = {name: new_leaf(each, parameters[name], make_call) for name, each in copies.items()}
        with each_sample(size) as samples:
            mode = SharedValueMode(samples)
            values = {name: mode.parameter(leaf) for name, leaf in leaves.items()}
            args, kwargs = samples.arguments(args, kwargs)
            with self._reparametrized(values), mode:
                return samples.results(self.original(*args, **kwargs))

    def _run_in_loop(
        self, parameters: dict[str, nn.Parameter], copies: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> object:
        def run_sample(copies: dict[str, Tensor], args: tuple, kwargs: dict) -> object:
            with self._reparametrized(copies):
                return self.original(*args, **kwargs)

        mapped = {name: MappedArgument(each) for name, each in copies.items()}
        return SampleLoop(self.module, self.name).run(run_sample, (mapped, args, kwargs), parameters)

    @contextmanager
    def _unrolled(self) -> Iterator[None]:
        """Recurrent layers inside of the module run step by step: torch.func does not support the fused kernels."""
        layers = [layer for layer in self._recurrent if "forward" not in vars(layer.module)]
        for layer in layers:
            layer.module.forward = layer.unrolled
        try:
            yield
        finally:
            for layer in layers:
                del layer.module.forward

    def _map_arguments(self, batch: Batch, args: tuple, kwargs: dict) -> tuple[tuple, dict, Callable]:
        """The arguments with the tensors of the batch as `MappedArgument`.

        Returns:
            The arguments, the keyword arguments, and a function from the number of output tensors to a list with the
            dimension of the samples in each, or None where all samples share the output.
        """
        if len(args) == 1 and type(args[0]) is Tensor and not kwargs:  # nearly always
            dim = self._dim(batch, args[0], True)
            return (self._mapped_argument(batch, args[0], dim),), {}, lambda number: [dim] * number
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dims = [None if isinstance(x, SharedTensor) else self._dim(batch, x, x is tensors[0]) for x in tensors]
        output_dim = max((dim for dim in dims if dim is not None), default=None)
        remaining = iter(dims)

        def mapped(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            dim = next(remaining)
            if isinstance(leaf, SharedTensor):
                return MappedArgument(leaf.copies)
            return self._mapped_argument(batch, leaf, dim)

        args, kwargs = pytree.tree_map(mapped, (args, kwargs))
        return args, kwargs, lambda number: [output_dim] * number

    def _mapped_argument(self, batch: Batch, x: Tensor, dim: int | None) -> Tensor | MappedArgument:
        """`x` as every sample gets it, given the dimension of the samples in it, or None."""
        if dim is None:
            return x
        batch.checked_size(x, dim, self.name)
        return MappedArgument.batches_of_one(x, dim)

    def _dim(self, batch: Batch, x: Tensor, is_first: bool) -> int | None:
        # Masks and the like, beside the first input, are taken as shared unless their shape says otherwise.
        if not is_first and not x.requires_grad and batch.matching_dim(x, batch_dim=self.batch_dim) is None:
            return None
        return batch.dim(x, self.module, self.name, 0, is_side=not is_first, batch_dim=self.batch_dim)

    def _joined(self, batch: Batch, result: Tensor, dim: int | None) -> Tensor:
        """The output for the batch, with the samples along `dim`, given the results of batches of one."""
        if dim is None:
            return shared_tensor(result, self.name, batch)
        if dim and result.ndim > 1 and result.shape[1] == 1 and (result.ndim < dim + 2 or result.shape[dim + 1] != 1):
            dim = 0  # as after the last of several steps in time
        if result.ndim < dim + 2 or result.shape[dim + 1] != 1:
            raise ValueError(
                f"module '{self.name}' gives an output of shape {tuple(result.shape[1:])} for one sample: expected"
                f" a dimension {dim} of size 1. Modules keep the samples apart, along the dimension they come in: take"
                " sums, means and losses over samples outside of it"
            )
        result = result.squeeze(dim + 1)
        return result.movedim(0, dim) if dim else result
