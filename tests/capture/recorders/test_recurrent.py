"""Recurrent layers take initial states that are learned or given, of one shape."""

import pytest
import torch
from capturing import assert_exact
from models import Net
from torch import nn

import rgd_ext


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_learned_initial_states_match_the_oracle(kind):
    def forward(model, x):
        start = model.start.expand(-1, x.shape[0], -1)
        return model.layer(x, (start, start) if kind is nn.LSTM else start)[0]

    model = Net(forward, layer=kind(3, 4, 2, batch_first=True))
    model.start = nn.Parameter(torch.randn(2, 1, 4))
    assert_exact(model, torch.randn(5, 6, 3))


@pytest.mark.parametrize("shape", [(1, 5, 4), (4, 5, 4), (2, 1, 4), (5, 4)])
def test_initial_state_of_another_shape_is_refused(shape):
    model = nn.GRU(3, 4, 2, batch_first=True)
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"initial state.*\(2, 5, m\)"):
        model(torch.randn(5, 6, 3), torch.zeros(shape))
