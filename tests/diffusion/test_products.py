"""Products with vectors of any form, and what rounding may not do to them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusing import batches, case
from models import mlp
from oracle import assert_close, diffusion_matrix, flat

from rgd_ext import DiffusionMatrix
from rgd_ext.contributions.convolution import Convolution
from rgd_ext.contributions.factor import Dense
from rgd_ext.contributions.outer import Bias, Outer
from rgd_ext.contributions.rows import Rows
from rgd_ext.convolutions import Geometry

pytestmark = pytest.mark.usefixtures("one_thread")


def test_vectors_may_be_lists_shaped_as_the_parameters():
    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_batch(model, loss, x, y)
    vector = [torch.randn_like(p) for p in model.parameters()]
    product = matrix @ vector
    assert [p.shape for p in product] == [p.shape for p in model.parameters()]
    assert_close(flat(product), matrix @ flat(vector))
    assert_close(matrix.quadratic_form(vector), flat(vector) @ flat(product))


def test_scipy_view():
    from scipy.sparse.linalg import eigsh

    model, loss, x, y = case()
    matrix = DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3))
    operator, dense = matrix.linear_operator(), matrix.to_dense().numpy()
    array = np.random.default_rng(0).standard_normal((len(dense), 2))
    assert np.allclose(operator @ array, dense @ array, atol=1e-12)
    assert np.allclose(operator.H @ array[:, 0], dense @ array[:, 0], atol=1e-12)
    assert np.allclose(operator @ array.astype("int64"), dense @ array.astype("int64"), atol=1e-12)
    assert np.allclose(eigsh(operator, 2)[0][::-1], matrix.spectrum(2).numpy())


def test_a_large_mean_does_not_leak_into_d():
    rows = torch.randn(50, 40) + 300
    vector = torch.randn(40)
    # To the rounding of the products <g_i, v>.
    error = (DiffusionMatrix(rows) @ vector).double() - diffusion_matrix(rows.double()) @ vector.double()
    assert error.norm() < 1e-3 * vector.norm()
    half = (rows - 260).bfloat16()
    expected = (half.double() @ vector.bfloat16().double()).var(correction=0)
    assert_close(DiffusionMatrix(half).quadratic_form(vector.double() + 1e-4), expected, torch.bfloat16)


FACTORS = {
    "dense": lambda e, x: Dense(e),
    "outer": lambda e, x: Outer(x, e, torch.Size((7, 6))),
    "bias": lambda e, x: Bias(Outer(x, e, torch.Size((7, 6)))),
    "rows": lambda e, x: Rows.of_sequences(torch.arange(48).view(16, 3) % 5, e, torch.Size((5, 7))),
    "convolution": lambda e, x: Convolution(e, x, torch.Size((3, 3, 1)), Geometry((1,), (1,), (0,), (1,), 1)),
}


@pytest.mark.parametrize("kind", FACTORS)
def test_products_with_gradients_of_low_precision_are_not_rounded(kind):
    e, x = torch.randn(16, 3, 7).bfloat16(), torch.randn(16, 3, 6).bfloat16()
    x = torch.randn(16, 3, 7).bfloat16() if kind == "convolution" else x
    exact = FACTORS[kind](e.double(), x.double())
    vector = torch.randn(exact.dense().shape[1:]).bfloat16()
    # A bias's terms are summed in the backward, in the dtype of the layer.
    tolerance = torch.bfloat16 if kind == "bias" else torch.float32
    found = FACTORS[kind](e, x).align(vector)
    assert found.dtype == torch.float32
    assert_close(found, exact.align(vector.double()), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_agree_give_exactly_zero(dtype):
    rows = torch.randn(1, 30).expand(8, -1).to(dtype)
    model, loss, x, y = case(dtype=torch.float32 if dtype == torch.bfloat16 else dtype, size=1)
    x, y = x.expand(8, -1).contiguous(), y.expand(8).contiguous()
    for matrix in (
        DiffusionMatrix(rows),
        DiffusionMatrix.from_batch(model, loss, x, y),
        DiffusionMatrix.from_dataset(model, loss, batches(x, y, 3)),
    ):
        vector = torch.randn(matrix.shape[0])
        values = [matrix @ vector, matrix.quadratic_form(vector), matrix.trace(), matrix.to_dense(), matrix.spectrum()]
        assert not any(value.any() for value in values)
        assert matrix.largest_eigenvalue() == 0
        assert matrix.rank() == 0


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
@pytest.mark.parametrize("spread", [1e-2, 5e-4, 1e-6])
def test_small_differences_of_tensors_are_not_rounded_away(spread, shape):
    rows = 1 + spread * torch.randn(shape)
    expected, vector = diffusion_matrix(rows.double()), torch.randn(shape[1])
    values = torch.linalg.eigvalsh(expected).flip(0)[: min(shape[0] - 1, shape[1])]
    matrix = DiffusionMatrix(rows)
    assert_close(matrix.trace(), expected.trace(), torch.float32)
    assert_close(matrix.spectrum(), values, torch.float32)
    assert_close(matrix @ vector, expected @ vector.double(), torch.float32)
    assert_close(matrix.quadratic_form(vector), vector.double() @ expected @ vector.double(), torch.float32)
    assert matrix.rank() == len(values)


def test_gradients_of_a_model_agree_below_the_rounding_of_their_products():
    _, _, x, y = case(size=1)
    x = x.expand(8, -1) + 1e-5 * torch.randn(8, 6)
    for dtype, is_zero in ((torch.float32, True), (torch.float64, False)):
        matrix = DiffusionMatrix.from_batch(mlp().to(dtype), F.cross_entropy, x.to(dtype), y.expand(8))
        assert (matrix.trace() == 0) == (matrix.largest_eigenvalue() == 0) == is_zero
