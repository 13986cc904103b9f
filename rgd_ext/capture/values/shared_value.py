"""Values that all samples share: parameters, and what is computed once from parameters alone.

Their gradients are wanted per sample. So where a value is used together with the samples, every sample has a copy of
it, and the gradients of the copies are taken back through the graph of the value to the copies of the parameters. The
graph ends in leaves, one for each parameter, made by `new_leaf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..batch import storage
from ..native import LayerCall
from .samples import fallback_warnings

# (parameters, rule=, spec=, operands=) -> the call of a layer with these parameters, in the module that runs.
CallMaker: TypeAlias = Callable[..., LayerCall]
Number: TypeAlias = int | float | Tensor


class LeafOrigin:
    """What a leaf of the graph of a shared value stands for. It is the attribute `origin` of the leaf.

    Attributes:
        copies: one copy per sample, (B, *shape), whose gradients are wanted.
        parameter: the parameter that the leaf stands for, or None.
        make_call: makes the call of a layer that has the parameter.
        is_reached: whether gradients of copies are being taken back to the leaf.
    """

    __slots__ = ("copies", "is_reached", "make_call", "parameter")

    def __init__(self, copies: Tensor, parameter: nn.Parameter | None, make_call: CallMaker | None) -> None:
        self.copies, self.parameter, self.make_call = copies, parameter, make_call
        self.is_reached = False

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Gradients that arrive at the leaf inside come from copies of a value."""
        self.is_reached = True
        try:
            yield
        finally:
            self.is_reached = False


def new_leaf(copies: Tensor, parameter: nn.Parameter | None = None, make_call: CallMaker | None = None) -> Tensor:
    """A leaf that stands for the value with these copies, and for `parameter` if they are copies of one."""
    leaf = copies.detach()[0].requires_grad_(copies.requires_grad)
    leaf.origin = LeafOrigin(copies, parameter, make_call)
    return leaf


class SharedValue:
    """A value that all samples share.

    Args:
        tensor: the value. Its graph ends in leaves from `new_leaf`.
        batch_size: B.
        root: the leaf whose elements, times `scale`, the value has in the same order in memory, or None if there is no
            such leaf. Without a scale the value may be a view of some of them, as long as that has no gaps.
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
    def of_leaf(cls, leaf: Tensor) -> SharedValue:
        """The value of a leaf."""
        return cls(leaf, len(leaf.origin.copies), leaf)

    @property
    def root(self) -> Tensor | None:
        """The leaf whose elements, times `scale`, the value has; None if there is none."""
        # A view of the leaf shares its memory, and so every change. A multiple has memory of its own.
        return self._root if self.scale is None or not self.is_changed() else None

    @property
    def margins(self) -> tuple[int, int]:
        """How many elements of the root lie before those of the value, and behind them."""
        before = self.tensor.storage_offset() - self.root.storage_offset() if self.scale is None else 0
        return before, self.root.numel() - before - self.tensor.numel()

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, if the value is one as it is."""
        return self.tensor.origin.parameter if self.tensor is self.root else None

    @property
    def copies(self) -> Tensor:
        """One copy of the value per sample, (B, *shape)."""
        if self._copies is None or self.is_changed():
            self._copies = self._copied()
        return self._copies

    def is_changed(self) -> bool:
        """Whether the tensor was changed in place after the value was made."""
        return self.tensor._version != self._version

    @torch.enable_grad()
    def _copied(self) -> Tensor:
        if self.tensor is self.root:
            return self.tensor.origin.copies
        leaves = leaves_of(self.tensor)
        if not leaves:  # a constant
            return self.tensor.expand(self.batch_size, *self.tensor.shape)
        copies = [leaf.origin.copies for leaf in leaves]
        # The edge stays what it is if the tensor is changed in place later, which changes the graph of the tensor.
        graph = get_gradient_edge(self.tensor), leaves
        return _CopiesOfValue.apply(graph, self.tensor.detach(), self.batch_size, *copies)

    @staticmethod
    def computed(
        used: Sequence[SharedValue], function: Callable, args: tuple, kwargs: dict, tensor: Tensor
    ) -> SharedValue:
        """The value `tensor`, which `function` computed from the values `used` and from constants in its arguments."""
        first = used[0]
        return (
            first._computed(function, args, kwargs, tensor) if len(used) == 1 else SharedValue(tensor, first.batch_size)
        )

    def _computed(self, function: Callable, args: tuple, kwargs: dict, tensor: Tensor) -> SharedValue:
        """The value that a function computed from this one alone: with its root, for a view or a multiple."""
        root = self.root
        if root is None or not tensor.requires_grad or memory_order(tensor) is None:
            return SharedValue(tensor, self.batch_size)
        is_view = storage(tensor) == storage(self.tensor)
        is_whole = tensor.numel() == root.numel()
        if is_view and (is_whole or self.scale is None):
            return SharedValue(tensor, self.batch_size, root, self.scale)
        factor = None if kwargs or is_view or not is_whole else _factor(function.__name__, args)
        if factor is None or tensor.stride() != self.tensor.stride():  # not every device keeps the layout
            return SharedValue(tensor, self.batch_size)
        return SharedValue(tensor, self.batch_size, self.root, factor if self.scale is None else self.scale * factor)


def memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions in the order of memory, outermost first; None if the elements have gaps or overlap."""
    if tensor.is_contiguous():
        return list(range(tensor.ndim))
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    sizes, strides = [tensor.shape[dim] for dim in order], [tensor.stride(dim) for dim in order]
    is_dense = all(n == 1 or s == prod(sizes[i + 1 :]) for i, (n, s) in enumerate(zip(sizes, strides, strict=True)))
    return order if is_dense else None


def _factor(name: str, args: tuple) -> Number | None:
    """The number by which a function of this name multiplies its argument; None for other functions."""
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
    """The copies of a value that was computed from leaves, as a function of the copies of the leaves."""

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
    """The gradients of `leaves`, per sample.

    Args:
        edge: the edge to a tensor that was computed from the leaves.
        leaves: the leaves.
        grads: the gradients of the tensor, (B, *shape).
    """
    grad = partial(torch.autograd.grad, [edge], leaves, retain_graph=True, allow_unused=True)
    with ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(leaf.origin.reached())
        # A tensor that an autograd.Function of the user has saved may be a `SharedTensor`; here it is an ordinary one.
        stack.enter_context(torch._C.DisableTorchFunctionSubclass())
        stack.enter_context(fallback_warnings(False))
        try:
            return grad([grads], is_grads_batched=True)
        except RuntimeError:  # an operator has no batching rule
            return [_stacked(rows) for rows in zip(*(grad([each]) for each in grads), strict=True)]


def _stacked(rows: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if rows[0] is None else torch.stack(rows)


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves from `new_leaf` that the graph of `tensor` ends in."""
    if tensor.grad_fn is None:
        return []
    found, seen, pending = [], {tensor.grad_fn}, [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if hasattr(node, "variable") and hasattr(node.variable, "origin"):
            found.append(node.variable)
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        pending += following
    return found
