"""Copies and pickles of a captured model are ordinary models."""

import copy
import io
import pickle

import pytest
import torch
from capturing import B, attributes, captured_grad, loss_of
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
def test_models_with_their_own_way_to_be_copied_have_ordinary_copies(name):
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


def test_a_copy_of_a_model_that_keeps_its_handle_has_none():
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
