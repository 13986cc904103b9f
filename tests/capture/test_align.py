"""Inner products of per-sample gradients with a vector, asked for in advance or by a rule, against the oracle."""

import copy

import pytest
import torch
from capturing import B, double, loss_of
from models import MODELS, Net, mlp
from oracle import assert_close, flat, per_sample_gradients
from planning_cases import STRATEGIES, TiedGPT, only_strategy
from torch import nn

import rgd_ext


def observed(model, inputs, vectors):
    """`stats.aligned` of one backward of an observed model."""
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        loss_of(model(*inputs)).backward()
    return handle.stats.aligned


def in_float64(model, inputs):
    return model.double(), [x.double() if x.is_floating_point() else x for x in inputs]


def random_vector(model):
    return [torch.randn_like(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", MODELS)
def test_products_match_the_oracle(name):
    build, sample = MODELS[name]
    model, inputs = in_float64(build(), sample(B))
    vectors = random_vector(model)
    expected = per_sample_gradients(model, loss_of, inputs) @ flat(vectors)
    assert_close(observed(model, inputs, vectors), expected)
    names = [name for name, _ in model.named_parameters()]
    assert_close(observed(model, inputs, dict(reversed([*zip(names, vectors, strict=True)]))), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_with_tied_weights_match_the_oracle(strategy, monkeypatch):
    only_strategy(monkeypatch, strategy)
    model, inputs = in_float64(TiedGPT(), [torch.randint(11, (B, 9))])
    vectors = random_vector(model)
    expected = per_sample_gradients(model, loss_of, inputs) @ flat(vectors)
    assert_close(observed(model, inputs, vectors), expected)


def test_names_that_are_missing_and_frozen_parameters_count_as_zeros():
    model, x = mlp().double(), double(B, 6)
    parameters = dict(model.named_parameters())
    parameters["0.bias"].requires_grad_(False)
    rows = per_sample_gradients(model, loss_of, [x])
    vectors = {
        name: torch.randn_like(p) if name == "0.weight" else torch.zeros_like(p) for name, p in parameters.items()
    }
    trainable = {name: v for name, v in vectors.items() if name != "0.bias"}
    expected = rows @ flat(trainable.values())
    assert_close(observed(model, [x], {"0.weight": vectors["0.weight"]}), expected)
    assert_close(observed(model, [x], list(trainable.values())), expected)
    assert not observed(model, [x], {}).any()


def test_a_tied_parameter_may_have_any_of_its_names():
    model, x = TiedGPT().double(), torch.randint(11, (B, 9))
    vector = torch.randn_like(model.head.weight)
    rows = per_sample_gradients(model, loss_of, [x])[:, : vector.numel()]
    for name in ("head.weight", "embed.weight"):
        assert_close(observed(model, [x], {name: vector}), rows @ vector.flatten())
    with pytest.raises(ValueError, match=r"several names of one tied parameter, 'head.weight', 'embed.weight'"):
        observed(model, [x], {"head.weight": vector, "embed.weight": vector})


def test_products_have_the_dtype_of_the_other_statistics():
    model, x = mlp(), torch.randn(B, 6)
    vectors, seen = random_vector(model), []
    with rgd_ext.precondition(
        model, weights=lambda stats: seen.append(stats.align(vectors)) or stats.alignments
    ) as handle:
        handle.align(vectors)
        loss_of(model(x)).backward()
    assert seen[0].dtype == handle.stats.aligned.dtype == handle.stats.weights.dtype


def test_a_parameter_of_another_shape_has_no_part_of_the_vector():
    model, x = nn.Linear(6, 3), torch.randn(B, 6)
    with rgd_ext.observe(model) as handle:
        handle.align(random_vector(model))
        model.weight.data = torch.randn(4, 6)
        model.bias.data = torch.randn(4)
        with pytest.raises(ValueError, match=r"in handle.align has shape \(3,( 6)?\): .* \(4,( 6)?\)"):
            loss_of(model(x)).backward()
    with pytest.raises(RuntimeError, match="the capture was removed"):
        handle.align(None)


def test_parameters_that_a_backward_does_not_reach_count_as_zeros():
    model = Net(lambda m, x: m.used(x), used=nn.Linear(6, 3), unused=nn.Linear(6, 3)).double()
    x, vectors = double(B, 6), random_vector(model)
    expected = per_sample_gradients(model, loss_of, [x]) @ flat(vectors)
    assert_close(observed(model, [x], vectors), expected)
    assert not observed(model, [x], {"unused.weight": vectors[2]}).any()


def test_sparse_gradients_are_vectors_too():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randint(7, (B, 3))
    gradient = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
    assert gradient[0].is_sparse
    twin = copy.deepcopy(model)
    twin[0].sparse = False
    expected = per_sample_gradients(twin, loss_of, [x]) @ flat(g.to_dense() for g in gradient).double()
    assert_close(observed(model, [x], gradient), expected, torch.float32)


def test_the_vector_stays_until_another_takes_its_place():
    model, x = mlp().double(), double(B, 6)
    rows = per_sample_gradients(model, loss_of, [x])
    with rgd_ext.observe(model) as handle:
        loss_of(model(x)).backward()
        assert handle.stats.aligned is None
        for vectors in (random_vector(model), random_vector(model)):
            handle.align(vectors)
            for _ in range(2):
                loss_of(model(x)).backward()
                assert_close(handle.stats.aligned, rows @ flat(vectors))
        handle.align(None)
        loss_of(model(x)).backward()
        assert handle.stats.aligned is None


def test_the_gradient_of_another_batch_may_be_passed_and_change_later():
    model, validation, x = mlp().double(), double(5, 6), double(B, 6)
    rows = per_sample_gradients(model, loss_of, [x])
    expected = rows @ per_sample_gradients(model, loss_of, [validation]).mean(0)
    with rgd_ext.observe(model) as handle:
        loss_of(model(validation)).backward()
        handle.align([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=False)
        for _ in range(2):
            loss_of(model(x)).backward()
            assert_close(handle.stats.aligned, expected)


def test_products_in_a_union_are_those_of_its_samples():
    model, x = mlp().double(), double(9, 6)
    vectors = random_vector(model)
    expected = per_sample_gradients(model, loss_of, [x]) @ flat(vectors)
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        with handle.accumulate():
            for part in (x[:2], x[2:]):
                (loss_of(model(part)) * len(part) / 9).backward()
    assert_close(handle.stats.aligned, expected)


def test_parameters_that_are_replaced_keep_their_part_of_the_vector():
    model, x = mlp().double(), double(B, 6)
    vectors = random_vector(model)
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        loss_of(model(x)).backward()
        model.load_state_dict({name: 2 * p for name, p in model.state_dict().items()}, assign=True)
        expected = per_sample_gradients(model, loss_of, [x]) @ flat(vectors)
        loss_of(model(x)).backward()
    assert_close(handle.stats.aligned, expected)


def test_parameters_that_are_frozen_or_converted_later_do_no_harm():
    model, x = mlp().double(), double(B, 6)
    vectors = random_vector(model)
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        model[0].bias.requires_grad_(False)
        expected = per_sample_gradients(model, loss_of, [x]) @ flat([vectors[0], *vectors[2:]])
        loss_of(model(x)).backward()
        assert_close(handle.stats.aligned, expected)
        model.zero_grad()
        loss_of(model.float()(x.float())).backward()
    assert_close(handle.stats.aligned, expected, torch.float32)


def test_a_rule_sees_the_products_that_were_asked_for():
    model, x = mlp().double(), double(B, 6)
    rows, vectors = per_sample_gradients(model, loss_of, [x]), random_vector(model)
    agrees = rows @ flat(vectors) > 0
    with rgd_ext.precondition(model, weights=lambda stats: (stats.aligned > 0) / agrees.sum()) as handle:
        handle.align(vectors)
        loss_of(model(x)).backward()
    assert_close(flat(p.grad for p in model.parameters()), rows[agrees].mean(0))


def test_a_plan_leaves_the_products_alone():
    model, x = mlp().double(), double(B, 6)
    with rgd_ext.observe(model) as handle:
        handle.align(random_vector(model))
        loss_of(model(x)).backward()
        before = handle.stats.aligned
        handle.plan(x)
        assert handle.stats.aligned is before


BAD = {
    "too few": (
        lambda v: v[:2],
        ValueError,
        r"vectors has 2 tensors: pass one for each of the .* trainable parameters",
    ),
    "a gradient that is missing": (lambda v: [*v[:-1], None], TypeError, "bias' is None: pass zeros, or a dict"),
    "a number": (lambda v: [*v[:-1], 1.0], TypeError, r"parameter '.*bias' is a float: pass a tensor of shape"),
    "a set": (set, TypeError, "a set, which has no order: pass a list"),
    "another shape": (
        lambda v: [v[0][:1], *v[1:]],
        ValueError,
        r"parameter '0.weight' has shape \(1, 6\): .* \(\d+, 6\)",
    ),
    "another dtype": (lambda v: [v[0].float(), *v[1:]], TypeError, r"convert it with .to\(torch.float64\)"),
    "another device": (lambda v: [v[0].to("meta"), *v[1:]], ValueError, r"is on meta: move it with .to\('cpu'\)"),
    "another name": (
        lambda v: {"0.gain": v[0]},
        ValueError,
        "'0.gain', which is not a trainable parameter: .*'0.weight'",
    ),
    "no sequence": (lambda v: 1.0, TypeError, "pass a tensor, or a sequence"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vectors_are_refused_and_the_last_one_stays(case):
    change, error, match = BAD[case]
    model, x = mlp().double(), double(B, 6)
    vectors = random_vector(model)
    expected = per_sample_gradients(model, loss_of, [x]) @ flat(vectors)
    with rgd_ext.observe(model) as handle:
        handle.align(vectors)
        with pytest.raises(error, match=match):
            handle.align(change(vectors))
        loss_of(model(x)).backward()
    assert_close(handle.stats.aligned, expected)
    capture = rgd_ext.precondition(model, weights=lambda stats: stats.align(change(vectors)))
    with capture, pytest.raises(error, match=match):
        loss_of(model(x)).backward()
