"""torch.compile, torch.export and torch.jit work on captured models or on their copies, or say that they do not."""

import copy

import pytest
import torch
from capturing import captured_grad, double, loss_of
from models import mlp
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.(script|trace)")


def test_compiled_model_gives_the_same_direction():
    model, x = mlp().double(), double(5, 6)
    expected = captured_grad(copy.deepcopy(model), x)
    with rgd_ext.precondition(model):
        compiled = torch.compile(model, backend="aot_eager")
        loss_of(compiled(x)).backward()
    assert_close(flat_grad(model), expected)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_script_modules_are_refused():
    with pytest.raises(ValueError, match="ScriptModule"):
        rgd_ext.precondition(nn.Sequential(torch.jit.script(nn.Linear(4, 4))))
