"""DiffusionMatrix against explicit per-sample gradients by torch.func in float64."""

import pytest
import torch
from diffusing import CASES, batches, case, check, explicit
from metric_cases import Methods
from oracle import assert_close, diffusion_matrix
from torch import nn

from rgd_ext import DiffusionMatrix

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_of_a_batch_is_the_explicit_matrix(name):
    model, loss, x, y = case(name)
    check(DiffusionMatrix.from_batch(model, loss, x, y), explicit(model, loss, x, y))


@pytest.mark.parametrize(("name", "size"), [("MLP", 1), ("MLP", 3), ("MLP", 7), ("MLP", 20), ("CNN", 3), ("GPT", 3)])
def test_of_a_data_set_is_the_explicit_matrix_for_any_batch_size(name, size):
    model, loss, x, y = case(name)
    check(DiffusionMatrix.from_dataset(model, loss, batches(x, y, size)), explicit(model, loss, x, y))


@pytest.mark.parametrize("name", CASES)
def test_in_float32(name):
    model, loss, x, y = case(name, dtype=torch.float32)
    rows = explicit(model, loss, x, y)
    values = torch.linalg.svdvals(rows - rows.mean(0)).square() / 7
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)),
    ):
        vector = torch.randn(rows.shape[1])
        assert_close(matrix @ vector, diffusion_matrix(rows) @ vector.double(), torch.float32)
        assert_close(matrix.spectrum(3), values[:3], torch.float32)
        assert (matrix @ vector).dtype == torch.float32
        assert matrix.rank() == 6


@pytest.mark.parametrize("shape", [(5, 8), (9, 4), (1, 3), (2, 2)], ids=str)
def test_of_tensors_is_the_explicit_matrix(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    if shape[0] > 1:
        check(DiffusionMatrix(rows), rows)
    parts = [rows[:, :1], rows[:, 1:].reshape(shape[0], 1, -1)]
    assert torch.equal(DiffusionMatrix(parts).to_dense(), DiffusionMatrix(rows).to_dense())


def test_any_source_that_follows_the_protocol_will_do():
    rows = torch.randn(6, 9, dtype=torch.float64)
    check(DiffusionMatrix(Methods(rows)), rows)


def test_both_forms_of_equation_3():
    model, loss, x, y = case()
    rows, n = explicit(model, loss, x, y), len(x)
    second_moment = rows.T @ rows / n - torch.outer(rows.mean(0), rows.mean(0))
    difference = rows[:, None] - rows[None]
    pairwise = torch.einsum("ijr,ijs->rs", difference, difference) / (2 * n * n)
    for matrix in (DiffusionMatrix.from_batch(model, loss, x, y), DiffusionMatrix(rows)):
        assert_close(matrix.to_dense(), second_moment)
        assert_close(matrix.to_dense(), pairwise)


@pytest.mark.parametrize("streamed", [False, True])
def test_symmetric_positive_and_of_rank_below_n(streamed):
    model, loss, x, y = case(size=4)
    matrix = DiffusionMatrix.from_batch(model, loss, x, y)
    if streamed:
        matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    dense, (u, v) = matrix.to_dense(), torch.randn(2, matrix.shape[0], dtype=torch.float64)
    assert torch.equal(dense, dense.T)
    assert_close(u @ (matrix @ v), v @ (matrix @ u))
    assert matrix.quadratic_form(u) >= 0
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12 * matrix.trace()
    assert matrix.rank() == 3
    assert_close(matrix.spectrum().sum(), matrix.trace())
    assert not matrix.spectrum(8)[3:].any()


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction_is_that_of_torch_var(correction):
    model, loss, x, y = case()
    rows = explicit(model, loss, x, y)
    for matrix in (
        DiffusionMatrix(rows, correction=correction),
        DiffusionMatrix.from_batch(model, loss, x, y, correction=correction),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3), correction=correction),
    ):
        variances = rows.var(0, correction=correction)
        assert_close(matrix.to_dense().diagonal(), variances)
        assert_close(matrix.trace(), variances.sum())
        assert_close(matrix.spectrum().sum(), variances.sum())
        vector = torch.randn(len(variances), dtype=torch.float64)
        assert_close(matrix.quadratic_form(vector), (rows @ vector).var(correction=correction))
        assert_close(vector @ (matrix @ vector), (rows @ vector).var(correction=correction))


def test_one_sample_has_no_diffusion_and_no_unbiased_estimate():
    model, loss, x, y = case(size=1)
    for matrix in (
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 1)),
    ):
        assert matrix.trace() == matrix.largest_eigenvalue() == matrix.rank() == 0
        assert not (matrix @ torch.ones(matrix.shape[0])).any()
        assert matrix.spectrum().shape == (0,)
    with pytest.raises(ValueError, match="N = 1 samples with correction=1"):
        DiffusionMatrix.from_batch(model, loss, x, y, correction=1)
    with pytest.raises(ValueError, match="N = 1 samples with correction=1"):
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 1), correction=1).trace()


BAD = {
    "model": (lambda m, f, x, y: DiffusionMatrix.from_batch(None, f, x, y), TypeError, "NoneType"),
    "model, data set": (lambda m, f, x, y: DiffusionMatrix.from_dataset(3, f, [(x, y)]), TypeError, "int"),
    "training": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m.train(), f, [(x, y)]), ValueError, r"model\.eval"),
    "iterator": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, iter([(x, y)])), TypeError, "only once"),
    "empty": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, []).trace(), ValueError, "loader is empty"),
    "not a pair": (lambda m, f, x, y: DiffusionMatrix.from_dataset(m, f, [x]).trace(), ValueError, "pairs"),
    "no samples": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, f, x[:0], y[:0]), ValueError, "no samples"),
    "nan": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, f, x * torch.nan, y), ValueError, "not finite"),
    "loss shape": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(m, lambda o, y: o, x, y),
        ValueError,
        r"shape \(7, 3\)",
    ),
    "loss type": (lambda m, f, x, y: DiffusionMatrix.from_batch(m, lambda o, y: 1.0, x, y), TypeError, "float"),
    "merged": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(nn.Sequential(m, nn.Flatten(0)), lambda o, y: o.sum(), x, y),
        ValueError,
        r"\(21,\).*dimension 0",
    ),
    "batch norm": (
        lambda m, f, x, y: DiffusionMatrix.from_batch(nn.Sequential(m, nn.BatchNorm1d(3).double()), f, x, y),
        ValueError,
        "convert_batch_norm",
    ),
    "correction": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2), correction=-1), ValueError, "-1"),
    "correction N": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2), correction=3), ValueError, "N = 3"),
    "shape": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(3), ValueError, r"\(3,\).*\(2, k\)"),
    "no columns": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(2, 0), ValueError, r"\(2, 0\)"),
    "dtype": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ torch.ones(2).long(), TypeError, "int64"),
    "array": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ [1.0, 2.0], TypeError, "linear_operator"),
    "list": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)) @ [torch.ones(3)], ValueError, r"\[\(2,\)\]"),
    "k": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)).spectrum(3), ValueError, "from 1 to d = 2"),
    "k 0": (lambda m, f, x, y: DiffusionMatrix(torch.ones(3, 2)).spectrum(0), ValueError, "k is 0"),
    "dense": (
        lambda m, f, x, y: DiffusionMatrix(torch.ones(2, 50_000)).to_dense(),
        ValueError,
        r"20000000000 bytes.*D @ v.*spectrum",
    ),
}


@pytest.mark.filterwarnings("ignore:.*its outputs are not finite")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(*case())
