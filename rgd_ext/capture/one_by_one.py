"""A module run for one sample after the other, where `torch.func.vmap` cannot run it for all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .batch import ONE_AT_A_TIME, modules_in
from .samples import Unequal, loop_samples
from .taps import keep_changes


class OneByOne:
    """Runs `module` for each sample. Its buffers are the same for all, and change as they do for the first."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name, self._kind = name, type(module).__name__
        self._buffers = [(m, dict(m._buffers)) for m in modules_in(module) if m._buffers]
        # What the first sample made of them, and of parameters in place.
        self._after: list[dict[str, Tensor | None]] | None = None
        self._changed: dict[str, Tensor] = {}

    def run(self, function: Callable, args: tuple, parameters: Mapping[str, nn.Parameter]) -> object:
        """What `map_samples` gives for `function(*args)`, whose first argument are copies of `parameters`.

        Raises:
            RuntimeError: if `function` fails.
            ValueError: if samples differ in what they make of buffers and parameters, or in their outputs' shapes.
        """

        def one(copies: dict[str, Tensor], *others):
            self._lend()
            result = function(copies, *others)
            # Compared, since changes of `x.data` leave the version as it is.
            self._check({name: x.detach() for name, x in copies.items() if not torch.equal(x, parameters[name])})
            return result

        try:
            found = loop_samples(one, args, {})
        except Unequal as error:
            self._restore()
            raise ValueError(
                f"module '{self._name}' ({self._kind}) cannot be captured as one unit: {error}. As a last remedy,"
                f" {ONE_AT_A_TIME}"
            ) from error
        except BaseException as error:
            self._restore()
            if not isinstance(error, (RuntimeError, ValueError, TypeError, IndexError)):
                raise
            raise RuntimeError(
                f"module '{self._name}' ({self._kind}) is captured as one unit, and fails for one sample"
                f" ({type(error).__name__}: {error}): write its forward for batches of any size, or capture a larger or"
                " a smaller module as the unit"
            ) from error
        self._restore(self._after or ())
        keep_changes(parameters, self._changed)
        return found

    def _lend(self) -> None:
        """Copies, which autograd may save."""
        for module, buffers in self._buffers:
            module._buffers.clear()
            module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def _check(self, changed: dict[str, Tensor]) -> None:
        """Compare buffers, and parameters that were `changed` in place, with those after the first sample."""
        now = [dict(module._buffers) for module, _ in self._buffers]
        if self._after is None:
            self._after, self._changed = now, {name: x.clone() for name, x in changed.items()}
        for first, found in [(self._changed, changed), *zip(self._after, now, strict=True)]:
            for name in first.keys() | found.keys():
                if not _is_equal(first.get(name), found.get(name)):
                    raise Unequal(
                        f"its forward gives '{name}', a buffer or a parameter, a value that depends on its input;"
                        " compute it outside the module"
                    )

    def _restore(self, values: Sequence[dict[str, Tensor | None]] = ()) -> None:
        """The buffers of before, with `values` if there are some."""
        for module, buffers in self._buffers:
            module._buffers.clear()
            module._buffers.update(buffers)
        for (module, buffers), found in zip(self._buffers, values, strict=bool(values)):
            for name, value in found.items():
                before = buffers.get(name)
                if before is None or value is None or before.shape != value.shape:
                    module._buffers[name] = value
                elif not torch.equal(before, value):
                    with torch.no_grad():
                        before.copy_(value)


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
