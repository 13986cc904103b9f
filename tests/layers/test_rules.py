"""Every layer rule matches the oracle."""

import pytest
import torch
from oracle import assert_close, diffusion_matrix, flat_grad, per_sample_gradients, weak_field
from torch import nn

import rgd_ext

# torch's weight norm has no batching rule, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*_weight_norm")
B = 5


class Scale(nn.Module):
    """A leaf with a raw parameter: the generic rule; makes the inputs of what follows need gradients."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return x * self.gain


class Gated(nn.Module):
    """Two raw parameters, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.b = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.sigmoid(x @ self.w + self.b) * (x @ self.w.T)


class First(nn.Module):
    """The first of a recurrent layer's outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class States(First):
    """The last states of a recurrent layer, from a given initial state."""

    def forward(self, x):
        layer = self.layer
        start = x.new_ones(layer.num_layers * (2 if layer.bidirectional else 1), len(x), layer.hidden_size)
        _, state = layer(x, (start, start) if isinstance(layer, nn.LSTM) else start)
        return torch.cat([s.transpose(0, 1).flatten(1) for s in (state if isinstance(state, tuple) else (state,))], 1)


class Attend(nn.Module):
    def __init__(self, mask=False, **options):
        super().__init__()
        self.attention, self.mask = nn.MultiheadAttention(4, 2, **options), mask

    def forward(self, x):
        batch_first = self.attention.batch_first
        x = x if batch_first else x.transpose(0, 1)
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if self.mask else None
        out = self.attention(x, x, x, attn_mask=mask, need_weights=self.mask)[0]
        return out if batch_first else out.transpose(0, 1)


class Pair(nn.Module):
    """nn.Bilinear of an input with itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.layer(x, x.flip(-1))


class Cells(nn.Module):
    """Cells of every kind, stepped by hand."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3), (4,)),
    "Linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "Linear over sequences": (lambda: nn.Linear(4, 3), (6, 4)),
    "Linear over long sequences": (lambda: nn.Linear(2, 3), (40, 2)),
    "Linear over grids": (lambda: nn.Linear(4, 3), (2, 3, 4)),
    "Bilinear": (Pair, (4,)),
    "Bilinear over sequences": (Pair, (6, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "Conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (4, 9)),
    "Conv1d valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid", bias=False), (4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 7)),
    "Conv2d strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 2), (2, 1)), (4, 8, 7)),
    "Conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 7)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 7)),
    "Conv2d of few places": (lambda: nn.Conv2d(8, 16, 3), (8, 3, 4)),
    "Conv2d of few places, circular": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (8, 2, 2)),
    "Conv2d of one place": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (4, 3, 2)),
    "Conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (4, 6, 7)),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 6, 7)),
    "Conv2d replicate": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (4, 6, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 5)),
    "ConvTranspose1d padded, dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, dilation=3, output_padding=2), (4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (4, 5, 4)),
    "ConvTranspose2d of few places": (lambda: nn.ConvTranspose2d(16, 8, 3), (16, 1, 2)),
    "ConvTranspose2d depthwise, padded, dilated": (
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, dilation=2, output_padding=1),
        (4, 5, 4),
    ),
    "ConvTranspose2d of few places, padded": (
        lambda: nn.ConvTranspose2d(16, 8, 3, dilation=3, output_padding=2),
        (16, 1, 2),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 3, 2, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,)),
    "LayerNorm over sequences": (lambda: nn.LayerNorm((6, 4)), (3, 6, 4)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), (6, 4)),
    "LayerNorm over grids": (lambda: nn.LayerNorm(4), (2, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (6, 4)),
    "RMSNorm of vectors": (lambda: nn.RMSNorm((4,), eps=0.1), (4,)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "GroupNorm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 5)),
    "InstanceNorm3d frozen": (lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True).eval(), (4, 2, 3, 2)),
    "BatchNorm1d frozen": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "BatchNorm2d frozen": (lambda: nn.BatchNorm2d(4).eval(), (4, 3, 2)),
    "raw parameters": (Gated, (4,)),
    "raw parameters over sequences": (Gated, (6, 4)),
    "PReLU": (lambda: nn.PReLU(4), (4, 3)),
    "weight_norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "RNN": (lambda: First(nn.RNN(4, 3, batch_first=True)), (6, 4)),
    "RNN relu": (lambda: First(nn.RNN(4, 3, nonlinearity="relu", bias=False, batch_first=True)), (6, 4)),
    "LSTM": (lambda: First(nn.LSTM(4, 3, batch_first=True)), (6, 4)),
    "LSTM stacked": (lambda: First(nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)), (6, 4)),
    "LSTM projected": (lambda: First(nn.LSTM(4, 5, proj_size=2, bidirectional=True, batch_first=True)), (6, 4)),
    "LSTM states": (lambda: States(nn.LSTM(4, 3, 2, batch_first=True)), (6, 4)),
    "GRU": (lambda: First(nn.GRU(4, 3, batch_first=True)), (6, 4)),
    "GRU states": (lambda: States(nn.GRU(4, 3, 2, bidirectional=True, batch_first=True)), (6, 4)),
    "RNNCell": (lambda: Cells(nn.RNNCell(4, 3)), (6, 4)),
    "LSTMCell": (lambda: Cells(nn.LSTMCell(4, 3)), (6, 4)),
    "GRUCell": (lambda: Cells(nn.GRUCell(4, 3)), (6, 4)),
    "MultiheadAttention": (lambda: Attend(batch_first=True), (6, 4)),
    "MultiheadAttention masked": (lambda: Attend(mask=True, batch_first=True, add_bias_kv=True), (6, 4)),
    "MultiheadAttention sequence first": (lambda: Attend(mask=True), (6, 4)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (6, 4)),
}


def curved(output):
    """A loss whose output gradients differ by sample and element."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).sin().mean()


