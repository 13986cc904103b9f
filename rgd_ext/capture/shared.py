"""Values that all samples of a batch share, kept once per sample so that gradients arrive per sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import ONE_AT_A_TIME, Batch
from .loops import loops_of
from .product_calls import product_of
from .samples import Mapped, map_samples
from .values import Leaf, RecordMaker, Value, leaf_of

_EXPANDING = {"expand", "repeat", "broadcast_to", "tile"}
_METADATA = {"size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "__len__", "get_device"}
# Numbers and text, which are the same for every sample.
_METADATA |= {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__repr__", "__format__"}
_VALUE_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Shared(torch.Tensor):
    """A tensor that looks like the one all samples share, with a copy of it per sample behind it.

    A model that adds positions of shape (1, T, n) to activations of shape (B, T, n) gets from autograd the gradient of
    the positions summed over the samples. With a Shared in their place what is computed from shared values alone is
    computed once and Shared again; where it meets a tensor of the batch, the result is an ordinary tensor.
    """

    @staticmethod
    def __new__(cls, value: Value, owner: str, batch: Batch) -> Shared:
        with torch._C.DisableTorchFunctionSubclass():
            shared = value.tensor.as_subclass(cls)
        shared._value, shared.owner, shared.batch = value, owner, batch
        return shared

    @property
    def value(self) -> Value:
        """Its value."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad and not self._value.tensor.requires_grad:
                # An autograd.Function made it, and has given it a graph since.
                return Value(self.as_subclass(Tensor), self._value.batch_size)
        return self._value

    @property
    def copies(self) -> Tensor:
        """One per sample, (B, *shape)."""
        return self.value.copies

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func.__name__ in ("type_as", "to") and len(args) > 1 and isinstance(args[1], Tensor):
            func, args = torch.Tensor.to, (args[0], args[1].device, args[1].dtype)
        return _compute(func, args, kwargs or {})


def share(
    copies: Tensor,
    owner: str,
    batch: Batch,
    parameter: nn.Parameter | None = None,
    make_record: RecordMaker | None = None,
) -> Tensor:
    """The value whose copies for each sample are given, (B, *shape); for one sample, simply that one.

    Args:
        copies: equal but for their gradients.
        owner: what they come from, for the user.
        batch: that they belong to.
        parameter, make_record: as in `leaf_of`.
    """
    if copies.shape[0] == 1:
        return copies[0]
    leaf = leaf_of(copies, parameter, make_record)
    shared = Shared(Value.of_leaf(leaf), owner, batch)
    if leaf.requires_grad:
        # What takes the value past __torch_function__ (an autograd.Function, a scripted function) ends here.
        message = _refusal(shared, "goes through a function that torch.func does not see")
        leaf.register_hook(partial(_refuse, message, leaf.stands_for))
    return shared


def _refuse(message: str, leaf: Leaf, grad: Tensor | None) -> None:
    if grad is not None and not leaf.is_followed:
        raise ValueError(message)


def _is_metadata(func: Callable) -> bool:
    """Whether `func` asks for the shape, dtype, a number and so on, not for a tensor."""
    if func.__name__ == "__get__":
        return func.__self__.__name__ not in _VALUE_PROPERTIES
    return func.__name__ in _METADATA


