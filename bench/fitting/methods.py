"""Methods of least squares: `rgd_ext.GaussNewton`, optimizers of torch, and another package."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

import rgd_ext

from .problems import Batch, Problem, mean_square

# Given the share of the time that has passed, makes some steps and returns how many.
Step = Callable[[float], int]
Setting = Mapping[str, object]


@dataclass(frozen=True)
class Method:
    """A function that starts the method on a model, and the settings among which the best is chosen.

    `start` has the arguments (problem, model) and those of the setting.
    """

    start: Callable[..., Step]
    settings: Sequence[Setting] = ({},)


def gauss_newton(problem: Problem, model: nn.Module, geodesic: bool = False) -> Step:
    """Levenberg-Marquardt steps on all samples."""
    optimizer = rgd_ext.GaussNewton(model, geodesic=geodesic)

    def step(_: float) -> int:
        optimizer.step(lambda: problem.residuals(model))
        return 1

    return step


def gauss_newton_on_samples(problem: Problem, model: nn.Module, lr: float, damping: float, size: int) -> Step:
    """Steps with constant damping on random samples."""
    optimizer = rgd_ext.GaussNewton(model, lr, damping, adaptive=False)

    def step(share: float) -> int:
        decay(optimizer, lr, share)
        samples = problem.drawn(size)
        optimizer.step(lambda: samples.residuals(model))
        return 1

    return step


def first_order(
    make: Callable[..., torch.optim.Optimizer],
    problem: Problem,
    model: nn.Module,
    lr: float,
    decays: bool,
    size: int | None = None,
) -> Step:
    """Steps along gradients, on `size` random samples or on all, with a rate that is constant or decays."""
    optimizer = make(model.parameters(), lr=lr)

    def step(share: float) -> int:
        if decays:
            decay(optimizer, lr, share)
        optimizer.zero_grad()
        mean_square(problem.drawn(size).residuals(model)).backward()
        optimizer.step()
        return 1

    return step


def decay(optimizer: torch.optim.Optimizer, lr: float, share: float) -> None:
    """Let the rate fall from `lr` to zero along a cosine of the time."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 + math.cos(math.pi * share)) / 2


def lbfgs(problem: Problem, model: nn.Module) -> Step:
    """L-BFGS on all samples. A step is an iteration; a call makes up to 20."""
    # Without tolerances, so that it goes on as long as the others.
    optimizer = torch.optim.LBFGS(
        model.parameters(), line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    state = optimizer.state[next(model.parameters())]

    def closure() -> Tensor:
        optimizer.zero_grad()
        # Of the mean, torch would leave out more updates of its Hessian, those with small inner products.
        loss = sum(residuals.square().sum() for residuals in problem.residuals(model)) / 2
        loss.backward()
        return loss

    def step(_: float) -> int:
        before = state.get("n_iter", 0)
        optimizer.step(closure)
        return state["n_iter"] - before

    return step


class Residuals(nn.Module):
    """A model whose outputs are the residuals of a batch, (B, k)."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model, self.residual = model, batch.by_transforms or batch.residual

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.residual(self.model, *inputs).view(len(inputs[0]), -1)


def levenberg_marquardt(problem: Problem, model: nn.Module, solver: str, size: int | None = None) -> Step:
    """Steps of the package torch-levenberg-marquardt on `size` random samples, or on all.

    It raises where the package is not installed, or does not support the problem.
    """
    from torch_levenberg_marquardt.training import LevenbergMarquardtModule

    if len(problem.batches) > 1:
        raise NotImplementedError("it takes residuals of one batch")
    # It would print a line for every matrix that it cannot factorise.
    logging.getLogger("torch_levenberg_marquardt").setLevel(logging.ERROR)
    training = LevenbergMarquardtModule(Residuals(model, problem.batches[0]), solve_method=solver)

    def step(_: float) -> int:
        inputs = [*problem.drawn(size).batches[0].inputs]
        training.training_step(inputs, inputs[0].new_zeros(len(inputs[0]), 1))
        return 1

    return step


def settings(**choices: Sequence[object]) -> list[Setting]:
    """All combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def as_text(setting: Setting) -> str:
    """The setting as tables show it: values by name, and flags that are set."""
    shown = {name: value for name, value in setting.items() if value is not False}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items())


OURS, PEER = "GaussNewton", "torch-levenberg-marquardt"
SOLVERS = ("cholesky", "qr")
adam = partial(first_order, torch.optim.Adam)
sgd = partial(first_order, partial(torch.optim.SGD, momentum=0.9, nesterov=True))

# For problems whose residuals are few enough for a Gauss-Newton step on all of them.
ON_ALL = {
    OURS: Method(gauss_newton),
    f"{OURS}, geodesic": Method(partial(gauss_newton, geodesic=True)),
    "Adam": Method(adam, settings(lr=[3e-3, 1e-2, 3e-2], decays=[False, True])),
    "SGD, momentum": Method(sgd, settings(lr=[1e-3, 1e-2, 1e-1], decays=[False, True])),
    "L-BFGS": Method(lbfgs),
    PEER: Method(levenberg_marquardt, settings(solver=SOLVERS)),
}
# For problems where a step has to be on a few samples.
ON_SAMPLES = {
    OURS: Method(gauss_newton_on_samples, settings(lr=[0.3, 1.0], damping=[0.3, 1.0], size=[16])),
    "Adam": Method(adam, settings(lr=[3e-3, 1e-2, 3e-2], decays=[True], size=[64, 256])),
    "SGD, momentum": Method(sgd, settings(lr=[0.1, 1.0], decays=[True], size=[64, 256])),
    "L-BFGS": Method(lbfgs),
    PEER: Method(levenberg_marquardt, settings(solver=SOLVERS, size=[16])),
}
