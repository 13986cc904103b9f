"""Models as lists of layers, with the seconds of their products of matrices on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

BYTES = 4  # of a number in float32


@dataclass(frozen=True)
class Layer:
    """A layer on the batch of one rank.

    Attributes:
        group: with which layers FSDP2 shards it. Group 0 is the root, which stays gathered from forward to backward.
        parameters: how many numbers it has.
        forward: seconds.
        backward: seconds of the backward of SGD, the gradient of the parameters included.
        gradient: seconds of one more product as large as that gradient: alignments, or a weighted sum.
    """

    group: int
    parameters: int
    forward: float
    backward: float
    gradient: float


@dataclass(frozen=True)
class Device:
    """Its peak in FLOP/s, what part of it training reaches, and bytes per second of its memory."""

    peak: float
    utilisation: float
    memory: float

    def layer(self, group: int, weights: int, others: int, tokens: int, attention: float = 0) -> Layer:
        """A product with a matrix of `weights`, beside `others` without a product, and FLOPs of attention."""
        speed = self.peak * self.utilisation
        product, scores = 2 * weights * tokens / speed, attention / speed
        return Layer(group, weights + others, product + scores, 2 * (product + scores), product)


@dataclass(frozen=True)
class Model:
    """A model with the batch of a rank: `build(device, tokens)` makes its layers."""

    build: Callable[[Device, int], list[Layer]]
    samples: int
    length: int

    def layers(self, device: Device) -> list[Layer]:
        """In the order of the forward."""
        return self.build(device, self.samples * self.length)


def gpt2(device: Device, tokens: int, depth: int, width: int, length: int, vocabulary: int = 50_257) -> list[Layer]:
    """GPT-2. The head shares the weights of the embedding, whose gradient is complete at the end of the backward."""
    d, scores = width, 2 * length * width * tokens
    layers = [Layer(0, (vocabulary + length) * d, 0, 0, 0)]
    for block in range(1, depth + 1):
        layers += [
            device.layer(block, 3 * d * d, 5 * d, tokens),
            device.layer(block, d * d, d, tokens, scores),
            device.layer(block, 4 * d * d, 6 * d, tokens),
            device.layer(block, 4 * d * d, d, tokens),
        ]
    head = replace(device.layer(0, vocabulary * d, 0, tokens), parameters=2 * d)
    return [*layers, head]


def llama(
    device: Device, tokens: int, depth: int, width: int, hidden: int, length: int, vocabulary: int = 32_000
) -> list[Layer]:
    """Llama: gated MLPs, no biases, and a head of its own."""
    d, scores = width, 2 * length * width * tokens
    layers = [Layer(0, vocabulary * d, 0, 0, 0)]
    for block in range(1, depth + 1):
        layers += [
            device.layer(block, 3 * d * d, d, tokens),
            device.layer(block, d * d, 0, tokens, scores),
            device.layer(block, 2 * d * hidden, d, tokens),
            device.layer(block, d * hidden, 0, tokens),
        ]
    return [*layers, device.layer(0, vocabulary * d, d, tokens)]


def materialised(layers: Sequence[Layer], samples: int, device: Device) -> list[Layer]:
    """The same if per-sample gradients are kept: the backward writes them, and later products read them."""

    def pass_over(layer: Layer) -> float:
        return samples * layer.parameters * BYTES / device.memory

    return [replace(one, backward=one.backward + pass_over(one), gradient=pass_over(one)) for one in layers]


MODELS = {
    "GPT-2 small": Model(partial(gpt2, depth=12, width=768, length=1024), 8, 1024),
    "GPT-2 medium": Model(partial(gpt2, depth=24, width=1024, length=1024), 8, 1024),
    "GPT-2 large": Model(partial(gpt2, depth=36, width=1280, length=1024), 8, 1024),
    "GPT-2 XL": Model(partial(gpt2, depth=48, width=1600, length=1024), 8, 1024),
    "Llama 7B": Model(partial(llama, depth=32, width=4096, hidden=11_008, length=4096), 2, 4096),
}