def _compute(func: Callable, args: tuple, kwargs: dict) -> object:
    """`func`, whose result belongs to the batch if any of its arguments did, else it is Shared."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shared = [t for t in tensors if isinstance(t, Shared)]
    first = shared[0]
    dims = {id(t): _batch_dim(t, shared) for t in tensors if not isinstance(t, Shared)}
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
        return _once(first, func, args, kwargs)
    try:
        met = _met(func, args, kwargs, dims) if dim == 0 else None
        return _of_copies(first, func, args, kwargs, dims, dim) if met is None else met
    except RuntimeError as error:
        raise ValueError(_refusal(first, f"goes through {func.__name__} ({error})")) from error


def _once(first: Shared, func: Callable, args: tuple, kwargs: dict) -> object:
    """What `func` computes from shared values alone."""
    values = [leaf.value for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Shared)]
    args, kwargs = pytree.tree_map_only(Shared, lambda shared: shared.value.tensor, (args, kwargs))

    def shared(tensor: Tensor) -> Shared:
        if not torch.is_grad_enabled():
            tensor = tensor.detach()
        return Shared(Value.computed(values, func, args, kwargs, tensor), first.owner, first.batch)

    return pytree.tree_map_only(Tensor, shared, func(*args, **kwargs))


def _met(func: Callable, args: tuple, kwargs: dict, dims: dict[int, int | None]) -> Tensor | None:
    """The product of samples, along dimension 0, with a shared value; None for other functions."""
    shared: dict[int, Shared] = {}

    def value_of(x: object) -> Value | None:
        if not isinstance(x, Shared):
            return None
        value = x.value
        shared[id(value)] = x
        return value

    product = product_of(func, args, kwargs, value_of)
    if product is None or dims.get(id(product.x)) != 0 or not product.form.has_samples_in_front():
        return None
    output = product.watched(product.output(), product.x, product.form)
    if product.rest is None:
        return output
    owner = shared[id(product.bias)]
    return output + Shared(product.rest, owner.owner, owner.batch)


def _of_copies(
    first: Shared, func: Callable, args: tuple, kwargs: dict, dims: dict[int, int | None], dim: int
) -> object:
    """`func` of each sample, which are along `dims` of tensors by their ids, and its copies of shared values."""

    def mapped(leaf: object) -> object:
        if isinstance(leaf, Shared):
            return Mapped(leaf.copies)
        found = dims.get(id(leaf))
        return leaf if found is None else Mapped.batches_of_one(leaf, found)

    args, kwargs = pytree.tree_map(mapped, (args, kwargs))
    with loops_of(first.batch.model).noted(f"'{first.owner}', which goes through {func.__name__},"):
        results = map_samples(func, args, kwargs)
    return pytree.tree_map_only(Tensor, partial(_joined, func, first, dim), results)


def _batch_dim(x: Tensor, shared: list[Shared]) -> int | None:
    """The dimension of the samples in `x`, or None where it belongs to all of them."""
    batch = shared[0].batch
    dim = None if batch.is_constant(x) else batch.place(x)
    if dim is None:
        if x.requires_grad:
            raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}"))
        return None
    like_shared = any(s.ndim >= x.ndim and s.shape[dim] == batch.size for s in shared)
    if not batch.is_input(x) and (like_shared or batch.is_square(x)):
        raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}, batch or not"))
    return dim


def _for_one_sample(shared: Shared, args: tuple, kwargs: dict) -> tuple[tuple, dict, int | None]:
    """Sizes that name the batch, as in `token.expand(B, -1, -1)`, rewritten for one sample, and their dimension."""
    sizes = args[1:] or tuple(kwargs.values())
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = (1,) * (len(sizes) - shared.ndim) + shared.shape
    for dim in (shared.batch.at, 0):
        if len(sizes) == len(shape) > dim and sizes[dim] == shared.batch.size and shape[dim] == 1:
            return (shared, (*sizes[:dim], 1, *sizes[dim + 1 :])), {}, dim
    return args, kwargs, None


def _joined(func: Callable, shared: Shared, dim: int, result: Tensor) -> Tensor:
    if result.ndim < dim + 2 or result.shape[dim + 1] != 1:
        raise ValueError(_refusal(shared, f"goes through {func.__name__}, which mixes samples or merges dimensions"))
    return result.squeeze(dim + 1).movedim(0, dim)


def _refusal(shared: Shared, where: str) -> str:
    return (
        f"'{shared.owner}' of shape {tuple(shared.shape)}, which is taken for the same in all"
        f" {shared.batch.size} samples, {where}: its gradient cannot be told apart by sample. Capture the module that"
        " uses it as one unit with rgd_ext.register_rule(module, rgd_ext.unit), or give the shared value a leading"
        f" dimension of 1; as a last remedy, {ONE_AT_A_TIME}"
    )
