"""The forward of a captured model may be wrapped, taken out and bound anew."""

import copy
import inspect
from functools import wraps
from types import MethodType

import pytest
import torch
from capturing import attributes, captured_grad, loss_of
from models import mlp
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


def wrapped(function):
    @wraps(function)
    def forward(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return forward


def prepare(model):
    """As accelerate.Accelerator.prepare does in mixed precision, with a factor in place of autocast."""
    model._original_forward = model.forward
    model.forward = MethodType(wrapped(model.forward.__func__), model)


def twice(module, x):
    return 2 * type(module).forward(module, x)


def test_a_forward_on_the_instance_is_bound_to_the_copy():
    model, x = mlp(), torch.randn(5, 6)
    model.forward = MethodType(twice, model)
    with rgd_ext.precondition(model):
        clones = [copy.deepcopy(model)]
        assert clones[0].forward == MethodType(twice, clones[0])
        prepare(model)
        clones.append(copy.deepcopy(model))
    for factor, clone in zip((2.0, 4.0), clones, strict=True):
        nn.init.zeros_(clone[4].weight)
        nn.init.ones_(clone[4].bias)
        assert torch.equal(clone(x), torch.full((5, 3), factor))


def test_a_forward_on_the_instance_that_is_no_method_is_that_of_the_copy():
    model, x = mlp(), torch.randn(5, 6)
    model.forward = lambda x: 2 * type(model).forward(model, x)
    with rgd_ext.precondition(model):
        assert copy.deepcopy(model).forward is copy.copy(model).forward
        prepare(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def unwrap(model):
    """As accelerate.Accelerator.unwrap_model(keep_fp32_wrapper=False)."""
    forward, original = model.forward, model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)


def test_a_wrapper_around_the_captured_forward_may_be_taken_off_again():
    model, x = mlp(), torch.randn(5, 6)
    output, expected = model(x).detach(), captured_grad(model, x)
    signature, before = inspect.signature(model.forward), attributes(model)
    handle = rgd_ext.precondition(model)
    prepare(model)
    clone = copy.deepcopy(model)
    for p in clone.parameters():
        nn.init.zeros_(p)
    assert not clone(x).any()
    assert inspect.signature(model.forward) == inspect.signature(clone.forward) == signature
    assert torch.equal(model(x), 2 * output)
    unwrap(model)
    assert torch.equal(model(x), output)
    model.zero_grad()
    loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)
    handle.remove()
    assert attributes(model) == before


def test_a_wrapper_below_the_capture_is_unwrapped_after_its_removal():
    model, x = mlp(), torch.randn(5, 6)
    expected = captured_grad(model, x)
    prepare(model)
    handle = rgd_ext.precondition(model)
    unwrap(model)
    with pytest.raises(TypeError, match=r"bound to it a second time.*call \.remove\(\).*`del model\.forward`"):
        model(x)
    handle.remove()
    del model.forward
    model.zero_grad()
    assert_close(captured_grad(model, x), expected)
    prepare(model)
    with rgd_ext.precondition(model):
        pass
    unwrap(model)
    model.zero_grad()
    assert_close(captured_grad(model, x), expected)
