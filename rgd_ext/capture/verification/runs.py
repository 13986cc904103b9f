"""Forwards of one call of a captured module, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from ...nests import tensors_in
from ..findings import NotRepeatable
from ..model_call import ModelCall
from ..parametrizations import cache_suspended
from ..precision import is_autocast
from .arguments import Arguments
from .environment import Environment
from .gradients import Gradients, parameters_of
from .isolation import has_global_hooks, isolated
from .random_numbers import RandomNumbers
from .state import ModelState


class Runs:
    """Forwards of one call of a captured module, undone at the end; a context manager.

    Args:
        call: the call.
        hooks: whether hooks around the forwards of modules inside run; they would see calls that the user did not make.
        autocast: whether autocast stays as it is; without it there is less rounding.
        side: the end of their range that uniform random numbers are near, see `EqualDraws`.

    Attributes:
        call: as given.
        arguments: those of the call.
        environment: the modes and random numbers that forwards and backwards have.
        gradients: those of the outputs.
        batch_size: B, or None where no tensor comes in; as the last captured forward has it.
        leaves_hooks_out: whether there are hooks that do not run.
    """

    def __init__(self, call: ModelCall, hooks: bool, autocast: bool, side: int) -> None:
        module, model = call.recorder.module, call.context.model
        self.call, self.arguments, self.batch_size = call, Arguments(call), call.batch_size
        self._state = ModelState(model, module)
        self.leaves_hooks_out = not hooks and (self._state.has_hooks() or has_global_hooks())
        parameters = parameters_of(call)
        tensors = [*parameters, *call.arrays]
        generators = [*self._state.generators, *self.arguments.generators()]
        random_numbers = RandomNumbers({x.device for x in tensors if x.is_cuda}, generators)
        autocasts = [] if autocast else list(filter(is_autocast, {x.device.type for x in tensors}))
        self.environment = Environment(module, random_numbers, autocasts, side)
        self.gradients = Gradients(call.context, parameters, self.environment, self._state)
        self._output: object = None

    def __enter__(self) -> Runs:
        with ExitStack() as stack:
            stack.callback(self._state.restore)
            stack.callback(self.environment.rewind)
            stack.enter_context(isolated(self.call.context.model, hooks=not self.leaves_hooks_out))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def captured_forward(self) -> list[Tensor]:
        """The tensors among the outputs of a captured forward."""
        with self._state.writes:
            outputs = self._outputs(*self.arguments.copied())
        self.batch_size = self.call.context.calls.batch_size
        return outputs

    def forward(self, arguments: Callable[[], tuple[tuple, dict]] | None = None) -> list[Tensor]:
        """The tensors among the outputs of an ordinary forward, for the arguments or for others in their place.

        Raises:
            NotRepeatable: if the forward, or what makes the arguments, raises.
        """
        try:
            with self.call.context.paused():
                return self._outputs(*(arguments or self.arguments.copied)())
        except Exception as error:
            raise NotRepeatable(f"its forward cannot be called once more ({type(error).__name__}: {error})") from error

    def faithful_output(self) -> list[object] | None:
        """What the last forward gave, in a list, if the user's own call would have given and changed the same."""
        is_other = self.environment.is_equalising or self.environment.lacks_autocast or self.leaves_hooks_out
        return None if is_other or self._state.is_changed() else [self._output]

    def moves_parameters(self) -> bool:
        """Whether forwards change parameters that are trained."""
        return any(p in self.gradients.parameters for p in self._state.moved())

    def _outputs(self, args: tuple, kwargs: dict) -> list[Tensor]:
        self._output = None  # or two of them would be there at once
        frozen_statistics = self.call.context.options.batch_norm == "contribution"
        self._state.lend(hooks=not self.leaves_hooks_out, frozen_statistics=frozen_statistics)
        self.environment.rewind()
        with self.environment.active(), cache_suspended():
            self._output = self.call.recorder(*args, **kwargs)
        return [_real(x) for x in tensors_in(self._output)]


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs, and zeros for what is infinite, which has no gradient: masked logits, for example."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.masked_fill(x.isinf(), 0) if x.is_floating_point() and x.isinf().any() else x
