"""Passes over a data set: how many there are, and what must not change from one to the next."""

import pytest
import torch
import torch.nn.functional as F
from diffusing import Counting, batches, case, check, explicit
from models import mlp
from oracle import assert_close
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rgd_ext import DiffusionMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


def test_products_take_one_pass_and_are_kept(tmp_path):
    model, loss, x, y = case()
    loader = Counting(batches(x, y, 3))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    assert loader.passes == 0
    matrix.trace(), matrix.trace()
    assert loader.passes == 1
    matrix @ torch.randn(matrix.shape[0], 4)
    assert loader.passes == 2
    matrix.spectrum(), matrix.rank(), matrix.largest_eigenvalue()
    assert loader.passes == 3


def test_a_loader_that_shuffles_is_noticed():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True))
    with pytest.raises(RuntimeError, match=r"batch \d differs.*shuffle=False"):
        matrix @ torch.ones(matrix.shape[0])


class Noisy:
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((x + 1e-3 * torch.randn_like(x), y) for x, y in self.loader)


def test_a_loader_that_augments_or_ends_early_is_noticed():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, Noisy(batches(x, y, 3)))
    with pytest.raises(RuntimeError, match=r"batch 0 differs.*augments"):
        matrix @ torch.ones(matrix.shape[0])
    loader = list(batches(x, y, 3))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    matrix.trace()
    last = loader.pop()
    with pytest.raises(RuntimeError, match="2 batches, but 3"):
        matrix.to_dense()
    loader += [last, last]
    with pytest.raises(RuntimeError, match="batch 3 differs"):
        matrix.to_dense()


def test_a_model_that_is_random_or_trained_meanwhile_is_noticed():
    _, loss, x, y = case()

    class Random(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5)

    matrix = DiffusionMatrix.from_dataset(Random(6, 3).double().eval(), loss, batches(x, y, 3))
    with pytest.raises(RuntimeError, match="random"):
        matrix @ torch.ones(matrix.shape[0])
    model = mlp().double().eval()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    matrix.trace()
    with torch.no_grad():
        model[0].weight += 1e-9
    with pytest.raises(RuntimeError, match="weights have changed"):
        matrix.to_dense()


def test_a_failed_pass_can_be_tried_again():
    model, loss, x, y = case()
    loader = Counting(batches(x, y, 3), fail_at=1)
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    with pytest.raises(KeyboardInterrupt):
        matrix.trace()
    loader.fail_at = None
    check(matrix, explicit(model, loss, x, y))


def test_progress_is_shown_on_a_terminal_and_changes_nothing(capsys, monkeypatch):
    model, loss, x, y = case()
    expected = DiffusionMatrix.from_batch(model, loss, x, y).trace()
    for is_terminal in (False, True):
        monkeypatch.setenv("FORCE_COLOR", "1" if is_terminal else "")
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), progress=True)
        assert_close(matrix.trace(), expected)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("pass 1 (moments)" in err) == is_terminal


class Unsized(IterableDataset):
    """A data set that does not know its length."""

    def __init__(self, x, y):
        self.pairs = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.pairs)


def test_a_loader_may_not_know_its_length():
    model, loss, x, y = case()
    expected = DiffusionMatrix.from_batch(model, loss, x, y)
    matrix = DiffusionMatrix.from_dataset(model, loss, DataLoader(Unsized(x, y), batch_size=3), progress=True)
    with pytest.raises(TypeError, match=r"has no len\(\): compute trace\(\) first"):
        matrix.estimate()
    assert_close(matrix.spectrum(3), expected.spectrum(3))
    assert matrix.estimate().passes == 2
