"""Inputs and outputs may be nested, sparse, of classes of their own, or given by keyword."""

import copy

import pytest
import torch
import torch.nn.functional as F
from capturing import B, Gain, assert_exact, behind, captured_grad, double, expected_direction, gain_rule, loss_of
from models import Encoder, Net, mlp
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext


def test_nested_inputs_and_keyword_arguments_match_the_oracle():
    model = Net(lambda m, batch: m.body(input=batch["x"]) + batch["scale"], body=nn.Linear(4, 4)).double()
    x = double(6, 4)
    plain = Net(lambda m, x: m.body(x) + 2.0, body=copy.deepcopy(model.body))
    expected = expected_direction(plain, x)
    assert_close(captured_grad(model, {"scale": torch.tensor(2.0), "x": x}), expected)


def test_a_batch_in_a_mapping_or_a_dataclass_gives_the_same_direction():
    from collections import UserDict
    from dataclasses import dataclass

    @dataclass
    class Inputs:
        ids: torch.Tensor

    encoder, x = Encoder().double(), torch.randint(11, (6, 5))
    expected = captured_grad(copy.deepcopy(encoder), x)
    for forward, batch in (
        (lambda m, b: m.encoder(b["ids"]), UserDict(ids=x)),
        (lambda m, b: m.encoder(b.ids), Inputs(x)),
    ):
        assert_close(captured_grad(Net(forward, encoder=copy.deepcopy(encoder)), batch), expected)


def test_inputs_by_keyword_in_another_order_match_the_oracle():
    model = Net(lambda m, a, b: m.layer(input2=b, input1=a), layer=nn.Bilinear(3, 3, 2))
    assert_exact(model, torch.randn(5, 3), torch.randn(5, 3))


def test_data_kept_in_a_buffer_is_the_batch_when_it_is_the_input():
    model = Net(lambda m, x: m.body(x), body=nn.Linear(4, 4), data=torch.randn(6, 4)).double()
    assert_exact(model, model.data)


def test_indices_of_32_bits_into_a_large_table_do_not_overflow():
    model, x = nn.Embedding(6_000_000, 1), torch.randint(6_000_000, (500, 2))
    x[:, 1] = x[:, 0] // 2  # rows that samples share
    expected = captured_grad(model, x)
    model.zero_grad()
    assert torch.equal(captured_grad(model, x.int()), expected)


def test_a_tensor_in_a_list_matches_the_oracle():
    class Listed(Gain):
        def forward(self, pair):
            return super().forward(pair[0])

    class Pack(nn.Module):
        def forward(self, x):
            return [x]

    rgd_ext.register_rule(Listed, gain_rule)
    model, x = behind(Pack(), Listed()), double(5, 4)
    assert_exact(model, x)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.* is slow")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs_match_the_oracle(layout):
    x = F.one_hot(torch.randint(5, (B,)), 5).double()
    raw = Net(lambda m, x: m.b(torch.sparse.mm(x, m.w).tanh()), w=nn.Parameter(double(5, 4)), b=nn.Linear(4, 3))
    for model in (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), raw):
        model = model.double()
        expected = expected_direction(model, x)
        assert_close(captured_grad(model, x.to_sparse(layout=layout)), expected)


def test_packed_sequences_are_refused():
    model = Net(lambda m, x: m.lstm(nn.utils.rnn.pack_sequence(list(x)))[1][0], lstm=nn.LSTM(4, 4))
    with pytest.raises(TypeError, match=r"PackedSequence.*pack_padded_sequence"):
        captured_grad(model, torch.randn(5, 3, 4))


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)], ids=["Linear", "LayerNorm"])
def test_an_empty_batch_is_refused(build):
    model = build()
    with rgd_ext.precondition(model), pytest.raises(ValueError, match="empty batch"):
        model(torch.randn(0, 4)).sum().backward()
    assert model.weight.grad is None


class Tagged(torch.Tensor):
    """A class of its own."""


def test_classes_of_tensors_stay():
    model, x = mlp(), torch.randn(5, 6)
    expected = captured_grad(model, x)
    model.zero_grad()
    with rgd_ext.precondition(model):
        output = model(x.as_subclass(Tagged))
        loss_of(output.as_subclass(torch.Tensor)).backward()
    assert type(output) is Tagged
    assert_close(flat_grad(model), expected)


def test_classes_of_outputs_stay():
    class Tagging(Gain):
        def forward(self, x):
            return super().forward(x).as_subclass(Tagged)

    rgd_ext.register_rule(Tagging, gain_rule)
    model, x = behind(Tagging()), double(5, 4)
    plain = behind(Gain())
    plain.load_state_dict(model.state_dict())
    with rgd_ext.precondition(model):
        output = model(x)
        loss_of(output.as_subclass(torch.Tensor)).backward()
    assert type(output) is Tagged
    assert_close(flat_grad(model), expected_direction(plain, x))
