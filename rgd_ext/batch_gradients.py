"""Per-sample gradients of a model and a criterion on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch_norm import batch_norms, check_frozen
from .capture.batch import tensors_in
from .capture.collect import collecting
from .capture.dry_run import unchanged_buffers
from .gradients import PerSampleGradients
from .per_sample_loss import PerSampleLoss


def check_module(model: object) -> None:
    """Raise TypeError if `model` is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


@contextmanager
def batch_gradients(
    model: nn.Module, mean_loss: PerSampleLoss
) -> Iterator[Callable[[object, object], tuple[Tensor, PerSampleGradients]]]:
    """Yields a function from a batch (x, y) to its mean loss and the gradients g_i of its per-sample losses.

    As long as `mean_loss` is not trusted, the first batch of several samples shows whether the model couples them,
    which raises ValueError. The model, its `.grad`, its capture if it has one, and the states of random number
    generators are as before afterwards.
    """
    check_module(model)
    check_frozen(batch_norms(model), "call model.eval(), or replace it with rgd_ext.convert_batch_norm(model)")
    device = next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    is_separate = mean_loss.is_trusted
    with torch.random.fork_rng(devices), collecting(model) as gradients:

        @torch.enable_grad()
        def evaluate(x: object, y: object) -> tuple[Tensor, PerSampleGradients]:
            nonlocal is_separate
            x, y = _moved(x, device), _moved(y, device)
            batch_size = next((t.shape[0] for t in tensors_in(x) if t.ndim), 0)
            if batch_size == 0:
                raise ValueError("a batch has no samples: pass tensors with at least one along dimension 0")
            if not is_separate and batch_size > 1:
                _check_separate(model, x, batch_size, devices)
                is_separate = True
            loss = mean_loss(called(model, x), y, batch_size)
            return loss.detach(), gradients(loss, batch_size)

        yield evaluate


def _moved(tree: object, device: torch.device) -> object:
    return pytree.tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, tree)


def called(model: Callable, x: object) -> object:
    """The model's output for x: one argument, several in a tuple or list, or by name in a mapping."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, (tuple, list)) else model(x)


@torch.no_grad()
def _check_separate(model: nn.Module, x: object, batch_size: int, devices: list[torch.device]) -> None:
    """Raise ValueError if what the model returns for every other sample of a batch depends on those between."""

    def of_every_other(x: object) -> list[Tensor]:
        # The same random numbers every time.
        with torch.random.fork_rng(devices), unchanged_buffers(model):
            tensors = tensors_in(called(model, x))
        return [t[::2] for t in tensors if t.shape[:1] == (batch_size,) and t.is_floating_point()]

    output = of_every_other(x)
    # One that is not the same for the same batch either is random, which tells nothing.
    if _agree(output, of_every_other(_with_copies(x, batch_size))) or not _agree(output, of_every_other(x)):
        return
    raise ValueError(
        f"not a per-sample model: in a batch of {batch_size}, outputs change with the other samples. Statistics of the"
        f" batch or a contrast in {type(model).__name__} couple the samples, so per-sample gradients do not exist:"
        " normalise within each sample (rgd_ext.convert_batch_norm) or by fixed statistics, and keep attention and"
        " sums off dimension 0"
    )


def _with_copies(x: object, batch_size: int) -> object:
    """`x` with a copy of the sample before in place of every second one, in its first tensor of `batch_size`."""
    leaves, spec = pytree.tree_flatten(dict(x) if isinstance(x, Mapping) else x)
    first = next((i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.shape[:1] == (batch_size,)), None)
    if first is not None:
        indices = torch.arange(batch_size, device=leaves[first].device)
        leaves[first] = leaves[first][indices - indices % 2]
    return pytree.tree_unflatten(leaves, spec)


def _agree(tensors: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors of the same shape are the same to rounding, as far as they are finite."""
    pairs = [(a, b) for a, b in zip(tensors, others, strict=False) if a.shape == b.shape and a.numel()]
    return not any((a - b).abs().max() > torch.finfo(a.dtype).eps ** 0.5 * a.abs().max() for a, b in pairs)
