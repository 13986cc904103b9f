"""A mode in which a module that runs on each sample computes only once what the samples share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..batch import storage
from .product_parsers import parse_product
from .products import Product
from .samples import Samples, is_per_sample, outside_vmap
from .shared_value import SharedValue, leaves_of


class SharedValueMode(TorchFunctionMode):
    """Computes values that samples share once, while a function runs on each of `samples` under vmap.

    The function sees a shared value as an ordinary batched tensor of vmap with a copy for each sample, so that
    operations which this mode does not know are right as well. Functions of shared values alone are called once,
    outside of vmap. In products of a shared value with the samples, the rules of layers give the contributions.

    Args:
        samples: the samples that the function runs on.
    """

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        self._samples = samples
        # The memory of the parameters.
        self._storages: set[int] = set()
        # By the id of the tensor that the function sees, which is kept alive so that the id stays unique.
        self._values: dict[int, tuple[Tensor, SharedValue]] = {}

    def parameter(self, leaf: Tensor) -> Tensor:
        """The tensor that the function sees for the parameter that a leaf stands for."""
        self._storages.add(storage(leaf))
        return self._batched(SharedValue.of_leaf(leaf))

    def _batched(self, value: SharedValue) -> Tensor:
        """The tensor that the function sees for `value`."""
        tensor = self._samples.split(value.copies)
        self._values[id(tensor)] = tensor, value
        return tensor

    def _is_of_a_parameter(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter or a view of one."""
        return storage(tensor) in self._storages

    def _adopt(self, x: object) -> None:
        """Take an ordinary tensor for a shared value if parameters were written into it, as into parts of zeros."""
        if type(x) is not Tensor or id(x) in self._values or not x.requires_grad or is_per_sample(x):
            return
        if leaves_of(x):
            self._values[id(x)] = x, SharedValue(x, self._samples.batch_size)

    def _lacks_copies(self, x: Tensor) -> bool:
        """Whether `x` stands for a value and is not batched, or has copies from before the value was changed."""
        value = self._value_of(x)
        return value is not None and (not is_per_sample(x) or value.is_changed())

    def _with_copies(self, x: Tensor) -> Tensor:
        """`x`, or the batched tensor of the value that it stands for."""
        if not self._lacks_copies(x):
            return x
        with outside_vmap():
            return self._batched(self._value_of(x))

    def _value_of(self, x: object) -> SharedValue | None:
        """The value that `x` stands for, or None."""
        found = self._values.get(id(x))
        return None if found is None else found[1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Arguments are nearly always flat, and a search in nests would cost more than the call.
        is_flat = not kwargs and all(type(x) is not tuple and type(x) is not list for x in args)
        leaves = args if is_flat else pytree.tree_leaves((args, kwargs))
        for x in leaves:
            self._adopt(x)
        values = [x for x in leaves if id(x) in self._values]
        if not values or not self._samples.is_innermost_transform():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _decomposed(func)(*args, **kwargs)
        others = [x for x in leaves if isinstance(x, Tensor) and id(x) not in self._values]
        if not any(is_per_sample(x) or x.requires_grad for x in others):
            return self._compute_once(func, args, kwargs)
        product = parse_product(func, args, kwargs, self._value_of)
        output = None if product is None else self._output(product)
        if output is not None:
            return output
        if any(self._lacks_copies(x) for x in values):
            args, kwargs = pytree.tree_map_only(Tensor, self._with_copies, (args, kwargs))
        return func(*args, **kwargs)

    def _compute_once(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """The results of a function of shared values and constants, which are shared values or constants too."""
        used: list[SharedValue] = []

        def plain(x: object) -> object:
            value = self._value_of(x)
            if value is None:
                return x
            used.append(value)
            return value.tensor

        args, kwargs = pytree.tree_map(plain, (args, kwargs))
        if _changes_first_argument(func) and isinstance(args[0], Tensor) and self._is_of_a_parameter(args[0]):
            # Refused before it runs, since the unit runs sample by sample after this error and makes the change then.
            raise RuntimeError(f"{func.__name__} changes a parameter in place")
        with outside_vmap():
            results = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, partial(self._result, func, args, kwargs, used), results)

    def _result(self, func: Callable, args: tuple, kwargs: dict, used: list[SharedValue], tensor: Tensor) -> Tensor:
        """The tensor that the function sees for `tensor`, which `func` computed from `used`."""
        if (not torch.is_grad_enabled() or not tensor.requires_grad) and not self._is_of_a_parameter(tensor):
            return tensor.detach()  # a constant; a view of a parameter may be changed in place, and stays a value
        with outside_vmap():
            return self._batched(SharedValue.computed(used, func, args, kwargs, tensor))

    def _output(self, product: Product) -> Tensor | None:
        """The output of a product, computed for all samples at once; None if it needs copies of the value."""
        found = product.kind.batched(product.x)
        if found is None:
            return None
        kind, drops_dim = found
        x, output = self._samples.join(product.x), self._samples.join(product.output())
        with outside_vmap():
            if drops_dim:
                x, output = x.squeeze(1), output.squeeze(1)
            output = product.watched(output, x, kind)
        output = self._samples.split(output.unsqueeze(1) if drops_dim else output)
        if product.separate_bias is None:
            return output
        with outside_vmap():
            bias = self._batched(product.separate_bias)
        return output + bias


@cache
def _decomposed(func: FunctionType) -> FunctionType:
    """A copy of a function of torch.nn.functional that modes see the inner calls of, and not the call itself."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    decomposed = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    decomposed.__kwdefaults__ = func.__kwdefaults__
    return decomposed


def _changes_first_argument(func: Callable) -> bool:
    """Whether a function changes its first argument in place."""
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")}
