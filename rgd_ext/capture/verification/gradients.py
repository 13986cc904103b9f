"""Gradients of a call's outputs: autograd's, and the contributions of the samples that the capture takes for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...contributions.factor import Factor
from ...contributions.ledger import Contributions
from ...linalg import accumulate_dtype
from ...planning.planner import Planner
from ..context import CaptureContext
from ..findings import BackwardFailed, Unprovable
from ..model_call import ModelCall
from ..precision import full_precision
from .environment import Environment
from .sketch import sketch
from .state import ModelState


def parameters_of(call: ModelCall) -> dict[nn.Parameter, str]:
    """The trainable parameters of the module that is called, and their names in the model."""
    return {
        p: call.context.parameters.name_of(p)
        for p in call.recorder.module.parameters()
        if p.requires_grad and isinstance(p, nn.Parameter)  # torch.func.functional_call puts others in their places
    }


class Gradients:
    """Gradients of the outputs of a call with respect to the trainable parameters of the module that is called.

    Args:
        context: the capture of the model.
        parameters: see `parameters_of`.
        environment: the modes that backwards run in.
        state: the state of the model, which forwards may change.

    Attributes:
        parameters: as given.
    """

    def __init__(
        self,
        context: CaptureContext,
        parameters: dict[nn.Parameter, str],
        environment: Environment,
        state: ModelState,
    ) -> None:
        self._context, self.parameters = context, parameters
        self._environment, self._state = environment, state

    def name_of(self, index: int) -> str:
        """The name of the parameter in that place."""
        return list(self.parameters.values())[index]

    def of(self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor], retain_graph: bool = False) -> list[Tensor]:
        """Sketches of autograd's gradients of the outputs that have cotangents, zeros where there are none."""
        return self.filled(self.reached(outputs, cotangents, retain_graph))

    def filled(self, sketches: list[Tensor | None]) -> list[Tensor]:
        """Sketches by parameters, with zeros in the place of None."""
        return [sketch(None, p) if x is None else x for x, p in zip(sketches, self.parameters, strict=True)]

    def reached(
        self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor], retain_graph: bool = False
    ) -> list[Tensor | None]:
        """Sketches of autograd's gradients of the outputs that have cotangents; None where none reaches a parameter."""
        roots = [outputs[n] for n in cotangents if outputs[n].requires_grad]
        vs = [v for n, v in cotangents.items() if outputs[n].requires_grad]
        trained = self._still_trained() if roots else []
        with self._environment.active(), self._context.paused():
            found = torch.autograd.grad(roots, trained, vs, retain_graph, allow_unused=True) if trained else []
        grads = map(dict(zip(trained, found, strict=True)).get, self.parameters)
        return [None if grad is None else sketch(grad, p) for grad, p in zip(grads, self.parameters, strict=True)]

    def contributions(
        self, outputs: dict[int, Tensor], cotangents: dict[int, Tensor], batch_size: int | None
    ) -> dict[nn.Parameter, Factor]:
        """What the capture takes for the contributions of the samples. Empties `outputs`.

        Raises:
            BackwardFailed: if the backward raises, which is the cause.
            Unprovable: if it does for several outputs, of which the user's loss may not use the one that fails, for
                lack of memory, or with parameters that the forward changes; or if there are parameters that met another
                number of samples than `batch_size`.
        """
        # Outputs themselves would stay in memory until the end of the backward, unlike their edges.
        edges = {n: get_gradient_edge(outputs[n]) for n in cotangents if outputs[n].requires_grad}
        outputs.clear()
        if not edges:
            return {}
        planner = Planner(self._context.options.memory_budget)  # its choices are not those of the capture
        try:
            with self._environment.active(), self._context.collecting(planner, keeps_contributions=False) as parts:
                vs = [cotangents[n] for n in edges]
                torch.autograd.backward(list(edges.values()), vs, inputs=self._still_trained())
        except Exception as error:
            if self._state.moved():
                raise Unprovable("its forward changes parameters that its backward needs") from error
            if len(edges) == 1 and not isinstance(error, torch.OutOfMemoryError):
                raise BackwardFailed(str(error)) from error
            raise Unprovable(f"the backward of all its outputs at once fails ({error})") from error
        contributions = dict(parts[0].factors()) if parts else {}
        for parameter, factor in contributions.items():
            if batch_size not in (None, factor.batch_size):
                name = self.parameters[parameter]
                raise Unprovable(f"'{name}' met {factor.batch_size} samples in a batch of another size")
        return contributions

    @torch.no_grad()
    def sums(self, contributions: dict[nn.Parameter, Factor], weights: Tensor | None = None) -> list[Tensor]:
        """Sketches of the sums of contributions over the samples, parameter by parameter, or of weighted sums."""
        return [_sum_of(parameter, contributions.get(parameter), weights) for parameter in self.parameters]

    def _still_trained(self) -> list[nn.Parameter]:
        """The parameters, but for those that the forward has frozen."""
        return [p for p in self.parameters if p.requires_grad]


def _sum_of(parameter: nn.Parameter, factor: Factor | None, weights: Tensor | None) -> Tensor:
    if factor is None:
        return sketch(None, parameter)
    gradients, x = Contributions.of([(parameter, factor)], factor.batch_size), factor.example
    with full_precision(parameter.device):
        if weights is None:
            return sketch(gradients.mean()[0], parameter)
        shares = (weights / gradients.batch_size).to(x.device, accumulate_dtype(x.dtype))
        return sketch(gradients.combine(shares)[0], parameter)


def cotangent(output: Tensor, number: int) -> Tensor:
    """Random numbers of the shape of `output`, with a norm of about one per sample."""
    generator = torch.Generator(output.device).manual_seed(number)
    dtype = torch.promote_types(output.dtype, torch.float)
    v = torch.randn(output.shape, generator=generator, dtype=dtype, device=output.device)
    return v.div_(max(1, output.shape[1:].numel()) ** 0.5).to(output.dtype)
