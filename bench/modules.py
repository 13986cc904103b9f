"""Every module of torch.nn that has parameters: a training step of RGD against one of SGD.

The module is the whole model, of the size that it would have in a small network; B = 32.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rgd_ext

from .measuring.report import Record, reason, show
from .measuring.selection import chosen
from .measuring.timing import Samples, host_clock, interleave, ratio, ratio_text, synchronize
from .training.arms import Arm, Training, rgd, sgd
from .training.peers import Backward

HEADER = ("module", "SGD ms", "RGD ms", "RGD / SGD (quartiles)", "remark")
# A module whose steps take this many times those of SGD must have issued a warning.
SLOW = 100
B, LENGTH, WIDTH = 32, 32, 256

Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]


def numbers(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """A function that makes one input of B samples."""
    return lambda: (torch.randn(B, *shape),)


def indices(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(10_000, (B, *shape)),)


def twice(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(B, *shape), torch.randn(B, *shape))


def labelled() -> tuple[Tensor, Tensor]:
    return torch.randn(B, WIDTH), torch.randint(1000, (B,))


class Adaptive(nn.Module):
    """The losses of the samples. The module is one unit, because the values of the targets choose its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 1000, [100, 500])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x, y).output


rgd_ext.register_rule(Adaptive, rgd_ext.unit)


def attended() -> tuple[Tensor, ...]:
    x = torch.randn(B, LENGTH, WIDTH)
    return x, x, x


def convolutions() -> Iterator[tuple[str, Case]]:
    for n, size in ((1, 256), (2, 16), (3, 6)):
        for name in (f"Conv{n}d", f"ConvTranspose{n}d"):
            yield name, (partial(getattr(nn, name), 32, 32, 3, padding=1), numbers(32, *[size] * n))


def norms() -> Iterator[tuple[str, Case]]:
    for n in (1, 2, 3):
        yield f"BatchNorm{n}d", (partial(getattr(nn, f"BatchNorm{n}d"), 32), numbers(32, *[8] * n))
        yield f"InstanceNorm{n}d", (partial(getattr(nn, f"InstanceNorm{n}d"), 32, affine=True), numbers(32, *[8] * n))
    yield "GroupNorm", (partial(nn.GroupNorm, 8, 32), numbers(32, 16, 16))
    yield "LayerNorm", (partial(nn.LayerNorm, WIDTH), numbers(LENGTH, WIDTH))
    yield "RMSNorm", (partial(nn.RMSNorm, WIDTH), numbers(LENGTH, WIDTH))


def recurrent() -> Iterator[tuple[str, Case]]:
    for name in ("RNN", "LSTM", "GRU"):
        yield name, (partial(getattr(nn, name), 64, WIDTH, batch_first=True), numbers(LENGTH, 64))
        yield f"{name}Cell", (partial(getattr(nn, f"{name}Cell"), 64, WIDTH), numbers(64))


def transformers() -> Iterator[tuple[str, Case]]:
    options = {"dim_feedforward": 2 * WIDTH, "dropout": 0.0, "batch_first": True}
    encoder = partial(nn.TransformerEncoderLayer, WIDTH, 4, **options)
    decoder = partial(nn.TransformerDecoderLayer, WIDTH, 4, **options)
    yield "MultiheadAttention", (partial(nn.MultiheadAttention, WIDTH, 4, batch_first=True), attended)
    yield "TransformerEncoderLayer", (encoder, numbers(LENGTH, WIDTH))
    yield "TransformerDecoderLayer", (decoder, twice(LENGTH, WIDTH))
    yield "TransformerEncoder", (lambda: nn.TransformerEncoder(encoder(), 2), numbers(LENGTH, WIDTH))
    yield "TransformerDecoder", (lambda: nn.TransformerDecoder(decoder(), 2), twice(LENGTH, WIDTH))
    yield "Transformer", (partial(nn.Transformer, WIDTH, 4, 1, 1, **options), twice(LENGTH, WIDTH))


def parametrised() -> Iterator[tuple[str, Case]]:
    for name in ("weight_norm", "spectral_norm", "orthogonal"):
        parametrise = getattr(parametrizations, name)
        yield f"Linear, {name}", (lambda f=parametrise: f(nn.Linear(WIDTH, WIDTH)), numbers(WIDTH))
    yield "Conv2d, weight_norm", (lambda: parametrizations.weight_norm(nn.Conv2d(32, 32, 3)), numbers(32, 16, 16))


