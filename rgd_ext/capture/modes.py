"""The base class of dispatch modes that see every operator of a forward."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """A dispatch mode whose method `operator` runs every operator. Operators of higher order run as they are."""

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
