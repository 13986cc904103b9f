"""All strategies of a layer give the direction of the oracle, and none holds more than it has to."""

import weakref

import pytest
import torch
from capturing import loss_of
from contribution_cases import with_blocks
from models import Net
from oracle import assert_close, direction, flat_grad, per_sample_gradients, weak_field
from planning_cases import STRATEGIES, Largest, model_and_inputs, only_strategy, strategies, with_rates
from torch import nn

import rgd_ext
from rgd_ext import linalg
from rgd_ext.contributions.outer import Outer


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh", "exact"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["tied", "convolutions", "GPT", "ResNet", "LSTM classifier", "siamese"])
def test_every_strategy_gives_the_direction_of_the_oracle(name, strategy, policy, monkeypatch):
    model, inputs = model_and_inputs(name)
    only_strategy(monkeypatch, strategy)
    options = {"epsilon": rgd_ext.Rayleigh(0.5)} if policy == "Rayleigh" else {"epsilon": rgd_ext.Spectral(0.5)}
    options |= {"inverse": "exact"} if policy == "exact" else {}
    with rgd_ext.precondition(model, **options) as handle:
        loss_of(model(*inputs)).backward()
        assert strategy in strategies(handle).values()
    grads = per_sample_gradients(model, loss_of, inputs)
    rayleigh = "Rayleigh" if policy == "Rayleigh" else "Spectral"
    small = grads.shape[1] < 3_000
    if policy != "exact":
        assert_close(flat_grad(model), weak_field(grads, rayleigh))
    elif small:
        assert_close(flat_grad(model), direction(grads, inverse="exact"))
    assert handle.stats.trace.item() == pytest.approx((grads - grads.mean(0)).square().sum(1).mean().item())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["tied", "convolutions"])
def test_matrix_vector_products_are_those_of_the_oracle_with_every_strategy(name, strategy, monkeypatch):
    model, inputs = model_and_inputs(name)
    only_strategy(monkeypatch, strategy)
    vector = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    each = lambda output, y: output.sin().square().flatten(1).mean(1).mean()  # noqa: E731
    matrix = rgd_ext.DiffusionMatrix.from_batch(model, each, inputs[0], torch.zeros(6))
    grads = per_sample_gradients(model, loss_of, inputs)
    centred = grads - grads.mean(0)
    assert_close(matrix @ vector, centred.T @ (centred @ vector) / 6)


@pytest.mark.parametrize("places", [(), (3,)])
def test_inputs_and_output_gradients_are_let_go_of_as_they_are_spent(places, monkeypatch):
    # One vector per sample, or of each a product of its own.
    owner, name = (torch.ops.rgd_ext, "ghost_combine") if places == () else (Outer, "combine")
    seen, alive = [], []

    def counting(combine):
        def counted(*args):
            alive.append(sum(tensor() is not None for tensor in seen))
            return combine(*args)

        return counted

    def see(module, args, output):
        seen.append(weakref.ref(args[0]))
        output.register_hook(lambda grad: seen.append(weakref.ref(grad)))

    with_rates(monkeypatch)
    monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    monkeypatch.setattr(torch.ops.rgd_ext, "combine", counting(torch.ops.rgd_ext.combine))
    only_strategy(monkeypatch, "recompute")
    layers = [nn.Linear(300, 300, bias=False) for _ in range(3)]
    for layer in layers:
        layer.register_forward_hook(see)
    with rgd_ext.precondition(nn.Sequential(nn.LayerNorm(300), *layers), verify=False) as handle:
        for _ in range(2):
            loss_of(handle.model(torch.randn(128, *places, 300))).backward()
            assert alive == [6, 4, 2, 0]  # the last for the norm's, which are tensors
            assert len(seen) == 6
            seen.clear()
            alive.clear()


def test_an_embedding_of_128k_words_makes_nothing_larger_than_its_table():
    model, x = nn.Embedding(128_000, 8), torch.randint(128_000, (64, 512))
    with rgd_ext.precondition(model), Largest() as largest:
        model(x).square().mean().backward()
    assert largest.elements <= max(model.weight.numel(), linalg.block_elements(x.device))


def tied(words):
    """A table that is the weight of the head as well."""
    embed, head = nn.Embedding(words, 6), nn.Linear(6, words, bias=False)
    head.weight = embed.weight
    return Net(lambda m, x: m.head(m.embed(x).tanh()), embed=embed, head=head)


def test_a_tied_table_is_formed_in_blocks_and_one_of_rare_words_not_at_all(monkeypatch):
    with_blocks(monkeypatch, 500)
    only_strategy(monkeypatch, "recompute")
    model, (x,) = model_and_inputs("tied")
    with rgd_ext.precondition(model), Largest() as largest:
        loss_of(model(x)).backward()
    # One sample has 5,000 rows of 6; the six of them would have 180,000 elements.
    assert largest.elements <= 30_000
    model, x = tied(words=500), torch.randint(500, (6, 2))
    with rgd_ext.precondition(model), Largest() as largest:
        loss_of(model(x)).backward()
    # The gradients of the six samples would have 18,000 elements, and the outputs have 6,000.
    assert largest.elements <= 6_000
