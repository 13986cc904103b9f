"""Shapes that may be those of the batch by chance are settled by what is known and by marks, or refused."""

import pytest
import torch
from capturing import assert_exact, captured_grad, double, expected_direction
from models import Net
from oracle import assert_close
from torch import nn

import rgd_ext


def test_shared_value_beside_the_batch_in_a_layer_is_refused():
    parts = {"body": nn.Linear(4, 4), "pair": nn.Bilinear(4, 4, 3), "p": nn.Parameter(torch.randn(1, 4))}
    with pytest.raises(ValueError, match=r"'pair' got a value shared by all samples among several inputs"):
        captured_grad(Net(lambda m, x: m.pair(m.body(x), m.p), **parts), torch.randn(6, 4))


def buffers_as_long_as_the_batch():
    rope = Net(lambda m, x, table: x * m.gain + table * m.gain.sin(), gain=nn.Parameter(torch.randn(4)))
    return {
        "buffer into a unit": Net(
            lambda m, x: m.rope(m.body(x), m.table[: x.shape[1]]),
            body=nn.Linear(4, 4),
            rope=rope,
            table=torch.randn(8, 4),
        ),
        "buffer meets a raw parameter": Net(
            lambda m, x: m.body(x) + m.scale * m.table[: x.shape[1]],
            body=nn.Linear(4, 4),
            scale=nn.Parameter(torch.randn(1)),
            table=torch.randn(8, 4),
        ),
        "buffer into a layer": Net(
            lambda m, x: m.body(x) + m.project(m.table[: x.shape[1]]),
            body=nn.Linear(4, 4),
            project=nn.Linear(2, 4),
            table=torch.randn(8, 2),
        ),
        "buffer of indices": Net(
            lambda m, x: m.body(x) + m.bias[m.index[: x.shape[1], : x.shape[1]]].sum(1, keepdim=True),
            body=nn.Linear(4, 4),
            bias=nn.Parameter(torch.randn(9)),
            index=torch.randint(9, (8, 8)),
        ),
    }


@pytest.mark.parametrize("length", [3, 6])
@pytest.mark.parametrize("name", buffers_as_long_as_the_batch())
def test_buffers_are_not_taken_for_samples(name, length):
    assert_exact(buffers_as_long_as_the_batch()[name], torch.randn(6, length, 4))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, mask):
        return (x @ self.q @ x.transpose(1, 2) + mask).softmax(-1) @ x


def test_square_mask_made_inside_is_refused_and_one_of_another_length_is_exact():
    def forward(m, x):
        return m.attend(m.body(x), torch.full((x.shape[1],) * 2, -1e9, dtype=x.dtype).triu(1))

    model = Net(forward, body=nn.Linear(4, 4), attend=Attend())
    assert_exact(model, torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match=r"'attend' got an input of shape \(6, 6\)"):
        captured_grad(model, torch.randn(6, 6, 4, dtype=torch.float64))


def test_square_of_positions_that_meets_a_raw_parameter_is_refused_where_it_may_be_the_batch():
    def forward(m, x):
        steps = torch.arange(x.shape[1], dtype=x.dtype)
        scores = m.body(x) @ x.transpose(1, 2) + m.slope * (steps[:, None] - steps).abs()
        return scores.softmax(-1) @ x

    model = Net(forward, body=nn.Linear(4, 4), slope=nn.Parameter(torch.tensor(0.3)))
    assert_exact(model, torch.randn(6, 3, 4))
    with pytest.raises(ValueError, match=r"slope' of shape \(\).*meets a tensor of shape \(6, 6\)"):
        captured_grad(model, torch.randn(6, 6, 4, dtype=torch.float64))


def test_one_row_of_the_batch_is_not_shared_by_all():
    model = Net(lambda m, x: m.a(x) + m.b(x[:1]), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'b' got an input of shape \(1, 4\)"):
        captured_grad(model, torch.randn(6, 4))


def flattened_tokens():
    parts = {"table": nn.Embedding(9, 4), "head": nn.Linear(4, 4)}
    return Net(lambda m, x: m.head(m.table(x).flatten(0, 1)), **parts), torch.randint(9, (5, 3))


def merged_windows():
    def forward(m, x):
        windows = m.body(x).view(len(x), 2, 2).flatten(0, 1)
        return (windows + m.table).view(len(x), -1)

    return Net(forward, body=nn.Linear(4, 4), table=nn.Parameter(torch.randn(2))), torch.randn(6, 4)


def mixed_samples():
    model = Net(lambda m, x: torch.cat([m.body(x), m.p]), body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(1, 4)))
    return model, torch.randn(6, 4)


def square_table():
    model = Net(lambda m, x: m.body(x) + m.p, body=nn.Linear(4, 4), p=nn.Parameter(torch.randn(6, 4)))
    return model, torch.randn(6, 4)


def positions_as_long_as_the_batch():
    parts = {"table": nn.Embedding(9, 4), "positions": nn.Embedding(9, 4)}
    return Net(lambda m, x: m.table(x) + m.positions(torch.arange(x.shape[1])), **parts), torch.randint(9, (5, 5))


def relative_positions_as_long_as_the_batch():
    def forward(m, x):
        steps = torch.arange(x.shape[1])
        scores = m.table(x) @ m.table(x).transpose(1, 2)
        return scores + m.bias((steps[:, None] - steps).abs())[..., 0]

    return Net(forward, table=nn.Embedding(9, 4), bias=nn.Embedding(9, 1)), torch.randint(9, (5, 5))


AMBIGUOUS = [
    relative_positions_as_long_as_the_batch,
    flattened_tokens,
    merged_windows,
    mixed_samples,
    square_table,
    positions_as_long_as_the_batch,
]


@pytest.mark.parametrize("build", AMBIGUOUS, ids=lambda f: f.__name__)
def test_ambiguous_shapes_are_refused_with_the_way_to_mark_them(build):
    model, x = build()
    with pytest.raises(ValueError, match=r"rgd_ext\.(mark|unit)"):
        captured_grad(model, x)
    assert all(p.grad is None for p in model.parameters())


def test_a_mark_settles_positions_as_long_as_the_batch():
    model, x = positions_as_long_as_the_batch()
    rgd_ext.mark(model.positions, batch_dim=None)
    assert_exact(model, x)


def test_relative_positions_of_another_length_than_the_batch_are_exact():
    model, _ = relative_positions_as_long_as_the_batch()
    assert_exact(model, torch.randint(9, (5, 3)))


def test_marks_say_where_the_samples_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = double(6, 3, 4)
    expected = expected_direction(model, x)
    sequence_first = Net(lambda m, x: m.body(x.transpose(0, 1)).transpose(0, 1), body=model)
    with pytest.raises(ValueError, match=r"'body\.0' got an input of shape \(3, 6, 4\) in a batch of 6 samples.*mark"):
        captured_grad(sequence_first, x)
    for layer in (model[0], model[2]):
        rgd_ext.mark(layer, batch_dim=1)
    assert_close(captured_grad(sequence_first, x), expected)


def test_batch_sizes_that_disagree_between_modules_are_refused():
    model = Net(lambda m, x: m.b(m.a(x)[:3]), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'b' got an input of shape \(3, 4\) in a batch of 6 samples"):
        captured_grad(model, torch.randn(6, 4))


def test_mark_settles_a_batch_as_long_as_its_sequences():
    def forward(m, x):
        return m.second(m.first(x).tanh().transpose(0, 1)).transpose(0, 1)

    model = Net(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 3))
    rgd_ext.mark(model.second, batch_dim=1)
    assert_exact(model, torch.randn(5, 5, 4))
