"""The cases: a model with a batch, and what is asked of a package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import models, sequences
from .models import CLASSES, INPUTS, WIDTH
from .problem import Problem
from .sequences import LENGTH, VOCABULARY

BATCH_SIZE = 4
TOLERANCE, AUTOCAST_TOLERANCE = 1e-9, 3e-2  # relative errors


@dataclass(frozen=True)
class Case:
    """A problem of a kind, in float64.

    Attributes:
        build: makes the problem.
        mixes: the model couples the samples of a batch.
        compiled: the packages get what `torch.compile` makes of the model.
        half: the problem is in float32 and runs under autocast.
        kept: the names in the `state_dict` and the type of the model must stay as they are.
    """

    build: Callable[[], Problem]
    mixes: bool = False
    compiled: bool = False
    half: bool = False
    kept: bool = False

    @contextmanager
    def dtype(self) -> Iterator[None]:
        """Within, new tensors have the dtype of the problem, those that packages make as well."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if self.half else torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def problem(self) -> Problem:
        """The problem, always with the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return replace(self.build(), autocast=self.half)

    def given(self, problem: Problem) -> Problem:
        """A copy of the problem, as a package gets it."""
        model = copy.deepcopy(problem.model)
        return replace(problem, model=torch.compile(model) if self.compiled else model)

    @property
    def tolerance(self) -> float:
        return AUTOCAST_TOLERANCE if self.half else TOLERANCE

    @property
    def success(self) -> str:
        """What the table says where a package does what is asked of it."""
        if self.kept:
            return "kept"
        return f"within {self.tolerance:g}" if self.half else "exact"


def labels(*shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, shape)


def vectors(model: nn.Module, **options: object) -> Problem:
    return Problem(model, torch.randn(BATCH_SIZE, INPUTS), labels(BATCH_SIZE), **options)


def images(model: nn.Module) -> Problem:
    return Problem(model, torch.randn(BATCH_SIZE, 1, 6, 6), labels(BATCH_SIZE))


def of_sequences(model: nn.Module) -> Problem:
    return Problem(model, torch.randn(BATCH_SIZE, LENGTH, WIDTH), labels(BATCH_SIZE))


def texts(model: nn.Module) -> Problem:
    return Problem(model, labels(BATCH_SIZE, LENGTH, classes=VOCABULARY), labels(BATCH_SIZE))


def language(model: nn.Module) -> Problem:
    """A label for every token."""
    tokens = labels(BATCH_SIZE, LENGTH + 1, classes=VOCABULARY)
    return Problem(model, tokens[:, :-1], tokens[:, 1:])


def own_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), models.Quadratic(), nn.Linear(WIDTH, CLASSES))


def time_first(model: nn.Module) -> Problem:
    return Problem(model, torch.randn(LENGTH, BATCH_SIZE, INPUTS), labels(BATCH_SIZE), batch_dim=1)


CASES = {
    "MLP": Case(lambda: vectors(models.mlp())),
    "activation in place": Case(lambda: vectors(models.mlp(nn.ReLU(inplace=True)))),
    "convolutions, GroupNorm": Case(lambda: images(models.convolutions(nn.GroupNorm(2, 4)))),
    "transformer block, LayerNorm": Case(lambda: of_sequences(sequences.Transformer())),
    "class token, positions as `nn.Parameter`": Case(lambda: of_sequences(sequences.ClassToken())),
    "`nn.MultiheadAttention`": Case(lambda: of_sequences(sequences.Attention())),
    "`nn.TransformerEncoderLayer`": Case(lambda: of_sequences(sequences.Encoder())),
    "`nn.LSTM`": Case(lambda: of_sequences(sequences.LSTM())),
    "embedding": Case(lambda: texts(sequences.Texts())),
    "positions looked up once for all samples": Case(lambda: texts(sequences.Positions())),
    "embedding tied to the head": Case(lambda: language(sequences.Tied())),
    "GPT-2 of transformers": Case(lambda: language(sequences.GPT2())),
    "GPT-2 with `position_ids` for each sample": Case(lambda: language(sequences.GPT2(positions_for_each=True))),
    "layer called twice": Case(lambda: vectors(models.Twice())),
    "`nn.Parameter` in a product": Case(lambda: vectors(models.Product())),
    "layer that no package knows": Case(lambda: vectors(own_layer())),
    "experts that get some of the samples": Case(lambda: vectors(models.Experts())),
    "parametrised weight (weight norm)": Case(lambda: vectors(models.weight_norm())),
    "frozen layer": Case(lambda: vectors(models.frozen())),
    "checkpointed activations": Case(lambda: vectors(models.Checkpointed())),
    "inputs with time first": Case(lambda: time_first(sequences.TimeFirst())),
    "sum of the losses": Case(lambda: vectors(models.mlp(), reduction="sum")),
    "union of two batches": Case(lambda: vectors(models.mlp(), parts=2)),
    "bfloat16 autocast": Case(lambda: vectors(models.mlp()), half=True),
    "`torch.compile` before": Case(lambda: vectors(models.mlp()), compiled=True),
    "BatchNorm in training mode": Case(lambda: images(models.convolutions(nn.BatchNorm2d(4))), mixes=True),
    "forward that mixes samples": Case(lambda: vectors(models.Centred()), mixes=True),
    "type and `state_dict` of the model kept": Case(lambda: vectors(models.mlp()), kept=True),
}
