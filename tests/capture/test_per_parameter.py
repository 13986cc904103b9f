"""Statistics of every parameter by itself, against the oracle, and their sums by module."""

import copy

import pytest
import torch
from capturing import B, double, loss_of, without_small_layers
from models import MODELS, Net, mlp
from oracle import assert_close, flat_grad, per_sample_gradients
from planning_cases import STRATEGIES, TiedGPT, only_strategy
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import rgd_ext
from rgd_ext.capture.unions import _Samples
from rgd_ext.contributions.itemised import ItemisedContributions


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
def test_strategies_for_convolutions_match_the_oracle(strategy, monkeypatch):
    only_strategy(monkeypatch, strategy)
    model, inputs = model_and_inputs("ResNet")
    assert_as_expected(observed(model, inputs).per_parameter, model, inputs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_and_tied_weights_match_the_oracle(strategy, monkeypatch):
    only_strategy(monkeypatch, strategy)
    model, inputs = TiedGPT().double(), [torch.randint(11, (B, 9))]
    assert_as_expected(observed(model, inputs).per_parameter, model, inputs)


@pytest.mark.parametrize("batch", [1, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_add_up_to_the_plain_statistics_and_gradients_have_the_same_bits(name, batch):
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
        with pytest.raises(RuntimeError, match=r"only some of the .* use parameter 'b.\w+', .*drop"):
            accumulate(handle, model, x)
        assert model.a.weight.grad is None
        assert handle.stats is None
        handle.defer()
        for both in (False, True):
            loss_of(model(x, both)).backward()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"use parameter 'b.\w+'"):
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


def test_parameters_are_told_apart_only_on_demand():
    model, x = mlp(), torch.randn(B, 6)
    with rgd_ext.observe(model) as handle:
        loss_of(model(x)).backward()
    assert handle.stats.per_parameter is None
    with pytest.raises(TypeError, match="per_parameter is 1: pass True or False"):
        rgd_ext.observe(model, per_parameter=1)


def test_plans_and_vectors_do_not_change_the_statistics_of_parameters():
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


def test_a_plan_is_timed_with_what_tells_the_parameters_apart(monkeypatch):
    model, x = mlp().double(), double(B, 6)
    items, calls = ItemisedContributions.items, []
    monkeypatch.setattr(ItemisedContributions, "items", lambda self, mean: calls.append(self) or items(self, mean))
    with rgd_ext.observe(model, per_parameter=True) as handle:
        handle.plan(x)
    assert calls


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


def test_a_write_that_failed_half_way_is_reported_as_such(monkeypatch):
    model, x = mlp().double(), double(B, 6)
    pop, calls = _Samples.pop, []

    def second_fails(samples, parameter):
        calls.append(parameter)
        if len(calls) == 2:
            raise MemoryError
        return pop(samples, parameter)

    with rgd_ext.observe(model, per_parameter=True) as handle:
        handle.defer()
        for part in x.split(3):
            (loss_of(model(part)) / 2).backward()
        with monkeypatch.context() as patch:
            patch.setattr(_Samples, "pop", second_fails)
            with pytest.raises(MemoryError):
                handle.write()
        with pytest.raises(RuntimeError, match=r"what was collected is lost.*handle.drop\(\)"):
            handle.write()


def test_parameters_that_were_replaced_before_the_backward_are_counted():
    model, x = mlp().double(), double(B, 6)
    with rgd_ext.observe(model, per_parameter=True) as handle:
        early = loss_of(model(x))
        model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
        model(x)
        early.backward()
    found = handle.stats.per_parameter
    assert len(found) == 6
    assert_close(found.by_module()[""].trace, handle.stats.trace)


@pytest.mark.parametrize("batch", [41, 64])
def test_models_of_several_dtypes_keep_the_bits_of_their_gradients(batch):
    model = Net(
        lambda m, x: m.c(m.b(m.a(x).double()).float()), a=nn.Linear(6, 8), b=nn.LayerNorm(8).double(), c=nn.Linear(8, 3)
    )
    twin, x = copy.deepcopy(model), torch.randn(batch, 6)
    observed(model, [x])
    with rgd_ext.observe(twin):
        loss_of(twin(x)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_gramian_for_each_parameter_is_never_in_memory():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(20)])
    x, shapes = torch.randn(256, 16), []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with rgd_ext.observe(model, per_parameter=True):
        loss = loss_of(model(x))
        with Shapes():
            loss.backward()
    assert shapes.count((256, 256)) < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_has_the_noise_scales_of_its_gradients(dtype):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype), torch.randn(1, 6)
    # Samples that nearly agree: 16 bits of the mean would be too few.
    x = (x + 0.1 * torch.randn(16, 6)).to(dtype)
    with rgd_ext.precondition(copy.deepcopy(model)) as handle, handle.collect() as parts:
        loss_of(handle.model(x)).backward()
    rows = [16 * factor.dense().double().flatten(1) for _, factor in parts[0].factors()]
    found = observed(model, [x]).per_parameter
    expected = {tuple(p.shape): r for (p, _), r in zip(parts[0].factors(), rows, strict=True)}
    for name, parameter in model.named_parameters():
        trace = expected[tuple(parameter.shape)].var(0, correction=0).sum()
        assert found[name].trace == pytest.approx(trace.item(), rel=0.02)
