"""Values that all samples of a batch share, kept once per sample so that gradients arrive per sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batch import Batch
from .samples import Mapped, map_samples

_EXPANDING = {"expand", "repeat", "broadcast_to", "tile"}
_METADATA = {"size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex", "__len__", "get_device"}
# Numbers and text, which are the same for every sample.
_METADATA |= {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__repr__", "__format__"}
_VALUE_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Shared(torch.Tensor):
    """A tensor that looks like the one all samples share and computes with one copy of it per sample.

    A model that adds positions of shape (1, T, n) to activations of shape (B, T, n) gets from autograd the gradient of
    the positions summed over the samples. With a Shared in their place every operation is done sample by sample, until
    it meets a tensor of the batch; the result is then an ordinary tensor.
    """

    @staticmethod
    def __new__(cls, per_sample: Tensor, owner: str, batch: Batch) -> Shared:
        shared = torch.Tensor._make_subclass(cls, per_sample.detach()[0], per_sample.requires_grad)
        shared.per_sample, shared.owner, shared.batch = per_sample, owner, batch
        shared.followed = [False]
        if per_sample.requires_grad:
            # What takes the value past __torch_function__ (an autograd.Function, a scripted function) ends here.
            message = _refusal(shared, "goes through a function that torch.func does not see")
            with torch._C.DisableTorchFunctionSubclass():
                shared.register_hook(partial(_refuse, message, shared.followed))
        return shared

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func.__name__ in ("type_as", "to") and len(args) > 1 and isinstance(args[1], Tensor):
            func, args = torch.Tensor.to, (args[0], args[1].device, args[1].dtype)
        return _compute(func, args, kwargs or {})


def share(per_sample: Tensor, owner: str, batch: Batch) -> Tensor:
    """The value whose copies for each sample are `per_sample` (B, *shape); for one sample, simply that one."""
    return per_sample[0] if per_sample.shape[0] == 1 else Shared(per_sample, owner, batch)


def _refuse(message: str, followed: list[bool], grad: Tensor | None) -> None:
    if grad is not None and not followed[0]:
        raise ValueError(message)


class _ThroughFunction(torch.autograd.Function):
    """The copies of a value that an autograd.Function gave for shared values.

    The Function is asked for its derivative once per sample, so it needs no batching rule.
    """

    @staticmethod
    def forward(ctx, values: tuple[Shared, list[Shared]], *copies: Tensor) -> Tensor:
        # In a tuple: the value's own graph is no part of this one.
        value, sources = values
        ctx.value, ctx.sources = value, sources
        return value.as_subclass(Tensor).detach().expand(value.batch.size, *value.shape)

    @staticmethod
    def backward(ctx, grads: Tensor):
        for source in ctx.sources:
            source.followed[0] = True
        try:
            # What the Function saved is Shared, but here it stands for itself.
            with torch._C.DisableTorchFunctionSubclass():
                rows = [
                    torch.autograd.grad(ctx.value, ctx.sources, grad, retain_graph=True, allow_unused=True)
                    for grad in grads
                ]
        finally:
            for source in ctx.sources:
                source.followed[0] = False
        columns = zip(*rows, strict=True)
        return None, *[None if column[0] is None else torch.stack(column) for column in columns]


def _followed(value: Shared) -> Shared:
    """`value` itself, or, if an autograd.Function gave it, one whose copies know where they come from."""
    with torch._C.DisableTorchFunctionSubclass():
        if value.grad_fn is None:
            return value
        sources = [source for source in _leaves(value.grad_fn) if isinstance(source, Shared)]
    copies = _ThroughFunction.apply((value, sources), *[source.per_sample for source in sources])
    return Shared(copies, value.owner, value.batch)


def _leaves(node: torch.autograd.graph.Node) -> list[Tensor]:
    """The leaves that a node of the graph leads to."""
    found, seen, pending = [], {node}, [node]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        pending += following
    return found


def _is_metadata(func: Callable) -> bool:
    """Whether `func` asks for the shape, dtype, a number and so on, not for a tensor."""
    if func.__name__ == "__get__":
        return func.__self__.__name__ not in _VALUE_PROPERTIES
    return func.__name__ in _METADATA


def _compute(func: Callable, args: tuple, kwargs: dict) -> object:
    """`func` sample by sample. Its result belongs to the batch if any of its arguments did, else it is Shared."""
    args, kwargs = pytree.tree_map_only(Shared, _followed, (args, kwargs))
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shared = [t for t in tensors if isinstance(t, Shared)]
    first = shared[0]
    batch = [t for t in tensors if not isinstance(t, Shared) and _belongs_to_batch(t, shared)]
    meets_batch = bool(batch)
    if meets_batch and func.__name__ == "batch_norm" and kwargs.get("training", True):
        raise ValueError(_refusal(first, "scales a batch normalisation in training mode, which couples the samples"))
    if func.__name__ in _EXPANDING and args[0] is first:
        args, kwargs, meets_batch = _for_one_sample(first, args, kwargs)

    def mapped(leaf: object) -> object:
        if isinstance(leaf, Shared):
            return Mapped(leaf.per_sample)
        return Mapped.batches_of_one(leaf, 0) if any(leaf is x for x in batch) else leaf

    args, kwargs = pytree.tree_map(mapped, (args, kwargs))
    try:
        results, spec = map_samples(func, args, kwargs, "different" if meets_batch else "same")
    except RuntimeError as error:
        raise ValueError(_refusal(first, f"goes through {func.__name__} ({error})")) from error
    finish = partial(_joined, func, first) if meets_batch else partial(Shared, owner=first.owner, batch=first.batch)
    results = [finish(r) if isinstance(r, Tensor) else r for r in results]
    return pytree.tree_unflatten(results, spec)


def _belongs_to_batch(x: Tensor, shared: list[Shared]) -> bool:
    batch = shared[0].batch
    if x.ndim == 0 or x.shape[0] != batch.size or batch.is_constant(x):
        if x.requires_grad:
            raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}"))
        return False
    like_shared = any(s.ndim >= x.ndim and s.shape[0] == batch.size for s in shared)
    if not batch.is_input(x) and (like_shared or batch.is_square(x)):
        raise ValueError(_refusal(shared[0], f"meets a tensor of shape {tuple(x.shape)}, batch or not"))
    return True


def _for_one_sample(shared: Shared, args: tuple, kwargs: dict) -> tuple[tuple, dict, bool]:
    """Sizes that name the batch, as in `token.expand(B, -1, -1)`, rewritten for one sample."""
    sizes = args[1:] or tuple(kwargs.values())
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    names_batch = sizes[0] == shared.batch.size and (
        len(sizes) > shared.ndim or (len(sizes) == shared.ndim and shared.shape[0] == 1)
    )
    return ((shared, (1, *sizes[1:])), {}, True) if names_batch else (args, kwargs, False)


def _joined(func: Callable, shared: Shared, result: Tensor) -> Tensor:
    if result.ndim < 2 or result.shape[1] != 1:
        raise ValueError(_refusal(shared, f"goes through {func.__name__}, which mixes samples or merges dimensions"))
    return result.squeeze(1)


def _refusal(shared: Shared, where: str) -> str:
    return (
        f"'{shared.owner}' of shape {tuple(shared.shape)}, which all {shared.batch.size} samples share, {where}: its"
        " gradient cannot be told apart by sample. Capture the module that uses it as one unit with"
        " rgd_ext.register_rule(type(module), rgd_ext.unit), or give the shared value a leading dimension of 1"
    )
