"""The statistics of the gradient of each parameter by itself, and their sums by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .noise import unbiased


class ParameterStats(NamedTuple):
    """The statistics of one parameter, or of all parameters of a module.

    With g the part of the mean gradient that belongs to it, and D the covariance of that part of the g_i:

    Attributes:
        grad_norm: |g|, a scalar.
        trace: tr D, a scalar.
        noise_scale: the gradient noise scale of this part, in samples, a scalar; see `Statistics.noise_scale`.
    """

    grad_norm: Tensor
    trace: Tensor
    noise_scale: Tensor


class PerParameter(Mapping[str, ParameterStats]):
    """`ParameterStats` by the names of parameters, or of modules, in the order of the model.

    |g|^2 and tr D add up over parameters; norms and noise scales do not. P is the number of names.

    Args:
        batch_size: the number of samples, B.
        items: |g|^2 and tr D, scalars, of the part of the gradients that belongs to each parameter, by its name.

    Attributes:
        batch_size: as given.
        squared_grad_norms: |g|^2 of each, shape (P,).
        traces: tr D of each, shape (P,).
    """

    def __init__(self, batch_size: int, items: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.batch_size, self._places = batch_size, {name: place for place, name in enumerate(items)}
        self.squared_grad_norms, self.traces = map(_stacked, zip(*items.values(), strict=True))

    def __getitem__(self, name: str) -> ParameterStats:
        place = self._places[name]
        return ParameterStats(self.grad_norms[place], self.traces[place], self.noise_scales[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def grad_norms(self) -> Tensor:
        """|g| of each, shape (P,)."""
        return self.squared_grad_norms.sqrt()

    @property
    def unbiased_traces(self) -> Tensor:
        """Unbiased estimates of tr Sigma, shape (P,); see `Statistics.unbiased_trace`."""
        return unbiased(self.batch_size, self.squared_grad_norms, self.traces)[0]

    @property
    def unbiased_squared_grad_norms(self) -> Tensor:
        """Unbiased estimates of |mu|^2, shape (P,); see `Statistics.unbiased_squared_grad_norm`."""
        return unbiased(self.batch_size, self.squared_grad_norms, self.traces)[1]

    @cached_property
    def noise_scales(self) -> Tensor:
        """The gradient noise scale of each, in samples, shape (P,)."""
        return self.unbiased_traces / self.unbiased_squared_grad_norms

    def by_module(self) -> PerParameter:
        """The same for each module, of all parameters in it and its children, by its name; "" is the model.

        A tied parameter counts where it comes first in the model.
        """
        inside: dict[str, list[int]] = {}
        for name, place in self._places.items():
            for module in modules_of(name):
                inside.setdefault(module, []).append(place)
        squared, traces = self.squared_grad_norms, self.traces
        sums = {module: (squared[places].sum(), traces[places].sum()) for module, places in inside.items()}
        return PerParameter(self.batch_size, sums)

    def to_dict(self) -> dict[str, np.ndarray]:
        """Columns of shape (P,), as `pandas.DataFrame` takes them; the unbiased ones may be averaged over batches."""
        columns = {
            "grad_norm": self.grad_norms,
            "trace": self.traces,
            "noise_scale": self.noise_scales,
            "unbiased_trace": self.unbiased_traces,
            "unbiased_squared_grad_norm": self.unbiased_squared_grad_norms,
        }
        values = torch.stack([*columns.values()]).cpu().numpy()
        return {"name": np.array([*self]), **dict(zip(columns, values, strict=True))}

    def __repr__(self) -> str:
        columns, names = self.to_dict(), [name or "(model)" for name in self]
        width = max(map(len, ["name", *names]))
        lines = [f"{'name':<{width}}" + "".join(f"{field:>13}" for field in ParameterStats._fields)]
        for name, *values in zip(names, *(columns[field] for field in ParameterStats._fields), strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{value:>13.4g}" for value in values))
        return "\n".join(lines)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])


def modules_of(parameter: str) -> list[str]:
    """The names of the modules that a parameter of this name is in, from the model, "", inwards."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
