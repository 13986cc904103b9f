"""Right models are proven, whatever their outputs, random numbers and precision."""

import warnings
from dataclasses import dataclass

import numpy
import pytest
import torch
import torch.nn.functional as F
from capturing import B, captured_grad, double, loss_of
from models import MODELS, Net, mlp, two_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

import rgd_ext


def test_a_loss_of_mixed_samples_is_told_from_outputs_of_each_sample():
    def forward(m, x):
        h = m.a(x).tanh()
        return {"loss": m.b(h - h.mean(0)).square().mean(), "logits": m.b(h)}

    assert "no weighted sum" in rgd_ext.verify(two_layers(forward), torch.randn(B, 5)).note
    # A loss of the outputs alone is like one outside of the model.
    contrast = Net(lambda m, x: (z := m.a(x), F.cross_entropy(z @ z.T, torch.arange(B))), a=nn.Linear(5, 4))
    assert not rgd_ext.verify(contrast, torch.randn(B, 5)).note


def test_a_loss_beside_outputs_on_the_way_to_others_is_proven():
    def forward(m, x, y):
        h = m.a(x).tanh()
        z = m.b(h)
        return F.cross_entropy(z, y), z, h

    model = Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    verification = rgd_ext.verify(model, torch.randn(B, 5), torch.tensor([0, 1, 2, 0, 2, 1]))
    assert (verification.samples, verification.note) == ((0, 5), "")
    assert verification.largest_error < 1e-5


def test_products_between_all_samples_are_left_out():
    def forward(m, x, y):
        left, right = m.a(x), m.b(y)
        return left, right, left @ right.T

    verification = rgd_ext.verify(
        Net(forward, a=nn.Linear(5, 4), b=nn.Linear(3, 4)), double(B, 5).float(), double(B, 3).float()
    )
    assert verification.samples
    assert "left out" in verification.note


