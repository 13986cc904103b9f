"""A tensor subclass for values that all samples of a batch share, so that their gradients arrive per sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..batch import ONE_AT_A_TIME, Batch
from .loops import loops_of
from .product_parsers import parse_product
from .samples import MappedArgument, map_samples
from .shared_value import CallMaker, LeafOrigin, SharedValue, new_leaf

_COMPILED = (
    "a value that all samples share goes into a compiled function, which runs uncompiled then: compile the function"
    " without fullgraph=True"
)
# Methods with sizes among their arguments, which may name the batch size.
_EXPANDING = {"expand", "repeat", "broadcast_to", "tile"}
# Methods that ask for a shape, a dtype and the like.
_METADATA = {"size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "__len__", "get_device"}
# Methods that return numbers or text, which are the same for every sample.
_METADATA |= {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__repr__", "__format__"}
# Properties that are tensors.
_VALUE_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class SharedTensor(torch.Tensor):
    """A value that all samples share, as a tensor that stands in the place of a parameter in a forward.

    A model that adds positions of shape (1, T, n) to activations of shape (B, T, n) gets from autograd the gradient of
    the positions summed over the samples. With a `SharedTensor` in the place of the positions, the sum is computed from
    a copy of them for each sample. What a function computes from shared tensors alone is computed once, and is a shared
    tensor again; together with a tensor of the batch, the result is an ordinary tensor.
    """

    _value: SharedValue
    owner: str
    batch: Batch

    @staticmethod
    def __new__(cls, value: SharedValue, owner: str, batch: Batch) -> SharedTensor:
        with torch._C.DisableTorchFunctionSubclass():
            shared = value.tensor.as_subclass(cls)
        shared._value, shared.owner, shared.batch = value, owner, batch
        return shared

    @property
    def value(self) -> SharedValue:
        """The value, with its copies."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad and not self._value.tensor.requires_grad:
                # An autograd.Function made this tensor, and gave it a graph afterwards.
                return SharedValue(self.as_subclass(Tensor), self._value.batch_size)
        return self._value

    @property
    def copies(self) -> Tensor:
        """One copy per sample, (B, *shape)."""
        return self.value.copies

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_COMPILED)
            return torch.compiler.disable(cls._run)(func, args, kwargs)
        return cls._run(func, args, kwargs)

    @staticmethod
    def _run(func, args, kwargs):
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func.__name__ in ("type_as", "to") and len(args) > 1 and isinstance(args[1], Tensor):
            func, args = torch.Tensor.to, (args[0], args[1].device, args[1].dtype)
        return _compute(func, args, kwargs or {})


def shared_tensor(
    copies: Tensor,
    owner: str,
    batch: Batch,
    parameter: nn.Parameter | None = None,
    make_call: CallMaker | None = None,
) -> Tensor:
    """The shared tensor with a copy for each sample; for a batch of one, the copy itself.

    Args:
        copies: the copies, (B, *shape), which are equal but for their gradients.
        owner: the name of the parameter or module that the value comes from, for messages.
        batch: the batch of the samples.
        parameter, make_call: as in `new_leaf`.
    """
    if copies.shape[0] == 1:
        return copies[0]
    leaf = new_leaf(copies, parameter, make_call)
    shared = SharedTensor(SharedValue.of_leaf(leaf), owner, batch)
    if leaf.requires_grad:
        # Functions without __torch_function__, such as scripted ones and autograd.Functions, send gradients here.
        message = _refusal(shared, "goes through a function that torch.func does not see")
        leaf.register_hook(partial(_refuse, message, leaf.origin))
    return shared


def _refuse(message: str, origin: LeafOrigin, grad: Tensor | None) -> None:
    if grad is not None and not origin.is_reached:
        raise ValueError(message)


def _is_metadata(func: Callable) -> bool:
    """Whether `func` asks for the shape, dtype, a number and so on, not for a tensor."""
    if func.__name__ == "__get__":
        return func.__self__.__name__ not in _VALUE_PROPERTIES
    return func.__name__ in _METADATA


