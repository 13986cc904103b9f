"""Checks before times are measured: all processes have the same bits, and the direction that one process has."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import rgd_ext

from ..measuring.agreement import without_tf32
from ..training.arms import Training, rgd
from ..training.models import loss
from ..training.oracle import relative_error
from .arms import EXACT
from .processes import Member

TOLERANCE = 1e-3  # in float32, of Rayleigh, which divides by g^T D g
Batch = tuple[Tensor, Tensor]


def compare(
    member: Member, trainings: Mapping[str, Training], model: nn.Module, parts: Sequence[Batch]
) -> dict[str, float]:
    """The error of exact directions, after the first step of all arms.

    Args:
        member: this process.
        trainings: the arms, each of which makes a step.
        model: from which they start.
        parts: the batches of all processes.

    Raises:
        AssertionError: in all processes, if directions are not bitwise equal in them, or not that of one process.
    """
    with without_tf32():
        for name, training in trainings.items():
            training()
            digests = member.gather(digest(whole_direction(training)))
            if len({*digests}) > 1:
                raise AssertionError(f"{name}: .grad of the processes differs")
        exact = {name: epsilon for name, epsilon in EXACT.items() if name in trainings}
        errors = {name: _error(member, trainings[name], model, epsilon, parts) for name, epsilon in exact.items()}
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise AssertionError(f"{name}: the direction differs from that of one process by {error:.1e}")
    return errors


def digest(tensors: Sequence[Tensor]) -> str:
    """A text that is equal for equal bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()


def whole_direction(training: Training) -> list[Tensor]:
    """The direction of the last step, of which a process may have shards."""
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in training.direction()]


def in_one_process(model: nn.Module, epsilon: rgd_ext.Policy, parts: Sequence[Batch]) -> list[Tensor]:
    """The direction of the union of the batches, which one process takes one after another."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        # This capture is meant to have no group, although there are other processes.
        warnings.filterwarnings("ignore", "torch.distributed has")
        handle = rgd(model, epsilon=epsilon).preconditioner
    with handle, handle.accumulate():
        for x, y in parts:
            (loss(model(x), y) / len(parts)).backward()
    return [p.grad for p in model.parameters()]


def _error(
    member: Member, training: Training, model: nn.Module, epsilon: rgd_ext.Policy, parts: Sequence[Batch]
) -> float:
    """As rank 0 finds it, while the others wait."""
    direction = whole_direction(training)
    own = relative_error(direction, in_one_process(model, epsilon, parts)) if member.rank == 0 else None
    return member.gather(own)[0]
