"""The statistics of the gradient of each parameter by itself, and their sums by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..gradients import Moments, sum_of_moments
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
    """`ParameterStats` by the names of parameters, in the order of the backward, or by those of modules.

    |g|^2 and tr D add up over parameters; norms and noise scales do not.

    Args:
        moments: those of each part of the gradients, by its name.

    Attributes:
        moments: as given.
    """

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self.moments = dict(moments)
        self._places = {name: place for place, name in enumerate(moments)}

    def __getitem__(self, name: str) -> ParameterStats:
        place = self._places[name]
        return ParameterStats(self.grad_norms[place], self.traces[place], self.noise_scales[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def squared_grad_norms(self) -> Tensor:
        """|g|^2 of each, shape (P,)."""
        return _stacked([moments.squared_grad_norm for moments in self.moments.values()])

    @cached_property
    def traces(self) -> Tensor:
        """tr D of each, shape (P,)."""
        return _stacked([moments.squared_norms for moments in self.moments.values()]).mean(1)

    @property
    def grad_norms(self) -> Tensor:
        """|g| of each, shape (P,)."""
        return self.squared_grad_norms.sqrt()

    @property
    def unbiased_traces(self) -> Tensor:
        """Unbiased estimates of tr Sigma, shape (P,); see `Statistics.unbiased_trace`."""
        return self._unbiased[0]

    @property
    def unbiased_squared_grad_norms(self) -> Tensor:
        """Unbiased estimates of |mu|^2, shape (P,); see `Statistics.unbiased_squared_grad_norm`."""
        return self._unbiased[1]

    @cached_property
    def _unbiased(self) -> tuple[Tensor, Tensor]:
        batch_size = len(next(iter(self.moments.values())).squared_norms)
        return unbiased(batch_size, self.squared_grad_norms, self.traces)

    @property
    def noise_scales(self) -> Tensor:
        """The gradient noise scale of each, in samples, shape (P,)."""
        return self.unbiased_traces / self.unbiased_squared_grad_norms

    def by_module(self) -> PerParameter:
        """The same of all parameters of each module, those of its children included, by its name; "" is the model.

        A tied parameter counts where it comes first in the model.
        """
        inside: dict[str, list[Moments]] = {}
        for name, moments in self.moments.items():
            for module in modules_of(name):
                inside.setdefault(module, []).append(moments)
        return PerParameter({module: sum_of_moments(parts) for module, parts in inside.items()})

    def to_dict(self) -> dict[str, np.ndarray]:
        """Columns of shape (P,), as `pandas.DataFrame` takes them: name, grad_norm, trace and noise_scale."""
        values = torch.stack([self.grad_norms, self.traces, self.noise_scales]).cpu().numpy()
        return {"name": np.array([*self]), **dict(zip(ParameterStats._fields, values, strict=True))}

    def __repr__(self) -> str:
        columns = self.to_dict()
        width = max(map(len, [*self, "name"]))
        lines = [f"{'name':<{width}}" + "".join(f"{field:>13}" for field in ParameterStats._fields)]
        for name, *values in zip(*columns.values(), strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{value:>13.4g}" for value in values))
        return "\n".join(lines)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])


def modules_of(parameter: str) -> list[str]:
    """The names of the modules that a parameter of this name is in, from the model, "", inwards."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
