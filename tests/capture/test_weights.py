"""Captured models with rules for the weights, and models that are only observed."""

import copy
from unittest.mock import Mock

import pytest
import torch
from capturing import B, captured_grad, double, loss_of, without_small_layers
from models import MODELS, mlp
from oracle import assert_close, flat, flat_grad, per_sample_gradients
from planning_cases import STRATEGIES, only_strategy
from torch import nn

import rgd_ext
from rgd_ext.metric import NEEDS
from rgd_ext.weights import Clip, FromGramian, Normalise


def model_and_inputs(name, dtype=torch.float64, batch=B):
    build, sample = MODELS[name]
    return build().to(dtype), [x.to(dtype) if x.is_floating_point() else x for x in sample(batch)]


def agreement(stats):
    """A rule that reads all there is without the Gramian."""
    return (stats.alignments + stats.squared_grad_norm) / stats.trace


agreement.needs = "alignments"


def of_the_gramian(stats):
    """A rule that reads the Gramian."""
    return stats.gram.softmax(1).sum(0)


def agreement_of(rows):
    return rows @ rows.mean(0) / rows.var(0, correction=0).sum()


# Each rule, and its weights from explicit gradients.
RULES = {
    "agreement": (agreement, agreement_of),
    "of the Gramian": (of_the_gramian, lambda rows: (rows @ rows.T).softmax(1).sum(0)),
    "Clip": (Clip(0.3), lambda rows: (0.3 / rows.norm(dim=1)).clamp(max=1) / len(rows)),
    "Normalise": (Normalise(), lambda rows: 1 / (len(rows) * rows.norm(dim=1))),
    "FromGramian": (FromGramian(lambda gram: gram.mean(1)), lambda rows: rows @ rows.mean(0)),
}


@pytest.mark.parametrize(("rule", "weights_of"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", MODELS)
def test_a_captured_model_gets_the_weighted_sum(name, rule, weights_of):
    model, inputs = model_and_inputs(name)
    rows = per_sample_gradients(model, loss_of, inputs)
    assert_close(captured_grad(model, *inputs, weights=rule), weights_of(rows) @ rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["GPT", "ResNet"])
def test_every_strategy_gives_the_weighted_sum_and_the_inner_products(name, strategy, monkeypatch):
    only_strategy(monkeypatch, strategy)
    without_small_layers(monkeypatch)
    model, inputs = model_and_inputs(name)
    rows = per_sample_gradients(model, loss_of, inputs)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    grad = captured_grad(model, *inputs, weights=lambda stats: stats.align(vectors))
    assert_close(grad, (rows @ flat(vectors)) @ rows)


@pytest.mark.parametrize(("rule", "weights_of"), RULES.values(), ids=RULES)
def test_a_union_of_batches_gets_one_weighted_sum(rule, weights_of):
    model, x = mlp().double(), double(9, 6)
    rows = per_sample_gradients(model, loss_of, [x])
    with rgd_ext.precondition(model, weights=rule) as handle, handle.accumulate():
        for part in (x[:2], x[2:]):
            (loss_of(model(part)) * len(part) / 9).backward()
    assert handle.stats.batch_size == 9
    assert_close(flat_grad(model), weights_of(rows) @ rows)


def test_the_optimizer_takes_a_rule_in_place_of_epsilon():
    model, x = mlp().double(), double(8, 6)
    twin, (rule, weights_of) = copy.deepcopy(model), RULES["Clip"]
    optimizer = rgd_ext.RGD(model, lr=0.1, momentum=0.9, weights=rule)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        rows = per_sample_gradients(twin, loss_of, [x])
        step = weights_of(rows) @ rows
        for p, part in zip(twin.parameters(), step.split([p.numel() for p in twin.parameters()]), strict=True):
            p.grad = part.view_as(p)
        reference.step()
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    assert_close(flat(model.parameters()), flat(twin.parameters()))
    assert optimizer.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("option", ["epsilon", "inverse"])
def test_a_rule_beside_what_it_replaces_is_refused_and_captures_nothing(option):
    model, value = mlp(), {"epsilon": 0.5, "inverse": "exact"}[option]
    for call in (rgd_ext.precondition, rgd_ext.RGD):
        with pytest.raises(TypeError, match=rf"got weights=Clip.* and {option}={value!r}: pass one or the other"):
            call(model, weights=Clip(1.0), **{option: value})
    assert rgd_ext.handle_of(model) is None
    with pytest.raises(TypeError, match="RGD got weights with parameters"):
        rgd_ext.RGD(model.parameters(), lr=0.1, weights=Clip(1.0))


@pytest.mark.parametrize("rule", [0.5, Clip, "clip"], ids=["a number", "a class", "a string"])
def test_what_is_no_rule_is_refused_and_captures_nothing(rule):
    model = mlp()
    with pytest.raises(TypeError, match="pass a callable Statistics -> "):
        rgd_ext.precondition(model, weights=rule)
    assert rgd_ext.handle_of(model) is None


@pytest.mark.parametrize(
    ("rule", "error"),
    [(lambda stats: stats.alignments[:2], ValueError), (lambda stats: 1 / 0, ZeroDivisionError)],
    ids=["of another shape", "raises"],
)
def test_a_rule_that_fails_changes_nothing_and_the_next_backward_works(rule, error):
    model, x = mlp().double(), double(8, 6)
    again, weights_of = RULES["Clip"]
    rules, rows = iter([rule, again]), per_sample_gradients(model, loss_of, [x])
    with rgd_ext.precondition(model, weights=lambda stats: next(rules)(stats)) as handle:
        with pytest.raises(error):
            loss_of(model(x)).backward()
        assert handle.stats is None
        assert all(p.grad is None for p in model.parameters())
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), weights_of(rows) @ rows)


