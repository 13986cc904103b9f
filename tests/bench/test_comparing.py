"""What packages give for the cases of the comparison, and how it is judged."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from oracle import per_sample_gradients, relative_error
from torch import nn

from bench.compare import FEATURES, RESULTS
from bench.comparing.attempts import ABSENT, EXACT, OTHER, WRONG, Attempt, attempt, tried
from bench.comparing.cases import CASES, Case, vectors
from bench.comparing.cells import LONGEST, code, short
from bench.comparing.models import Centred, mlp
from bench.comparing.packages import PACKAGES
from bench.comparing.packages.found import AbsentError, Found
from bench.comparing.problem import Problem
from bench.comparing.reference import CONTRIBUTIONS, JACOBIAN, contributions, jacobian
from bench.measuring.environment import version

RECORD = json.loads((RESULTS / FEATURES).read_text())
FEW = "MLP", "embedding tied to the head", "layer called twice", "inputs with time first", "BatchNorm in training mode"


def plain(problem):
    """A package that is right."""
    return Found({"gradients": problem.rows()}, problem.model)


def outcomes(name, package):
    """The outcome of each attempt of a package on a case, now and in the record."""
    now = tried(name, CASES[name], {package: PACKAGES[package]}).attempts[package]
    (recorded,) = [result for result in RECORD["cases"] if result["case"] == name]
    before = {way: (found["outcome"], found["meaning"]) for way, found in recorded["attempts"][package].items()}
    return {way: (found.outcome, found.meaning) for way, found in now.items()}, before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.compiled])
def test_ours_gives_what_the_record_says(name):
    if "GPT-2" in name:
        pytest.importorskip("transformers")
    now, before = outcomes(name, "rgd_ext")
    assert now == before


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "rgd_ext"])
@pytest.mark.parametrize("name", FEW)
def test_other_packages_give_what_the_record_says(name, package):
    distribution = PACKAGES[package].distribution
    if distribution != "torch" and version(distribution) != RECORD["environment"]["packages"][distribution]:
        pytest.skip(f"{distribution} of the record is not installed")
    now, before = outcomes(name, package)
    assert now == before


def test_reference_is_the_gradient_of_each_sample():
    case = CASES["MLP"]
    with case.dtype():
        problem = case.problem()

        def loss(output):
            return nn.functional.cross_entropy(output, problem.y)

        expected = per_sample_gradients(problem.model, loss, [problem.x])
        assert relative_error(problem.rows(), expected) < 1e-13


def test_contributions_and_derivatives_add_up_to_the_gradient_and_differ():
    case = CASES["forward that mixes samples"]
    with case.dtype():
        problem = case.problem()
        loss = problem.loss(problem.model, problem.x, problem.y)
        whole = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, problem.trained())])
        found = [function(problem) for function in (Problem.rows, contributions, jacobian)]
    assert [relative_error(rows.mean(0), whole) < 1e-12 for rows in found] == [False, True, True]
    assert relative_error(found[1], found[2]) > 0.1


def test_attempts_are_judged_by_the_gradients():
    case = CASES["MLP"]
    assert attempt(case, plain).outcome == EXACT
    slightly = attempt(case, lambda problem: Found({"gradients": problem.rows() * 1.001}, problem.model))
    assert (slightly.outcome, round(slightly.error, 5)) == (WRONG, 0.001)
    mean = attempt(case, lambda problem: Found({"gradients": problem.rows().mean(0)}, problem.model))
    assert (mean.outcome, mean.error) == (WRONG, None)

    def partly_undefined(problem):
        rows = problem.rows()
        return Found({"gradients": rows, "Gramian": rows @ rows.T * torch.nan}, problem.model)

    assert attempt(case, partly_undefined).outcome == WRONG


def test_gradients_under_autocast_are_compared_with_those_of_float32():
    found = attempt(replace(CASES["MLP"], half=True), plain)
    assert found.outcome == EXACT
    assert found.error > 1e-4, "the rounding errors of bfloat16"


def test_worst_of_several_results_counts():
    def half_right(problem):
        rows = problem.rows()
        return Found({"gradients": rows, "Gramian": rows @ rows.T * 2}, problem.model)

    assert attempt(CASES["MLP"], half_right).outcome == WRONG


def test_errors_and_what_is_absent_are_noted():
    def refusing(problem):
        raise NotImplementedError("no such layer\nand more")

    def absent(problem):
        raise AbsentError("no unions")

    assert attempt(CASES["MLP"], refusing).about == "NotImplementedError: no such layer"
    assert attempt(CASES["MLP"], absent) == Attempt(ABSENT, about="no unions")


@pytest.mark.parametrize("kind", ["torch.nn.modules.rnn.LSTM", "models.Own"])
def test_first_warning_about_the_result_is_told_in_one_line(kind):
    """One about hooks is not, and neither is one about a module that only holds others."""
    told = f"Extension saving to grad_batch does not have an extension for Module <class '{kind}'>"

    def warning(problem):
        layer = nn.Linear(2, 1)
        layer.register_full_backward_hook(lambda *_: None)
        layer(torch.ones(1, 2)).backward()  # torch warns that no input needs a gradient
        warnings.warn(f"{told}\nand more", stacklevel=1)
        warnings.warn("word " * LONGEST, stacklevel=1)
        return plain(problem)

    warned = attempt(CASES["MLP"], warning).warned
    if "torch" in kind:
        assert warned == told
    else:
        assert len(warned) == LONGEST
        assert code(warned).endswith("word …`")


@pytest.mark.parametrize(("function", "meaning"), [(contributions, CONTRIBUTIONS), (jacobian, JACOBIAN)])
def test_rows_with_another_meaning_are_named(function, meaning):
    case = Case(lambda: vectors(Centred()), mixes=True)
    found = attempt(case, lambda problem: Found({"gradients": function(problem)}, problem.model))
    assert (found.outcome, found.meaning) == (OTHER, meaning)


class Other(nn.Sequential):
    pass


def test_models_that_are_wrapped_or_replaced_are_noticed():
    def of_another_type(problem):
        return Found({"gradients": problem.rows()}, Other(*problem.model))

    def wrapping(problem):
        return Found({"gradients": problem.rows()}, nn.Sequential(problem.model))

    def replacing(problem):
        other = replace(problem, model=mlp(nn.ReLU()))
        return Found({"gradients": other.rows()}, other.model, instead=other.model)

    kept = CASES["type and `state_dict` of the model kept"]
    assert attempt(kept, plain).outcome == EXACT
    assert attempt(kept, wrapping).meaning == "0.0.weight"
    assert attempt(kept, of_another_type).meaning == "Other"
    assert attempt(CASES["MLP"], wrapping).outcome == EXACT, "nobody has asked that it be kept"
    found = attempt(CASES["MLP"], replacing)
    assert found.another_model
    assert short(found, "exact") == "of another model"
