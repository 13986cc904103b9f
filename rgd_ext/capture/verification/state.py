"""What forwards may change in a model, noted and put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ...nests import modules_in
from ..batch import storage
from ..copies import leaves_in, own_copy
from ..modes import OperatorMode
from .random_numbers import is_generator

_STRUCTURE = ("_parameters", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Writes(OperatorMode):
    """A mode that notes the values of parameters before operators change them in place.

    Attributes:
        before: the values of the parameters that were changed.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.before: dict[nn.Parameter, Tensor] = {}
        self._owners = {storage(p): p for p in parameters}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled parts run compiled."""
        return True

    def operator(self, func: Callable, args: tuple, kwargs: dict) -> object:
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(args[place] if place < len(args) else kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _note(self, written: object) -> None:
        for x in pytree.tree_leaves(written):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                owner = self._owners.get(storage(x))
                if owner is not None and owner not in self.before:
                    self.before[owner] = owner.detach().clone()


class ModelState:
    """The attributes of all modules of a model: buffers, modes, hooks, and whatever forwards keep there.

    Args:
        model: the whole model.
        called: the module in it whose forward is called; hooks around that are its caller's.

    Attributes:
        generators: the random number generators that modules keep.
        writes: the mode that notices parameters which forwards change in place.
    """

    def __init__(self, model: nn.Module, called: nn.Module) -> None:
        modules = modules_in(model)
        leaves = [leaf for module in modules for leaf in leaves_in(vars(module))]
        lists = [each for leaf in leaves if isinstance(leaf, nn.Module) for each in modules_in(leaf)]
        self.generators = [leaf for leaf in leaves if is_generator(leaf)]
        self._attributes = [(module, dict(vars(module))) for module in dict.fromkeys([*modules, *lists])]
        self._others = [module for module, _ in self._attributes if module is not called]
        places = [places for module, _ in self._attributes for places in (module._parameters, module._modules)]
        self._places = [(each, dict(each)) for each in places]
        parameters = list(dict.fromkeys(p for module, _ in self._attributes for p in module._parameters.values()))
        self._data = [(p, p.data, p.requires_grad) for p in parameters if p is not None and p.layout == torch.strided]
        self.writes = _Writes(p for p, *_ in self._data)

    def has_hooks(self) -> bool:
        """Whether modules besides the one called have hooks around their forwards."""
        return any(vars(module).get(name) for module in self._others for name in _HOOKS)

    def moved(self) -> list[nn.Parameter]:
        """The parameters that forwards have changed, in place as far as they ran under `writes`."""
        return [p for p, data, _ in self._data if p in self.writes.before or p.data_ptr() != data.data_ptr()]

    def restore(self) -> None:
        """Put back every attribute, the same object as before, and the values of parameters."""
        for module, attributes in self._attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for places, contents in self._places:
            places.clear()
            places.update(contents)
        for parameter, data, requires_grad in self._data:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for parameter, value in self.writes.before.items():
            parameter.data.copy_(value)  # autograd, which may have saved the parameter, must not notice

    def is_changed(self) -> bool:
        """Whether a forward since `lend` has changed a buffer."""
        for module, attributes in self._attributes:
            now = module._buffers
            if any(name not in now or not _is_same(x, now[name]) for name, x in attributes["_buffers"].items()):
                return True
        return False

    def lend(self, hooks: bool, frozen_statistics: bool) -> None:
        """Restore, and put copies in the places of what forwards may change.

        Args:
            hooks: whether hooks around the forwards of other modules than the one called stay.
            frozen_statistics: whether batch normalisation takes its running statistics, where it has them.
        """
        self.restore()
        memo: dict[int, object] = {}
        for module, attributes in self._attributes:
            copies = {name: own_copy(value, memo) for name, value in attributes.items() if name not in _STRUCTURE}
            vars(module).update(copies)
            if frozen_statistics and isinstance(module, _BatchNorm) and module.running_mean is not None:
                vars(module)["training"] = False
        if not hooks:
            for module in self._others:
                vars(module).update({name: OrderedDict() for name in _HOOKS})


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
