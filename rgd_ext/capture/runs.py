"""Forwards and backwards of one call of a captured module, of which nothing remains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from .alone import Reading, readings
from .batch import arrays_in, tensors_in
from .equal_draws import EqualDraws
from .factors import Factor
from .sketch import sketch
from .state import ModelState, RandomNumbers, detached_copy, with_tensors

if TYPE_CHECKING:
    from .preconditioner import Preconditioner
    from .taps import Tap


@contextmanager
def nothing_cached() -> Iterator[None]:
    """`torch.nn.utils.parametrize.cached()` forgets what it has inside, and what it gets there afterwards."""
    saved, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = saved


class Runs:
    """Forwards and backwards of one call of a captured module, of which nothing remains; a context manager.

    Args:
        hooks: whether hooks around the forwards of modules inside run; they would see calls that the user did not make.

    Attributes:
        parameters: the trainable ones of the module, and their names in it.
        batch_size: B, or None where no tensor comes in.
        leaves_hooks_out: whether there are hooks that don't run.
        output: of the last forward.
    """

    def __init__(self, capture: Preconditioner, tap: Tap, args: tuple, kwargs: dict, hooks: bool) -> None:
        self._capture, self._tap, self._args, self._kwargs = capture, tap, args, kwargs
        self.parameters = {
            p: name
            for name, p in tap.module.named_parameters()
            if p.requires_grad and isinstance(p, nn.Parameter)  # others are of torch.func.functional_call
        }
        tensors = [*self.parameters, *tensors_in((args, kwargs))]
        generators = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]
        arrays = arrays_in(args, kwargs)
        self.batch_size = arrays[0].shape[0] if arrays else None
        self._state = ModelState(capture.model)
        self.leaves_hooks_out = not hooks and self._state.has_hooks()
        devices = {x.device for x in tensors if x.is_cuda}
        self._random = RandomNumbers(devices, [*self._state.generators(), *generators])
        self._mode: EqualDraws | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Runs:
        stack = self._stack
        stack.callback(self._state.restore)
        stack.callback(self._random.rewind)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.enter_context(nothing_cached())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what forwards of the user's say they say again
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # As inside a checkpoint, which counts what is saved.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def forward(self, reading: tuple[tuple, dict] | None = None, captured: bool = False) -> list[Tensor]:
        """The tensors among the outputs, for the arguments or for `reading` in their place."""
        args, kwargs = reading or with_tensors(detached_copy, (self._args, self._kwargs))
        self._state.lend(hooks=not self.leaves_hooks_out)
        self._random.rewind()
        with self._drawing(), nullcontext() if captured else self._capture.paused():
            self.output = self._tap(*args, **kwargs)
        return tensors_in(self.output)

    def is_random(self) -> bool:
        """Whether the forward before drew random numbers. From now on they are the same for all samples."""
        if self._mode is None and self._random.have_drawn():
            self._mode = EqualDraws()
            return True
        return False

    @property
    def is_equalising(self) -> bool:
        """Whether random numbers are the same for all samples."""
        return self._mode is not None

    @property
    def unknown_draws(self) -> set[str]:
        """Operators whose random numbers still depend on the batch."""
        return set() if self._mode is None else self._mode.unknown

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        if self._mode is None:
            yield
        else:
            with self._mode, sdpa_kernel(SDPBackend.MATH):  # the other kernels draw their masks inside
                yield

    def grads(self, outputs: list[Tensor], cotangents: list[Tensor], again: bool = False) -> list[Tensor]:
        """Sketches of autograd's gradients; `again` if they are asked for once more."""
        with self._drawing(), self._capture.paused():
            grads = torch.autograd.grad(outputs, list(self.parameters), cotangents, again, allow_unused=True)
        return [sketch(grad, p) for grad, p in zip(grads, self.parameters, strict=True)]

    def contributions(self, outputs: list[Tensor], cotangents: list[Tensor]) -> dict[nn.Parameter, Factor]:
        """What the capture takes for the contributions of the samples."""
        with self._drawing(), self._capture.trial() as parts:
            torch.autograd.backward(outputs, cotangents, inputs=list(self.parameters))
        return parts[0] if parts else {}

    def readings(self, batch_size: int) -> list[Reading]:
        """Ways to take samples out of the arguments."""
        return list(readings(self._args, self._kwargs, batch_size))
