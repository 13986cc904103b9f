"""Steps of optimizers before a direction is written are refused, and `zero_grad` drops what was collected."""

import pytest
import torch
from capturing import double, loss_of
from models import mlp
from oracle import assert_close, flat, flat_grad, weak_field
from union_cases import assert_same, backwards, batches, state, union_of

import rgd_ext


@pytest.fixture(params=["RGD", "RGD of parameters", "AdamW"])
def optimizer(request, model, handle):
    parameters = model.parameters()
    if request.param == "RGD":
        handle.remove()
        return rgd_ext.RGD(model, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(parameters) if request.param == "AdamW" else rgd_ext.RGD(parameters, lr=0.1, momentum=0.9)


def handle_of(optimizer, handle):
    return getattr(optimizer, "preconditioner", None) or handle


def test_a_step_before_the_direction_is_written_is_refused(model, handle, optimizer):
    handle, parts = handle_of(optimizer, handle), batches()
    expected = weak_field(union_of(model, parts))
    handle.defer()
    backwards(model, parts)
    before = state(model, optimizer)
    with pytest.raises(RuntimeError, match=r"handle\.write\(\) before the step, and before gradients are clipped"):
        optimizer.step()
    assert_same(state(model, optimizer), before)
    handle.write()
    assert_close(flat_grad(model), expected)
    optimizer.step()
    assert not torch.equal(flat(model.parameters()), flat(before[0]))


def test_a_step_inside_a_block_is_refused(model, handle, optimizer):
    before = flat(model.parameters()).clone()
    with handle_of(optimizer, handle).accumulate():
        optimizer.step()  # of nothing
        backwards(model, batches())
        with pytest.raises(RuntimeError, match=r"block of handle\.accumulate\(\).*after the block"):
            optimizer.step()
        assert torch.equal(flat(model.parameters()), before)
    optimizer.step()
    assert not torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_with_a_closure_is_refused_if_that_does_not_write(by_name, model, handle, optimizer):
    handle, parts = handle_of(optimizer, handle), batches()

    def step(closure):
        return optimizer.step(closure=closure) if by_name else optimizer.step(closure)

    def closure():  # of the last batch, as in Lightning
        backwards(model, parts[1:])
        if writes:
            handle.write()
        return torch.tensor(3.0)

    handle.defer()
    for writes in (False, True):
        optimizer.zero_grad()
        handle.drop()
        backwards(model, parts[:1])
        before = state(model, optimizer)
        if not writes:
            with pytest.raises(RuntimeError, match=r"handle\.write\(\) before the step"):
                step(closure)
            assert_same(state(model, optimizer), before)
    expected = weak_field(union_of(model, parts))
    assert step(closure) == 3
    assert_close(flat_grad(model), expected)
    assert not torch.equal(flat(model.parameters()), flat(before[0]))


def test_steps_of_other_models_are_free(model, handle):
    other = mlp()
    handle.defer()
    backwards(model, batches())
    optimizer = rgd_ext.RGD(other, lr=0.1)
    loss_of(other(torch.randn(5, 6))).backward()
    optimizer.step()
    optimizer.zero_grad()
    handle.write()
    assert handle.stats.batch_size == 8


def test_a_block_that_raised_refuses_no_steps(model, handle):
    optimizer = rgd_ext.RGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="without a tensor") as held, handle.accumulate():  # whose frames live on
        backwards(model, [*batches(), None])
    assert held.traceback
    optimizer.step()


@pytest.mark.parametrize("order", ["before", "after"])
def test_zero_grad_keeps_a_step_that_is_left_out_from_the_next_union(order, model):
    optimizer = rgd_ext.RGD(model, lr=0.0)
    handle = optimizer.preconditioner
    handle.defer()
    left_out, used = [double(4, 6)], batches()
    backwards(model, left_out)
    if order == "after":
        optimizer.zero_grad()
    for _ in range(2):
        if order == "before":
            optimizer.zero_grad()
        backwards(model, used)
        handle.write()
        assert_close(flat_grad(model), weak_field(union_of(model, used)))
        optimizer.step()
        if order == "after":
            optimizer.zero_grad()


def test_zero_grad_of_some_parameters_drops_the_whole_union(model, handle):
    optimizer = rgd_ext.RGD(model[0].parameters(), lr=0.1)
    with handle.accumulate():
        backwards(model, batches())
        optimizer.zero_grad()
        backwards(model, batches()[:1])
    assert handle.stats.batch_size == 3