def cases() -> dict[str, Case]:
    """By name: the module, and its inputs."""
    return {
        "Linear": (partial(nn.Linear, WIDTH, WIDTH), numbers(WIDTH)),
        "Linear, sequences": (partial(nn.Linear, WIDTH, WIDTH), numbers(LENGTH, WIDTH)),
        "Bilinear": (partial(nn.Bilinear, 64, 64, 32), twice(64)),
        **dict(convolutions()),
        "Embedding": (partial(nn.Embedding, 10_000, 64), indices(LENGTH)),
        "EmbeddingBag": (partial(nn.EmbeddingBag, 10_000, 64), indices(LENGTH)),
        "PReLU": (partial(nn.PReLU, 32), numbers(32, 16, 16)),
        **dict(norms()),
        **dict(recurrent()),
        **dict(transformers()),
        "AdaptiveLogSoftmaxWithLoss": (Adaptive, labelled),
        **dict(parametrised()),
    }


# Modules without a forward of their own, one for several machines, and one that returns the mean loss only.
EXCEPTIONS = {"ParameterDict", "ParameterList", "RNNBase", "RNNCellBase", "SyncBatchNorm", "LinearCrossEntropyLoss"}


def with_parameters() -> set[str]:
    """The names of the classes of torch.nn whose instances have parameters, without the lazy ones."""
    classes = {name: kind for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    return {name for name, kind in classes.items() if _makes_parameters(kind) and not name.startswith("Lazy")}


def _makes_parameters(kind: type[nn.Module]) -> bool:
    makers = "Parameter(", "Linear(", "MultiheadAttention(", "Layer(", "_get_clones("
    ancestors = [base for base in kind.__mro__ if base is not nn.Module and "__init__" in vars(base)]
    bodies = [inspect.getsource(base.__init__) for base in ancestors if issubclass(base, nn.Module)]
    return any(maker in body for body in bodies for maker in makers)


def squares(module: nn.Module, *inputs: Tensor) -> Backward:
    """The backward of the mean square of the output; of its first tensor, if there are several."""

    def backward() -> None:
        output = module(*inputs)
        first = output if isinstance(output, Tensor) else output[0]
        first.square().mean().backward()

    return backward


ARMS = {"SGD": Arm(sgd, squares), "RGD": Arm(rgd, squares)}


def bench(case: Case, device: str, rounds: int) -> tuple[Samples, str]:
    """Milliseconds of steps, and the warnings that RGD issued."""
    module, inputs = case[0]().to(device), tuple(x.to(device) for x in case[1]())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        arms = {name: Training(arm, module, *inputs) for name, arm in ARMS.items()}
        wait = synchronize(device)
        samples = interleave({name: host_clock(arm, 1, wait) for name, arm in arms.items()}, rounds)
    return samples, "; ".join({str(warning.message).partition("\n")[0] for warning in found})


def row(name: str, samples: Samples, remark: str) -> list[str]:
    """A row of the table."""
    times = [f"{sorted(samples[arm])[len(samples[arm]) // 2]:.3g}" for arm in ARMS]
    return [name, *times, ratio_text(samples, "RGD", "SGD"), remark]


def run(device: str, quick: bool, json: str | None, only: Sequence[str]) -> list[str]:
    """Time the modules that `only` chooses, print a table and write the raw samples.

    Returns what failed: a class of torch.nn without a case, a module that is refused, or one that is slow without a
    warning.
    """
    record, results = Record(json, "modules", device), {}
    torch.manual_seed(0)
    known = {name.partition(",")[0] for name in cases()}
    failures = [f"torch.nn.{name} has no case" for name in sorted(with_parameters() - known - EXCEPTIONS)]
    rows = []
    for name, case in chosen(cases(), only).items():
        try:
            samples, remark = bench(case, device, rounds=3 if quick else 20)
        except Exception as problem:
            failures.append(f"{name}: {reason(problem)}")
            continue
        results[name] = samples
        rows.append(row(name, samples, remark))
        if ratio(samples, "RGD", "SGD")[0] >= SLOW and not remark:
            failures.append(f"{name}: slow, without a warning")
    show(HEADER, [rows], f"a training step of a module, float32, B = {B}, {device}")
    record.write(milliseconds=results)
    return failures
