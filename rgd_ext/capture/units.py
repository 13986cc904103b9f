"""Modules captured as one function of a sample: the generic rule, and attention."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import _StopRecomputationError

from ..batch_norm import REMEDIES_IN_UNIT, batch_norms, check_frozen
from .batch import AS_UNIT, ELSEWHERE, ONE_AT_A_TIME, Batch, check_not_empty, modules_in
from .copies import leaves_in
from .dry_run import unchanged_buffers
from .equal_draws import unknown_draws
from .findings import WrongGradients
from .loops import loops_of
from .once import OnceForAll
from .one_by_one import OneByOne
from .recurrent import FORWARDS, Recurrent
from .runs import nothing_cached
from .samples import Mapped, Unequal, differs, each_of
from .shared import Shared, share
from .taps import Tap
from .values import leaf_of


class Unit(Tap):
    """Any module with all it contains. It sees each sample as a batch of one, with a copy of its parameters."""

    def __init__(self, capture, module, name, slots) -> None:
        super().__init__(capture, module, name, slots)
        self.batch_norms = batch_norms(module, name)
        self._recurrent = [Recurrent(capture, m, name, []) for m in modules_in(module) if type(m).forward in FORWARDS]
        # Why torch.func.vmap cannot run it, if it cannot, and whether the user knows.
        self._obstacle: str | None = None
        self._has_warned = False

    def check_batch_norm(self):
        # One sample at a time, a batch's statistics would silently become the sample's.
        check_frozen(self.batch_norms, REMEDIES_IN_UNIT)

    def record(self, batch, parameters, args, kwargs):
        batch = self.sized(batch, args, kwargs)
        if batch.at is None:
            return self._for_one(parameters, self.original, args, kwargs)
        check_not_empty(batch.size, self.name)
        plain = self._plain_output(args, kwargs) if batch.size != 1 and self.capture.verifier.is_proving else None
        args, kwargs, output_dims = self._mapped(batch, args, kwargs)
        is_parametrized = parametrize.is_parametrized(self.module)
        with nothing_cached(), self._iterated() if is_parametrized else nullcontext():
            results = self._of_samples(batch.size, parameters, args, kwargs)
        results, spec = ([results], None) if isinstance(results, Tensor) else pytree.tree_flatten(results)
        if spec is not None or kwargs or len(args) != 1:
            self._check_objects((args, kwargs), results)
        tensors = iter(output_dims(sum(isinstance(r, Tensor) for r in results)))
        joined = [self._joined(batch, r, next(tensors)) if isinstance(r, Tensor) else r for r in results]
        if plain is not None:
            self._compare(joined, plain)
        return joined[0] if spec is None else pytree.tree_unflatten(joined, spec)

    def _of_samples(self, size: int, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict) -> object:
        """The output for all samples at once, or for one after the other where that is not possible."""
        copies, obstacle = self._spread(parameters, size), self._obstacle
        noted = loops_of(self.capture.model).noted(f"module '{self.name}' ({type(self.module).__name__})")
        if obstacle is None:
            try:
                with self._checked_buffers(), self._unrolled() if self._recurrent else nullcontext(), noted:
                    return self._of_all_samples(parameters, copies, args, kwargs)
            except (Unequal, _StopRecomputationError):
                raise
            except Exception as error:  # whatever the module does that vmap cannot
                obstacle = str(error)

        def one(copies: dict[str, Tensor], args: tuple, kwargs: dict) -> object:
            with self._replaced(copies):
                return self.original(*args, **kwargs)

        mapped = {name: Mapped(each) for name, each in copies.items()}
        found = OneByOne(self.module, self.name).run(one, (mapped, args, kwargs), parameters)
        self._obstacle = obstacle
        if not self._has_warned and not self.capture.verifier.is_proving:
            self._has_warned = True
            warnings.warn(
                f"module '{self.name}' ({type(self.module).__name__}) runs for one sample after the other, which is"
                f" exact but slow, since torch.func.vmap cannot run it: {obstacle}\nTo make it fast, write it"
                " without data-dependent control flow, or teach the capture its gradient with rgd_ext.register_rule",
                stacklevel=2,
            )
        return found

    def _of_all_samples(
        self, parameters: dict[str, nn.Parameter], copies: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> object:
        """The output, tensors with the samples in front."""
        size = len(next(iter(copies.values())))
        use = partial(self._make_record, size)
        leaves = {name: leaf_of(each, parameters[name], use) for name, each in copies.items()}
        with each_of(size) as samples:
            mode = OnceForAll(samples)
            shared = {name: mode.parameter(leaf) for name, leaf in leaves.items()}
            args, kwargs = samples.arguments(args, kwargs)
            with self._replaced(shared), mode:
                return samples.results(self.original(*args, **kwargs))

    @contextmanager
    def _unrolled(self) -> Iterator[None]:
        """Recurrent layers run step by step: torch.func does not carry the fused kernels."""
        layers = [layer for layer in self._recurrent if "forward" not in vars(layer.module)]
        for layer in layers:
            layer.module.forward = layer.unrolled
        try:
            yield
        finally:
            for layer in layers:
                del layer.module.forward

    def _plain_output(self, args: tuple, kwargs: dict) -> list | None:
        """What the module gives for the whole batch, while the capture is verified; None where that tells nothing."""
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Shared) for leaf in leaves):
            return None
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
        devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices), unchanged_buffers(self.module), nothing_cached():
            output = pytree.tree_leaves(self.original(*args, **kwargs))
        return None if unknown_draws() else output

    def _check_objects(self, arguments: tuple, results: list) -> None:
        """Raise ValueError where an object other than a container keeps tensors of single samples, as caches do."""
        given = [x for leaf in pytree.tree_leaves(arguments) for x in _held(leaf) if differs(x)]
        if given or any(_held(leaf) for leaf in results):
            raise ValueError(
                f"module '{self.name}' ({type(self.module).__name__}), captured sample by sample, keeps tensors in an"
                " object that it takes or gives, such as a cache: call it with use_cache=False, or give tuples, lists"
                " and dicts of tensors"
            )

    @contextmanager
    def _iterated(self) -> Iterator[None]:
        """The power iterations of spectral norms are done: where vmap fails, another attempt would repeat them."""
        places = self.module.parametrizations
        norms = [norm for each in places.values() for norm in each if isinstance(norm, _SpectralNorm) and norm.training]
        if norms:
            with torch.no_grad():
                for name in places:
                    getattr(self.module, name)
        for norm in norms:
            norm.training = False
        try:
            yield
        finally:
            for norm in norms:
                norm.training = True

    @contextmanager
    def _checked_buffers(self) -> Iterator[None]:
        """Raise `Unequal` if a buffer was given a value per sample. After an error the buffers before are back."""
        before = [(module, dict(module._buffers)) for module in modules_in(self.module)]
        versions = [(x, x._version) for _, buffers in before for x in buffers.values() if x is not None]
        try:
            yield
            for module, _ in before:
                for name, buffer in module._buffers.items():
                    if isinstance(buffer, Tensor) and differs(buffer):
                        raise Unequal(
                            f"module '{self.name}', captured sample by sample, gives '{name}', a buffer of its"
                            f" {type(module).__name__}, a value that depends on its input: compute it outside the"
                            " module, or teach the capture its gradient with rgd_ext.register_rule. As a last remedy,"
                            f" {ONE_AT_A_TIME}"
                        )
        except BaseException as error:
            for module, buffers in before:
                module._buffers |= buffers
            has_failed = not isinstance(error, _StopRecomputationError)
            if has_failed and any(x._version != version for x, version in versions):
                raise Unequal(
                    f"module '{self.name}' ({type(self.module).__name__}) changes a buffer in place, and then cannot be"
                    f" run sample by sample under torch.func.vmap ({error}): {ONE_AT_A_TIME}"
                ) from error
            raise

    def _compare(self, joined: list, plain: list) -> None:
        for got, want in zip(joined, plain, strict=True):
            if not isinstance(want, Tensor) or not want.is_floating_point() or isinstance(got, Shared):
                continue
            # Under autocast the two may come in different precision.
            eps = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps)
            got, want = got.detach().double(), want.double()
            largest = torch.nan_to_num(want.abs()).max().item() if want.numel() else 0.0
            tolerance = 100 * eps**0.75 * largest
            if _broadcasts(want, got):  # one value for all samples
                want = want.expand_as(got)
            if got.shape != want.shape or not torch.allclose(got, want, 0, tolerance, equal_nan=True):
                difference = (got - want).abs().max().item() / (largest or 1.0) if got.shape == want.shape else 1.0
                raise WrongGradients(
                    f"module '{self.name}' ({type(self.module).__name__}) gives other values for a batch than for its"
                    f" samples one by one, by {difference:.2g} of the largest: it couples the samples (as batch"
                    " statistics do), or takes an input that all samples share for one with samples. Give such an"
                    " argument a leading dimension of 1, or capture the enclosing module as one unit with"
                    " rgd_ext.register_rule(enclosing, rgd_ext.unit)"
                )

    def _mapped(self, batch: Batch, args: tuple, kwargs: dict):
        """The arguments with the batch's tensors as `Mapped`, and how to get the dims of the samples in n outputs."""
        if len(args) == 1 and type(args[0]) is Tensor and not kwargs:  # nearly always
            dim = self._dim(batch, args[0], True)
            return (self._of_each(batch, args[0], dim),), {}, lambda number: [dim] * number
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dims = [None if isinstance(x, Shared) else self._dim(batch, x, x is tensors[0]) for x in tensors]
        batch_dims = {dim for dim in dims if dim is not None}
        found = iter(dims)

        def mapped(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            dim = next(found)
            if isinstance(leaf, Shared):
                return Mapped(leaf.copies)
            return self._of_each(batch, leaf, dim)

        args, kwargs = pytree.tree_map(mapped, (args, kwargs))
        output_dim = max(batch_dims, default=None)
        return args, kwargs, lambda number: [output_dim] * number

    def _of_each(self, batch: Batch, x: Tensor, dim: int | None) -> Tensor | Mapped:
        """`x` for each sample, given the dimension of the samples in it, if it has one."""
        if dim is None:
            return x
        batch.size_of(x, dim, self.name)
        return Mapped.batches_of_one(x, dim)

    def _dim(self, batch: Batch, x: Tensor, is_first: bool) -> int | None:
        # Masks and the like, beside the first input, are taken as shared unless their shape says otherwise.
        if not is_first and not x.requires_grad and batch.place(x, at=self.at) is None:
            return None
        return batch.dim(x, self.module, self.name, 0, is_side=not is_first, at=self.at)

    def _joined(self, batch: Batch, result: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return share(result, self.name, batch)
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


def _broadcasts(x: Tensor, like: Tensor) -> bool:
    return x.ndim == like.ndim and all(n in (1, m) for n, m in zip(x.shape, like.shape, strict=True))


def _held(leaf: object) -> list[Tensor]:
    """The tensors that an object keeps in its attributes."""
    if isinstance(leaf, (Tensor, Mapped, nn.Module, type)) or not hasattr(leaf, "__dict__"):
        return []
    return [x for x in leaves_in(vars(leaf)) if isinstance(x, Tensor)]


class Attention(Unit):
    """nn.MultiheadAttention, whose arguments say where their samples are."""

    _signature = inspect.signature(nn.MultiheadAttention.forward)

    def _mapped(self, batch, args, kwargs):
        dim = 0 if self.module.batch_first else 1
        arguments = self._signature.bind(self.module, *args, **kwargs).arguments
        del arguments["self"]
        same: dict[int, Tensor | Mapped] = {}  # of query, key and value, which torch compares by identity
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                key = id(value) if name in ("query", "key", "value") else id(name)
                if key not in same:
                    same[key] = self._argument(batch, name, value, dim)
                arguments[name] = same[key]
        return (), dict(arguments), lambda number: [dim, 0][:number]

    def _argument(self, batch: Batch, name: str, value: Tensor, dim: int) -> Tensor | Mapped:
        if isinstance(value, Shared):
            return Mapped(value.copies)
        if name == "attn_mask" and value.ndim == 2:
            return value
        if name == "attn_mask":
            if value.ndim != 3 or len(value) != batch.size * self.module.num_heads:
                raise ValueError(
                    f"module '{self.name}' got an attn_mask of shape {tuple(value.shape)} in a batch of {batch.size}"
                    f" samples: expected (L, S), or (B h, L, S) for {self.module.num_heads} heads"
                )
            return Mapped(value.view(batch.size, -1, *value.shape[1:]))
        if name in ("query", "key", "value") and value.ndim == 2:
            raise ValueError(
                f"module '{self.name}' got a {name} of shape {tuple(value.shape)} without a batch: pass x[None], or"
                f" what else has the samples along dimension {dim}; where it is called for each sample, {AS_UNIT}; or"
                f" {ONE_AT_A_TIME}"
            )
        dim = 0 if name == "key_padding_mask" else dim
        if value.ndim <= dim or value.shape[dim] != batch.size:
            raise ValueError(
                f"module '{self.name}' got a {name} of shape {tuple(value.shape)} in a batch of {batch.size} samples:"
                f" expected the samples along dimension {dim} (batch_first={self.module.batch_first}). {ELSEWHERE}"
            )
        return Mapped.batches_of_one(value, dim)
