"""The gradient noise of each parameter and module, from several batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from ...capture import observe
from ...diffusion.batch_gradients import call, to_device
from ...diffusion.per_sample_loss import PerSampleLoss
from ...metric.per_parameter import PerParameter, modules_of
from ...nests import tensors_in


class Row(NamedTuple):
    """A parameter, or a module with the sums over its parameters.

    Attributes:
        name: in the model; "" for the model itself.
        is_module: whether it is a module.
        elements: the number of weights.
        trace: an estimate of tr Sigma, with Sigma the covariance of the gradients of single samples.
        squared_grad_norm: an estimate of |mu|^2, with mu the gradient over all data; negative where noise hides it.
    """

    name: str
    is_module: bool
    elements: int
    trace: float
    squared_grad_norm: float

    @property
    def noise_scale(self) -> float | None:
        """tr Sigma / |mu|^2, in samples; None where the estimate of |mu|^2 is not positive."""
        return self.trace / self.squared_grad_norm if self.squared_grad_norm > 0 else None


class Noise(NamedTuple):
    """What was measured.

    Attributes:
        rows: each module, before its parameters and the modules in it, in the order of the model; the first is the
            model.
        batch_sizes: of the batches that were used.
    """

    rows: list[Row]
    batch_sizes: list[int]

    def share(self, row: Row) -> float:
        """The share of a row in the trace of the model; 0 where there is no noise."""
        return row.trace / self.rows[0].trace if self.rows[0].trace > 0 else 0


def measure(model: nn.Module, loss: Callable, data: Iterable, batches: int) -> Noise:
    """The noise of a model in evaluation mode, from means over batches of the unbiased estimates of each batch.

    Args:
        model: the model.
        loss: the criterion, (output, y) -> the mean, the sum or all of the losses of the samples.
        data: pairs (x, y), or one such tuple. Batches of one sample are left out.
        batches: how many to take at most.

    Raises:
        ValueError: if no batch has two samples, and for a model or a loss that couples the samples.
        TypeError: if the data does not consist of pairs.
    """
    model.eval()
    mean_loss, sums, batch_sizes = PerSampleLoss(loss), _Sums(), []
    with observe(model, per_parameter=True) as handle:
        for pair in [data] if isinstance(data, tuple) else islice(data, batches):
            x, y = _pair(pair, model)
            batch_size = next((t.shape[0] for t in tensors_in(x) if t.ndim), 0)
            if batch_size > 1:
                mean_loss(call(model, x), y, batch_size).backward()
                sums.add(handle.stats.per_parameter)  # type: ignore[union-attr, arg-type]  # there was a backward
                batch_sizes.append(batch_size)
                model.zero_grad()
    if not batch_sizes:
        raise ValueError(
            "the data has no batch of two samples or more, and one sample shows no noise: pass larger ones"
        )
    return Noise(sums.rows(model, len(batch_sizes)), batch_sizes)


def _pair(pair: object, model: nn.Module) -> tuple:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        found = f"a {type(pair).__name__}" + (f" of {len(pair)}" if isinstance(pair, (tuple, list)) else "")
        raise TypeError(f"the data gives {found}: return a pair (x, y), or a loader that gives pairs")
    device = next(p.device for p in model.parameters() if p.requires_grad)
    return tuple(to_device(part, device) for part in pair)


class _Sums:
    """Sums over batches of the estimates of tr Sigma and |mu|^2, by the names of parameters."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, found: PerParameter) -> None:
        """Add the estimates of a batch; those of parameters without a part in it are zero."""
        estimates = torch.stack([found.unbiased_traces, found.unbiased_squared_grad_norms], 1).double().cpu()
        for name, pair in zip(found, estimates, strict=True):
            self._sums[name] = self._sums.get(name, 0) + pair

    def rows(self, model: nn.Module, batches: int) -> list[Row]:
        """The rows, with means over so many batches."""
        sums: dict[tuple[bool, str], tuple[int, torch.Tensor]] = {}
        for name, parameter in model.named_parameters():
            if name in self._sums:
                for key in (*((True, module) for module in modules_of(name)), (False, name)):
                    elements, total = sums.get(key, (0, torch.zeros(2, dtype=torch.float64)))
                    sums[key] = elements + parameter.numel(), total + self._sums[name]
        return [Row(name, is_module, n, *(total / batches).tolist()) for (is_module, name), (n, total) in sums.items()]
