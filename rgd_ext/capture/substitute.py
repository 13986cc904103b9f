"""A substitute for the forward of one module, which copies and pickles of the module do not have."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import MethodType
from typing import NoReturn

from torch import nn


class Substitute:
    """Subclasses say what is called in the place of their module's forward, once installed.

    It goes into the attributes of the module itself, whose type stays. Beside it go the methods by which Python copies
    and pickles an object: they take it away meanwhile.

    Attributes:
        module: whose forward it stands in for.
        previous: the forward that was found among the module's own attributes, or None.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable | None = vars(module).get("forward")
        self._attributes = {"forward": MethodType(self._function(), module), "__reduce_ex__": self._reduced}
        self._attributes["__prepare_scriptable__"] = self._refuse_to_be_scripted
        if hasattr(type(module), "__deepcopy__"):  # as of parametrised modules
            self._attributes["__deepcopy__"] = self._deep_copied

    @property
    def original(self) -> Callable:
        """The forward it stands in for."""
        # Bound by __get__, since torch.export does not follow MethodType.
        return self.previous or type(self.module).forward.__get__(self.module)

    def install(self) -> None:
        """Take the place of the module's forward."""
        vars(self.module).update(self._attributes)

    def uninstall(self) -> None:
        """Leave the module as it was found; a forward that somebody has put there since stays."""
        attributes = vars(self.module)
        for name, value in self._attributes.items():
            if attributes.get(name) == value:
                del attributes[name]
        if self.previous is not None:
            attributes.setdefault("forward", self.previous)

    def _function(self) -> Callable:
        """The forward as a function of the module, as classes have it: wrappers take it out and bind it anew."""

        def forward(module: nn.Module, /, *args, **kwargs):
            if module is not self.module:  # a copy, with a copy of a wrapper around this
                return self._original_of(module)(*args, **kwargs)
            if args and args[0] is module:
                raise TypeError(self._bound_twice())
            return self(*args, **kwargs)

        # Trainers look at the arguments of model.forward to choose columns of a data set.
        with suppress(ValueError, TypeError):  # of a forward that has none
            signature = inspect.signature(self.original)
            module = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
            forward.__signature__ = signature.replace(parameters=[module, *signature.parameters.values()])
        return forward

    def _original_of(self, module: nn.Module) -> Callable:
        """The forward of a copy."""
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
            # A class of the user's may return the attributes themselves, which get back what is absent.
            return tuple(dict(part) if part is vars(self.module) else part for part in reduced)

    def _deep_copied(self, memo: dict[int, object]) -> nn.Module:
        with self._absent():
            return copy.deepcopy(self.module, memo)
