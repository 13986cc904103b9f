"""Checks of modules that are captured as one unit: of their outputs, their buffers and the objects that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import _StopRecomputationError

from ...nests import modules_in
from ...planning.trial import unchanged_buffers
from ..batch import ONE_AT_A_TIME
from ..copies import leaves_in
from ..equal_draws import unknown_draws
from ..findings import WrongGradients
from ..parametrizations import cache_suspended
from ..values.samples import MappedArgument, UnequalSamples, is_per_sample
from ..values.shared_tensor import SharedTensor


def plain_output(module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> list | None:
    """The leaves of the output of an ordinary forward for the whole batch, while the capture is verified.

    None if they need not be those of the samples one by one: with shared tensors, or random numbers.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(leaf, SharedTensor) for leaf in leaves):
        return None
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
    devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), unchanged_buffers(module), cache_suspended():
        output = pytree.tree_leaves(forward(*args, **kwargs))
    return None if unknown_draws() else output


def check_output(module: nn.Module, name: str, output: list, plain: list) -> None:
    """Compare the output of the samples one by one with `plain_output`.

    Raises:
        WrongGradients: if they differ.
    """
    for got, want in zip(output, plain, strict=True):
        if not isinstance(want, Tensor) or not want.is_floating_point() or isinstance(got, SharedTensor):
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
                f"module '{name}' ({type(module).__name__}) gives other values for a batch than for its"
                f" samples one by one, by {difference:.2g} of the largest: it couples the samples (as batch"
                " statistics do), or takes an input that all samples share for one with samples. Give such an"
                " argument a leading dimension of 1, or capture the enclosing module as one unit with"
                " rgd_ext.register_rule(enclosing, rgd_ext.unit)"
            )


def _broadcasts(x: Tensor, like: Tensor) -> bool:
    """Whether `x` can be expanded to the shape of `like`."""
    return x.ndim == like.ndim and all(n in (1, m) for n, m in zip(x.shape, like.shape, strict=True))


def check_objects(module: nn.Module, name: str, arguments: tuple, results: list) -> None:
    """Raise ValueError if an object other than a container, such as a cache, holds tensors of single samples."""
    held = [x for leaf in pytree.tree_leaves(arguments) for x in _tensors_held_by(leaf) if is_per_sample(x)]
    if held or any(_tensors_held_by(leaf) for leaf in results):
        raise ValueError(
            f"module '{name}' ({type(module).__name__}), captured sample by sample, keeps tensors in an"
            " object that it takes or gives, such as a cache: call it with use_cache=False, or give tuples, lists"
            " and dicts of tensors"
        )


def _tensors_held_by(leaf: object) -> list[Tensor]:
    """The tensors that an object has among its attributes."""
    if isinstance(leaf, (Tensor, MappedArgument, nn.Module, type)) or not hasattr(leaf, "__dict__"):
        return []
    return [x for x in leaves_in(vars(leaf)) if isinstance(x, Tensor)]


@contextmanager
def buffers_checked(module: nn.Module, name: str) -> Iterator[None]:
    """Check the buffers of a module after a forward under vmap, and give them back after an error.

    Raises:
        UnequalSamples: if a buffer was given a value per sample, or was changed in place before an error.
    """
    before = [(each, dict(each._buffers)) for each in modules_in(module)]
    versions = [(x, x._version) for _, buffers in before for x in buffers.values() if x is not None]
    try:
        yield
        for owner, _ in before:
            for key, buffer in owner._buffers.items():
                if isinstance(buffer, Tensor) and is_per_sample(buffer):
                    raise UnequalSamples(
                        f"module '{name}', captured sample by sample, gives '{key}', a buffer of its"
                        f" {type(owner).__name__}, a value that depends on its input: compute it outside the"
                        " module, or teach the capture its gradient with rgd_ext.register_rule. As a last remedy,"
                        f" {ONE_AT_A_TIME}"
                    )
    except BaseException as error:
        for owner, buffers in before:
            owner._buffers |= buffers
        has_failed = not isinstance(error, _StopRecomputationError)
        if has_failed and any(x._version != version for x, version in versions):
            raise UnequalSamples(
                f"module '{name}' ({type(module).__name__}) changes a buffer in place, and then cannot be"
                f" run sample by sample under torch.func.vmap ({error}): {ONE_AT_A_TIME}"
            ) from error
        raise
