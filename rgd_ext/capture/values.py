"""Values: tensors that all samples share, which are parameters or computed from parameters alone, once for all.

Their gradients are wanted per sample. So where a value is used together with the samples, every sample has a copy of
it; the gradients of the copies are taken back through the graph of the value to the copies of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .batch import storage
from .nodes import BoundRule, Record
from .samples import fallback_warnings

# (parameters, rule, kind) -> the record of a layer that uses the parameters in the module that runs.
RecordMaker: TypeAlias = Callable[[dict[str, nn.Parameter], BoundRule, str | None], Record]
Number: TypeAlias = int | float | Tensor


class Leaf:
    """What a leaf in the graph of a value stands for; its attribute `stands_for`.

    Attributes:
        copies: (B, *shape), whose gradients are wanted.
        parameter: if it is one.
        make_record: of a layer that uses the parameter.
        is_followed: whether gradients are being taken back to it.
    """

    __slots__ = ("copies", "is_followed", "make_record", "parameter")

    def __init__(self, copies: Tensor, parameter: nn.Parameter | None, make_record: RecordMaker | None) -> None:
        self.copies, self.parameter, self.make_record = copies, parameter, make_record
        self.is_followed = False


def leaf_of(copies: Tensor, parameter: nn.Parameter | None = None, make_record: RecordMaker | None = None) -> Tensor:
    """A leaf that stands for a value with these copies, and for a parameter if they are copies of one."""
    leaf = copies.detach()[0].requires_grad_(copies.requires_grad)
    leaf.stands_for = Leaf(copies, parameter, make_record)
    return leaf


class Value:
    """A value that all samples share.

    Args:
        tensor: the value. Its graph ends in leaves from `leaf_of`.
        batch_size: B.
        root: the leaf whose elements, times `scale`, it holds in the same order in memory; without a scale it may be a
            view of a part of them that has no gaps. None without one.
        scale: a number, or None for 1.
    """

    __slots__ = ("_copies", "_root", "_version", "batch_size", "scale", "tensor")

    def __init__(
        self, tensor: Tensor, batch_size: int, root: Tensor | None = None, scale: Number | None = None
    ) -> None:
        self.tensor, self.batch_size, self._root, self.scale = tensor, batch_size, root, scale
        self._version = tensor._version
        self._copies: Tensor | None = None

    @classmethod
    def of_leaf(cls, leaf: Tensor) -> Value:
        """The value that a leaf is."""
        return cls(leaf, len(leaf.stands_for.copies), leaf)

    @property
    def root(self) -> Tensor | None:
        """The leaf whose elements it holds, times `scale`."""
        # A view of the leaf shares its memory and what is changed there; a multiple has memory of its own.
        return self._root if self.scale is None or not self.is_changed() else None

    @property
    def margins(self) -> tuple[int, int]:
        """How many elements of the root are before its own and behind them."""
        before = self.tensor.storage_offset() - self.root.storage_offset() if self.scale is None else 0
        return before, self.root.numel() - before - self.tensor.numel()

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that it is."""
        return self.tensor.stands_for.parameter if self.tensor is self.root else None

    @property
    def copies(self) -> Tensor:
        """One per sample, (B, *shape)."""
        if self._copies is None or self.is_changed():
            self._copies = self._copied()
        return self._copies

    def is_changed(self) -> bool:
        """Whether the value was changed in place."""
        return self.tensor._version != self._version

    @torch.enable_grad()
    def _copied(self) -> Tensor:
        if self.tensor is self.root:
            return self.tensor.stands_for.copies
        leaves = leaves_of(self.tensor)
        if not leaves:  # a constant
            return self.tensor.expand(self.batch_size, *self.tensor.shape)
        copies = [leaf.stands_for.copies for leaf in leaves]
        # An edge, since the tensor may be changed in place later, and its graph with it.
        graph = get_gradient_edge(self.tensor), leaves
        return _CopiesOfValue.apply(graph, self.tensor.detach(), self.batch_size, *copies)

    @staticmethod
    def computed(used: Sequence[Value], function: Callable, args: tuple, kwargs: dict, tensor: Tensor) -> Value:
        """`tensor`, which `function` made of the values `used` and of constants among its arguments."""
        first = used[0]
        return first._changed_by(function, args, kwargs, tensor) if len(used) == 1 else Value(tensor, first.batch_size)

    def _changed_by(self, function: Callable, args: tuple, kwargs: dict, tensor: Tensor) -> Value:
        root = self.root
        if root is None or not tensor.requires_grad or memory_order(tensor) is None:
            return Value(tensor, self.batch_size)
        is_view = storage(tensor) == storage(self.tensor)
        is_whole = tensor.numel() == root.numel()
        if is_view and (is_whole or self.scale is None):
            return Value(tensor, self.batch_size, root, self.scale)
        factor = None if kwargs or is_view or not is_whole else _factor(function.__name__, args)
        if factor is None or tensor.stride() != self.tensor.stride():  # not every device keeps the layout
            return Value(tensor, self.batch_size)
        return Value(tensor, self.batch_size, self.root, factor if self.scale is None else self.scale * factor)


def memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions as the elements lie in memory, outermost first; None where that has gaps or overlaps."""
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    sizes, strides = [tensor.shape[dim] for dim in order], [tensor.stride(dim) for dim in order]
    is_dense = all(n == 1 or s == prod(sizes[i + 1 :]) for i, (n, s) in enumerate(zip(sizes, strides, strict=True)))
    return order if is_dense else None


def _factor(name: str, args: tuple) -> Number | None:
    """The number by which a function of this name multiplies its value, if that is what it does."""
    if name in ("neg", "negative", "__neg__"):
        return -1
    numbers = [x for x in args if isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0)]
    if len(numbers) != 1:
        return None
    if name in ("mul", "multiply", "__mul__", "__rmul__"):
        return numbers[0]
    is_quotient = name in ("div", "divide", "true_divide", "__truediv__") and numbers[0] is args[1]
    return 1 / numbers[0] if is_quotient else None


class _CopiesOfValue(torch.autograd.Function):
    """Copies of a value that was computed from leaves, given theirs."""

    @staticmethod
    def forward(
        ctx, graph: tuple[GradientEdge, list[Tensor]], tensor: Tensor, batch_size: int, *copies: Tensor
    ) -> Tensor:
        ctx.edge, ctx.leaves = graph
        return tensor.expand(batch_size, *tensor.shape)

    @staticmethod
    def backward(ctx, grads: Tensor):
        return None, None, None, *_gradients_per_sample(ctx.edge, ctx.leaves, grads)


def _gradients_per_sample(edge: GradientEdge, leaves: list[Tensor], grads: Tensor) -> Sequence[Tensor | None]:
    """The gradients of `leaves` for each of `grads`, (B, *shape), gradients of the tensor at the edge."""
    for leaf in leaves:
        leaf.stands_for.is_followed = True
    grad = partial(torch.autograd.grad, [edge], leaves, retain_graph=True, allow_unused=True)
    try:
        # What a function of the user's saved may be `Shared`, but stands for itself here.
        with torch._C.DisableTorchFunctionSubclass(), fallback_warnings(False):
            try:
                return grad([grads], is_grads_batched=True)
            except RuntimeError:  # there is no batching rule
                return [_stacked(rows) for rows in zip(*(grad([each]) for each in grads), strict=True)]
    finally:
        for leaf in leaves:
            leaf.stands_for.is_followed = False


def _stacked(rows: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if rows[0] is None else torch.stack(rows)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves from `leaf_of` that the graph of `tensor` ends in."""
    if tensor.grad_fn is None:
        return []
    found, seen, pending = [], {tensor.grad_fn}, [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable") and hasattr(node.variable, "stands_for"):
            found.append(node.variable)
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        pending += following
    return found
