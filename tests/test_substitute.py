"""Copies and pickles of a captured model are ordinary models; wrappers may take its forward out and bind it anew."""

import copy
import inspect
import io
import pickle
from functools import wraps
from types import MethodType

import pytest
import torch
from capturing import B, captured_grad, loss_of
from models import mlp
from oracle import assert_close, flat_grad
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import rgd_ext

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.(script|trace)", "ignore:There is a performance drop.*_weight_norm"
)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "average": lambda model: AveragedModel(model).module,
    "copy of a copy": lambda model: copy.deepcopy(saved(model)),
}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def attributes(model):
    return [set(vars(module)) for module in model.modules()]


@copies
def test_copies_of_a_captured_model_are_ordinary_models(copied):
    model, x = nn.Sequential(nn.Embedding(11, 4), nn.LSTM(4, 4, batch_first=True)), torch.randint(11, (5, 3))
    other = nn.Sequential(nn.Embedding(11, 4), nn.LSTM(4, 4, batch_first=True))
    other.load_state_dict(model.state_dict())
    with rgd_ext.precondition(model):
        captured = attributes(model)
        clone = copied(model)
        assert attributes(model) == captured
        assert clone.state_dict().keys() == other.state_dict().keys() == model.state_dict().keys()
        assert attributes(clone) == attributes(other)
        for net in (clone, other):
            loss_of(net(x)[0]).backward()
        assert torch.equal(flat_grad(clone), flat_grad(other))
        assert model[0].weight.grad is None
        clone.zero_grad()
        loss_of(model(x)[0]).backward()
        assert_close(captured_grad(clone, x, loss=lambda out: loss_of(out[0])), flat_grad(model))


def test_a_shallow_copy_has_the_forward_of_its_class():
    model = nn.Linear(4, 4)
    with rgd_ext.precondition(model):
        other = copy.copy(model)
        other._parameters = {"weight": torch.eye(4), "bias": None}
        x = torch.randn(B, 4)
        assert torch.equal(other(x), x)
        assert "forward" not in vars(other)


class Attributes(nn.Linear):
    def __getstate__(self):
        return self.__dict__


OWN_COPIES = {
    "parametrised": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3))),
    "torch.fx": lambda: torch.fx.symbolic_trace(mlp()),
    "__getstate__": lambda: nn.Sequential(Attributes(6, 3)),
}


@pytest.mark.parametrize("name", OWN_COPIES)
def test_models_with_their_own_way_to_be_copied(name):
    model, x = OWN_COPIES[name](), torch.randn(5, 6)
    plain = attributes(copy.deepcopy(model))
    expected = captured_grad(model, x)
    with rgd_ext.precondition(model):
        clone = copy.deepcopy(model)
        assert attributes(clone) == plain
        if name != "parametrised":  # which torch does not pickle
            assert attributes(pickle.loads(pickle.dumps(model))) == attributes(pickle.loads(pickle.dumps(clone)))
    clone.zero_grad()
    assert_close(captured_grad(clone, x), expected)


def test_copies_are_exported_scripted_and_compiled_whole():
    model, x = mlp(), torch.randn(5, 6)
    expected = model(x)
    with rgd_ext.precondition(model):
        clone = copy.deepcopy(model)
    assert torch.equal(torch.export.export(clone, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.script(clone)(x), expected)
    assert torch.equal(torch.compile(clone, fullgraph=True, backend="eager")(x), expected)


def test_a_captured_model_is_exported_and_traced_as_the_ordinary_model():
    model, x = mlp(), torch.randn(5, 6)
    expected = model(x)
    with rgd_ext.precondition(model) as handle:
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
        traced = torch.jit.trace(model, (x,))
        assert torch.equal(traced(x), expected)
        assert "detach" not in str(traced.graph)
        assert handle.stats is None


def test_a_captured_model_is_not_scripted_or_compiled_whole():
    model, x = mlp(), torch.randn(5, 6)
    with rgd_ext.precondition(model):
        with pytest.raises(TypeError, match=r"captured.*script\(copy\.deepcopy\(model\)\)"):
            torch.jit.script(model)
        with pytest.raises(RuntimeError, match=r"without fullgraph=True, or on a copy, copy\.deepcopy\(model\)"):
            torch.compile(model, fullgraph=True, backend="eager")(x)
        assert torch.jit.script(copy.deepcopy(model))(x).isfinite().all()


def wrapped(function):
    @wraps(function)
    def forward(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return forward


def prepare(model):
    """As accelerate.Accelerator.prepare does in mixed precision, with a factor in place of autocast."""
    model._original_forward = model.forward
    model.forward = MethodType(wrapped(model.forward.__func__), model)


def unwrap(model):
    """As accelerate.Accelerator.unwrap_model(keep_fp32_wrapper=False)."""
    forward, original = model.forward, model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)


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


def test_a_wrapper_around_the_captured_forward_and_without_it_again():
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


def test_a_copy_of_a_model_that_keeps_its_handle():
    class Keeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.seen = nn.Linear(6, 3), []

        def forward(self, x):
            assert self.handle is handle
            return self.body(x)

    model = Keeper()
    model.handle = handle = rgd_ext.precondition(model)
    assert copy.deepcopy(model).handle is None
    loss_of(model(torch.randn(5, 6))).backward()  # the verification does not put a copy in its place
    assert handle.stats.batch_size == 5
