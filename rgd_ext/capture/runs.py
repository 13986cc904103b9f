"""Forwards and backwards of one call of a captured module, which leave no trace in it."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from .batch import arrays_in, batch_size, is_list, modules_in, tensors_in
from .copies import detached_copy, with_tensors
from .equal_draws import EqualDraws
from .factors import Factor
from .findings import BackwardFailed, NotRepeatable, Unprovable
from .loops import loops_of
from .precision import is_autocast
from .ragged import ragged_readings
from .random_numbers import RandomNumbers, is_generator
from .sketch import sketch
from .state import ModelState

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
    """Suspend `torch.nn.utils.parametrize.cached()`: nothing inside reads its cache or fills it."""
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
        arrays: the tensors with dimensions among them; the first holds the samples.
    """

    tap: Tap
    args: tuple
    kwargs: dict
    arrays: Sequence[Tensor]

    @classmethod
    def of(cls, tap: Tap, args: tuple, kwargs: dict) -> Call:
        """With the arrays in `args` and `kwargs`."""
        return cls(tap, args, kwargs, arrays_in(args, kwargs))

    @property
    def batch_size(self) -> int | None:
        """The number of samples, or None where no tensor comes in."""
        return batch_size(self.arrays, self.tap.capture.batch_dim)


class Runs:
    """Forwards and backwards of one call of a captured module, undone at the end; a context manager.

    Args:
        hooks: whether hooks around the forwards of modules inside run; they would see calls that the user did not make.
        autocast: whether autocast stays as it is; without it there is less rounding.
        side: of uniform random numbers, see `EqualDraws`.

    Attributes:
        model: that is captured.
        module, name: of the tap that is called.
        parameters: the trainable ones of the module, and their names in the model.
        batch_size: B, or None where no tensor comes in; as the last captured forward has it.
        is_listed: whether the first tensor is one of a list.
        leaves_hooks_out: whether there are hooks that don't run.
        reached: by parameters, whether autograd's last gradient of outputs reached them.
    """

    def __init__(self, capture: Preconditioner, call: Call, hooks: bool, autocast: bool, side: int) -> None:
        self._capture, (self._tap, self._args, self._kwargs, arrays) = capture, call
        self.model, self.module, self.name = capture.model, call.tap.module, call.tap.name
        self.parameters = {
            p: capture.name_of(p)
            for p in call.tap.module.parameters()
            if p.requires_grad and isinstance(p, nn.Parameter)  # others are of torch.func.functional_call
        }
        generators = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if is_generator(x)]
        self.batch_size, self.is_listed = call.batch_size, is_list(call.args, call.kwargs)
        self._state = ModelState(capture.model, self.module)
        self.leaves_hooks_out = not hooks and (
            self._state.has_hooks() or any(getattr(module, name) for name in _GLOBAL_HOOKS)
        )
        self.reached: list[bool] = []
        self._freezes = capture.batch_norm == "contribution"
        devices = {x.device for x in [*self.parameters, *arrays] if x.is_cuda}
        kinds = {x.device.type for x in [*self.parameters, *arrays]}
        self._autocasts = [] if autocast else list(filter(is_autocast, kinds))
        self._random = RandomNumbers(devices, [*self._state.generators, *generators])
        # Without layers that tell, it is found out in the first forward, which then has to run again.
        drops = any(isinstance(m, _DropoutNd) and m.training and m.p for m in modules_in(call.tap.module))
        self._mode = EqualDraws(side) if drops else None
        self._side = side
        self._output: object = None

    def __enter__(self) -> Runs:
        with ExitStack() as stack:
            stack.callback(self._state.restore)
            stack.callback(self._random.rewind)
            stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(False)
            if self.leaves_hooks_out:
                for name in _GLOBAL_HOOKS:
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, OrderedDict())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the user's own forward repeats them
            loops = loops_of(self.model)
            loops.is_silent = True
            stack.callback(setattr, loops, "is_silent", False)
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                # As inside a checkpoint, which counts what is saved.
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def noisy_arguments(self, size: float) -> tuple[tuple, dict]:
        """The arguments with relative noise on real numbers."""
        generator = torch.Generator().manual_seed(0)

        def noisy(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.layout != torch.strided:
                return detached_copy(x)
            noise = torch.randn(x.shape, generator=generator, device="cpu").to(x)
            return detached_copy(x.detach() * (1 + size * noise)).requires_grad_(x.requires_grad)

        return with_tensors(noisy, (self._args, self._kwargs))

    def captured_forward(self) -> list[Tensor]:
        """The tensors among the outputs."""
        with self._state.writes:
            outputs = self._outputs(*self._copied_arguments())
        self.batch_size = self._capture.batch_size
        return outputs

    def moves_parameters(self) -> bool:
        """Whether forwards change parameters that are trained."""
        return any(p in self.parameters for p in self._state.moved())

    def forward(self, arguments: Callable[[], tuple[tuple, dict]] | None = None) -> list[Tensor]:
        """The tensors among the outputs of an ordinary forward, for the arguments or for others in their place.

        Raises:
            NotRepeatable: if the forward, or what makes the arguments, raises.
        """
        try:
            with self._capture.paused():
                return self._outputs(*(arguments or self._copied_arguments)())
        except Exception as error:
            raise NotRepeatable(f"its forward cannot be called once more ({type(error).__name__}: {error})") from error

    def _copied_arguments(self) -> tuple[tuple, dict]:
        return with_tensors(detached_copy, (self._args, self._kwargs))

    def _outputs(self, args: tuple, kwargs: dict) -> list[Tensor]:
        self._output = None  # or two of them would be there at once
        self._state.lend(hooks=not self.leaves_hooks_out, frozen_statistics=self._freezes)
        self._random.rewind()
        with self._drawing(), nothing_cached():
            self._output = self._tap(*args, **kwargs)
        return [_real(x) for x in tensors_in(self._output)]

    def faithful_output(self) -> list[object] | None:
        """What the last forward gave, in a list, if the user's own call would have given and changed the same."""
        if self._mode is not None or self.leaves_hooks_out or self.lacks_autocast or self._state.is_changed():
            return None
        return [self._output]

    def is_random(self) -> bool:
        """Whether the forward before drew random numbers. From now on they are the same for all samples."""
        if self._mode is None and self._random.have_drawn():
            self._mode = EqualDraws(self._side)
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
    def has_other_side(self) -> bool:
        """Whether uniform random numbers were near one end of their range, and the other is to come."""
        return self._side == 0 and self._mode is not None and self._mode.has_sides

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

    def grads(
        self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor], retain_graph: bool = False
    ) -> list[Tensor]:
        """Sketches of autograd's gradients of the outputs, which have the places of their cotangents."""
        roots = [outputs[n] for n in cotangents if outputs[n].requires_grad]
        vs = [v for n, v in cotangents.items() if outputs[n].requires_grad]
        trained = self._still_trained() if roots else []
        with self._drawing(), self._capture.paused():
            found = torch.autograd.grad(roots, trained, vs, retain_graph, allow_unused=True) if trained else []
        grads = list(map(dict(zip(trained, found, strict=True)).get, self.parameters))
        self.reached = [grad is not None for grad in grads]
        return [sketch(grad, p) for grad, p in zip(grads, self.parameters, strict=True)]

    def _still_trained(self) -> list[nn.Parameter]:
        """The parameters, but for those that the forward has frozen."""
        return [p for p in self.parameters if p.requires_grad]

    def contributions(self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor]) -> dict[nn.Parameter, Factor]:
        """What the capture takes for the contributions of the samples. Empties `outputs`.

        Raises:
            BackwardFailed: if the backward raises, which is the cause.
            Unprovable: if it does for several outputs, of which the user's loss may not use the one that fails, for
                lack of memory, or with parameters that the forward changes; or if there are parameters that met another
                number of samples.
        """
        # Edges, or the outputs would be there until the end of the backward.
        edges = {n: get_gradient_edge(outputs[n]) for n in cotangents if outputs[n].requires_grad}
        outputs.clear()
        if not edges:
            return {}
        try:
            with self._drawing(), self._capture.trial() as parts:
                vs = [cotangents[n] for n in edges]
                torch.autograd.backward(list(edges.values()), vs, inputs=self._still_trained())
        except Exception as error:
            if self._state.moved():
                raise Unprovable("its forward changes parameters that its backward needs") from error
            if len(edges) == 1 and not isinstance(error, torch.OutOfMemoryError):
                raise BackwardFailed(str(error)) from error
            raise Unprovable(f"the backward of all its outputs at once fails ({error})") from error
        contributions = parts[0] if parts else {}
        for parameter, factor in contributions.items():
            if self.batch_size not in (None, factor.batch_size):
                name = self.parameters[parameter]
                raise Unprovable(f"'{name}' met {factor.batch_size} samples in a batch of another size")
        return contributions

    def name_of(self, index: int) -> str:
        """Of the parameter in that place."""
        return list(self.parameters.values())[index]

    def readings(self, batch_size: int) -> list[Reading]:
        """Ways to take samples out of the arguments."""
        arguments, dim = (self._args, self._kwargs, batch_size), self._capture.batch_dim
        return [*(ragged_readings(*arguments) if dim == 0 else ()), *readings(*arguments, dim)]


def cotangent(output: Tensor, number: int) -> Tensor:
    """Random numbers of the shape of `output`, with a norm of about one per sample."""
    generator = torch.Generator(output.device).manual_seed(number)
    dtype = torch.promote_types(output.dtype, torch.float)
    v = torch.randn(output.shape, generator=generator, dtype=dtype, device=output.device)
    return v.div_(max(1, output.shape[1:].numel()) ** 0.5).to(output.dtype)