def _compute(func: Callable, args: tuple, kwargs: dict) -> object:
    """The result of `func`: a tensor of the batch if any argument is one, else a shared tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shared = [t for t in tensors if isinstance(t, SharedTensor)]
    first = shared[0]
    dims = {id(t): _batch_dim(t, shared) for t in tensors if not isinstance(t, SharedTensor)}
    dim = max((d for d in dims.values() if d is not None), default=None)
    if dim is not None and func.__name__ == "batch_norm" and kwargs.get("training", True):
        raise ValueError(
            f"'{first.owner}' of shape {tuple(first.shape)} scales a batch normalisation in training mode, which"
            " couples the samples: use running statistics, or multiply the output of an nn.BatchNorm layer with"
            " affine=False, under batch_norm='contribution'"
        )
    if func.__name__ in _EXPANDING and args[0] is first:
        args, kwargs, dim = _for_one_sample(first, args, kwargs)
    if dim is None:
        return _compute_once(first, func, args, kwargs)
    try:
        product = _product(func, args, kwargs, dims) if dim == 0 else None
        return _compute_per_sample(first, func, args, kwargs, dims, dim) if product is None else product
    except RuntimeError as error:
        raise ValueError(_refusal(first, f"goes through {func.__name__} ({error})")) from error


def _compute_once(first: SharedTensor, func: Callable, args: tuple, kwargs: dict) -> object:
    """The result of `func` for shared tensors and constants."""
    values = [leaf.value for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, SharedTensor)]
    args, kwargs = pytree.tree_map_only(SharedTensor, lambda shared: shared.value.tensor, (args, kwargs))

    def shared(tensor: Tensor) -> SharedTensor:
        if not torch.is_grad_enabled():
            tensor = tensor.detach()
        return SharedTensor(SharedValue.computed(values, func, args, kwargs, tensor), first.owner, first.batch)

    return pytree.tree_map_only(Tensor, shared, func(*args, **kwargs))


def _product(func: Callable, args: tuple, kwargs: dict, dims: dict[int, int | None]) -> Tensor | None:
    """The result of a product of samples, along dimension 0, with a shared value; None for other functions."""
    shared: dict[int, SharedTensor] = {}

    def value_of(x: object) -> SharedValue | None:
        if not isinstance(x, SharedTensor):
            return None
        value = x.value
        shared[id(value)] = x
        return value

    product = parse_product(func, args, kwargs, value_of)
    if product is None or dims.get(id(product.x)) != 0 or not product.kind.has_samples_in_front():
        return None
    output = product.watched(product.output(), product.x, product.kind)
    if product.separate_bias is None:
        return output
    bias = shared[id(product.bias)]
    return output + SharedTensor(product.separate_bias, bias.owner, bias.batch)


def _compute_per_sample(
    first: SharedTensor, func: Callable, args: tuple, kwargs: dict, dims: dict[int, int | None], dim: int
) -> object:
    """The result of `func` for each sample and its copies of the shared values, along dimension `dim`.

    `dims` has the dimension of the samples in each tensor, by its id.
    """

    def mapped(leaf: object) -> object:
        if isinstance(leaf, SharedTensor):
            return MappedArgument(leaf.copies)
        found = dims.get(id(leaf))
        return leaf if found is None else MappedArgument.batches_of_one(leaf, found)

    args, kwargs = pytree.tree_map(mapped, (args, kwargs))
    with loops_of(first.batch.model).noted(f"'{first.owner}', which goes through {func.__name__},"):
        results = map_samples(func, args, kwargs)
    return pytree.tree_map_only(Tensor, partial(_moved_back, func, first, dim), results)


def _batch_dim(x: Tensor, shared: list[SharedTensor]) -> int | None:
    """The dimension of the samples in `x`, or None where all of them share it."""
    batch = shared[0].batch
    dim = None if batch.is_constant(x) else batch.matching_dim(x)
    if dim is None:
        if x.requires_grad:
            raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}"))
        return None
    like_shared = any(s.ndim >= x.ndim and s.shape[dim] == batch.size for s in shared)
    if not batch.is_batched_input(x) and (like_shared or batch.may_be_positions(x)):
        raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}, batch or not"))
    return dim


def _for_one_sample(shared: SharedTensor, args: tuple, kwargs: dict) -> tuple[tuple, dict, int | None]:
    """The arguments of an expansion to the batch size, as in `token.expand(B, -1, -1)`, for one sample.

    Returns:
        The arguments and keyword arguments, and the dimension that is expanded to the batch size; None if none is.
    """
    sizes = args[1:] or tuple(kwargs.values())
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = (1,) * (len(sizes) - shared.ndim) + shared.shape
    for dim in (shared.batch.batch_dim, 0):
        if len(sizes) == len(shape) > dim and sizes[dim] == shared.batch.size and shape[dim] == 1:
            return (shared, (*sizes[:dim], 1, *sizes[dim + 1 :])), {}, dim
    return args, kwargs, None


def _moved_back(func: Callable, shared: SharedTensor, dim: int, result: Tensor) -> Tensor:
    """A result of batches of one, with the samples in front, as a tensor with the samples along `dim`."""
    if result.ndim < dim + 2 or result.shape[dim + 1] != 1:
        raise ValueError(_refusal(shared, f"goes through {func.__name__}, which mixes samples or merges dimensions"))
    return result.squeeze(dim + 1).movedim(0, dim)


def _refusal(shared: SharedTensor, where: str) -> str:
    """The message for a shared tensor whose gradient cannot be told apart by sample."""
    return (
        f"'{shared.owner}' of shape {tuple(shared.shape)}, which is taken for the same in all"
        f" {shared.batch.size} samples, {where}: its gradient cannot be told apart by sample. Capture the module that"
        " uses it as one unit with rgd_ext.register_rule(module, rgd_ext.unit), or give the shared value a leading"
        f" dimension of 1; as a last remedy, {ONE_AT_A_TIME}"
    )
