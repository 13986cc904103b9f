"""The optimizers of the methods. All but AdamW step by the rule of torch.optim.SGD; they differ in the direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rgd_ext
from rgd_ext.metric import Epsilon, Inverse, Statistics


def sgd(model: nn.Module, lr: float, momentum: float) -> torch.optim.SGD:
    """Along the gradient."""
    return torch.optim.SGD(model.parameters(), lr, momentum)


def adamw(model: nn.Module, lr: float, _: float) -> torch.optim.AdamW:
    """With torch's defaults for all but the learning rate, so also for the momentum."""
    return torch.optim.AdamW(model.parameters(), lr)


def rgd(epsilon: Epsilon, inverse: Inverse = "weak-field") -> Callable[..., rgd_ext.RGD]:
    """Along (I - eps D) g, or (I + eps D)^-1 g with the exact inverse."""

    def make(model: nn.Module, lr: float, momentum: float) -> rgd_ext.RGD:
        return rgd_ext.RGD(model, lr, momentum, epsilon=epsilon, inverse=inverse)

    return make


def clipped(model: nn.Module, lr: float, momentum: float) -> rgd_ext.RGD:
    """Along the mean of per-sample gradients, each clipped to the median of their norms."""
    return rgd_ext.RGD(model, lr, momentum, weights=clip_at_median)


def clip_at_median(stats: Statistics) -> Tensor:
    """min(1, m / |g_i|) / B, with m the median of the |g_i|, the lower one for an even B."""
    norms = stats.sample_norms
    # Where most gradients are zero, so is their median, and 0 / 0 has to be 0.
    smallest = torch.finfo(norms.dtype).tiny
    return (norms.median() / norms.clamp(min=smallest)).clamp(max=1) / stats.batch_size


clip_at_median.only_sample_norms = True


def upgrad(model: nn.Module, lr: float, momentum: float) -> rgd_ext.RGD:
    """Along the direction of UPGrad, which increases no sample's loss (P. Quinton and V. Rey, 2024, arXiv 2406.16232).

    Raises:
        ImportError: without torchjd[quadprog-projector].
    """
    from torchjd.aggregation import UPGradWeighting
    from torchjd.linalg import QuadprogProjector

    # By default TorchJD regularises the projection more, and small increases are then left.
    weighting = UPGradWeighting(projector=QuadprogProjector(norm_eps=0, reg_eps=1e-6))
    return rgd_ext.RGD(model, lr, momentum, weights=rgd_ext.weights.FromGramian(weighting))


def sam(rho: float) -> Callable[..., SAM]:
    """Along the gradient at a point of higher loss, a distance of `rho` away."""

    def make(model: nn.Module, lr: float, momentum: float) -> SAM:
        return SAM(model.parameters(), lr, momentum, rho)

    return make


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation (P. Foret et al., 2021, arXiv 2010.01412): the gradient at x + rho g / |g|."""

    def __init__(self, parameters: object, lr: float, momentum: float, rho: float) -> None:
        super().__init__(parameters, lr, momentum)
        self._rho = rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Call the closure, which computes the loss and its gradient, at x and at x + rho g / |g|; then step from x."""
        with torch.enable_grad():
            loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        # At a stationary point there is nothing to ascend along.
        scale = (self._rho / norm).masked_fill(norm == 0, 0.0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(scale * gradient)
        with torch.enable_grad():
            closure()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        super().step()
        return loss
