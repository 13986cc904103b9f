"""Directions are deferred until `handle.write()`, as trainers need it."""

import copy
import gc
import weakref

import pytest
import torch
from capturing import double, loss_of
from models import mlp
from oracle import assert_close, flat, flat_grad, per_sample_gradients, weak_field
from torch import nn
from union_cases import (
    assert_same,
    backwards,
    batches,
    both_losses,
    model_and_input,
    other_loss,
    state,
    total_of,
    union_of,
)

import rgd_ext


def test_write_gives_the_direction_of_the_union_since_the_last(model, handle):
    handle.defer()
    for parts in (batches(), [double(4, 6)]):
        model.zero_grad()
        backwards(model, parts)
        assert model[0].weight.grad is None
        handle.write()
        assert handle.stats.batch_size == sum(map(len, parts))
        assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def test_write_adds_to_gradients(model, handle):
    parts = batches()
    with handle.paused():
        other_loss(model(parts[0])).backward()
    plain = flat_grad(model).clone()
    handle.defer()
    backwards(model, parts)
    handle.write()
    assert_close(flat_grad(model), plain + weak_field(union_of(model, parts)))


def test_write_without_a_backward_changes_nothing(model, handle):
    handle.defer()
    handle.write()
    assert (model[0].weight.grad, handle.stats) == (None, None)
    backwards(model, batches())
    handle.write()
    before, stats = state(model), handle.stats
    handle.write()
    assert_same(state(model), before)
    assert handle.stats is stats


def test_a_backward_that_failed_has_no_part(model, handle):
    parts = batches()
    handle.defer()
    backwards(model, parts[:1])
    x = double(4, 6).requires_grad_()
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        total_of(model(x)).backward()
    backwards(model, parts[1:])
    handle.write()
    assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def test_plans_matrices_proofs_and_pauses_leave_what_is_collected_alone(model, handle):
    parts = batches()
    loss, y = nn.functional.mse_loss, double(5, 3)
    expected = rgd_ext.DiffusionMatrix.from_batch(copy.deepcopy(model), loss, parts[1], y).to_dense()
    handle.defer()
    backwards(model, parts[:1])
    handle.plan(parts[1])
    assert_close(rgd_ext.DiffusionMatrix.from_batch(model, loss, parts[1], y).to_dense(), expected)
    assert rgd_ext.verify(model, parts[1]).samples
    with handle.paused():
        torch.autograd.grad(loss_of(model(parts[1])), list(model.parameters()))
    assert model[0].weight.grad is None
    backwards(model, parts[1:])
    handle.write()
    assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def test_a_union_is_written_under_autocast_in_full_precision():
    model, x = model_and_input("GPT")
    expected = weak_field(per_sample_gradients(model, both_losses, [x]))
    with rgd_ext.precondition(model) as handle:
        handle.defer()
        output = model(x)
        loss_of(output).backward(retain_graph=True)
        other_loss(output).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            handle.write()
    assert_close(flat_grad(model), expected)


def test_scaled_losses_are_written_before_they_are_unscaled(model):
    parts = batches()
    expected = weak_field(union_of(model, parts))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), rgd_ext.RGD(model, lr=0.1)
    optimizer.preconditioner.defer()
    before = flat(model.parameters()).clone()
    for x in parts:
        scaler.scale(total_of(model(x))).backward()
    optimizer.preconditioner.write()
    scaler.unscale_(optimizer)
    assert_close(flat_grad(model), expected)
    scaler.step(optimizer)
    assert_close(flat(model.parameters()), before - 0.1 * expected)


def test_a_deferring_model_that_nobody_holds_is_collected():
    model = mlp()
    handle = rgd_ext.precondition(model)
    handle.defer()
    loss_of(model(torch.randn(5, 6))).backward()
    references = [weakref.ref(held) for held in (model, handle, *model.parameters())]
    del model, handle
    gc.collect()
    assert all(reference() is None for reference in references)


def test_removing_drops_what_is_collected(model):
    optimizer = rgd_ext.RGD(model, lr=0.1)
    optimizer.preconditioner.defer()
    backwards(model, batches())
    optimizer.preconditioner.remove()
    assert model[0].weight.grad is None
    optimizer.step()
    backwards(model, batches())
    assert model[0].weight.grad is not None


def test_gradient_hooks_are_refused_before_anything_is_lost(model, handle):
    parts = batches()
    handle.defer()
    backwards(model, parts)
    hook = model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"'0\.weight' has gradient hooks.*remove them"):
        handle.write()
    assert model[0].weight.grad is None
    hook.remove()
    handle.write()
    assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def _nested(handle):
    with handle.accumulate():
        pass


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (_nested, r"handle defers.*handle\.defer\(False\) first"),
        (lambda handle: handle.defer(False), r"defer\(False\).*handle\.write\(\) first, or handle\.drop\(\)"),
    ],
    ids=["accumulate", "defer(False)"],
)
@pytest.mark.parametrize("remedy", ["write", "drop"])
def test_what_is_deferred_is_not_lost(call, match, remedy, model, handle):
    parts = batches()
    handle.defer()
    backwards(model, parts[:1])
    with pytest.raises(RuntimeError, match=match):
        call(handle)
    handle.defer()
    backwards(model, parts[1:])
    getattr(handle, remedy)()
    handle.defer(False)
    if remedy == "write":
        assert_close(flat_grad(model), weak_field(union_of(model, parts)))
    else:
        assert model[0].weight.grad is None
    _nested(handle)


@pytest.mark.parametrize("call", ["defer", "write"])
def test_blocks_are_not_deferred(call, model, handle):
    parts = batches()
    with handle.accumulate():
        backwards(model, parts)
        with pytest.raises(RuntimeError, match=r"inside of a block of handle\.accumulate\(\).*outside of the block"):
            getattr(handle, call)()
    assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def test_write_without_deferring_names_defer(model, handle):
    handle.defer(False)
    with pytest.raises(RuntimeError, match=r"does not defer.*call handle\.defer\(\) before"):
        handle.write()
