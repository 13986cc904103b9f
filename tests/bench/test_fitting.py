"""The problems of least squares, and the methods that solve them."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from bench.fitting import equations, problems
from bench.fitting.methods import ON_ALL, ON_SAMPLES, PEER, Method, as_text, settings
from bench.fitting.problems import Batch, Problem
from bench.fitting.result import Curve, Result, section
from bench.fitting.runs import Budget, best_setting, compare, race

BUDGET = Budget(seconds=0.02, seeds=1, turns=2)


class Solution(nn.Module):
    """A function in the place of a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("build", "solution"),
    [
        (equations.poisson, lambda x: (torch.sin(math.pi * x) / (x * (1 - x))).prod(-1, keepdim=True)),
        (equations.heat, lambda x: equations.heat_solution(x)[:, None]),
    ],
)
def test_the_known_solution_of_an_equation_has_no_residual(build, solution):
    problem, model = build(), Solution(solution)
    assert problem.error(model) < 1e-16
    assert problem.solution_error(model) < 1e-12
    assert problem.error(problem.network()) > 1e-3


# Of torch.func itself, when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
def test_both_ways_to_differentiate_agree():
    problem = equations.poisson()
    (batch,), model = problem.batches, problem.network()
    torch.testing.assert_close(batch.by_transforms(model, *batch.inputs), batch.residual(model, *batch.inputs))


def small():
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    return Problem((1, 8, 1), (Batch(problems.difference, (x, torch.sin(3 * x))),))


def test_samples_are_drawn_without_repetition():
    drawn = small().drawn(10)
    assert [len(part) for part in drawn.batches[0].inputs] == [10, 10]
    assert len(drawn.batches[0].inputs[0].unique()) == 10
    assert len(small().drawn(None).batches[0].inputs[0]) == 30


@pytest.mark.parametrize(("methods", "name"), [(methods, name) for methods in (ON_ALL, ON_SAMPLES) for name in methods])
def test_every_method_lowers_the_error(methods, name):
    if name == PEER:
        pytest.importorskip("torch_levenberg_marquardt")
    torch.manual_seed(0)
    problem = small()
    model, method = problem.network(), methods[name]
    step, before = method.start(problem, model, **method.settings[0]), problem.error(model)
    assert sum(step(0.0) for _ in range(20)) >= 20
    assert problem.error(model) < before


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
def test_the_other_package_solves_an_equation_on_one_batch_only():
    pytest.importorskip("torch_levenberg_marquardt")
    failed, starts = {}, {"cholesky": partial(ON_ALL[PEER].start, solver="cholesky")}
    race(equations.heat(), starts, 0, BUDGET, failed)
    assert failed == {"cholesky": "NotImplementedError: it takes residuals of one batch"}
    problem = equations.poisson()
    model = problem.network()
    before, step = problem.error(model), starts["cholesky"](problem, model)
    for _ in range(3):
        step(0.0)
    assert problem.error(model) < before


def test_a_method_that_fails_has_no_curve_but_a_reason():
    def failing(problem, model):
        raise ValueError("cannot")

    failed = {}
    curves = race(small(), {"failing": failing, "Adam": lambda *given: lambda share: 1}, 0, BUDGET, failed)
    assert failed == {"failing": "ValueError: cannot"}
    assert set(curves) == {"Adam"}


def test_the_setting_with_the_least_error_is_chosen():
    def start(problem, model, size):
        def step(share):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(size)
            return 1

        return step

    result = Result("small")
    method = Method(start, settings(size=[math.nan, 100.0, 0.0]))
    assert best_setting("filled", method, small(), BUDGET, result) == {"size": 0.0}
    assert set(result.tuning["filled"]) == {"size nan", "size 100.0", "size 0.0"}


def test_a_method_of_ours_that_fails_raises():
    def failing(problem, model):
        raise ValueError("cannot")

    with pytest.raises(AssertionError, match="GaussNewton: ValueError: cannot"):
        compare("small", small(), {"GaussNewton": Method(failing), "other": Method(failing)}, BUDGET)
    result = compare("small", small(), {"other": Method(failing)}, BUDGET)
    assert result.left_out == {"other": "ValueError: cannot"}
    assert "left out: ValueError: cannot" in str(section(result))


def test_shares_of_the_time_grow_up_to_all_of_it():
    shares = Budget(seconds=1, seeds=1, turns=5).shares()
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_settings_are_all_combinations():
    assert settings(lr=[1, 2], size=[3]) == [{"lr": 1, "size": 3}, {"lr": 2, "size": 3}]
    assert [as_text(setting) for setting in settings(lr=[1], decays=[True, False])] == ["lr 1, decays", "lr 1"]


def test_errors_of_ours_are_compared_with_the_least_of_the_others():
    result = Result("small", settings=dict.fromkeys(["GaussNewton", "Adam", "L-BFGS"], ""))
    for name, errors in {"GaussNewton": (1, 2, 9), "Adam": (7, 8, 9), "L-BFGS": (5, 6, 99)}.items():
        result.curves[name] = [Curve([0, 4], [0.0, 1.0], [10.0, error]) for error in errors]
    assert [row[-1] for row in section(result)] == ["3", "", ""]
