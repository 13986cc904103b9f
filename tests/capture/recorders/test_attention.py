"""nn.MultiheadAttention matches the oracle with all its options, masks and arguments."""

import pytest
import torch
from capturing import assert_exact, captured_grad, double, loss_of
from models import Net
from oracle import assert_close, per_sample_gradients, weak_field
from planning_cases import reasons
from torch import nn

import rgd_ext

B, L, S, HEADS, WIDTH = 5, 3, 4, 2, 4
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)


def attention(**options):
    """The module, with biases that are not zero, and a query, a key and a value with the samples in front."""
    layer = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, [double(B, L, WIDTH), double(B, S, layer.kdim), double(B, S, layer.vdim)]


def model_of(layer, places=(0, 1, 2), **arguments):
    """What takes samples in front, and gives the layer's output and weights of each side by side.

    Args:
        layer: nn.MultiheadAttention.
        places: of query, key and value among the inputs.
        arguments: of the layer; an int is the place of an input.
    """

    def forward(m, *inputs):
        sequences = [x if m.layer.batch_first or x.ndim != 3 else x.transpose(0, 1) for x in inputs]
        others = {name: inputs[value] if type(value) is int else value for name, value in arguments.items()}
        if type(arguments.get("attn_mask")) is int:
            others["attn_mask"] = others["attn_mask"].flatten(0, 1)  # (B h, L, S)
        output, weights = m.layer(*[sequences[place] for place in places], **others)
        output = output if m.layer.batch_first else output.transpose(0, 1)
        return output.flatten(1) if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)

    return Net(forward, layer=layer)


def check(model, inputs):
    expected = model(*inputs).detach()
    with rgd_ext.precondition(model):
        assert_close(model(*inputs).detach(), expected)
    assert_exact(model, *inputs)


MODULES = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "without bias": {"bias": False},
    "added bias": {"add_bias_kv": True},
    "added zero": {"add_zero_attn": True},
    "added bias and zero": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    "of another width": {"kdim": 3, "vdim": 2},
    "of another width, without bias": {"kdim": 3, "bias": False, "batch_first": False},
}
NEEDED = {"no weights": {"need_weights": False}, "mean": {}, "all": {"average_attn_weights": False}}


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("options", MODULES)
def test_every_option_of_the_module_matches_the_oracle(options, needed):
    layer, inputs = attention(**MODULES[options])
    check(model_of(layer, attn_mask=CAUSAL, **NEEDED[needed]), inputs)


MASKS = {
    "none": {},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.linspace(-1, 1, L * S, dtype=torch.float64).view(L, S)},
    "by head": {"attn_mask": 3},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "padding": {"key_padding_mask": 4},
    "padding in floats": {"key_padding_mask": 5},
    "padding by head": {"attn_mask": 3, "key_padding_mask": 5},
    "padding, causal": {"attn_mask": CAUSAL, "key_padding_mask": 4, "is_causal": True},
}


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("options", ["plain", "added bias and zero"])
@pytest.mark.parametrize("masks", MASKS)
def test_every_mask_matches_the_oracle(masks, options, needed):
    layer, inputs = attention(**MODULES[options])
    padding = torch.arange(S) > torch.tensor([1, 3, 2, 1, 3])[:, None]
    inputs += [double(B, HEADS, L, S), padding, double(B, S)]
    check(model_of(layer, **MASKS[masks], **NEEDED[needed]), inputs)


@pytest.mark.parametrize("frozen", [[], ["in_proj_weight"], ["in_proj_bias", "bias_k"], ["bias_v", "out_proj.weight"]])
@pytest.mark.parametrize("places", [(0, 0, 0), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_arguments_that_are_one_tensor_match_the_oracle(places, frozen):
    layer, (x, _, _) = attention(add_bias_kv=True)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    check(model_of(layer, places), [x, double(B, L, WIDTH)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", NEEDED)
def test_dropout_is_drawn_as_without_the_capture(needed, training):
    layer, inputs = attention(dropout=0.5)
    model, found = model_of(layer.train(training), **NEEDED[needed]), []
    with rgd_ext.precondition(model, verify=False) as handle:
        for context in (handle.paused, handle.accumulate):
            torch.manual_seed(1)
            with context():
                found.append(model(*inputs).detach())
    assert_close(*found)


def test_number_of_samples_is_that_of_the_query_where_the_model_got_no_tensor():
    layer, inputs = attention()
    model = Net(lambda m: m.layer(*inputs)[0], layer=layer)
    expected = weak_field(per_sample_gradients(Net(lambda m, *x: m.layer(*x)[0], layer=layer), loss_of, inputs))
    assert_close(captured_grad(model, verify=False), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(L, L), (HEADS, L, L)], ids=["mask", "mask by head"])
def test_arguments_that_all_samples_share_match_the_oracle(shape, batch_first):
    def forward(m, x):
        between, _ = m.layer(m.q, m.q, m.q, attn_mask=m.mask, key_padding_mask=m.padding, need_weights=False)
        return x + (between if m.layer.batch_first else between.transpose(0, 1)).sin()

    layer, (x, _, _) = attention(batch_first=batch_first)
    q = nn.Parameter(double(1, L, WIDTH) if batch_first else double(L, 1, WIDTH))
    model = Net(forward, layer=layer, q=q, mask=nn.Parameter(double(*shape)), padding=nn.Parameter(double(1, L)))
    assert_exact(model, x)


def test_a_mask_that_all_samples_share_matches_the_oracle_beside_the_batch():
    layer, inputs = attention()
    model = Net(lambda m, *x: m.layer(*x, attn_mask=m.mask)[0], layer=layer, mask=nn.Parameter(double(L, S)))
    assert_exact(model, *inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": CAUSAL.T}, r"2D attn_mask is torch\.Size\(\[4, 3\]\)"),
        ({"attn_mask": CAUSAL[None]}, r"got an attn_mask of shape \(1, 3, 4\)"),
        ({"key_padding_mask": CAUSAL}, r"got a key_padding_mask of shape \(3, 4\)"),
        ({"is_causal": True}, "Need attn_mask"),
    ],
)
def test_masks_of_other_shapes_are_refused(arguments, message):
    layer, inputs = attention()
    with pytest.raises((ValueError, RuntimeError), match=message):
        captured_grad(model_of(layer, **arguments), *inputs)


def test_samples_along_another_dimension_are_refused():
    layer, inputs = attention(batch_first=False)
    with pytest.raises(ValueError, match=r"got a query of shape \(5, 3, 4\) .*dimension 1 "):
        captured_grad(Net(lambda m, *x: m.layer(*x)[0], layer=layer), *inputs)


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 20}], ids=["packed", "apart"])
@pytest.mark.parametrize("is_self", [True, False])
def test_projections_have_the_strategies_of_linear_layers(is_self, options):
    layer = nn.MultiheadAttention(64, 4, batch_first=True, **({} if is_self else options))
    x = torch.randn(5, 3, 64)
    inputs = [x, x, x] if is_self else [torch.randn(5, 3, n) for n in (64, layer.kdim, layer.vdim)]
    with rgd_ext.precondition(layer) as handle:
        loss_of(layer(*inputs)[0]).backward()
        assert all("ghost" in reason for reason in reasons(handle).values())
