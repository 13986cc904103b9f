"""The base class of dispatch modes that see every operator of a forward."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_stance_lock = threading.RLock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Functions that torch.compile has compiled run uncompiled, as they must under most modes: see `OperatorMode`."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        yield
        return
    # The stance is that of all threads. If one of them began between another's begin and end, it would stay for good.
    with _stance_lock, torch.compiler.set_stance("force_eager"):
        yield


class OperatorMode(TorchDispatchMode):
    """A dispatch mode whose method `operator` runs every operator. Operators of higher order run as they are.

    Dynamo compiles nothing under a mode that does not let it, by `ignore_compile_internals`: then a function with
    `fullgraph=True` raises an error, and others run uncompiled for good. Enter `uncompiled` around such a mode.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise dynamo is imported, which takes a second, though nothing here is compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        run = self.operator if hasattr(func, "_schema") else _run_unchanged
        return run(func, args, kwargs or {})

    def operator(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """The result of `func`, an operator with a schema."""
        raise NotImplementedError


def _run_unchanged(func: Callable, args: tuple, kwargs: dict) -> object:
    return func(*args, **kwargs)
