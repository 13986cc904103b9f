"""The gradient noise of each parameter and module, from the samples of several batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...capture import observe
from ...diffusion.batch_gradients import batch_size_of, call, device_of, to_device
from ...diffusion.per_sample_loss import PerSampleLoss
from ...metric import PerParameter
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
    found = union.statistics()
    if found is None:
        raise ValueError(
            "no backward has reached a parameter of the model: return a model whose output depends on them"
        )
    return Noise(_rows(model, found), union.batch_sizes)


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

    def statistics(self) -> PerParameter | None:
        """Those of each parameter in the order of the model, in float64; None if no backward has reached one."""
        number, items = sum(self.batch_sizes), {}
        for name, _ in self._model.named_parameters():
            if name in self._sums:
                squared_grad_norm = (self._sums[name] / number).square().sum()
                trace = self._squares[name] / number - squared_grad_norm
                items[name] = squared_grad_norm, trace.clamp(min=0)
        return PerParameter(number, items) if items else None


def _rows(model: nn.Module, found: PerParameter) -> list[Row]:
    """A row for each parameter, after those of the modules that it is in, which have the sums."""
    elements: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name in found:
            for part in (*modules_of(name), name):
                elements[part] = elements.get(part, 0) + parameter.numel()
    # No module has the name of a parameter.
    estimates = {
        name: pair
        for table in (found, found.by_module())
        for name, *pair in zip(
            table, table.unbiased_traces.tolist(), table.unbiased_squared_grad_norms.tolist(), strict=True
        )
    }
    return [Row(name, name not in found, number, *estimates[name]) for name, number in elements.items()]
