"""Parameters may have several uses: tied weights, modules called again, tables of tokens and of positions."""

import pytest
import torch
from capturing import assert_exact, double
from models import GPT, Net
from torch import nn


def test_one_parameter_in_two_modules_and_one_module_called_thrice_match_the_oracle():
    model = Net(lambda m, x: m.b(m.a(m.a(x).tanh()) + m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    assert_exact(model, double(6, 4))


def test_an_embedding_tied_to_the_head_matches_the_oracle():
    assert_exact(GPT(), torch.randint(11, (7, 9)))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_an_embedding_of_one_token_tied_to_the_head_matches_the_oracle(shape):
    embed, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embed.weight
    assert_exact(Net(lambda m, x: m.head(m.embed(x).tanh()), embed=embed, head=head), torch.randint(9, shape))


def test_tokens_and_positions_in_one_table_match_the_oracle():
    def forward(m, x):
        return m.table(x) + m.table(torch.arange(x.shape[1]))

    assert_exact(Net(forward, table=nn.Embedding(9, 4)), torch.randint(9, (5, 3)))


def test_positions_may_go_through_layers_before_they_meet_the_batch():
    def forward(m, x):
        return m.table(x) + m.project(m.norm(m.positions(torch.arange(x.shape[1]))))

    parts = {"table": nn.Embedding(9, 4), "positions": nn.Embedding(3, 5)}
    parts |= {"norm": nn.LayerNorm(5), "project": nn.Linear(5, 4)}
    assert_exact(Net(forward, **parts), torch.randint(9, (5, 3)))


def test_a_unit_may_give_one_value_for_all_samples():
    class Positions(nn.Embedding):
        def forward(self, ids, positions):
            return super().forward(positions[None])

    def forward(m, ids):
        return m.head(m.tokens(ids) + m.positions(ids, positions=torch.arange(ids.shape[1])))

    model = Net(forward, tokens=nn.Embedding(9, 4), positions=Positions(9, 4), head=nn.Linear(4, 3)).double()
    x = torch.randint(9, (5, 7))
    assert_exact(model, x)
