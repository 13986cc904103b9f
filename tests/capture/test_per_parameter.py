"""Statistics of every parameter by itself, against the oracle, and their sums by module."""

import copy

import pytest
import torch
from capturing import B, double, loss_of, without_small_layers
from models import MODELS, Net, mlp
from oracle import assert_close, flat_grad, per_sample_gradients
from planning_cases import STRATEGIES, TiedGPT, only_strategy
from torch import nn

import rgd_ext


def expected(model, inputs):
    """For each parameter its name, |g|, tr D and the noise scale, from the definitions."""
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    parts = per_sample_gradients(model, loss_of, inputs).split([number for _, number in named], 1)
    for (name, _), rows in zip(named, parts, strict=True):
        g = rows.mean(0)
        covariance = rows.var(0, correction=1).sum()
        noise_scale = covariance / (g.square().sum() - covariance / len(rows))
        yield name, g.norm(), rows.var(0, correction=0).sum(), noise_scale


def assert_as_expected(found, model, inputs):
    want = [*expected(model, inputs)]
    assert [*found] == [name for name, *_ in want]
    for name, *values in want:
        assert_close(torch.stack(found[name]), torch.stack(values))


def observed(model, inputs, **options):
    with rgd_ext.observe(model, per_parameter=True, **options) as handle:
        loss_of(model(*inputs)).backward()
    return handle.stats


def model_and_inputs(name, batch=B):
    build, sample = MODELS[name]
    return build().double(), [x.double() if x.is_floating_point() else x for x in sample(batch)]


