"""Other packages, used as their users would: each leaves a direction in the `.grad` of a model, RGD's by default.

The packages that compute per-sample gradients are combined with our kernels for the rest of the direction, so that the
times differ by the price of their gradients alone. A peer is a function of (model, x, y) that returns a backward. It
raises if the package is not installed or does not support the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rgd_ext
from rgd_ext import ops

from .models import loss

Backward = Callable[[], None]
FRACTION = 0.5  # the argument of the policies of all arms


def write_direction(model: nn.Module, grads: list[Tensor], scale: float = 1) -> None:
    """Write the direction of `scale` times `grads` into `.grad`, by `Rayleigh`, which needs no Gramian."""
    direction, _ = rgd_ext.direction(grads, epsilon=rgd_ext.Rayleigh(FRACTION))
    for parameter, step in zip(model.parameters(), direction, strict=True):
        parameter.grad = step.mul_(scale)


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Per-sample gradients by torch.func.vmap(grad)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    grads = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0))
    return lambda: write_direction(model, list(grads(parameters, x, y).values()))


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Per-sample gradients by Opacus's GradSampleModule."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model)

    def backward() -> None:
        loss(wrapped(x), y).backward()
        write_direction(model, [p.grad_sample for p in model.parameters()])
        for parameter in model.parameters():
            parameter.grad_sample = None

    return backward


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Backward:
    """Per-sample gradients by BackPACK's BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    extended, criterion = extend(model), extend(nn.CrossEntropyLoss())

    def backward() -> None:
        with backpack(BatchGrad()):
            criterion(extended(x).movedim(-1, 1), y).backward()
        for module in model.modules():
            if any(not hasattr(p, "grad_batch") for p in module.parameters(recurse=False)):
                raise NotImplementedError(f"BatchGrad does not know {type(module).__name__}")
        write_direction(model, [p.grad_batch for p in model.parameters()], len(x))
        for parameter in model.parameters():
            del parameter.grad_batch

    return backward


def spectral_weights(gram: Tensor) -> Tensor:
    """w of shape (B,) with sum_i w_i g_i = (I - eps D) g, for `Spectral`."""
    squared_norm, alignments, squared_norms, centred = ops.gram_moments(gram)
    epsilon = FRACTION * len(gram) / ops.largest_eigenvalue(centred)
    ulp = torch.finfo(gram.dtype).eps
    return ops.sample_weights(squared_norm, alignments, squared_norms, epsilon, ulp)[1].to(gram)


def sample_losses(output: Tensor, y: Tensor) -> Tensor:
    """The loss of each sample, shape (B,); their mean is `loss`."""
    return F.cross_entropy(output.movedim(-1, 1), y, reduction="none").view(len(y), -1).mean(1)


def torchjd(
    model: nn.Module, x: Tensor, y: Tensor, weighting: Callable[[Tensor], Tensor] = spectral_weights
) -> Backward:
    """The Gramian by TorchJD's autogram, and a backward of the losses with weights computed from it."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)

    def backward() -> None:
        losses = sample_losses(model(x), y)
        losses.backward(weighting(engine.compute_gramian(losses)))

    return backward


def torchjd_autojac(model: nn.Module, x: Tensor, y: Tensor, aggregator: nn.Module) -> Backward:
    """Per-sample gradients by TorchJD's autojac, which its `aggregator` combines.

    On the CPU the rows of the Jacobian are computed one after the other, which takes less time there than by vmap, and
    less memory where the activations are large.
    """
    from torchjd import autojac

    rows_at_once = 1 if x.device.type == "cpu" else None

    def backward() -> None:
        autojac.backward(sample_losses(model(x), y), parallel_chunk_size=rows_at_once)
        autojac.jac_to_grad(model.parameters(), aggregator, optimize_gramian_computation=True)

    return backward
