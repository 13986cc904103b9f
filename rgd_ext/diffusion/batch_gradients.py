"""Per-sample gradients of a model and a criterion on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..batch_norm import batch_norms, check_frozen
from ..capture.captured_gradients import collecting
from ..gradients import PerSampleGradients
from ..nests import tensors_in
from .per_sample_loss import PerSampleLoss

Output = TypeVar("Output")


def check_module(model: object) -> None:
    """Raise TypeError if `model` is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


@contextmanager
def batch_gradients(
    model: nn.Module, mean_loss: PerSampleLoss
) -> Iterator[Callable[[object, object], tuple[Tensor, PerSampleGradients]]]:
    """Yields a function from a batch (x, y) to its mean loss and the gradients g_i of its per-sample losses.

    As long as `mean_loss` is not trusted, batches are verified as by `rgd_ext.verify`, which raises ValueError if the
    model couples samples. Afterwards the model, its `.grad`, its capture if it has one, and the states of the random
    number generators are as they were before.
    """
    check_module(model)
    check_frozen(batch_norms(model), "call model.eval(), or replace it with rgd_ext.convert_batch_norm(model)")
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), collecting(model, verify=not mean_loss.is_trusted) as gradients:

        @torch.enable_grad()
        def evaluate(x: object, y: object) -> tuple[Tensor, PerSampleGradients]:
            x, y = to_device(x, device), to_device(y, device)
            batch_size = batch_size_of(x)
            if batch_size == 0:
                raise ValueError("a batch has no samples: pass tensors with at least one along dimension 0")
            loss = mean_loss(call(model, x), y, batch_size)
            return loss.detach(), gradients(loss, batch_size)

        yield evaluate


def device_of(model: nn.Module) -> torch.device:
    """That of the first trainable parameter."""
    return next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))


def batch_size_of(x: object) -> int:
    """The number of samples along dimension 0 of the first tensor in the arguments of a model; 0 without one."""
    return next((t.shape[0] for t in tensors_in(x) if t.ndim), 0)


def to_device(tree: object, device: torch.device) -> object:
    """A nest of arguments with its tensors on `device`."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, tree)


def call(model: Callable[..., Output], x: object) -> Output:
    """model(x); with several arguments if x is a tuple or list, with keyword arguments if it is a mapping."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)