def check(model, inputs, loss=curved, policy="Spectral"):
    expected = per_sample_gradients(model, loss, inputs)
    with rgd_ext.precondition(model, epsilon=getattr(rgd_ext, policy)(0.5)) as handle:
        loss(model(*inputs)).backward()
    assert_close(flat_grad(model), weak_field(expected, policy))
    return handle.stats, expected


@pytest.mark.parametrize("first", [True, False], ids=["first", "inner"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_matches_oracle(name, dtype, first):
    build, shape = LAYERS[name]
    layer = build()
    model = (layer if first else nn.Sequential(Scale(), layer)).to(dtype)
    stats, expected = check(model, [torch.randn(B, *shape, dtype=dtype)])
    assert_close(stats.trace, diffusion_matrix(expected).trace(), dtype)
    assert_close(stats.squared_norms, (expected - expected.mean(0)).square().sum(1), dtype)


@pytest.mark.parametrize("policy", ["Spectral", "Rayleigh", "Trace"])
@pytest.mark.parametrize("name", ["Linear", "Linear over sequences", "Conv2d", "LSTM", "GroupNorm"])
def test_layer_matches_oracle_for_every_policy(name, policy):
    build, shape = LAYERS[name]
    check(build().double(), [torch.randn(B, *shape, dtype=torch.float64)], policy=policy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_of_small_inputs_has_the_default_epsilon_of_torch(dtype):
    layer, x = nn.RMSNorm(4, dtype=dtype), 1e-4 * torch.randn(B, 6, 4)
    curved(layer(x.to(dtype))).backward()
    plain = layer.weight.grad.clone()
    layer.zero_grad()
    with rgd_ext.precondition(layer, epsilon=rgd_ext.Fixed(0.0)):
        curved(layer(x.to(dtype))).backward()
    assert_close(layer.weight.grad, plain)


EMBEDDINGS = {
    "plain": {},
    "padded": {"padding_idx": 2},
    "by frequency": {"scale_grad_by_freq": True},
    "renormalised": {"max_norm": 1.0},
}


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
@pytest.mark.parametrize("options", ["plain", "padded", "renormalised"])
def test_embedding_matches_oracle(options, shape):
    model = nn.Sequential(nn.Embedding(9, 4, **EMBEDDINGS[options]), Scale()).double()
    check(model, [torch.randint(9, (B, *shape))])


def test_embedding_gradient_is_scaled_by_the_frequency_in_the_batch():
    model = nn.Embedding(9, 4, **EMBEDDINGS["by frequency"])
    x = torch.randint(9, (B, 3))
    curved(model(x)).backward()
    expected, model.weight.grad = model.weight.grad, None
    with rgd_ext.precondition(model), pytest.raises(ValueError, match=r"'weight'.*sample 0 of 5 has a relative error"):
        model(x)  # what a sample gets depends on the others
    with rgd_ext.precondition(model, epsilon=0.0, verify=False):
        curved(model(x)).backward()
    assert_close(model.weight.grad, expected)


@pytest.mark.filterwarnings("ignore:.*rounding errors")  # RMSNorm takes away the scale
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_parameters_get_no_gradient_and_leave_the_rest_exact(name):
    build, shape = LAYERS[name]
    model = nn.Sequential(Scale(), build()).double()
    frozen = list(model[1].parameters())[::2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    check(model, [torch.randn(B, *shape, dtype=torch.float64)])
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("name", LAYERS)
def test_one_sample_gets_the_plain_gradient(name):
    build, shape = LAYERS[name]
    model, x = build().double(), torch.randn(1, *shape, dtype=torch.float64)
    curved(model(x)).backward()
    expected = flat_grad(model).clone()
    model.zero_grad()
    with rgd_ext.precondition(model) as handle:
        curved(model(x)).backward()
    assert_close(flat_grad(model), expected)
    assert handle.stats.epsilon == 0


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_input_gradient_are_those_of_the_plain_model(name):
    build, shape = LAYERS[name]
    model, x = build().double(), torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)
    plain = model(x)
    (expected,) = torch.autograd.grad(curved(plain), x)
    with rgd_ext.precondition(model):
        output = model(x)
        curved(output).backward()
    assert_close(output.detach(), plain.detach())
    assert_close(x.grad, expected)


def test_dropout_inside_attention_is_the_same_in_forward_and_backward():
    # A mask drawn again in the backward would leave gradients where the forward has zeros.
    layer = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    x = torch.randn(1, 6, 4).expand(B, -1, -1)
    with rgd_ext.precondition(layer, epsilon=0.0):
        output = layer(x, x, x, need_weights=False)[0]
        output.sum().backward()
    assert torch.allclose(layer.out_proj.bias.grad, torch.full((4,), 6.0 * B))
    value_bias = layer.in_proj_bias.grad[8:]
    assert not torch.allclose(value_bias, value_bias.new_full((4,), 0.0))
    assert not torch.allclose(output[0], output[1]), "identical samples draw different masks"


def test_dropout_between_recurrent_layers_is_drawn_anew_and_only_in_training():
    layer, x = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True), torch.randn(B, 6, 4)
    with rgd_ext.precondition(layer):
        first, second = layer(x)[0], layer(x)[0]
        assert not torch.allclose(first, second)
        layer.eval()
        assert_close(layer(x)[0].detach(), layer(x)[0].detach())