@pytest.mark.parametrize("gram", [False, True], ids=["moments", "gram"])
@pytest.mark.parametrize("small", [True, False], ids=["small", "planned"])
@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_matches_the_oracle(name, small, gram, monkeypatch):
    if not small:
        without_small_layers(monkeypatch)
    model, inputs = model_and_inputs(name)
    assert_as_expected(observed(model, inputs, gram=gram).per_parameter, model, inputs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_and_tied_weights_match_the_oracle(strategy, monkeypatch):
    only_strategy(monkeypatch, strategy)
    model, inputs = TiedGPT().double(), [torch.randint(11, (B, 9))]
    assert_as_expected(observed(model, inputs).per_parameter, model, inputs)


@pytest.mark.parametrize("batch", [1, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_keeps_its_bits_and_the_totals_their_values(name, batch):
    model, inputs = model_and_inputs(name, batch)
    model, inputs = model.float(), [x.float() if x.is_floating_point() else x for x in inputs]
    twin = copy.deepcopy(model)
    stats = observed(model, inputs)
    with rgd_ext.observe(twin) as handle:
        loss_of(twin(*inputs)).backward()
    assert torch.equal(flat_grad(model), flat_grad(twin))
    assert_close(stats.alignments, handle.stats.alignments, torch.float32)
    assert_close(stats.sample_norms, handle.stats.sample_norms, torch.float32)
    whole = stats.per_parameter.by_module()[""]
    assert_close(whole.grad_norm, stats.grad_norm, torch.float32)
    if batch > 1:
        assert_close(stats.trace, handle.stats.trace, torch.float32)
        assert_close(whole.trace, stats.trace, torch.float32)


def test_sums_by_module_are_those_of_their_parameters():
    model, inputs = model_and_inputs("ResNet")
    found = observed(model, inputs).per_parameter
    modules = found.by_module()
    assert [*modules] == [name for name, m in model.named_modules() if [*m.parameters()]]
    for module in modules:
        inside = [found[name] for name in found if not module or name.startswith(f"{module}.")]
        assert_close(modules[module].trace, sum(stats.trace for stats in inside))
        assert_close(modules[module].grad_norm.square(), sum(stats.grad_norm.square() for stats in inside))


def test_micro_batches_give_the_statistics_of_their_union():
    model, x = mlp().double(), double(12, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        with handle.accumulate():
            for part in x.split(5):
                (loss_of(model(part)) * len(part) / 12).backward()
        assert_as_expected(handle.stats.per_parameter, model, [x])
        handle.defer()
        for part in x.split(4):
            (loss_of(model(part)) / 3).backward()
        handle.write()
        assert_as_expected(handle.stats.per_parameter, model, [x])


def branches():
    """A model with a parameter that a batch may leave out."""
    return Net(lambda m, x, both: m.a(x) + m.b(x) if both else m.a(x), a=nn.Linear(6, 3), b=nn.Linear(6, 3)).double()


def test_a_parameter_without_a_part_in_the_backward_is_missing():
    model, x = branches(), double(B, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        loss_of(model(x, False)).backward()
    assert [*handle.stats.per_parameter] == ["a.weight", "a.bias"]


def accumulate(handle, model, x):
    with handle.accumulate():
        for both in (False, True):
            loss_of(model(x, both)).backward()


def test_a_union_of_batches_that_use_other_parameters_is_refused():
    model, x = branches(), double(B, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        with pytest.raises(RuntimeError, match=r"'b.\w+' had a part .* some .* only.*drop"):
            accumulate(handle, model, x)
        assert model.a.weight.grad is None
        assert handle.stats is None
        handle.defer()
        for both in (False, True):
            loss_of(model(x, both)).backward()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"'b.\w+' had a part"):
                handle.write()
        handle.drop()
        for part in x.split(3):
            (loss_of(model(part, True)) / 2).backward()
        handle.write()
        assert [*handle.stats.per_parameter] == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_losses_of_one_call_may_use_other_parameters():
    model, x = two_heads(), double(B, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        with handle.accumulate():
            first, second = model(x)
            loss_of(first).backward(retain_graph=True)
            loss_of(second).backward()
        together = handle.stats.per_parameter
        first, second = model(x)
        (loss_of(first) + loss_of(second)).backward()
    for name, stats in handle.stats.per_parameter.items():
        assert_close(torch.stack(together[name]), torch.stack(stats))


def two_heads():
    return Net(
        lambda m, x: (m.a(m.body(x).tanh()), m.b(m.body(x).tanh())),
        body=nn.Linear(6, 4),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 2),
    ).double()


def test_it_is_there_only_where_it_was_asked_for():
    model, x = mlp(), torch.randn(B, 6)
    with rgd_ext.observe(model) as handle:
        loss_of(model(x)).backward()
    assert handle.stats.per_parameter is None
    with pytest.raises(TypeError, match="per_parameter is 1: pass True or False"):
        rgd_ext.observe(model, per_parameter=1)


def test_a_plan_and_a_vector_leave_it_alone():
    model, x = mlp().double(), double(B, 6)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    with rgd_ext.observe(model, per_parameter=True) as handle:
        handle.align(vectors)
        loss_of(model(x)).backward()
        before = handle.stats
        handle.plan(x)
        assert handle.stats is before
    assert_as_expected(before.per_parameter, model, [x])
    rows = per_sample_gradients(model, loss_of, [x])
    assert_close(before.aligned, rows @ torch.cat([v.flatten() for v in vectors]))


def test_parameters_that_are_replaced_keep_their_names():
    model, x = mlp().double(), double(B, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)
        loss_of(model(x)).backward()
    assert_as_expected(handle.stats.per_parameter, model, [x])


def test_one_sample_has_no_noise_scale():
    model, x = mlp().double(), double(1, 6)
    found = observed(model, [x]).per_parameter
    assert not found.traces.any()
    assert found.noise_scales.isnan().all()


def test_tables():
    model, x = mlp().double(), double(B, 6)
    found = observed(model, [x]).per_parameter
    columns = found.to_dict()
    assert [*columns] == ["name", "grad_norm", "trace", "noise_scale"]
    assert columns["name"].tolist() == [*found]
    assert columns["trace"].tolist() == found.traces.tolist()
    head, *rows = repr(found).splitlines()
    assert head.split() == [*columns]
    assert [row.split()[0] for row in rows] == [*found]
    assert float(rows[0].split()[2]) == pytest.approx(found["0.weight"].trace.item(), rel=1e-3)
