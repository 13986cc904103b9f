"""A handle writes directions, leaves the model as it was found, and keeps nothing alive."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from capturing import captured_grad, double, loss_of
from models import ViT, mlp
from oracle import assert_close, direction, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext


def test_a_captured_model_that_nobody_holds_is_collected():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    handle = rgd_ext.precondition(model)
    loss_of(model(torch.randn(6, 4))).backward()
    references = [weakref.ref(held) for held in (model, handle, *model.parameters())]
    del model, handle
    gc.collect()
    assert all(reference() is None for reference in references)


def test_two_captured_models_have_a_direction_each():
    generator, critic = mlp().double(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = double(5, 6)
    whole = nn.Sequential(generator, critic)
    expected = per_sample_gradients(whole, loss_of, [x])
    first = sum(p.numel() for p in generator.parameters())
    with rgd_ext.precondition(generator), rgd_ext.precondition(critic):
        loss_of(critic(generator(x))).backward()
    assert_close(flat_grad(generator), weak_field(expected[:, :first]))
    assert_close(flat_grad(critic), weak_field(expected[:, first:]))


def test_gradients_accumulate_as_autograd_does():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
        once = flat_grad(model).clone()
        loss_of(model(x)).backward()
    assert torch.equal(flat_grad(model), 2 * once)


def test_spectral_every_takes_lambda_max_for_the_same_share_of_the_trace_in_between():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4)).double()
    handle = rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=3))
    exact = copy.deepcopy(model)
    reference = rgd_ext.precondition(exact, epsilon=rgd_ext.Spectral(0.5))
    shares = []
    for step in range(7):
        x, scale = torch.randn(6, 5, dtype=torch.float64), 10.0**step  # as a GradScaler changes it
        for captured in (model, exact):
            (scale * captured(x).square().sum()).backward()
        stats, want = handle.stats, reference.stats
        shares.append((stats.largest_eigenvalue / stats.trace).item())
        torch.testing.assert_close(stats.trace, want.trace)
        torch.testing.assert_close(stats.epsilon, 0.5 / stats.largest_eigenvalue)
        assert (stats.centred_gram is None) == (step % 3 != 0)
        if step % 3 == 0:
            torch.testing.assert_close(stats.largest_eigenvalue, want.largest_eigenvalue)
        else:
            assert shares[-1] == pytest.approx(shares[step - step % 3])


def test_spectral_every_goes_on_after_a_batch_that_overflowed():
    model = torch.nn.LayerNorm(4).double()
    handle = rgd_ext.precondition(model, epsilon=rgd_ext.Spectral(0.5, every=2))
    x = torch.randn(6, 4, dtype=torch.float64)
    (float("inf") * model(x).square().sum()).backward()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(handle.stats.largest_eigenvalue, handle.stats.trace)  # the bound
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_remove_leaves_the_model_as_it_was_found():
    model, x = ViT(), torch.randn(3, 1, 8, 8)
    before = [dict(m.__dict__) for m in model.modules()]
    parameters = list(model.parameters())
    handle = rgd_ext.precondition(model)
    loss_of(model(x)).backward()
    handle.remove()
    assert before == [m.__dict__ for m in model.modules()]
    assert all(p is q and not p._backward_hooks for p, q in zip(parameters, model.parameters(), strict=True))
    sum(p.square().sum() for p in parameters).backward()
    model.zero_grad()
    loss_of(model(x)).backward()
    plain = flat_grad(model)
    rgd_ext.precondition(model).remove()
    model.zero_grad()
    loss_of(model(x)).backward()
    assert torch.equal(flat_grad(model), plain)


@pytest.mark.parametrize("layer", [0, 2])
def test_forward_keeps_its_signature_and_an_override_survives(layer):
    model = mlp()
    signature = inspect.signature(model.forward)
    calls = []
    forward = model[layer].forward
    model[layer].forward = lambda x: (calls.append(1), forward(x))[1]
    override = model[layer].forward
    with rgd_ext.precondition(model):
        assert inspect.signature(model.forward) == signature
        loss_of(model(torch.randn(5, 6))).backward()
    assert calls
    assert model[layer].forward is override


def test_nothing_is_recorded_without_gradients_or_inside_torch_func():
    model, x = mlp().double(), double(5, 6)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    with rgd_ext.precondition(model) as handle:
        with torch.no_grad():
            model(x)
        assert not model(x.clone()).detach().requires_grad

        def loss(parameters, x):
            return loss_of(torch.func.functional_call(model, parameters, (x[None],)))

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        loss_of(model(x)).backward()
        assert handle.stats.batch_size == 5
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    assert_close(flat_grad(model), direction(rows))


def test_a_failed_forward_or_backward_leaves_no_trace():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(double(5, 7))
        assert all(isinstance(p, nn.Parameter) for p in model[0]._parameters.values())
        output = model(x)
        output.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(output).backward()
        hidden = model[2](model[1](model[0](x)))
        hidden.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model[4](hidden)).backward()
        assert model[0].weight.grad is None
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), expected)
