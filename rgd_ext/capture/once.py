"""Run a module on each sample, computing once for all what they share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .batch import storage
from .product_calls import product_of
from .products import Product
from .samples import Samples, differs, outside_vmap
from .values import Value, leaves_of


class OnceForAll(TorchFunctionMode):
    """While a function runs on each of `samples`: values that they share are computed once, from parameters on.

    To the function a value is an ordinary tensor under vmap, with a copy for each sample, so that operations this mode
    does not know are right as well. In products with the samples the rules of layers give the contributions.

    Args:
        samples: of the batch.
    """

    def __init__(self, samples: Samples) -> None:
        super().__init__()
        self._samples = samples
        # Of the parameters' memory.
        self._storages: set[int] = set()
        # By the id of the tensor that the function has, which is kept alive.
        self._values: dict[int, tuple[Tensor, Value]] = {}

    def parameter(self, leaf: Tensor) -> Tensor:
        """What the function has for the parameter that a leaf stands for."""
        self._storages.add(storage(leaf))
        return self.shared(Value.of_leaf(leaf))

    def shared(self, value: Value) -> Tensor:
        """What the function has for `value`."""
        tensor = self._samples.split(value.copies)
        self._values[id(tensor)] = tensor, value
        return tensor

    def _is_of_a_parameter(self, tensor: Tensor) -> bool:
        """Whether it is one, or a view of it."""
        return storage(tensor) in self._storages

    def _notice(self, x: object) -> None:
        """An ordinary tensor that parameters were written into, as into parts of zeros, has become a value."""
        if type(x) is not Tensor or id(x) in self._values or not x.requires_grad or differs(x):
            return
        if leaves_of(x):
            self._values[id(x)] = x, Value(x, self._samples.number)

    def _lacks_copies(self, x: Tensor) -> bool:
        """Whether `x` is a value whose copies, as they are now, it does not stand for."""
        value = self._value_of(x)
        return value is not None and (not differs(x) or value.is_changed())

    def _with_copies(self, x: Tensor) -> Tensor:
        """What stands for `x` under vmap."""
        if not self._lacks_copies(x):
            return x
        with outside_vmap():
            return self.shared(self._value_of(x))

    def _value_of(self, x: object) -> Value | None:
        found = self._values.get(id(x))
        return None if found is None else found[1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Nearly always they are flat, and searching nests would cost more than the call.
        is_flat = not kwargs and all(type(x) is not tuple and type(x) is not list for x in args)
        leaves = args if is_flat else pytree.tree_leaves((args, kwargs))
        for x in leaves:
            self._notice(x)
        values = [x for x in leaves if id(x) in self._values]
        if not values or not self._samples.is_innermost_transform():
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _opened(func)(*args, **kwargs)
        others = [x for x in leaves if isinstance(x, Tensor) and id(x) not in self._values]
        if not any(differs(x) or x.requires_grad for x in others):
            return self._computed(func, args, kwargs)
        product = product_of(func, args, kwargs, self._value_of)
        output = None if product is None else self._met(product)
        if output is not None:
            return output
        if any(self._lacks_copies(x) for x in values):
            args, kwargs = pytree.tree_map_only(Tensor, self._with_copies, (args, kwargs))
        return func(*args, **kwargs)

    def _computed(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """What a function makes of values alone."""
        used: list[Value] = []

        def plain(x: object) -> object:
            value = self._value_of(x)
            if value is None:
                return x
            used.append(value)
            return value.tensor

        args, kwargs = pytree.tree_map(plain, (args, kwargs))
        if _changes_first(func) and isinstance(args[0], Tensor) and self._is_of_a_parameter(args[0]):
            # Refused before it runs: the unit then runs one sample after the other, and would change it again.
            raise RuntimeError(f"{func.__name__} changes a parameter in place")
        with outside_vmap():
            results = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, partial(self._result, func, args, kwargs, used), results)

    def _result(self, func: Callable, args: tuple, kwargs: dict, used: list[Value], tensor: Tensor) -> Tensor:
        """What the function has for `tensor`, which `func` computed from `used`."""
        if (not torch.is_grad_enabled() or not tensor.requires_grad) and not self._is_of_a_parameter(tensor):
            return tensor.detach()  # a constant; a view of a parameter may be changed in place, and stays a value
        with outside_vmap():
            return self.shared(Value.computed(used, func, args, kwargs, tensor))

    def _met(self, product: Product) -> Tensor | None:
        """The product of the samples with a value; None where only copies of the value will do."""
        found = product.form.of_all(product.x)
        if found is None:
            return None
        form, merges = found
        x, output = self._samples.joined(product.x), self._samples.joined(product.output())
        with outside_vmap():
            if merges:
                x, output = x.squeeze(1), output.squeeze(1)
            output = product.watched(output, x, form)
        output = self._samples.split(output.unsqueeze(1) if merges else output)
        if product.rest is None:
            return output
        with outside_vmap():
            rest = self.shared(product.rest)
        return output + rest


@cache
def _opened(func: FunctionType) -> FunctionType:
    """A function of torch.nn.functional that is not handed to this mode as a whole, but calls what it consists of."""
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _changes_first(func: Callable) -> bool:
    """Whether a function changes its first argument in place."""
    name = func.__name__
    return name in _CHANGING or (name.endswith("_") and not name.endswith("__"))


_CHANGING = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")}
