"""Several backwards, of several batches or of one forward, give one direction."""

import copy
import itertools

import pytest
import torch
from capturing import B, captured_grad, double, expected_direction, loss_of, without_small_layers
from models import GPT, Net, mlp
from oracle import assert_close, flat_grad, per_sample_gradients, weak_field
from planning_cases import STRATEGIES, with_strategies
from torch import nn
from union_cases import LAYERS, batches, both_losses, model_and_input, other_loss, total_of, union_of

import rgd_ext


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


@pytest.mark.parametrize("small", [True, False], ids=["small layers together", "one by one"])
@pytest.mark.parametrize("name", ["MLP", "GPT", "ViT", "ResNet", "LSTM classifier", *LAYERS])
def test_backwards_of_one_forward_are_of_the_same_samples(name, small, united, monkeypatch):
    if not small:
        without_small_layers(monkeypatch)
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


def test_backwards_of_one_forward_may_take_strategies_that_differ(monkeypatch):
    strategies = itertools.cycle(STRATEGIES)
    taken = with_strategies(monkeypatch, lambda factor: next(strategies))
    model, x = model_and_input("GPT")
    expected = weak_field(per_sample_gradients(model, both_losses, [x]))
    with rgd_ext.precondition(model, verify=False) as handle, handle.accumulate():
        output = model(x)
        loss_of(output).backward(retain_graph=True)
        other_loss(output).backward()
    assert set(taken) == set(STRATEGIES)
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


def test_backwards_of_some_samples_and_of_some_parameters_add_up(model, handle, united):
    x = double(B, 6)
    expected = expected_direction(model, x)

    def run():
        output = model(x)
        (loss_of(output[:2]) * 2 / B).backward(retain_graph=True)
        rest = loss_of(output[2:]) * (B - 2) / B
        rest.backward(retain_graph=True, inputs=list(model[:4].parameters()))
        rest.backward(inputs=list(model[4:].parameters()))

    united(handle, run)
    assert handle.stats.batch_size == B
    assert_close(flat_grad(model), expected)


def test_heads_behind_one_call_of_a_part_may_have_a_backward_each(united):
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


def test_a_backward_through_one_more_call_pairs_the_samples_of_both(model, handle, united):
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


def test_accumulate_gives_the_direction_of_the_union():
    model = GPT().double()
    parts = [torch.randint(11, (3, 9)), torch.randint(11, (5, 7))]
    rows = [per_sample_gradients(model, lambda out: loss_of(out) * len(out), [x]) / len(x) for x in parts]
    expected = weak_field(torch.cat(rows) * 8)
    with rgd_ext.precondition(model) as handle:
        with handle.accumulate():
            for x in parts:
                (loss_of(model(x)) * len(x)).backward()
            assert model.head.weight.grad is None
        assert handle.stats.batch_size == 8
    missing = model.positions.weight.grad[7:]
    assert_close(flat_grad(model), expected)
    assert missing.abs().sum() > 0


def test_accumulate_keeps_batches_that_came_in_one_buffer():
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches, grads = torch.randint(11, (2, 6, 3)), torch.randn(2, 6, 3).double()
    directions = []
    x, grad = torch.empty_like(batches[0]), torch.empty_like(grads[0])
    for fill in (torch.Tensor.copy_, lambda buffer, values: values):
        model.zero_grad()
        with rgd_ext.precondition(model) as handle, handle.accumulate():
            for batch, of_output in zip(batches, grads, strict=True):
                model(fill(x, batch)).backward(fill(grad, of_output))
        directions.append(flat_grad(model))
    assert torch.equal(*directions)


def _raise_after(function):
    function()
    raise ZeroDivisionError


def test_accumulate_writes_nothing_when_its_block_raises():
    model = mlp()
    with rgd_ext.precondition(model) as handle:
        with pytest.raises(ZeroDivisionError), handle.accumulate():
            _raise_after(loss_of(model(torch.randn(5, 6))).backward)
        assert model[0].weight.grad is None
        with pytest.raises(RuntimeError, match="nested"), handle.accumulate(), handle.accumulate():
            pass


def test_a_union_may_take_another_strategy_than_its_batches(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    x = double(5, 2, 4)
    expected = captured_grad(model, x)
    model.zero_grad()
    taken = with_strategies(monkeypatch, lambda factor: "ghost" if factor.batch_size == 1 else "materialise")
    without_small_layers(monkeypatch)
    with rgd_ext.precondition(model) as handle, handle.accumulate():
        for sample in x:
            loss_of(model(sample[None])).div(len(x)).backward()
    assert set(taken) == {"ghost", "materialise"}
    assert_close(flat_grad(model), expected)
