"""The models of the study."""

import pytest
import torch

from bench.studying.models import MODELS, build


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_a_model_gives_logits_and_treats_samples_independently(name, shape):
    torch.manual_seed(0)
    model, x = build(name, shape, 7), torch.randn(4, *shape)
    assert model(x).shape == (4, 7)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_models_have_the_sizes_of_their_descriptions():
    counts = {name: sum(p.numel() for p in build(name, (1, 8, 8), 10).parameters()) for name in MODELS}
    assert counts == {"MLP": 8970, "small MLP": 1210, "CNN": 6186, "small CNN": 666}
    assert build("MLP", (1, 28, 28), 10)[1].out_features == 128


def test_weights_are_a_function_of_the_global_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return build("CNN", (1, 8, 8), 10)[0].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="no model 'ResNet', only MLP"):
        build("ResNet", (1, 8, 8), 10)
