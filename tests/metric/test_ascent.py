"""`Ascent` gives the gradient at the point of steepest ascent where D is the Hessian, and says where it is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, diffusion_matrix, relative_error

import rgd_ext
from rgd_ext import Ascent


class Logistic:
    """Logistic regression on data whose labels were drawn from a model of the same kind."""

    def __init__(self, samples=200_000, d=4):
        self.x = torch.randn(samples, d, dtype=torch.float64)
        self.truth = torch.linspace(-1, 1, d, dtype=torch.float64)
        self.y = torch.bernoulli((self.x @ self.truth).sigmoid())

    def losses(self, w):
        return F.binary_cross_entropy_with_logits(self.x @ w, self.y, reduction="none")

    def gradients(self, w):
        return ((self.x @ w).sigmoid() - self.y)[:, None] * self.x

    def hessian(self, w):
        p = (self.x @ w).sigmoid()
        return (self.x * (p * (1 - p))[:, None]).T @ self.x / len(self.x)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    return Logistic()


def test_epsilon_makes_the_step_of_length_rho(problem):
    grads = problem.gradients(problem.truth + 0.1)
    mean, d = grads.mean(0), diffusion_matrix(grads)
    (step,), stats = rgd_ext.direction(grads, epsilon=Ascent(0.3))
    assert_close(stats.epsilon, -0.3 / mean.norm())
    assert_close(step, mean + d @ (0.3 * mean / mean.norm()))


def test_near_a_fit_the_direction_is_the_gradient_at_the_point_of_ascent(problem):
    w = problem.truth + 0.02
    grads = problem.gradients(w)
    # Labels are those of the truth, at a distance of 0.04, and the data are a sample.
    assert relative_error(diffusion_matrix(grads), problem.hessian(w)) < 0.02
    mean = grads.mean(0)
    errors = []
    for rho in (0.2, 0.1, 0.05):
        (step,), _ = rgd_ext.direction(grads, epsilon=Ascent(rho))
        there = problem.gradients(w + rho * mean / mean.norm()).mean(0)
        errors.append(((step - there).norm() / (there - mean).norm()).item())  # of what the ascent changes
    assert errors[0] > errors[1] > errors[2]  # to first order in rho
    assert errors[2] < 0.05  # what is left for small rho is the difference of D from the Hessian


def test_far_from_a_fit_it_is_another_direction(problem):
    w = problem.truth + 3.0
    grads = problem.gradients(w)
    mean = grads.mean(0)
    (step,), _ = rgd_ext.direction(grads, epsilon=Ascent(0.05))
    there = problem.gradients(w + 0.05 * mean / mean.norm()).mean(0)
    assert (step - there).norm() > (there - mean).norm()


def test_where_the_training_data_are_interpolated_d_is_much_smaller_than_the_hessian(problem):
    # Labels that can be separated, and weights for which the loss is nearly zero.
    separable = copy.copy(problem)
    separable.y = (problem.x @ problem.truth > 0).double()
    w = 30 * problem.truth
    grads = separable.gradients(w)
    assert separable.losses(w).mean() < 0.05
    assert diffusion_matrix(grads).trace() < 0.5 * separable.hessian(w).trace()


def test_it_goes_beyond_the_bound_of_equation_6_and_remains_a_direction_of_descent(problem):
    grads = problem.gradients(problem.truth + 0.05)
    (step,), stats = rgd_ext.direction(grads, epsilon=Ascent(10.0))
    assert stats.epsilon.abs() > 1 / torch.linalg.eigvalsh(diffusion_matrix(grads))[-1]
    assert step @ grads.mean(0) > grads.mean(0).square().sum()


@pytest.mark.parametrize("scale", [64.0, lambda: 64.0], ids=["number", "function"])
def test_it_follows_the_scale_of_the_loss(scale, problem):
    grads = problem.gradients(problem.truth + 0.05)
    (expected,), _ = rgd_ext.direction(grads, epsilon=Ascent(0.3))
    (scaled,), _ = rgd_ext.direction(64 * grads, epsilon=Ascent(0.3, loss_scale=scale))
    assert_close(scaled, 64 * expected)


def test_no_gradient_is_no_ascent():
    (step,), stats = rgd_ext.direction(torch.tensor([[1.0], [-1.0]]), epsilon=Ascent(0.1))
    assert stats.epsilon == 0
    assert step == 0
