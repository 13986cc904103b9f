"""Forwards and backwards of one call of a captured module, of which nothing remains."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from .alone import Reading, readings
from .batch import arrays_in, modules_in, tensors_in
from .equal_draws import EqualDraws
from .factors import Factor
from .precision import is_autocast
from .sketch import sketch
from .state import ModelState, RandomNumbers, detached_copy, with_tensors

if TYPE_CHECKING:
    from .preconditioner import Preconditioner
    from .taps import Tap


_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@contextmanager
def nothing_cached() -> Iterator[None]:
    """`torch.nn.utils.parametrize.cached()` forgets what it has inside, and what it gets there afterwards."""
    saved, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = saved


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs, and zeros for what is infinite, which has no gradient: masked logits, for example."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.masked_fill(x.isinf(), 0) if x.is_floating_point() and x.isinf().any() else x


class Call(NamedTuple):
    """A call of a captured module from outside.

    Attributes:
        tap: of the module.
        args, kwargs: the arguments.
        arrays: the tensors with dimensions among them; the first holds the samples along dimension 0.
    """

    tap: Tap
    args: tuple
    kwargs: dict
    arrays: Sequence[Tensor]

    @classmethod
    def of(cls, tap: Tap, args: tuple, kwargs: dict) -> Call:
        """With the arrays in `args` and `kwargs`."""
        return cls(tap, args, kwargs, arrays_in(args, kwargs))


class Runs:
    """Forwards and backwards of one call of a captured module, of which nothing remains; a context manager.

    Args:
        hooks: whether hooks around the forwards of modules inside run; they would see calls that the user did not make.
        autocast: whether autocast stays as it is; without it there is less rounding.

    Attributes:
        parameters: the trainable ones of the module, and their names in it.
        batch_size: B, or None where no tensor comes in.
        leaves_hooks_out: whether there are hooks that don't run.
        output: of the last forward.
        found_zeros: whether a gradient of autograd's was zero.
    """

    def __init__(self, capture: Preconditioner, call: Call, hooks: bool, autocast: bool) -> None:
        self._capture, (self._tap, self._args, self._kwargs, arrays) = capture, call
        self.parameters = {
            p: name
            for name, p in call.tap.module.named_parameters()
            if p.requires_grad and isinstance(p, nn.Parameter)  # others are of torch.func.functional_call
        }
        generators = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, torch.Generator)]
        self.batch_size = arrays[0].shape[0] if arrays else None
        self._state = ModelState(capture.model)
        self.leaves_hooks_out = not hooks and (
            self._state.has_hooks() or any(getattr(module, name) for name in _GLOBAL_HOOKS)
        )
        self.found_zeros = False
        self._freezes = capture.batch_norm == "contribution"
        devices = {x.device for x in [*self.parameters, *arrays] if x.is_cuda}
        kinds = {x.device.type for x in [*self.parameters, *arrays]}
        self._autocasts = [] if autocast else list(filter(is_autocast, kinds))
        self._random = RandomNumbers(devices, [*self._state.generators(), *generators])
        # Found out in the first forward, unless there are layers that tell: it would have to be run again.
        drops = any(isinstance(m, _DropoutNd) and m.training and m.p for m in modules_in(call.tap.module))
        self._mode = EqualDraws() if drops else None
        self._stack = ExitStack()

    def __enter__(self) -> Runs:
        stack = self._stack
        stack.callback(self._state.restore)
        stack.callback(self._random.rewind)
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if self.leaves_hooks_out:
            for name in _GLOBAL_HOOKS:
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, OrderedDict())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what forwards of the user's say they say again
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # As inside a checkpoint, which counts what is saved.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def with_noise(self, size: float) -> tuple[tuple, dict]:
        """The arguments with relative noise on real numbers."""
        generator = torch.Generator().manual_seed(0)

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.layout != torch.strided:
                return detached_copy(x)
            noise = torch.randn(x.shape, generator=generator).to(x)
            return detached_copy(x.detach() * (1 + size * noise)).requires_grad_(x.requires_grad)

        return with_tensors(noisy, (self._args, self._kwargs))

    def forward(self, reading: tuple[tuple, dict] | None = None, captured: bool = False) -> list[Tensor]:
        """The tensors among the outputs, for the arguments or for `reading` in their place."""
        self.output = None  # or two of them would be there at once
        args, kwargs = reading or with_tensors(detached_copy, (self._args, self._kwargs))
        self._state.lend(hooks=not self.leaves_hooks_out, frozen_statistics=self._freezes)
        self._random.rewind()
        with self._drawing(), nothing_cached(), nullcontext() if captured else self._capture.paused():
            self.output = self._tap(*args, **kwargs)
        return [_real(x) for x in tensors_in(self.output)]

    def is_random(self) -> bool:
        """Whether the forward before drew random numbers. From now on they are the same for all samples."""
        if self._mode is None and self._random.have_drawn():
            self._mode = EqualDraws()
            return True
        return False

    def draws_elsewhere(self) -> bool:
        """Whether the forward before drew random numbers from another library."""
        return self._random.have_others_drawn()

    @property
    def lacks_autocast(self) -> bool:
        """Whether autocast is enabled and left out."""
        return bool(self._autocasts)

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
        with ExitStack() as stack:
            for kind in self._autocasts:
                stack.enter_context(torch.autocast(kind, enabled=False))
            if self._mode is not None:
                stack.enter_context(self._mode)
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the other kernels draw their masks inside
            yield

    def grads(self, outputs: list[Tensor], cotangents: list[Tensor], again: bool = False) -> list[Tensor]:
        """Sketches of autograd's gradients; `again` if they are asked for once more."""
        with self._drawing(), self._capture.paused():
            grads = torch.autograd.grad(outputs, list(self.parameters), cotangents, again, allow_unused=True)
        sketches = [sketch(grad, p) for grad, p in zip(grads, self.parameters, strict=True)]
        self.found_zeros |= any(grad is not None and not s.any() for grad, s in zip(grads, sketches, strict=True))
        return sketches

    def contributions(self, outputs: list[Tensor], cotangents: list[Tensor]) -> dict[nn.Parameter, Factor]:
        """What the capture takes for the contributions of the samples. Empties the list of outputs."""
        # Edges, or the outputs would be there until the end of the backward.
        edges = [get_gradient_edge(x) for x in outputs]
        outputs.clear()
        with self._drawing(), self._capture.trial() as parts:
            torch.autograd.backward(edges, cotangents, inputs=list(self.parameters))
        return parts[0] if parts else {}

    def readings(self, batch_size: int) -> list[Reading]:
        """Ways to take samples out of the arguments."""
        return list(readings(self._args, self._kwargs, batch_size))
