"""The optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..capture.residuals import ResidualCapture
from .arguments import check_all_pulled, check_flag, check_group, checked_rows, wants_double
from .evaluation import Evaluator
from .levenberg_marquardt import least_factor, search
from .problem import Problem
from .report import Report
from .residuals import Closure
from .snapshot import Position, Snapshot

_COPIED = (
    "this GaussNewton is a copy, whose model is not captured: make GaussNewton(model, ...) for the copy of the model,"
    " and load_state_dict the state"
)
# In the state of a parameter.
_STATE = "previous_step"


class GaussNewton(torch.optim.Optimizer):
    """Least squares by Gauss-Newton and Levenberg-Marquardt: x <- x - lr J^T (J J^T + damping)^-1 r.

    It minimises |r|^2 / 2 for residuals r of a model, such as model(x) - y, or those of a differential equation. J is
    their Jacobian. It is not formed: the step is a combination of the gradients of the residuals, whose weights solve a
    system with their Gramian J J^T, (N, N) for N residuals; or J^T J, (d, d), if there are fewer weights than
    residuals. That pays off up to some thousand residuals a step, or as many weights.

    The model may be differentiated with respect to its inputs inside of the closure, by `torch.autograd.grad(...,
    create_graph=True)` or torch.func, as far as its parameters are those of nn.Linear. It is an ordinary model outside
    of `step`. The `.grad` of parameters is neither read nor written.

    Args:
        model: computes the residuals; captured as by `rgd_ext.observe`, with the same restrictions.
        lr: the step size; 1 is the whole Gauss-Newton step.
        damping: what is added to the diagonal of J J^T: the larger, the shorter the step, and the more along the
            gradient. In units of a squared gradient of a residual.
        adaptive: whether a step is tried, and taken only if |r|^2 falls; otherwise the damping grows. It follows by how
            much |r|^2 falls (Levenberg-Marquardt, by Nielsen's rule), and is kept in `param_groups`. The closure is
            called again for each trial. False for mini-batches: every step is taken, and the damping stays.
        params: parameters or groups of the model, as torch.optim takes them, with an `lr`, `damping`, `weight_decay` or
            `momentum` of their own; by default all. The fit leaves others out, those with lr=0, and frozen ones.
        weight_decay: adds weight_decay |x|^2 / 2 to the loss.
        momentum: for mini-batches: the damping pulls the step towards `momentum` times the step before, in place of
            zero (SPRING: Goldshlager, Abrahamsen and Lin, arXiv 2401.10190).
        geodesic: whether to correct the steps by the curvature of the residuals along them (Transtrum and Sethna, arXiv
            1201.5885), for one more call of the closure each: fewer steps for smooth problems. Needs `adaptive`.
        max_rows: the largest number of residuals in a step; None allows for a system of 16,384 unknowns.
        dtype: torch.float64 to compute J J^T in float64 for a float32 model, which allows for less damping. The linear
            system itself is always solved in float64.
        memory_budget: as for `rgd_ext.precondition`.
        verify: prove that the rows of J are the gradients of the residuals, in steps 1, 2, 4, 8, ... and whenever the
            closure or the shapes of its residuals are new. The closure is called once more for it.

    Attributes:
        report: what the last step has done, or None before the first.

    Raises:
        TypeError, ValueError: for invalid arguments, and as `rgd_ext.observe`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        >>> optimizer = rgd_ext.GaussNewton(model)
        >>> for _ in range(50):
        ...     loss = optimizer.step(lambda: (model(x) - torch.sin(3 * x))[:, 0])
        >>> bool(loss < 1e-6)
        True
    """

    report: Report | None

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 1e-3,
        adaptive: bool = True,
        *,
        params: ParamsT | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        geodesic: bool = False,
        max_rows: int | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: float | None = None,
        verify: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that computes the residuals")
        for name, flag in (("adaptive", adaptive), ("geodesic", geodesic), ("verify", verify)):
            check_flag(name, flag)
        if geodesic and not adaptive:
            raise ValueError("GaussNewton(geodesic=True) with adaptive=False: pass adaptive=True, which it needs")
        is_double, max_rows = wants_double(dtype), checked_rows(max_rows)
        self._own, self._adaptive, self._geodesic = set(model.parameters()), adaptive, geodesic
        defaults = {"lr": lr, "damping": damping, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._evaluator: Evaluator | None = Evaluator(
            ResidualCapture(model, memory_budget, self), is_double, max_rows, verify
        )
        self.report = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        of_a_copy: dict[str, Any] = {"_evaluator": None, "report": None, "_own": set(), "_adaptive": False}
        for name, value in of_a_copy.items():
            self.__dict__.setdefault(name, value)  # a copy has no capture

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError, ValueError: for invalid options, or parameters that are not of the model.
        """
        check_group({**self.defaults, **param_group}, self._adaptive)
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
        for entry in params:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(parameter, Tensor) and parameter not in self._own:
                raise ValueError(
                    f"params has a tensor of shape {tuple(parameter.shape)} that is no parameter of the model: pass"
                    " some of model.parameters(), or a module that contains it as the model"
                )
        super().add_param_group({**param_group, "params": params})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from `state_dict`.

        Raises:
            ValueError: if it is the state of another optimizer, or does not fit; nothing is changed then.
        """
        for group in state_dict["param_groups"]:
            if missing := self.defaults.keys() - group.keys():
                raise ValueError(
                    f"the state has groups without {', '.join(sorted(missing))}, as those of another optimizer: load"
                    " one from the state_dict() of a GaussNewton"
                )
        super().load_state_dict(state_dict)

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]  # no other closure
        """Take a step.

        Args:
            closure: returns the residuals of a batch: (B,), or (B, k) for k of each sample; or a tuple of these, for
                several batches with sizes of their own. Residual i depends on sample i alone, and samples lie along
                dimension 0 of the model's inputs. Called several times, it returns the same residuals for the same
                parameters. It runs no backward.

        Returns:
            |r|^2 / 2 before the step, a scalar.

        Raises:
            TypeError, ValueError: for invalid residuals, such as a loss, more than `max_rows`, those that mix samples,
                or that are not finite; if there is nothing to fit.
            RuntimeError: if the closure runs a backward, or takes derivatives that cannot be captured; if the linear
                system is singular; for a copy, or a capture that was removed or taken over.

        Whatever is raised, parameters, buffers, random number generators and the state are as before. If no trial
        reduces the loss, the parameters and the damping are as before, and `report.accepted` is False. On a GPU with
        adaptive=False a step that is not finite is left out.
        """
        evaluator = self._evaluator
        if evaluator is None:
            raise RuntimeError(_COPIED)
        if not callable(closure):
            raise TypeError(f"closure is of type {type(closure).__name__}: pass a function that returns the residuals")
        for group in self.param_groups:
            check_group(group, self._adaptive)
        check_all_pulled(self.param_groups)
        groups = {p: group for group in self.param_groups for p in group["params"] if p.requires_grad}
        if not groups:
            raise ValueError("there is nothing to fit: all parameters are frozen")
        groups = {p: group for p, group in groups.items() if group["lr"]}
        start = evaluator.snapshot()
        try:
            self.report = self._take_step(evaluator, closure, groups, start)
        except BaseException:
            start.restore()
            raise
        return self.report.loss

    def _take_step(
        self,
        evaluator: Evaluator,
        closure: Closure,
        groups: dict[nn.Parameter, dict[str, Any]],
        start: Snapshot,
    ) -> Report:
        """Take a step, and tell what it has done."""
        if not groups:  # as a scheduler may have it
            residuals = evaluator.residuals(closure)
            return Report(residuals.square().sum() / 2, len(residuals), 0, False, 0, 0.0, None, False, 0.0)
        equations = evaluator.equations(closure, [*groups], start, self._adaptive)
        parameters, number = equations.jacobian.parameters, equations.jacobian.rows

        def evaluate() -> Tensor:
            start.restore()
            return evaluator.residuals(closure, number)

        with torch.no_grad():
            problem = Problem(equations, [groups[p] for p in parameters], [self._previous(p) for p in parameters])
            if not self._adaptive:
                return self._fixed_step(problem)
            after = evaluator.snapshot()
            report = self._adaptive_step(problem, evaluate)
            after.restore()
            return report

    def _previous(self, parameter: nn.Parameter) -> Tensor | None:
        """The step before, if it is kept for momentum."""
        found: Tensor | None = self.state[parameter].get(_STATE) if parameter in self.state else None
        return found

    def _adaptive_step(self, problem: Problem, evaluate: Callable[[], Tensor]) -> Report:
        """Look for a step by which the loss falls, take it, and choose the damping of the next one."""
        position = Position(problem.equations.jacobian.parameters)
        try:
            found = search(problem, position, evaluate, self._geodesic)
        except BaseException:
            position.restore()
            raise
        damping = self.param_groups[0]["damping"]
        if found.is_accepted:
            factor = max(found.next_factor, least_factor(problem, damping))
            for group in self.param_groups:
                group["damping"] *= factor
        return problem.report(
            accepted=found.is_accepted,
            trials=found.trials,
            damping=found.factor * damping,
            gain_ratio=found.gain_ratio,
            geodesic=found.is_accelerated,
        )

    def _fixed_step(self, problem: Problem) -> Report:
        """Take the step."""
        step, parameters = problem.step(), problem.equations.jacobian.parameters
        is_finite = None if problem.equations.waits else torch.stack([s.isfinite().all() for s in step]).all()
        for parameter, group, s in zip(parameters, problem.groups, step, strict=True):
            parameter.sub_(group["lr"] * (s if is_finite is None else torch.where(is_finite, s, 0)))
            if group["momentum"]:
                previous, kept = self._previous(parameter), s.to(parameter)
                if is_finite is not None:
                    kept = torch.where(is_finite, kept, torch.zeros_like(kept) if previous is None else previous)
                self.state[parameter][_STATE] = kept
        return problem.report(damping=self.param_groups[0]["damping"])
