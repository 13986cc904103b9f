"""Backwards may go to some parameters only; those inside of another one, and changed inputs, are noticed."""

import copy
import gc
import weakref

import pytest
import torch
from capturing import captured_grad, double, expected_direction, loss_of
from models import Net, mlp
from oracle import assert_close, flat, flat_grad
from torch import nn

import rgd_ext


def test_backward_to_some_parameters_gives_the_direction_of_these_alone():
    model, x = mlp().double(), double(5, 6)
    frozen = copy.deepcopy(model)
    for parameter in frozen[:4].parameters():
        parameter.requires_grad_(False)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward(inputs=list(model[4].parameters()))
    assert model[0].weight.grad is None
    assert_close(flat([p.grad for p in model[4].parameters()]), captured_grad(frozen, x))


@pytest.mark.parametrize("build", [mlp, lambda: nn.LayerNorm(6)], ids=["mlp", "LayerNorm"])
def test_batch_sizes_that_disagree_in_one_backward_are_refused(build):
    model = build()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"batch sizes disagree.*3 samples.*5"):
        (loss_of(model(torch.randn(3, 6))) + loss_of(model(torch.randn(5, 6)))).backward()


def test_a_node_called_by_hand_is_refused():
    model = nn.Linear(4, 3)
    with rgd_ext.precondition(model):
        output = model(torch.randn(5, 4))
        with pytest.raises((RuntimeError, TypeError)):  # nodes in Python cannot be called at all
            output.grad_fn(torch.ones_like(output))


def test_inputs_changed_in_place_are_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with rgd_ext.precondition(model):
        hidden = model[0](torch.randn(5, 4))
        output = model[1](hidden)
        hidden.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(output).backward()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hooks_on_parameters_are_refused(hook, when):
    model, x = mlp(), torch.randn(5, 6)
    if when == "before":
        getattr(model[0].weight, hook)(lambda value: None)
    with pytest.raises(ValueError, match=r"'0\.weight' has gradient hooks"):  # noqa: PT012
        rgd_ext.precondition(model)
        getattr(model[0].weight, hook)(lambda value: None)
        loss_of(model(x)).backward()
    assert model[2].weight.grad is None


@pytest.mark.parametrize("where", [0, 2])
def test_a_backward_that_ran_inside_another_is_noticed(where):
    model, x, other = mlp(), torch.randn(5, 6), torch.randn(4, 6)

    with rgd_ext.precondition(model):
        loss = loss_of(model(other))
        hidden = model[:where](x.requires_grad_())
        hidden.register_hook(lambda grad: loss.backward())
        with pytest.raises(RuntimeError, match=r"ran inside another one.*paused\(\)"):
            loss_of(model[where:](hidden)).backward()
        written = flat_grad(model)
        model.zero_grad()
        loss_of(model(other)).backward()
        assert torch.equal(flat_grad(model), written)


def test_a_backward_inside_another_that_has_not_met_the_model_yet_is_exact():
    model, x, other = mlp().double(), torch.randn(5, 6).double(), torch.randn(4, 6).double()
    directions = []
    with rgd_ext.precondition(model):
        output, loss = model(x), loss_of(model(other))

        def inner(grad):
            loss.backward()
            directions.append(flat_grad(model))
            model.zero_grad()

        output.register_hook(inner)
        loss_of(output).backward()
        directions.append(flat_grad(model))
    for inputs, found in zip((other, x), directions, strict=True):
        assert_close(found, captured_grad(copy.deepcopy(model), inputs))


def test_a_forward_inside_another_backward_is_refused():
    model, x, kept = nn.LayerNorm(4), torch.randn(5, 4, requires_grad=True), []

    def run(grad):
        with torch.enable_grad():
            kept.append(model(x))

    with rgd_ext.precondition(model):
        passed = x.clone()
        passed.register_hook(run)
        passed.sum().backward()
        with pytest.raises(RuntimeError, match="ran inside a backward"):
            (kept[0] + model(x)).sum().backward()


def test_a_backward_that_fails_is_thrown_away_whole():
    seen = []

    def fail(grad):
        raise KeyError("in the middle")

    def forward(m, x):
        hidden, failing = m.a(x), len(seen) == 0
        if failing and hidden.requires_grad:
            hidden.register_hook(fail)
        return m.b(hidden.tanh())

    model, x = Net(forward, a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double(), double(5, 4)
    with rgd_ext.precondition(model, verify=False):
        output = model(x)
        output.register_hook(lambda grad: seen.append(weakref.ref(grad)))
        with pytest.raises(KeyError, match="in the middle"):
            loss_of(output).backward()
        del output
        gc.collect()
        (grad,) = seen
        assert grad() is None
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected_direction(model, x))
