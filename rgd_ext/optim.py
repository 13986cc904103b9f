"""The optimizer: torch.optim.SGD along the RGD direction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from .capture import Preconditioner, precondition
from .capture.captures import is_captured
from .capture.steps import forget_gradients
from .distributed import Mode, ProcessGroupLike
from .metric import Epsilon, Inverse, Weights


class RGD(torch.optim.SGD):
    """Relativistic gradient descent, x <- x - lr (I - eps D) g, eq. (10).

    Everything but the direction is `torch.optim.SGD`: momentum, weight decay, parameter groups, schedulers, state_dict,
    hooks, `maximize`, `foreach`, `fused`. The direction is in `.grad` after every `backward()`; what the handle only
    collects (`accumulate`, `defer`) has to be written before `step()`, which raises RuntimeError otherwise. A copy of
    model and optimizer is not captured and goes on with plain gradients: capture it anew. A second `RGD(model)`, as of
    a trainer that is run twice, takes the capture over, and the first one refuses to step.

    Args:
        model: the model to capture with `rgd_ext.precondition`; or parameters or groups, as torch.optim takes them, of
            a model that has been captured already.
        epsilon, inverse, weights, batch_norm, memory_budget, verify, batch_dim, process_group, mode: of
            `rgd_ext.precondition`; only with a model. With `weights` the direction is sum_i w_i g_i in place of
            (I - eps D) g.
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

    # The class has no default for it: Lightning wraps an optimizer in a subclass of its class, which looks up in the
    # optimizer only the attributes that it lacks itself.
    preconditioner: Preconditioner | None

    def __init__(
        self,
        model: nn.Module | ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        epsilon: Epsilon | None = None,
        inverse: Inverse | None = None,
        weights: Weights | None = None,
        batch_norm: Literal["error", "contribution"] | None = None,
        memory_budget: float | None = None,
        verify: bool | None = None,
        batch_dim: int | None = 0,
        process_group: ProcessGroupLike | None = None,
        mode: Mode = "exact",
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {"epsilon": epsilon, "inverse": inverse, "weights": weights}
        options |= {"batch_norm": batch_norm, "memory_budget": memory_budget, "verify": verify}
        options["process_group"] = process_group
        options = {name: value for name, value in options.items() if value is not None}
        options |= {} if batch_dim == 0 else {"batch_dim": batch_dim}
        options |= {} if mode == "exact" else {"mode": mode}
        handle: Preconditioner | None = None
        if isinstance(model, nn.Module):
            # SGD checks its arguments before the model is captured.
            torch.optim.SGD(model.parameters(), lr, momentum, dampening, weight_decay, nesterov, **others)
            handle = precondition(model, **options)
            parameters: ParamsT = model.parameters()
        elif options:
            raise TypeError(
                f"RGD got {', '.join(options)} with parameters: pass the model, or give them to rgd_ext.precondition"
            )
        else:
            parameters = model
        super().__init__(parameters, lr, momentum, dampening, weight_decay, nesterov, **others)
        self.preconditioner = handle
        if handle is not None:
            handle.belongs_to(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has no annotations there
        self.__dict__.setdefault("preconditioner", None)  # a copy has no capture

    def state_dict(self) -> dict[str, Any]:
        """The state of `torch.optim.SGD`, which can load it, and under 'preconditioner' that of the handle, if any."""
        memory = {} if self.preconditioner is None else self.preconditioner.state_dict()
        return super().state_dict() | ({"preconditioner": memory} if memory else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from `state_dict`, or from that of a `torch.optim.SGD`.

        Raises:
            ValueError: if the state does not fit; nothing is changed then.
        """
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
        """As `torch.optim.Optimizer.zero_grad`; also drops what was collected and not written, of the whole model."""
        forget_gradients(self)
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
