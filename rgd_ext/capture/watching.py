"""Modes that see every operator of a forward."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A mode whose `operator` runs the operators of ATen and of libraries; those of higher order run as they are."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, which takes a second; nothing below is compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        run = self.operator if hasattr(func, "_schema") else _as_it_is
        return run(func, args, kwargs or {})

    def operator(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """The result of `func`, an operator with a schema."""
        raise NotImplementedError


def _as_it_is(func: Callable, args: tuple, kwargs: dict) -> object:
    return func(*args, **kwargs)
