"""The base class of substitutes for the forward of a module, which copies and pickles of the module do not have."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import MethodType
from typing import NoReturn

from torch import nn


class ForwardSubstitute:
    """Is called in the place of a module's forward once it is installed. Subclasses define `__call__`.

    It is installed as an attribute of the module, whose type stays. Beside it are installed the methods by which Python
    copies and pickles an object, which remove it meanwhile.

    Attributes:
        module: the module.
        previous: the forward that was found among the module's own attributes, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable | None = vars(module).get("forward")
        self._attributes = {"forward": MethodType(self._function(), module), "__reduce_ex__": self._reduced}
        self._attributes["__prepare_scriptable__"] = self._refuse_to_be_scripted
        if hasattr(type(module), "__deepcopy__"):  # as parametrised modules have
            self._attributes["__deepcopy__"] = self._deep_copied

    @property
    def original(self) -> Callable:
        """The forward that the module has without the substitute."""
        # Bound by __get__, since torch.export does not follow MethodType.
        return self.previous or type(self.module).forward.__get__(self.module)

    def install(self) -> None:
        """Take the place of the module's forward."""
        vars(self.module).update(self._attributes)

    def uninstall(self) -> None:
        """Leave the module as it was found; a forward that was set after the substitute was installed stays."""
        attributes = vars(self.module)
        for name, value in self._attributes.items():
            if attributes.get(name) == value:
                del attributes[name]
        if self.previous is not None:
            attributes.setdefault("forward", self.previous)

    def _function(self) -> Callable:
        """A function of the module that calls the substitute; wrappers take it out of its method and bind it anew."""

        def forward(module: nn.Module, /, *args, **kwargs):
            if module is not self.module:  # a copy of the module, with a copy of a wrapper around this function
                return self._original_of(module)(*args, **kwargs)
            if args and args[0] is module:
                raise TypeError(self._bound_twice())
            return self(*args, **kwargs)

        # Trainers look at the arguments of model.forward to choose columns of a data set.
        with suppress(ValueError, TypeError):  # the forward has no signature
            signature = inspect.signature(self.original)
            module = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            forward.__signature__ = signature.replace(parameters=[module, *signature.parameters.values()])
        return forward

    def _original_of(self, module: nn.Module) -> Callable:
        """The forward that a copy of the module has without the substitute."""
        if self.previous is None:
            return type(module).forward.__get__(module)
        return MethodType(self.previous.__func__, module) if isinstance(self.previous, MethodType) else self.previous

    def _bound_twice(self) -> str:
        return (
            f"the forward of the captured module ({type(self.module).__name__}) was bound to it a second time, as"
            " accelerator.unwrap_model(model, keep_fp32_wrapper=False) does if accelerator.prepare(model) came before"
            " the capture: call .remove() on the handle before you unwrap the model; or now, and then `del"
            " model.forward`"
        )

    def _refuse_to_be_scripted(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script of a captured module ({type(self.module).__name__}): script a copy,"
            " torch.jit.script(copy.deepcopy(model)), or call .remove() on the handle first"
        )

    @contextmanager
    def _absent(self) -> Iterator[None]:
        """The module has no substitute inside."""
        attributes = vars(self.module)
        present = {name: attributes[name] for name in self._attributes if name in attributes}
        self.uninstall()
        try:
            yield
        finally:
            attributes.update(present)

    def _reduced(self, protocol: int) -> tuple | str:
        with self._absent():
            reduced = self.module.__reduce_ex__(protocol)
            # The class may return the dictionary of attributes itself, into which the substitute comes back.
            return tuple(dict(part) if part is vars(self.module) else part for part in reduced)

    def _deep_copied(self, memo: dict[int, object]) -> nn.Module:
        with self._absent():
            return copy.deepcopy(self.module, memo)
