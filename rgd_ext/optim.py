"""The optimizer: torch.optim.SGD along the RGD direction."""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import nn

from .capture import Preconditioner, precondition
from .capture.preconditioner import is_captured
from .capture.steps import unwritten
from .metric import Inverse, Policy


class RGD(torch.optim.SGD):
    """Relativistic gradient descent, x <- x - lr (I - eps D) g, eq. (10).

    Everything but the direction is `torch.optim.SGD`: momentum, weight decay, parameter groups, schedulers, state_dict,
    hooks, `maximize`, `foreach`, `fused`. The direction is in `.grad` after every `backward()`; what the handle only
    collects (`accumulate`, `defer`) has to be written before `step()`, a RuntimeError otherwise. A copy of model and
    optimizer is not captured and goes on with plain gradients: capture it anew. A second `RGD(model)`, as of a trainer
    that is run twice, takes the capture over, and the first one refuses to step.

    Args:
        model: the model to capture with `rgd_ext.precondition`; or parameters or groups, as torch.optim takes them, of
            a model that has been captured already.
        epsilon, inverse, batch_norm, memory_budget, verify, batch_dim: of `rgd_ext.precondition`; only with a model.
        lr, momentum, dampening, weight_decay, nesterov, others: of `torch.optim.SGD`.

    Attributes:
        preconditioner: the handle of the capture, or None for parameters.

    Raises:
        ValueError: if trainable parameters were never captured, or as `rgd_ext.precondition`.
        TypeError: if options of the capture come with parameters, whose capture has its own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,)))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.preconditioner.stats.batch_size
        16
    """

    # No default in the class: wrappers of Lightning are subclasses of it, which ask the optimizer for what they lack.
    preconditioner: Preconditioner | None

    def __init__(
        self,
        model,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        epsilon: Policy | float | None = None,
        inverse: Inverse | None = None,
        batch_norm: Literal["error", "contribution"] | None = None,
        memory_budget: float | None = None,
        verify: bool | None = None,
        batch_dim: int | None = 0,
        **others,
    ) -> None:
        options = {"epsilon": epsilon, "inverse": inverse, "batch_norm": batch_norm}
        options |= {"memory_budget": memory_budget, "verify": verify}
        options = {name: value for name, value in options.items() if value is not None}
        options |= {} if batch_dim == 0 else {"batch_dim": batch_dim}
        is_model = isinstance(model, nn.Module)
        if options and not is_model:
            raise TypeError(
                f"RGD got {', '.join(options)} with parameters: pass the model, or give them to rgd_ext.precondition"
            )
        if is_model:  # what SGD refuses is refused before anything is captured
            torch.optim.SGD(model.parameters(), lr, momentum, dampening, weight_decay, nesterov, **others)
        handle = precondition(model, **options) if is_model else None
        parameters = model.parameters() if is_model else model
        super().__init__(parameters, lr, momentum, dampening, weight_decay, nesterov, **others)
        self.preconditioner = handle
        if handle is not None:
            handle.owner = weakref.ref(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("preconditioner", None)  # of a copy

    def state_dict(self) -> dict:
        """As that of `torch.optim.SGD`, which can load it; what the handle has to remember is in 'preconditioner'."""
        memory = {} if self.preconditioner is None else self.preconditioner.state_dict()
        return super().state_dict() | ({"preconditioner": memory} if memory else {})

    def load_state_dict(self, state_dict: dict) -> None:
        """From `state_dict`, or that of a `torch.optim.SGD`; ValueError if it does not fit, and nothing has changed."""
        if self.preconditioner is None:
            super().load_state_dict(state_dict)
            return
        before = self.preconditioner.state_dict()
        self.preconditioner.load_state_dict(state_dict.get("preconditioner", {}))
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.preconditioner.load_state_dict(before)
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; drops also what was collected and not written, of the whole model."""
        for union in unwritten(self):
            union.drop()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """As `torch.optim.Optimizer.add_param_group`; ValueError for trainable parameters that are not captured."""
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif not isinstance(params, set):  # torch refuses sets, whose order changes
            params = list(params)
        for position, entry in enumerate(params):
            name, parameter = entry if isinstance(entry, tuple) else (f"number {position}", entry)
            if isinstance(parameter, torch.Tensor) and parameter.requires_grad and not is_captured(parameter):
                raise ValueError(
                    f"parameter {name} of shape {tuple(parameter.shape)} was never captured, so backward() writes its"
                    " plain gradient: pass the model, RGD(model, ...), or call rgd_ext.precondition(model) first"
                )
        super().add_param_group({**param_group, "params": params})
