"""Models may take time first, (T, B, ...), and so may modules inside of others."""

import pytest
import torch
from capturing import B, assert_exact, double, expected_direction, loss_of
from models import Net
from oracle import assert_close, flat_grad
from torch import nn

import rgd_ext

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
T, WIDTH = 4, 8


def encoder(activation="relu", norm=None):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, activation), 2, norm)


def class_token(m, x):
    return m.body(torch.cat([m.token.expand(-1, x.shape[1], -1), x]) + m.places)[0]


def last(m, x):
    return m.out(m.body(x)[0][-1])


def looked_up(m, x):
    return m.out(m.body(x) + m.places(torch.arange(len(x)))[:, None])


def batch_first_inside(m, x):
    return m.out(m.norm(m.conv(m.body(x).permute(1, 2, 0))).mean(2))


def transformer(m, x, padding):
    causal = nn.Transformer.generate_square_subsequent_mask(len(x))
    return m.body(x, x.flip(0), tgt_mask=causal, src_key_padding_mask=padding)


def stack():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Tanh())


def raw(*shape):
    return nn.Parameter(torch.randn(shape))


MODELS = {
    "transformer": lambda: Net(transformer, body=nn.Transformer(WIDTH, 2, 1, 1, 16, 0.0)),
    "lstm": lambda: Net(last, body=nn.LSTM(WIDTH, 5, 2), out=nn.Linear(5, 3)),
    "class token": lambda: Net(class_token, body=encoder(), token=raw(1, 1, WIDTH), places=raw(T + 1, 1, WIDTH)),
    "unit": lambda: Net(
        lambda m, x: m.out(m.gain(m.body(x))[0]),
        body=stack(),
        gain=Net(lambda m, x: x * m.p, p=raw(4)),
        out=nn.Linear(4, 3),
    ),
    "unit that gives the last step": lambda: Net(
        lambda m, x: m.out(m.gain(m.body(x))),
        body=stack(),
        gain=Net(lambda m, x: (x * m.p)[-1], p=raw(4)),
        out=nn.Linear(4, 3),
    ),
    "indices": lambda: Net(lambda m, x: m.body((x > 0).long().sum(-1)), body=nn.Embedding(WIDTH + 1, 3)),
    "as many channels as samples": lambda: Net(
        batch_first_inside, body=stack(), conv=nn.Conv1d(4, B, 2), norm=nn.GroupNorm(2, B), out=nn.Linear(B, 3)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_time_first_match_the_oracle(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), double(T, B, WIDTH)
    others = [torch.arange(T) > torch.tensor([3, 1, 3, 2, 3, 0])[:, None]] if name == "transformer" else []
    samples_first = Net(_samples_first, model=model)
    expected = expected_direction(samples_first, x.transpose(0, 1), *others)
    rgd_ext.RGD(model, lr=0.1, batch_dim=1)
    loss_of(model(x, *others)).backward()
    assert_close(flat_grad(model), expected)


def _samples_first(m, x, *others):
    output = m.model(x.transpose(0, 1), *others)
    return output.transpose(0, 1) if output.ndim == 3 else output


@pytest.mark.parametrize("forward", [looked_up, lambda m, x: m.out(m.body(x).transpose(0, 1))])
def test_sizes_that_agree_by_chance_are_settled_by_a_mark(forward):
    parts = {"body": nn.Embedding(9, 4), "places": nn.Embedding(9, 4), "out": nn.Linear(4, 3)}
    model, x = Net(forward, **parts).double(), torch.randint(9, (B, B))
    with pytest.raises(ValueError, match=r"rgd_ext\.mark"):
        rgd_ext.verify(model, x, batch_dim=1)
    if forward is looked_up:
        rgd_ext.mark(model.places, batch_dim=None)
    else:
        rgd_ext.mark(model.out, batch_dim=0)
    model.places.requires_grad_(forward is looked_up)
    assert rgd_ext.verify(model, x, batch_dim=1).samples == (0, B - 1)


def test_transformers_with_time_first_inside_of_a_model_with_samples_first_match_the_oracle():
    body = encoder(activation=nn.PReLU(), norm=nn.LayerNorm(WIDTH))
    model = Net(lambda m, x: m.out(m.body(x.transpose(0, 1)).mean(0)), body=body, out=nn.Linear(WIDTH, 3)).double()
    x = double(B, T, WIDTH)
    assert_exact(model, x)


@pytest.mark.parametrize("kind", [lambda: nn.Transformer(WIDTH, 2, 1, 1, 16), lambda: nn.LSTM(WIDTH, 5)])
def test_the_error_without_batch_dim_names_it(kind):
    model = kind()
    inputs = [torch.randn(T, B, WIDTH)] * (1 + isinstance(model, nn.Transformer))
    with pytest.raises(ValueError, match=r"precondition\(model, batch_dim=1\)"):
        rgd_ext.verify(model, *inputs)
    assert rgd_ext.verify(model, *inputs, batch_dim=1).samples == (0, B - 1)


def test_a_first_tensor_without_that_dimension_is_refused():
    with rgd_ext.precondition(nn.Linear(3, 2), batch_dim=1) as handle:
        with pytest.raises(ValueError, match=r"\(3,\), and batch_dim=1"):
            handle.model(torch.randn(3))
        with pytest.raises(ValueError, match="captured with batch_dim=1"):
            rgd_ext.verify(handle.model, torch.randn(2, 5, 3), batch_dim=2)
        assert rgd_ext.verify(handle.model, torch.randn(2, 5, 3)).batch_size == 5


def test_the_diffusion_matrix_takes_samples_first():
    model, x = nn.Linear(3, 2), torch.randn(B, T, 3)
    with rgd_ext.precondition(model, batch_dim=1), pytest.raises(ValueError, match=r"batch_dim=1.*\.remove\(\)"):
        rgd_ext.DiffusionMatrix.from_batch(model, nn.MSELoss(), x, torch.randn(B, T, 2))
    rgd_ext.DiffusionMatrix.from_batch(model, nn.MSELoss(), x, torch.randn(B, T, 2))


def test_one_sample_whose_direction_is_the_plain_gradient_is_noticed():
    model = nn.Linear(4, 2)
    with rgd_ext.precondition(model, batch_dim=None), pytest.warns(UserWarning, match=r"one sample.*accumulate"):
        loss_of(model(torch.randn(5, 4))).backward()
