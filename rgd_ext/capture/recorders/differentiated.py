"""The recorder of linear layers in models that are differentiated with respect to their inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...contributions.factor import Dense, Factor
from ...contributions.outer import Outer
from ..derivatives import linear
from .layer import LayerRecorder


class DifferentiatedLinear(LayerRecorder):
    """Records a linear layer as others are recorded, until derivatives are followed; then every use of its weight."""

    def __call__(self, *args, **kwargs):
        native, derivatives = self.context.native, self.context.derivatives
        if not derivatives.are_followed:
            return super().__call__(*args, **kwargs)
        if native.pauses or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        (x,) = self._ordered(args, kwargs)
        parameters = self._trainable()
        weight, bias = self.module.weight, self.module.bias
        is_own = all(p is None or not p.requires_grad or p is parameters.get(name) for name, p in _named(weight, bias))
        return linear(x, weight, bias, self._take) if is_own else self.original(*args, **kwargs)

    def _take(self, parameter: nn.Parameter, inputs: Tensor | None, output_grads: Tensor) -> None:
        """Hand a use of a parameter to the backward under way."""
        samples = self.context.derivatives.samples
        if output_grads.ndim < 2 or output_grads.shape[0] != samples.batch_size:
            raise ValueError(
                f"module '{self.name}' was differentiated with vectors of shape {tuple(output_grads.shape)} where those"
                f" of {samples.batch_size} samples were expected in front: a derivative of all samples at once, such as"
                " torch.func.jacrev of the whole batch, or a value that all samples share. Differentiate each sample by"
                " itself, torch.func.vmap(torch.func.hessian(u))(x), with the samples in the outermost vmap and without"
                " chunk_size; or the sum over them, torch.autograd.grad(u.sum(), x, create_graph=True)"
            )
        factor: Factor
        if inputs is None:
            grads = output_grads.to(parameter.dtype)
            factor = Dense(grads.flatten(1, -2).sum(1) if grads.ndim > 2 else grads)
        else:
            factor = Outer(
                _vectors(inputs.to(parameter.dtype)), _vectors(output_grads.to(parameter.dtype)), parameter.shape
            )
        self.context.current_backward(samples).add_use(parameter, factor)


def _named(weight: Tensor, bias: Tensor | None) -> list[tuple[str, Tensor | None]]:
    return [("weight", weight), ("bias", bias)]


def _vectors(x: Tensor) -> Tensor:
    """(B, ..., n) as (B, T, n), or (B, n)."""
    return x.flatten(1, -2) if x.ndim > 3 else x
