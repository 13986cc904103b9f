"""Modules that are slow because torch.func.vmap has no batching rule are named."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from capturing import captured_grad, expected_direction, loss_of, own_type
from models import Net
from oracle import assert_close
from torch import nn

import rgd_ext

B = 5


def bags():
    """A table that is no EmbeddingBag, and indices."""

    def forward(m, x):
        return F.embedding_bag(x, m.table.tanh()) + F.embedding_bag(x, m.table.tanh())

    return own_type(forward, table=nn.Parameter(torch.randn(9, 4))), indices()


def indices():
    return torch.randint(9, (B, 3))


@pytest.mark.parametrize("verify", [True, False])
def test_a_unit_that_loops_is_named_once(verify):
    table, x = bags()
    model = nn.Sequential(table, nn.Tanh(), nn.Linear(4, 3)).double()
    with rgd_ext.precondition(model, verify=verify):
        with pytest.warns(
            UserWarning, match=r"module '0' \(Own\) is slow: .* runs aten::embedding_bag\S* for one"
        ) as caught:
            loss_of(model(x)).backward()
        assert len(caught) == 1
        loss_of(model(x)).backward()


def test_a_module_whose_parameter_loops_is_named_once():
    model = Net(
        lambda m, x: m.head(F.embedding_bag(x, m.table)), head=nn.Linear(4, 3), table=nn.Parameter(torch.randn(9, 4))
    )
    with rgd_ext.precondition(model.double()):
        with pytest.warns(UserWarning, match=r"'Net\.table', which goes through embedding_bag, is slow") as caught:
            loss_of(model(indices())).backward()
        assert len(caught) == 1
        loss_of(model(indices())).backward()


def test_a_rule_is_a_remedy():
    table, x = bags()
    model = nn.Sequential(table, nn.Linear(4, 3)).double()
    expected = expected_direction(model, x)

    def rule(module, inputs, e):
        rows = F.one_hot(inputs[0], 9).double().mean(1)
        return {"table": 2 * rows[:, :, None] * e[:, None] * (1 - module.table.tanh() ** 2)}

    rgd_ext.register_rule(type(table), rule)
    assert_close(captured_grad(model, x), expected)


@pytest.mark.parametrize("verify", [True, False])
def test_warnings_of_the_module_itself_stay(verify):
    def forward(m, x):
        warnings.warn("of the module", FutureWarning, stacklevel=2)
        return m.gain * x

    model = own_type(forward, gain=nn.Parameter(torch.ones(4)))
    with rgd_ext.precondition(model, verify=verify):
        for _ in range(2):
            with pytest.warns(FutureWarning, match="of the module") as caught:
                model(torch.randn(B, 4))
            assert len(caught) == 1


def test_torch_warns_itself_outside_of_the_capture():
    table, x = bags()
    with rgd_ext.precondition(table), pytest.warns(UserWarning, match="is slow"):
        table(x)
    with pytest.warns(UserWarning, match="There is a performance drop"):
        torch.func.vmap(lambda x: F.embedding_bag(x[None], table.table))(x)
