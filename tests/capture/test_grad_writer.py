"""A step along the sum of several directions, as gradient accumulation makes it without a word to the handle, warns."""

import pytest
import torch
from capturing import double, loss_of
from models import mlp
from oracle import assert_close, flat_grad, weak_field
from torch import nn
from union_cases import backwards, batches, union_of

import rgd_ext

SUM = r"sum of \d directions.*rgd_ext\.handle_of\(model\)\.accumulate\(\)"


@pytest.fixture(params=["RGD", "AdamW"])
def optimizer(request, model, handle):
    parameters = model.parameters()
    return rgd_ext.RGD(parameters, lr=0.1) if request.param == "RGD" else torch.optim.AdamW(parameters)


def clip(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def unscale(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)


@pytest.mark.parametrize("before_step", [None, clip, unscale])
def test_a_step_along_a_sum_warns_once(before_step, model, handle, optimizer):
    for is_first in (True, False):
        optimizer.zero_grad()
        backwards(model, [*batches(), double(4, 6)])
        if before_step:
            before_step(model, optimizer)
        if is_first:
            with pytest.warns(UserWarning, match="sum of 3 directions") as caught:
                optimizer.step()
            assert [warning.filename for warning in caught] == [__file__]
        else:
            optimizer.step()


def test_the_remedy_of_the_warning_gives_the_direction_of_the_batch(model, optimizer):
    parts = batches()
    expected = weak_field(union_of(model, parts))
    with rgd_ext.handle_of(model).accumulate():
        backwards(model, parts)
    assert_close(flat_grad(model), expected)
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_are_set_to_zero_are_no_part_of_a_sum(set_to_none, model, optimizer):
    for part in batches() * 2:
        optimizer.zero_grad(set_to_none)
        backwards(model, [part])
        optimizer.step()


@pytest.mark.parametrize("is_seen", [False, True])
def test_zeros_through_data_are_not_seen_and_the_warning_names_what_is(is_seen, model, handle, optimizer, recwarn):
    for part in batches():
        for parameter in model.parameters():
            if is_seen:
                optimizer.zero_grad()  # the remedy
            elif parameter.grad is not None:
                parameter.grad.data.zero_()
        backwards(model, [part])
        optimizer.step()
    said = ["optimizer.zero_grad() before each; p.grad.data.zero_() is not seen" in str(w.message) for w in recwarn]
    assert said == ([] if is_seen else [True])


def test_a_direction_of_zeros_is_part_of_a_sum(model, handle, optimizer):
    (model(batches()[0]) * 0).sum().backward()
    assert not flat_grad(model).any()
    backwards(model, batches()[1:])
    with pytest.warns(UserWarning, match="sum of 2 directions"):
        optimizer.step()


def test_a_sum_that_was_dropped_is_not_stepped_along(model, handle, optimizer):
    backwards(model, batches())
    optimizer.zero_grad(set_to_none=not isinstance(optimizer, rgd_ext.RGD))
    optimizer.step()


def test_gradients_that_were_never_set_to_zero_are_part_of_a_sum(model, handle, optimizer):
    first, second = batches()
    backwards(model, [first])
    optimizer.step()
    backwards(model, [second])
    with pytest.warns(UserWarning, match=r"optimizer\.zero_grad\(\) before each"):
        optimizer.step()


def test_directions_may_be_written_in_inference_mode(model, handle, optimizer):
    handle.defer()
    for _ in range(2):
        optimizer.zero_grad()
        backwards(model, batches())
        with torch.inference_mode():
            handle.write()
        optimizer.step()


def test_a_direction_is_added_to_a_sparse_gradient(model, handle):
    (x,), weight = batches()[:1], model[0].weight
    backwards(model, [x])
    direction, before = weight.grad.clone(), torch.randn_like(weight)
    weight.grad = before.to_sparse()
    backwards(model, [x])
    assert_close(weight.grad, before + direction)


def test_a_closure_that_adds_up_directions_warns(model, handle, optimizer):
    def closure():
        optimizer.zero_grad()
        backwards(model, batches())
        return torch.tensor(0.0)

    with pytest.warns(UserWarning, match=SUM):
        optimizer.step(closure)


@pytest.mark.parametrize("capture", [rgd_ext.observe, lambda model: rgd_ext.precondition(model, epsilon=0.0)])
def test_plain_gradients_may_add_up(capture):
    model = mlp().double()
    with capture(model):
        backwards(model, batches())
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("rule", [{"weights": rgd_ext.weights.Clip(1.0)}, {"epsilon": 0.1}, {}])
def test_directions_of_every_other_rule_add_up_to_a_sum(rule):
    model = mlp().double()
    with rgd_ext.precondition(model, **rule):
        backwards(model, batches())
        with pytest.warns(UserWarning, match=SUM):
            torch.optim.SGD(model.parameters(), lr=0.1).step()


class Heads(nn.Module):
    """Two outputs of one layer."""

    def __init__(self):
        super().__init__()
        self.trunk, self.heads = nn.Linear(6, 4), nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x, head):
        return self.heads[head](self.trunk(x).tanh())


def test_directions_add_up_where_they_meet():
    model = Heads().double()
    trunk = torch.optim.SGD(model.trunk.parameters(), lr=0.1)
    with rgd_ext.precondition(model):
        for index in range(2):
            loss_of(model(double(5, 6), index)).backward()
        with pytest.warns(UserWarning, match=SUM):
            trunk.step()


def test_directions_of_other_parameters_do_not_add_up():
    model = Heads().double()
    trunk, first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.trunk, *model.heads))
    with rgd_ext.precondition(model):
        for index in range(2):
            trunk.zero_grad()
            loss_of(model(double(5, 6), index)).backward()
        for optimizer in (trunk, first, second):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        for module in model.heads:
            loss_of(module(double(5, 4))).backward()
        second.step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_optimizers_of_parts_step_along_single_directions(set_to_none):
    model = mlp().double()
    optimizers = [torch.optim.SGD(model[index].parameters(), lr=0.1) for index in (0, 2, 0, 2)]
    with rgd_ext.precondition(model):
        for optimizer in optimizers:  # as for the two networks of a GAN that were captured as one model
            optimizer.zero_grad(set_to_none)
            backwards(model, batches()[:1])
            optimizer.step()


def parts_with_optimizers():
    """A model, and an optimizer for each half of it."""
    model = mlp().double()
    return model, rgd_ext.precondition(model), *(rgd_ext.RGD(m.parameters(), lr=0.1) for m in (model[:2], model[2:]))


def test_a_sum_stays_one_when_other_gradients_are_set_to_zero():
    model, _, first, second = parts_with_optimizers()
    backwards(model, batches())
    first.zero_grad()
    with pytest.warns(UserWarning, match="sum of 2 directions"):
        second.step()


def test_a_direction_stays_part_of_a_sum_when_other_gradients_are_set_to_zero():
    model, _, first, second = parts_with_optimizers()
    for optimizer in (second, first):  # at first.zero_grad() its part has a sum, and the other one direction
        backwards(model, batches()[:1])
        optimizer.zero_grad()
    backwards(model, batches()[:1])
    first.step()
    with pytest.warns(UserWarning, match="sum of 2 directions"):
        second.step()


def test_steps_of_other_parameters_do_not_warn(model, handle):
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    backwards(model, batches())
    other.step()
    with pytest.warns(UserWarning, match=SUM):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
