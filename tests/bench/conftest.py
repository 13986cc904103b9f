import pytest
import torch

from bench.__main__ import main
from bench.training import models
from bench.training.architectures import group_norm, resnet


@pytest.fixture(autouse=True)
def _on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch):
    """Runs `python -m bench ARGUMENTS --device cpu --quick`."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--device", "cpu", "--quick"])
        main()

    return run


@pytest.fixture
def example():
    """A small model of a kind, MLP, GPT, GN or BN (a ResNet with that normalisation), with its batch."""

    def build(kind):
        if kind == "MLP":
            return models.mlp(batch_size=5, width=16)
        if kind == "GPT":
            model = models.GPT(vocabulary=11, width=8, layers=1, heads=2, length=4)
            return model, torch.randint(11, (5, 4)), torch.randint(11, (5, 4))
        model, x, y = models.on_images(resnet(8, norm=group_norm if kind == "GN" else torch.nn.BatchNorm2d), 3)
        return model, x[..., :8, :8], y

    return build
