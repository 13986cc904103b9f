"""The gradient noise of each parameter and module, from the samples of several batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...capture import observe
from ...diffusion.batch_gradients import batch_size_of, call, device_of, to_device
from ...diffusion.per_sample_loss import PerSampleLoss
from ...metric import PerParameter
from ...metric.noise import unbiased
from ...metric.per_parameter import modules_of
from .. import resolve


class Row(NamedTuple):
    """A parameter, or a module with the sums over its parameters.

    Attributes:
        name: in the model; "" for the model itself.
        is_module: whether it is a module.
        elements: the number of weights.
        trace: an unbiased estimate of tr Sigma, with Sigma the covariance of the gradients of single samples.
        squared_grad_norm: an unbiased estimate of |mu|^2, with mu the mean of their distribution; negative where noise
            hides it.
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
        batch_sizes: of the batches.
    """

    rows: list[Row]
    batch_sizes: list[int]

    def share(self, row: Row) -> float:
        """The share of a row in the trace of the model; 0 where there is no noise."""
        return row.trace / self.rows[0].trace if self.rows[0].trace > 0 else 0


def measure(model: nn.Module, loss: Callable, data: Iterable, batches: int) -> Noise:
    """The noise of a model in evaluation mode, from the union of the samples of several batches.

    Args:
        model: the model.
        loss: the criterion, (output, y) -> the mean, the sum or all of the losses of the samples.
        data: pairs (x, y), or one such pair: a tuple, or a list that begins with a tensor.
        batches: how many to take at most.

    Raises:
        ValueError: for fewer than two samples, gradients that are not finite, and a model or a loss that couples the
            samples.
        TypeError: if the data does not consist of pairs.
    """
    model.eval()
    mean_loss, union, device = PerSampleLoss(loss), _Union(model), device_of(model)
    with observe(model, per_parameter=True) as handle:
        for x, y in map(_checked_pair, [data] if resolve.is_batch(data) else islice(data, batches)):
            x, y, before = to_device(x, device), to_device(y, device), handle.stats
            mean_loss(call(model, x), y, batch_size_of(x)).backward()
            # They are those of an earlier batch where the backward has reached no parameter.
            reached = None if handle.stats is None or handle.stats is before else handle.stats.per_parameter
            union.add(batch_size_of(x), reached)
    if sum(union.batch_sizes) < 2:
        raise ValueError(f"the data has {sum(union.batch_sizes)} samples, which show no noise: pass at least two")
    rows = _rows(model, union.estimates())
    if not rows:
        raise ValueError(
            "no backward has reached a parameter of the model: return a model whose output depends on them"
        )
    return Noise(rows, union.batch_sizes)


def _checked_pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        found = f"a {type(pair).__name__}" + (f" of {len(pair)}" if isinstance(pair, (tuple, list)) else "")
        raise TypeError(
            f"the data gives {found}: return a pair (x, y), or a loader of pairs, where x is what the model takes: a"
            " tensor, a tuple of arguments, or a dict of them"
        )
    return pair[0], pair[1]


class _Union:
    """The samples of several batches.

    Args:
        model: the gradient of each batch is taken out of its `.grad`.

    Attributes:
        batch_sizes: of the batches.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.batch_sizes = model, list[int]()
        # By parameter, sum_i |g_i|^2 and sum_i g_i.
        self._squares: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, batch_size: int, found: PerParameter | None) -> None:
        """Add a batch; the gradients of parameters that its backward did not reach are zero.

        Raises:
            ValueError: for gradients that are not finite.
        """
        self.batch_sizes.append(batch_size)
        if found is None:
            return
        squares = (found.traces + found.squared_grad_norms).tolist()
        gradients = {name: p.grad.to_dense() for name, p in self._model.named_parameters() if p.grad is not None}
        for name, square in zip(found, squares, strict=True):
            if not math.isfinite(square):
                raise ValueError(
                    f"the gradient of parameter '{name}' is not finite: look at the data, the loss and the weights"
                )
            self._squares[name] = self._squares.get(name, 0) + batch_size * square
            self._sums[name] = self._sums.get(name, 0) + batch_size * gradients[name].double()
        self._model.zero_grad()

    def estimates(self) -> dict[str, Tensor]:
        """Unbiased estimates of tr Sigma and |mu|^2, shape (2,), by the names of parameters."""
        number, found = sum(self.batch_sizes), {}
        for name, total in self._sums.items():
            squared_grad_norm = total.square().sum().item() / number**2
            trace = max(self._squares[name] / number - squared_grad_norm, 0)
            found[name] = torch.tensor(unbiased(number, squared_grad_norm, trace), dtype=torch.float64)
        return found


def _rows(model: nn.Module, estimates: Mapping[str, Tensor]) -> list[Row]:
    """A row for each parameter, after those of the modules that it is in, which have the sums."""
    found: dict[tuple[str, bool], tuple[int, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name in estimates:
            for key in (*((module, True) for module in modules_of(name)), (name, False)):
                elements, total = found.get(key, (0, torch.zeros(2, dtype=torch.float64)))
                found[key] = elements + parameter.numel(), total + estimates[name]
    return [Row(name, is_module, n, *total.tolist()) for (name, is_module), (n, total) in found.items()]
