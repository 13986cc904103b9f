"""Small problems in float64 whose flows can be integrated: the loss of one sample, the samples, and a start."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.nn.functional import avg_pool2d, cross_entropy, softplus, unfold

from ..data import Sources
from ..data.formats import CLASSES

# The samples of a problem, tensors (N, ...), or one of them without the first dimension.
Samples = tuple[Tensor, ...]
SAMPLES, HIDDEN, CHANNELS = 64, 6, 4


@dataclass(frozen=True, eq=False)
class Problem:
    """Per-sample losses f_i(x) and a start.

    Attributes:
        loss: function of x (d,) and the tensors of one sample; a scalar.
        samples: N of them.
        x0: the start, (d,).
        duration: T lambda_max(H(x0)), the time until which flows are compared, with the Hessian of the mean loss f.
    """

    loss: Callable[..., Tensor]
    samples: Samples
    x0: Tensor
    duration: float

    @property
    def size(self) -> int:
        """N."""
        return len(self.samples[0])

    def losses(self, x: Tensor, samples: Samples | None = None) -> Tensor:
        """f_i(x) of all samples or of these, (N,)."""
        samples = samples or self.samples
        return vmap(self.loss, (None,) + (0,) * len(samples))(x, *samples)

    def mean(self, x: Tensor, samples: Samples | None = None) -> Tensor:
        """f(x), or that of these samples."""
        return self.losses(x, samples).mean()

    @cached_property
    def sharpness(self) -> float:
        """lambda_max(H(x0))."""
        return torch.linalg.eigvalsh(jacrev(grad(self.mean))(self.x0))[-1].item()


class Random:
    """Normal numbers that depend on the seed only."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def chosen(self, size: int, among: int) -> Tensor:
        """Different indices, (size,)."""
        return torch.randperm(among, generator=self.generator)[:size]


def quadratic(seed: int) -> Problem:
    """f_i = x^T A x / 2 + b_i^T x with the same A for all samples, so that D is constant. The b_i have mean zero."""
    random, curvatures = Random(seed), torch.tensor([1.0, 0.3], dtype=torch.float64)
    slopes = random.normal(SAMPLES, 2)
    x0 = 2 * random.normal(2)
    return Problem(lambda x, b: (curvatures * x * x).sum() / 2 + b @ x, (slopes - slopes.mean(0),), x0, 20)


def least_squares(seed: int) -> Problem:
    """Linear regression of noisy targets on two inputs of unequal size."""
    random = Random(seed)
    a = random.normal(SAMPLES, 2) * torch.tensor([1.0, 0.5], dtype=torch.float64)
    y = a @ random.normal(2) + 0.5 * random.normal(SAMPLES)
    return Problem(lambda x, a, y: (a @ x - y) ** 2 / 2, (a, y), 2 * random.normal(2), 20)


def logistic_regression(seed: int) -> Problem:
    """Labels drawn from the model's own probabilities."""
    random = Random(seed)
    a, truth = random.normal(SAMPLES, 5), 1.5 * random.normal(5)
    uniform = torch.rand(SAMPLES, generator=random.generator, dtype=torch.float64)
    signs = torch.where(uniform < torch.sigmoid(a @ truth), 1.0, -1.0).double()
    return Problem(lambda x, a, sign: softplus(-sign * (a @ x)), (a, signs), random.normal(5), 40)


def tanh_neuron(seed: int) -> Problem:
    """Regression of noisy targets by x_3 tanh(x_1 a + x_2)."""
    random = Random(seed)

    def output(x: Tensor, a: Tensor) -> Tensor:
        return x[2] * torch.tanh(x[0] * a + x[1])

    a, truth = 2 * random.normal(SAMPLES), torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64)
    y = output(truth, a) + 0.3 * random.normal(SAMPLES)
    return Problem(lambda x, a, y: (output(x, a) - y) ** 2 / 2, (a, y), truth + random.normal(3) / 2, 40)


def small_mlp(seed: int, sources: Sources) -> Problem:
    """A layer of tanh and a linear one on digits of 4 by 4 pixels, with cross-entropy."""
    random = Random(seed)
    images, labels = digits(random, sources)
    inputs = avg_pool2d(images, 2).flatten(1)
    layers = Layers((HIDDEN, inputs.shape[1]), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,))

    def loss(x: Tensor, image: Tensor, label: Tensor) -> Tensor:
        w1, b1, w2, b2 = layers.of(x)
        return cross_entropy(w2 @ torch.tanh(w1 @ image + b1) + b2, label)

    return Problem(loss, (inputs, labels), layers.start(random), 40)


def small_cnn(seed: int, sources: Sources) -> Problem:
    """A 3 x 3 convolution of stride 2, tanh, 2 x 2 mean pooling and a linear layer on digits, with cross-entropy.

    The convolution is a product with the patches of the image, which are computed once.
    """
    random = Random(seed)
    images, labels = digits(random, sources)
    patches = unfold(images, 3, padding=1, stride=2)  # (N, 9, 16)
    layers = Layers((CHANNELS, 9), (CHANNELS, 1), (CLASSES, 4 * CHANNELS), (CLASSES,))

    def loss(x: Tensor, patches: Tensor, label: Tensor) -> Tensor:
        w1, b1, w2, b2 = layers.of(x)
        pooled = torch.tanh(w1 @ patches + b1).reshape(CHANNELS, 2, 2, 2, 2).mean((2, 4))
        return cross_entropy(w2 @ pooled.flatten() + b2, label)

    return Problem(loss, (patches, labels), layers.start(random), 40)


class Layers:
    """Weights and biases of these shapes, as parts of one vector x (d,)."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def of(self, x: Tensor) -> list[Tensor]:
        parts = x.split([math.prod(shape) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def start(self, random: Random) -> Tensor:
        """Normal weights of variance 1 / fan-in, and zeros for biases."""
        weights = [random.normal(*shape) / math.sqrt(shape[-1]) for shape in self.shapes]
        return torch.cat([(part if i % 2 == 0 else 0 * part).flatten() for i, part in enumerate(weights)])


def digits(random: Random, sources: Sources) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels (N,) of random training samples."""
    train = sources.split("digits", 1000).train
    chosen = random.chosen(SAMPLES, len(train.labels))
    return train.inputs[chosen].double(), train.labels[chosen]
