"""A small classifier, and its gradients and Hessian as dense matrices in float64."""

import copy

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from bench.studying.data import Samples


def classifier():
    """Of four pixels into four classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


def images(count):
    """So many samples for it."""
    generator = torch.Generator().manual_seed(1)
    return Samples(torch.randn(count, 1, 2, 2, generator=generator), torch.arange(count) % 4)


def largest(matrix):
    """The largest eigenvalue."""
    return torch.linalg.eigvalsh(matrix)[-1].item()


def assert_left_alone(model, measure):
    """That measuring the model changes neither its weights nor its gradients."""
    before = [parameter.clone() for parameter in model.parameters()]
    measure(model)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


class Dense:
    """A model's cross entropies as a function of its weights x, (d,)."""

    def __init__(self, model, samples):
        self.model, self.samples = copy.deepcopy(model).double(), samples
        self.x = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def losses(self, x):
        """By sample, (N,)."""
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        parts = x.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        outputs = functional_call(self.model, weights, (self.samples.inputs.double(),))
        return cross_entropy(outputs, self.samples.labels, reduction="none")

    @property
    def gradients(self):
        """(N, d)."""
        return jacrev(self.losses)(self.x)

    def moments(self, index=slice(None)):
        """The mean of these samples' gradients, (d,), and their covariance, (d, d)."""
        gradients = self.gradients[index]
        return gradients.mean(0), torch.cov(gradients.T, correction=0)

    def drawn(self, generator, size, draws):
        """The moments of so many batches of that size, drawn without replacement."""
        return [self.moments(torch.randperm(len(self.samples), generator=generator)[:size]) for _ in range(draws)]

    def decrease(self, directions):
        """The largest decrease of the mean loss, of many rates, by a step along each of these, on average over them."""

        def after(rate):
            return torch.stack([self.losses(self.x - rate * each).mean() for each in directions]).mean().item()

        return self.losses(self.x).mean().item() - min(map(after, np.geomspace(1e-3, 20, 1000)))

    @property
    def hessian(self):
        """Of the mean, (d, d)."""
        return jacrev(jacrev(lambda x: self.losses(x).mean()))(self.x)
