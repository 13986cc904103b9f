"""Objects of a user's own code, named on the command line as `module:factory`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, TypeGuard

from torch import Tensor, nn


def make(name: str, kind: Any, description: str) -> Any:
    """What the factory that `name` stands for returns.

    Args:
        name: "module:factory", a module that is installed or in the current directory, and a function (or class) in it
            that is called without arguments. A factory with dots in its name is an attribute of an attribute.
        kind: what the result has to be an instance of.
        description: what to return, for the error message.

    Raises:
        ValueError: if there is no such module or factory, or it needs arguments.
        TypeError: if it is not a function, or returns something else. Exceptions of the user's code pass through.

    Example:
        >>> rgd_ext.commands.resolve.make("torch.nn:MSELoss", torch.nn.Module, "a torch.nn.Module")
        MSELoss()
    """
    made = _factory(name, description)()
    if not isinstance(made, kind):
        raise TypeError(f"{name} returned a {type(made).__name__}: return {description}")
    return made


def add_model_and_data(parser: ArgumentParser, data: str) -> None:
    """Declare the factories of a model, of its data, for which `data` is the help, and of a criterion."""
    parser.add_argument("model", metavar="MODULE:FACTORY", help="returns the model, with its weights loaded")
    parser.add_argument("--data", required=True, metavar="MODULE:FACTORY", help=data)
    parser.add_argument(
        "--loss",
        default="torch.nn:CrossEntropyLoss",
        metavar="MODULE:FACTORY",
        help="returns the criterion, (output, y) -> loss (default: %(default)s)",
    )


def model_and_data(options: Namespace) -> tuple[nn.Module, Iterable, Callable]:
    """The model, the data and the criterion of the arguments that `add_model_and_data` declares; raises as `make`."""
    model = make(options.model, nn.Module, "a torch.nn.Module")
    data = make(options.data, Iterable, "a loader, which gives pairs (x, y), or a tuple (x, y)")
    return model, data, make(options.loss, Callable, "a criterion, (output, y) -> loss")


def is_batch(data: object) -> TypeGuard[tuple | list]:
    """Whether data is one batch (x, y) and not a loader of batches: a tuple, or a list that begins with a tensor."""
    return isinstance(data, tuple) or (isinstance(data, list) and len(data) == 2 and isinstance(data[0], Tensor))


def _factory(name: str, description: str) -> Callable[[], object]:
    module, _, path = name.partition(":")
    if not module or not path:
        raise ValueError(f"{name!r} is no factory: pass module:function, as in models:make_model for models.py")
    found = _module(module)
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"{name}: there is no {attribute} in {_where(found)}; pass the name of a function there")
        found = getattr(found, attribute)
    if not callable(found) or isinstance(found, nn.Module):
        raise TypeError(f"{name} is a {type(found).__name__}: name a function that returns it")
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} takes arguments ({error}): name a function that needs none, and returns {description}"
        ) from None
    return found


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Where the module exists, but imports another one that is missing, the user needs the traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"there is no module {error.name}: pass the name of an installed one, or of one in the current directory"
        ) from None


def _where(found: object) -> str:
    return getattr(found, "__file__", None) or repr(found)
