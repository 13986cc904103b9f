"""A loop over the samples, for modules that `torch.func.vmap` cannot run for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...nests import modules_in
from ..batch import ONE_AT_A_TIME
from ..values.samples import UnequalSamples, loop_samples
from .recorder import write_back


class SampleLoop:
    """Runs a module for one sample after the other.

    Every sample meets the same buffers. Afterwards they have the values that the first sample gave them, which those of
    the others have to equal.

    Args:
        module: the module.
        name: its name in the model, for messages.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._name, self._kind = name, type(module).__name__
        self._buffers = [(m, dict(m._buffers)) for m in modules_in(module) if m._buffers]
        # The values that the first sample gave to buffers, and to parameters in place.
        self._after: list[dict[str, Tensor | None]] | None = None
        self._changed: dict[str, Tensor] = {}

    def run(self, function: Callable, args: tuple, parameters: Mapping[str, nn.Parameter]) -> object:
        """The results of `function(*args)`, as `map_samples` returns them.

        Args:
            function: runs the module for one sample.
            args: the arguments of all samples; the first are the copies of `parameters`.
            parameters: by name.

        Raises:
            RuntimeError: if `function` fails.
            ValueError: if samples change buffers or parameters in different ways, or differ in their outputs' shapes.
        """

        def run_sample(copies: dict[str, Tensor], *others):
            self._lend_copies()
            result = function(copies, *others)
            # Compared, since changes of `x.data` leave the version as it is.
            self._check({name: x.detach() for name, x in copies.items() if not torch.equal(x, parameters[name])})
            return result

        try:
            found = loop_samples(run_sample, args, {})
        except UnequalSamples as error:
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
        write_back(parameters, self._changed)
        return found

    def _lend_copies(self) -> None:
        """Put copies of the buffers into the module, since autograd may save what is changed in place later."""
        for module, buffers in self._buffers:
            module._buffers.clear()
            module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def _check(self, changed: dict[str, Tensor]) -> None:
        """Compare the buffers, and the parameters that were changed in place, with those after the first sample."""
        now = [dict(module._buffers) for module, _ in self._buffers]
        if self._after is None:
            self._after, self._changed = now, {name: x.clone() for name, x in changed.items()}
        for first, found in [(self._changed, changed), *zip(self._after, now, strict=True)]:
            for name in first.keys() | found.keys():
                if not _is_equal(first.get(name), found.get(name)):
                    raise UnequalSamples(
                        f"its forward gives '{name}', a buffer or a parameter, a value that depends on its input;"
                        " compute it outside the module"
                    )

    def _restore(self, values: Sequence[dict[str, Tensor | None]] = ()) -> None:
        """Give the module its buffers back, with `values` if there are some."""
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