def test_a_write_that_fails_keeps_what_was_collected_for_another():
    model, x, failures = mlp().double(), double(9, 6), [KeyError("mine")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule, weights_of = RULES["of the Gramian"]

    def failing(stats):
        if failures:
            raise failures[0]
        return rule(stats)

    rows = per_sample_gradients(model, loss_of, [x])
    with rgd_ext.precondition(model, weights=failing) as handle:
        handle.defer()
        for part in (x[:2], x[2:6]):
            (loss_of(model(part)) * len(part) / 9).backward()
        for _ in range(2):
            with pytest.raises(KeyError, match="mine"):
                handle.write()
            assert all(p.grad is None for p in model.parameters())
            with pytest.raises(RuntimeError, match=r"Call handle.write\(\) before the step"):
                optimizer.step()
        (loss_of(model(x[6:])) * 3 / 9).backward()  # may follow
        failures.clear()
        handle.write()
        assert handle.stats.batch_size == 9
        assert_close(flat_grad(model), weights_of(rows) @ rows)
        optimizer.step()
        handle.write()  # nothing is left
        handle.defer(False)


def test_after_a_write_that_failed_batches_are_not_told_apart_any_more():
    model, x = mlp().double(), double(8, 6)
    with rgd_ext.precondition(model, weights=lambda stats: 1 / 0) as handle:
        handle.defer()
        outputs = [model(part) for part in x.split(4)]
        for output in outputs:
            (loss_of(output) / 2).backward(retain_graph=True)
        with pytest.raises(ZeroDivisionError):
            handle.write()
        with pytest.raises(RuntimeError, match="which samples are the same cannot be told"):
            loss_of(outputs[0]).backward()
        handle.drop()


def test_what_is_lost_half_way_is_not_written(monkeypatch):
    model, x = mlp().double(), double(8, 6)
    with rgd_ext.precondition(model) as handle:
        handle.defer()
        for part in x.split(4):
            (loss_of(model(part)) / 2).backward()
        with monkeypatch.context() as patched:
            patched.setattr("rgd_ext.capture.unions.concatenate_batches", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                handle.write()
        with pytest.raises(RuntimeError, match=r"an earlier handle.write\(\) failed .*: call handle.drop\(\)"):
            handle.write()
        with pytest.raises(RuntimeError, match=r"Call handle.write\(\) before the step"):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        handle.drop()
        loss_of(model(x)).backward()
        handle.write()
    assert handle.stats.batch_size == 8


def test_a_backward_of_the_model_inside_of_a_rule_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    x, others = double(B, 2, 8, 8), []

    def rule(stats):
        if others:
            others.pop().backward()
        return torch.full_like(stats.alignments, 1 / B)

    with rgd_ext.precondition(model, weights=rule) as handle:
        loss, other = loss_of(model(x)), loss_of(model(2 * x))
        others.append(other)
        with pytest.raises(
            RuntimeError, match=r"a rule was choosing .* `with handle.paused\(\), torch.enable_grad\(\):`"
        ):
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
        loss_of(model(x)).backward()
    assert handle.stats.batch_size == B


def test_a_backward_inside_of_a_rule_may_be_an_ordinary_one():
    model, x = nn.Conv2d(2, 4, 3).double(), double(B, 2, 8, 8)

    def rule(stats):
        with handle.paused(), torch.enable_grad():
            loss_of(model(2 * x)).backward()
        return torch.full_like(stats.alignments, 1 / B)

    expected = torch.autograd.grad(loss_of(model(x)) + loss_of(model(2 * x)), list(model.parameters()))
    with rgd_ext.precondition(model, weights=rule) as handle:
        loss_of(model(x)).backward()
    assert_close(flat_grad(model), flat(expected))


def test_what_a_rule_needs_is_read_once_for_each_backward():
    class Counting:
        reads = 0

        @property
        def needs(self):
            self.reads += 1
            return "gram" if self.reads % 2 else "norms"

        def __call__(self, stats):
            return torch.full_like(stats.alignments, 1 / stats.batch_size)

    rule, model = Counting(), nn.Conv1d(2, 3, 2, dtype=torch.float64)
    with rgd_ext.precondition(model, weights=rule) as handle:
        before = rule.reads
        for number in range(1, 5):
            loss_of(model(double(B, 2, 5))).backward()
            assert rule.reads == before + number
            assert (handle.stats.gram is not None) == (rule.reads % 2 == 1)


def test_clipping_under_autocast_and_a_grad_scaler():
    model, x = mlp(), torch.randn(16, 6)
    expected = captured_grad(copy.deepcopy(model), x, weights=Clip(0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = rgd_ext.RGD(model, lr=0.0, weights=Clip(0.05, loss_scale=scaler.get_scale))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert (flat_grad(model) - expected).norm() / expected.norm() < 0.05


def test_an_overflow_reaches_the_grad_scaler():
    model, x = mlp(), torch.full((4, 6), 1e30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = rgd_ext.RGD(model, lr=0.1, weights=Normalise(), verify=False)
    before = flat(model.parameters()).clone()
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("needs", NEEDS)
def test_plan_does_the_work_of_the_rule_without_calling_it(needs):
    def rule(stats):
        pytest.fail("was called")

    rule.needs = needs
    model, inputs = model_and_inputs("ResNet")
    with rgd_ext.precondition(model, weights=rule) as handle:
        planned = handle.plan(*inputs)
    with rgd_ext.precondition(model, epsilon=rgd_ext.Spectral() if needs == "gram" else 0.0) as handle:
        assert planned.layers == handle.plan(*inputs).layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_an_observed_model_has_the_bits_of_the_plain_capture(name, batch, dtype):
    model, inputs = model_and_inputs(name, dtype, batch)
    plain = captured_grad(copy.deepcopy(model), *inputs, epsilon=0.0)
    rows = per_sample_gradients(model, loss_of, inputs)
    with rgd_ext.observe(model) as handle:
        loss_of(model(*inputs)).backward()
    stats = handle.stats
    assert torch.equal(flat_grad(model), plain)
    assert_close(flat_grad(model), rows.mean(0))
    assert stats.epsilon is None
    assert torch.equal(stats.weights, torch.full_like(stats.weights, 1 / batch))
    assert torch.equal(stats.direction_norm, stats.grad_norm)
    assert_close(stats.sample_norms, rows.norm(dim=1), torch.float32)  # from moments, see `sample_norms`
    assert_close(stats.alignments + stats.squared_grad_norm, rows @ rows.mean(0), dtype)
    if batch > 1:
        assert_close(stats.trace, rows.var(0, correction=0).sum(), dtype)


def test_an_observed_model_has_the_gramian_on_demand():
    model, inputs = model_and_inputs("ResNet")
    plain = captured_grad(copy.deepcopy(model), *inputs, weights=lambda s: torch.full_like(s.alignments, 1 / B))
    rows = per_sample_gradients(model, loss_of, inputs)
    with rgd_ext.observe(model, gram=True) as handle:
        loss_of(model(*inputs)).backward()
    assert_close(handle.stats.gram, rows @ rows.T)
    assert handle.stats.rank == B - 1
    assert torch.equal(flat_grad(model), plain)
    with pytest.raises(TypeError, match="gram is 'yes': pass True or False"):
        rgd_ext.observe(mlp(), gram="yes")


def test_an_observed_training_is_that_of_sgd_bitwise():
    model = mlp()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    with rgd_ext.observe(model):
        for _ in range(10):
            x = torch.randn(8, 6)
            for net, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(net(x)).backward()
                optimizer.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_micro_batches_of_an_observed_model_give_the_statistics_of_their_union():
    model, x = mlp().double(), double(12, 6)
    rows = per_sample_gradients(model, loss_of, [x])
    with rgd_ext.observe(model) as handle, handle.accumulate():
        for part in x.split(2):
            (loss_of(model(part)) / 6).backward()
    assert handle.stats.batch_size == 12
    assert_close(flat_grad(model), rows.mean(0))
    trace = rows.var(0, correction=1).sum()
    assert_close(handle.stats.noise_scale, trace / (rows.mean(0).square().sum() - trace / 12))


def test_handles_say_what_they_are_for():
    model = mlp()
    with rgd_ext.observe(model) as handle:
        assert repr(handle) == "Preconditioner(Sequential, 4 modules, plain gradients)"
    with rgd_ext.precondition(model, weights=Clip(1.0)) as handle:
        assert "4 modules, weights=Clip(max_norm=1.0" in repr(handle)
    with rgd_ext.precondition(model, epsilon=rgd_ext.Trace(0.5)) as handle:
        assert "4 modules, Trace(fraction=0.5), inverse='weak-field'" in repr(handle)
