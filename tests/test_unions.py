"""One direction from several backwards: of one forward, and deferred as trainers need it."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from capturing import B, double, loss_of
from models import MODELS, Net, mlp
from oracle import assert_close, flat, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext
from rgd_ext.capture.planner import Planner


def other_loss(output):
    return output.cos().mean() + output.square().sum()


def both_losses(output):
    return loss_of(output) + other_loss(output)


def batches():
    return [double(3, 6), double(5, 6)]


def total_of(output):
    return loss_of(output) * len(output)


def union_of(model, parts):
    """G of all samples, whose loss is the sum of `total_of` over the parts."""
    return torch.cat([per_sample_gradients(model, total_of, [x]) / len(x) for x in parts]) * sum(map(len, parts))


def backwards(model, parts):
    for x in parts:
        total_of(model(x)).backward()


def state(model, *optimizers):
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()], grads, [copy.deepcopy(o.state_dict()) for o in optimizers]


def assert_same(now, before):
    torch.testing.assert_close(now, before, rtol=0, atol=0, allow_subclasses=False)


@pytest.fixture(params=["block", "deferred"])
def united(request):
    """Runs a function, and writes the direction of its backwards in either of the two ways."""

    def in_block(handle, run):
        with handle.accumulate():
            run()

    def deferred(handle, run):
        handle.defer()
        run()
        handle.write()
        handle.defer(False)

    return in_block if request.param == "block" else deferred


# Several backwards of one forward


LAYERS = {
    "large convolution": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)), (8, 3, 20, 20)),
    "large sequences": (lambda: nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.LayerNorm(24)), (8, 50, 20)),
    "wide": (lambda: nn.Sequential(nn.Linear(20, 1200), nn.Tanh(), nn.Linear(1200, 3)), (8, 20)),
}


def model_and_input(name):
    if name in MODELS:
        build, sample = MODELS[name]
        (x,) = sample(B)
    else:
        build, shape = LAYERS[name]
        x = torch.randn(shape)
    return build().double(), x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("small", [True, False], ids=["small layers together", "one by one"])
@pytest.mark.parametrize("name", ["MLP", "GPT", "ViT", "ResNet", "LSTM classifier", *LAYERS])
def test_backwards_of_one_forward_are_of_the_same_samples(name, small, united, monkeypatch):
    if not small:
        monkeypatch.setattr("rgd_ext.capture.small.SMALL", 0)
    model, x = model_and_input(name)
    expected = weak_field(per_sample_gradients(model, both_losses, [x]))
    with rgd_ext.precondition(model) as handle:
        output = model(x)

        def run():
            loss_of(output).backward(retain_graph=True)
            other_loss(output).backward()

        united(handle, run)
        assert handle.stats.batch_size == len(x)
    assert_close(flat_grad(model), expected)


def test_backwards_of_one_forward_in_ways_that_differ(monkeypatch):
    ways = itertools.cycle(["materialise", "recompute", "ghost"])

    def settle(self, name, factor, needs_gram, empty):
        self.note(name, factor, needs_gram)
        return factor.settled(next(ways), empty)

    monkeypatch.setattr(Planner, "settle", settle)
    model, x = model_and_input("GPT")
    expected = weak_field(per_sample_gradients(model, both_losses, [x]))
    with rgd_ext.precondition(model, verify=False) as handle, handle.accumulate():
        output = model(x)
        loss_of(output).backward(retain_graph=True)
        other_loss(output).backward()
    assert_close(flat_grad(model), expected)


def test_other_batches_of_the_union_are_samples_of_their_own(model, handle, united):
    parts = batches()

    def run():
        for x in parts:
            output = model(x)
            for share in (0.3, 0.7):
                (share * total_of(output)).backward(retain_graph=True)

    united(handle, run)
    assert handle.stats.batch_size == 8
    assert_close(flat_grad(model), weak_field(union_of(model, parts)))


def test_backwards_of_some_samples_and_of_some_parameters(model, handle, united):
    x = double(B, 6)
    expected = weak_field(per_sample_gradients(model, loss_of, [x]))

    def run():
        output = model(x)
        (loss_of(output[:2]) * 2 / B).backward(retain_graph=True)
        rest = loss_of(output[2:]) * (B - 2) / B
        rest.backward(retain_graph=True, inputs=list(model[:4].parameters()))
        rest.backward(inputs=list(model[4:].parameters()))

    united(handle, run)
    assert handle.stats.batch_size == B
    assert_close(flat_grad(model), expected)


def test_heads_behind_one_call_of_a_part(united):
    parts = {"body": nn.Linear(5, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 2)}
    model, x = Net(lambda m, x: torch.cat([m.a(m.body(x)), m.b(m.body(x))], 1), **parts).double(), double(B, 5)
    expected = weak_field(per_sample_gradients(model, lambda out: loss_of(out[:, :3]) + other_loss(out[:, 3:]), [x]))
    with rgd_ext.precondition(model) as handle:
        z = model.body(x)

        def run():
            loss_of(model.a(z)).backward(retain_graph=True)
            other_loss(model.b(z)).backward()

        united(handle, run)
    assert_close(flat_grad(model), expected)


def test_a_backward_that_goes_through_one_more_call(model, handle, united):
    first, second = double(B, 6), double(B, 6)
    twin = copy.deepcopy(model)
    with rgd_ext.precondition(twin):  # one backward of the sum pairs the samples of the two calls by their places
        (both_losses(twin(first)) + both_losses(twin(second))).backward()
    expected = flat_grad(twin)

    def run():
        outputs = [model(first), model(second)]
        other_loss(outputs[0]).backward(retain_graph=True)
        (loss_of(outputs[0]) + loss_of(outputs[1])).backward(retain_graph=True)
        other_loss(outputs[1]).backward()

    united(handle, run)
    assert_close(flat_grad(model), expected)


def test_a_backward_that_ties_separate_samples_is_refused(model, handle):
    first, second = double(B, 6), double(B, 6)
    expected = weak_field(union_of(model, [first, second]))
    with handle.accumulate():
        outputs = [model(first), model(second)]
        for output in outputs:
            total_of(output).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"separate samples before.*one backward of the sum"):
            (outputs[0] * outputs[1]).sum().backward()
    assert_close(flat_grad(model), expected)
    model.zero_grad()
    with handle.accumulate():
        outputs = [model(first), model(second)]
        (total_of(outputs[0]) + total_of(outputs[1]) + (outputs[0] * outputs[1]).sum()).backward()
    assert handle.stats.batch_size == B


def test_batches_of_two_sizes_in_one_call_are_separate_samples():
    x, y = batches()
    model = Net(lambda m: (m.a(x + 0), m.b(y + 0)), a=nn.Linear(6, 4), b=nn.Linear(6, 2)).double()
    rows = [per_sample_gradients(layer, loss_of, [z]) / len(z) for layer, z in ((model.a, x), (model.b, y))]
    with rgd_ext.precondition(model, verify=False) as handle, handle.accumulate():
        for output in model():
            loss_of(output).backward()
    assert_close(flat_grad(model), weak_field(torch.block_diag(*rows) * 8))


def test_without_a_union_every_backward_of_a_forward_writes_a_direction(model, handle):
    x = double(B, 6)
    expected = sum(weak_field(per_sample_gradients(model, loss, [x])) for loss in (loss_of, other_loss))
    output = model(x)
    loss_of(output).backward(retain_graph=True)
    other_loss(output).backward()
    assert_close(flat_grad(model), expected)


# Deferred


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


# Misuse


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


# Optimizers


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
