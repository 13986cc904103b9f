"""Eigenvalues and rank: exact ones, iterated ones, and where all of them are too many."""

import pytest
import torch
from diffusing import CASES, Counting, batches, case
from oracle import assert_close

from rgd_ext import DiffusionMatrix
from rgd_ext.diffusion import spectrum

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)], ids=str)
def test_rank_counts_what_is_above_rounding(shape, dtype):
    low = torch.randn(shape[0], 3, dtype=dtype) @ torch.randn(3, shape[1], dtype=dtype) + torch.randn(shape[1])
    assert DiffusionMatrix(low).rank() == 3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [1, 4])
def test_iterated_spectrum_is_the_exact_one(name, k, monkeypatch):
    model, loss, x, y = case(name, size=12)
    expected = DiffusionMatrix.from_batch(model, loss, x, y).spectrum(k)
    monkeypatch.setattr(spectrum, "_EXACT", 3)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 5)),
    ):
        assert_close(matrix.spectrum(k), expected, torch.float64)
        with pytest.raises(RuntimeError, match=r"at most min\(N - 1, d\) = 11"):
            matrix.rank()
        with pytest.raises(ValueError, match=r"spectrum\(10\)"):
            matrix.spectrum()


def test_eigenvalues_beyond_the_rank_are_zero_when_iterated(monkeypatch):
    rows = torch.randn(4, 60, dtype=torch.float64)
    expected = DiffusionMatrix(rows).spectrum(6)
    monkeypatch.setattr(spectrum, "_EXACT", 3)
    assert_close(DiffusionMatrix(rows).spectrum(6), expected)


def test_all_eigenvalues_of_few_samples_of_a_large_model(monkeypatch):
    model, loss, x, y = case(size=5)
    expected = DiffusionMatrix.from_batch(model, loss, x, y)
    d = expected.shape[0]
    monkeypatch.setattr(spectrum, "_EXACT", int((5 * d) ** 0.5) + 1)
    assert d > spectrum._EXACT
    loader = Counting(batches(x, y, 2))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader, correction=1)
    assert_close(matrix.spectrum(), expected.spectrum() * 5 / 4)
    assert_close(matrix.spectrum(d)[:4], expected.spectrum() * 5 / 4)
    assert matrix.rank() == expected.rank() == 4
    assert loader.passes == 2
    assert matrix.estimate().passes == matrix.estimate(3).passes == 2
    assert matrix.estimate().bytes < 4 * 8 * 5 * d


def test_all_eigenvalues_of_too_many_samples_name_what_to_call(monkeypatch):
    model, loss, x, y = case()
    monkeypatch.setattr(spectrum, "_EXACT", int((3 * sum(p.numel() for p in model.parameters())) ** 0.5) + 1)
    loader = Counting(batches(x, y, 2))
    matrix = DiffusionMatrix.from_dataset(model, loss, loader)
    message = r"spectrum\(10\).*from_batch takes up to \d+ samples"
    with pytest.raises(ValueError, match=message):
        matrix.spectrum()  # four batches have at least four samples
    assert loader.passes == 0
    matrix = DiffusionMatrix.from_dataset(model, loss, [(x, y)])
    with pytest.raises(ValueError, match=message):
        matrix.spectrum()
    with pytest.raises(RuntimeError, match=rf"at most min\(N - 1, d\) = 6; .*{message}"):
        matrix.rank()


def test_estimate_is_about_a_spectrum(monkeypatch):
    model, loss, x, y = case("CNN")
    batch = DiffusionMatrix.from_batch(model, loss, x, y).estimate()
    dense = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)).estimate()
    monkeypatch.setattr(spectrum, "_EXACT", 3)
    iterated = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    d = iterated.shape[0]
    assert all(e.seconds > 0 for e in (batch, dense, iterated.estimate(5)))
    assert batch.bytes < dense.bytes
    assert dense.bytes >= 8 * d * d
    assert dense.passes == 2
    assert iterated.estimate(30).passes > iterated.estimate(5).passes >= 20
    assert iterated.estimate(5).bytes >= 20 * 8 * d
