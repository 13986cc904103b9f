"""Directions of embeddings are sparse where their ordinary gradients are."""

import pytest
import torch
from capturing import as_unit, captured_grad, loss_of, own_type
from models import Net
from oracle import assert_close, flat
from torch import nn

import rgd_ext

B, T, ROWS, WIDTH = 5, 5, 9, 4


def bags():
    """Indices of B bags of T rows each, or of B sequences."""
    return torch.randint(ROWS, (B, T))


def embedding_of(kind, is_sparse=True):
    torch.manual_seed(0)
    width = WIDTH if kind is nn.EmbeddingBag else 5 * WIDTH
    return nn.Sequential(kind(ROWS, WIDTH, sparse=is_sparse), nn.Flatten(), nn.Linear(width, 3)).double()


@pytest.mark.parametrize("policy", [rgd_ext.Spectral(0.5), rgd_ext.Rayleigh(0.3)], ids=["Spectral", "Rayleigh"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_directions_are_sparse_where_gradients_are(kind, policy):
    x, found = bags(), []
    for is_sparse in (True, False):
        model = embedding_of(kind, is_sparse)
        with rgd_ext.precondition(model, epsilon=policy) as handle:
            for _ in range(2):
                loss_of(model(x)).backward()
            norm = handle.stats.direction_norm
            with handle.accumulate():
                loss_of(model(x)).backward()
        assert model[0].weight.grad.is_sparse == is_sparse
        found.append((model[0].weight.grad.to_dense(), norm))
    torch.testing.assert_close(*found)


def test_diffusion_matrices_of_sparse_tables_are_those_of_dense_ones():
    x, y, found = bags(), torch.randint(3, (5,)), []
    for is_sparse in (True, False):
        model = embedding_of(nn.Embedding, is_sparse)
        matrix = rgd_ext.DiffusionMatrix.from_batch(model, nn.CrossEntropyLoss(), x, y)
        found.append(matrix @ torch.linspace(-1, 1, matrix.shape[0], dtype=torch.float64))
    assert_close(*found)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_adam_takes_sparse_directions(kind):
    model, x = embedding_of(kind), bags() % 4
    before = model[0].weight.detach().clone()
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    torch.optim.SparseAdam([model[0].weight]).step()
    assert set((model[0].weight != before).any(1).nonzero().flatten().tolist()) == set(x.unique().tolist())


def test_sparse_and_dense_directions_of_one_table_add_up():
    def forward(m, x, is_tied):
        return m.head(m.bag(x)) if is_tied else m.bag(x)

    model = Net(forward, bag=nn.EmbeddingBag(ROWS, WIDTH, sparse=True), head=nn.Linear(WIDTH, ROWS, bias=False))
    model.head.weight = model.double().bag.weight
    x, each = bags(), []
    for is_tied in (False, True, False):
        with rgd_ext.precondition(model):
            loss_of(model(x, is_tied)).backward()
        assert model.bag.weight.grad.is_sparse != is_tied
        each.append(model.bag.weight.grad.to_dense())
        model.zero_grad()
    with rgd_ext.precondition(model):
        for is_tied in (False, True, False):
            loss_of(model(x, is_tied)).backward()
    assert_close(model.bag.weight.grad, sum(each))


@pytest.mark.parametrize("kind", [nn.Embedding])
def test_gradients_inside_of_a_unit_stay_sparse(kind):
    model, x = own_type(lambda m, x: m.inner(x), inner=embedding_of(kind)), bags()
    as_unit(model)
    expected = captured_grad(embedding_of(kind, False), x)
    with rgd_ext.precondition(model):
        loss_of(model(x)).backward()
    assert model.inner[0].weight.grad.is_sparse
    assert_close(flat(p.grad.to_dense() for p in model.parameters()), expected)