def test_complex_outputs_and_masked_logits_are_proven():
    model = Net(lambda m, x: torch.fft.rfft(m.b(m.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 4))
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples
    model._forward = lambda m, x: torch.fft.rfft(m.b(m.a(x).flip(0))).flip(0)
    with pytest.raises(ValueError, match="the capture credits"):
        rgd_ext.verify(model, torch.randn(B, 5))
    mask = torch.tensor([0, -torch.inf, 0, 0])
    model._forward = lambda m, x: m.b(m.a(x)) + mask
    assert rgd_ext.verify(model, torch.randn(B, 5)).samples


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


OUTPUTS = {
    "tuple": lambda z, y: (z, z.square()),
    "mapping": lambda z, y: {"logits": z, "number": 3, "labels": y},
    "dataclass with a loss": lambda z, y: Output(F.cross_entropy(z, y), z),
    "no dimension for one sample": lambda z, y: z.sum(1).squeeze(),
    "merged with places": lambda z, y: z.flatten()[:, None],
    "places first": lambda z, y: z.T.flatten(),
    "samples last": lambda z, y: z.T,
    "mean loss": F.cross_entropy,
    "sum loss": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "weighted loss": lambda z, y: F.cross_entropy(z, y, ignore_index=2),
    "two losses": lambda z, y: (F.cross_entropy(z, y), z.square().sum()),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_all_kinds_tell_samples_apart(name):
    model = Net(lambda m, x, y: OUTPUTS[name](m.b(m.a(x).tanh()), y), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    y = torch.tensor([0, 1, 2, 0, 2, 1])
    verification = rgd_ext.verify(model, torch.randn(B, 5), y)
    assert verification.samples == (0, B - 1)
    assert verification.largest_error < 1e-5


def test_a_contrastive_loss_of_the_model_is_summed_and_said_once():
    def forward(m, x):
        z = m.a(x)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    model = Net(forward, a=nn.Linear(5, 4))
    with rgd_ext.precondition(model):
        with pytest.warns(UserWarning, match="no weighted sum"):
            model(torch.randn(B, 5))
        model(torch.randn(B + 1, 5))


# Rounding


def test_rounding_is_no_error():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 4)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert rgd_ext.verify(encoder, torch.randn(7, 5, 32)).samples

    def low_inside(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.encoder(x).float()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rounding errors")
        captured_grad(Net(low_inside, encoder=encoder), torch.randn(7, 5, 32))


def test_a_chaotic_recurrence_is_no_error():
    model, x = nn.RNN(8, 16, batch_first=True), torch.randn(5, 200, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6
    model = Net(lambda m, x: m.layer(x)[0][:, -1], layer=model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rounding errors")
        assert captured_grad(model, x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_whole_models_are_proven_in_every_precision(dtype):
    for name, (build, inputs_of) in MODELS.items():
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs_of(5)]
        assert rgd_ext.verify(build().to(dtype), *inputs).samples, name


def test_models_are_proven_under_autocast_and_inside_of_checkpoints():
    model, x = (
        Net(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=mlp(), b=nn.Linear(3, 2)),
        torch.randn(B, 6),
    )
    with rgd_ext.precondition(model) as handle:
        with torch.autocast("cpu"), warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_of(model(x)).backward()
        loss_of(checkpoint(model, x, use_reentrant=False)).backward()
        assert handle.stats.batch_size == B
    with rgd_ext.precondition(mlp()) as handle:
        loss_of(checkpoint(handle.model, x, use_reentrant=False)).backward()  # verified inside
        assert handle.stats.batch_size == B


def test_a_model_that_needs_autocast_is_proven_under_it():
    model, x = mlp(), torch.randn(B, 6).bfloat16()
    with rgd_ext.precondition(model) as handle, torch.autocast("cpu", torch.bfloat16):
        assert rgd_ext.verify(model, x).tolerance > 0.01
        loss_of(model(x)).backward()
        loss_of(model(x)).backward()
    assert handle.stats.batch_size == B


# Random numbers


def test_random_numbers_of_numpy_for_each_sample_are_no_error():
    def forward(m, x):
        return m.b(1 + 1e-3 * m.a(x * torch.tensor(numpy.random.rand(*x.shape) > 0.3)))

    for seed in range(5):
        numpy.random.seed(seed)
        assert rgd_ext.verify(two_layers(forward), torch.randn(B, 5)).samples


def noise(m, x):
    z = m.a(x)
    z = z + torch.randn_like(z) * torch.rand(len(z), 1) + torch.distributions.Exponential(1.0).sample((len(z), 1))
    z = z * torch.bernoulli(torch.full((len(z), 1), 0.8)) + torch.normal(z.detach(), 1.0)
    return m.b(F.gumbel_softmax(F.alpha_dropout(F.dropout(z, 0.2), 0.2), dim=-1))


def own_generator(m, x):
    return m.b(m.a(x) * torch.rand(len(x), 4, generator=m.generator))


def timesteps(m, x):
    return m.b(m.a(x) * (1 + torch.randint(10, (len(x), 1))) + torch.multinomial(m.a(x).softmax(-1), 2)[:, :1])


@pytest.mark.parametrize("forward", [noise, own_generator, timesteps], ids=lambda forward: forward.__name__)
def test_random_forwards_are_proven(forward):
    model = two_layers(forward)
    model.generator = torch.Generator().manual_seed(0)
    verification = rgd_ext.verify(model, torch.randn(B, 5))
    assert verification.samples == (0, B - 1)
    assert not verification.note


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU])
def test_random_layers_are_proven(kind):
    verification = rgd_ext.verify(nn.Sequential(nn.Conv1d(2, 4, 3), kind(), nn.Conv1d(4, 2, 3)), torch.randn(B, 2, 9))
    assert verification.samples
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    assert rgd_ext.verify(encoder, torch.randn(B, 3, 4)).samples
