"""The largest eigenvalue of matrices whose spectra make it hard to find."""

import pytest
import torch
from operator_cases import DEVICES, sample_grads
from oracle import assert_close

import rgd_ext
from rgd_ext import ops
from rgd_ext.metric import rounding


def spectra(size):
    """Eigenvalues that are hard to find, by name."""
    generator = torch.Generator().manual_seed(size)
    values = torch.rand(size, generator=generator, dtype=torch.float64) / 2
    one, half = torch.ones(size, dtype=torch.float64), size // 2
    result = {"random": values, "zero": 0 * one, "repeated": one, "rank one": torch.eye(size).double()[0]}
    result["evenly spaced"] = torch.linspace(0, 1, size, dtype=torch.float64)
    for gap in (1e-3, 1e-6, 1e-9, 1e-12):
        top = 1 - gap * torch.linspace(0, 1, half + 1, dtype=torch.float64)
        result[f"cluster of {gap}"] = torch.cat([top, values[half + 1 :]])
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 17, 128, 300])
@pytest.mark.parametrize("name", spectra(1))
def test_largest_eigenvalue_of_hard_spectra(name, size, dtype, device):
    """Matrices in float64 whose entries have rounding errors of `dtype`."""
    values, ulp = spectra(size)[name].to(device), rounding(dtype, torch.device(device))
    rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)).double())[0]
    for basis in (rotation.to(device), torch.eye(size).double().to(device)):
        for scale in (1.0, 1e-200, 1e200):
            matrix = (basis * values) @ basis.T * scale
            found, wanted = ops.largest_eigenvalue(matrix, ulp).item(), values.max().item() * scale
            assert abs(found - wanted) <= max(1e-12, 2 * ulp) * wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-37, 1e37])
@pytest.mark.parametrize("name", spectra(1))
def test_largest_eigenvalue_of_float32_close_to_its_limits(name, scale, device):
    rotation = torch.linalg.qr(torch.randn(70, 70, generator=torch.Generator().manual_seed(1)).double())[0]
    matrix = ((rotation * spectra(70)[name]) @ rotation.T * scale).float()
    wanted = torch.linalg.eigvalsh(matrix.double())[-1].clamp(min=0)
    found = ops.largest_eigenvalue(matrix.to(device)).double().cpu()
    assert abs(found - wanted) <= 3 * rounding(torch.float32, torch.device(device)) * wanted


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_whatever_its_vector(device):
    # Some of these vectors are all but orthogonal to the one that the search starts from.
    angles = torch.linspace(0, torch.pi, 4000, dtype=torch.float64, device=device)
    ones, zeros = torch.ones_like(angles), torch.zeros_like(angles)
    vectors = torch.stack([angles.cos(), angles.sin(), zeros], 1)
    matrices = vectors[:, :, None] * vectors[:, None] + torch.stack([zeros, zeros, ones / 2], 1).diag_embed()
    assert_close(torch.stack([ops.largest_eigenvalue(matrix) for matrix in matrices]), ones)


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_beyond_float32_is_infinite(device):
    assert ops.largest_eigenvalue(torch.full((4, 4), 3e38, device=device)) == torch.inf


@pytest.mark.skipif(not rgd_ext.build_info()["compiled"], reason="the default kernel is as exact as can be")
@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_is_no_more_exact_than_the_ulp_asks_for(device):
    matrix = torch.diag(torch.linspace(0, 1, 200, dtype=torch.float64, device=device))
    for ulp in (1e-2, 1e-4):
        assert 1e-9 < 1 - ops.largest_eigenvalue(matrix, ulp).item() <= ulp / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_largest_eigenvalue_of_a_centred_gramian(dtype, device):
    grads = sample_grads("wide, many samples", dtype, device)[0]
    centred = grads - grads.mean(0)
    # Its null space holds the vector of ones.
    gram = centred @ centred.T
    largest = ops.largest_eigenvalue(gram)
    assert largest.dtype == dtype
    assert_close(largest, torch.linalg.eigvalsh(gram.double())[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_largest_eigenvalue_of_what_is_not_finite_is_nan(value, place, device):
    matrix = torch.eye(9, device=device)
    matrix[place] = value
    assert ops.largest_eigenvalue(matrix).isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_largest_eigenvalue_of_rounding_errors_is_not_negative(device):
    assert ops.largest_eigenvalue(-1e-18 * torch.eye(5, device=device)).item() == 0


def test_largest_eigenvalue_gives_the_same_bits_for_any_number_of_threads():
    matrix, before = ops.gram(torch.randn(700, 900, dtype=torch.float64)), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.largest_eigenvalue(matrix))
    finally:
        torch.set_num_threads(before)
    if rgd_ext.build_info()["compiled"]:
        assert results[0] == results[1] == results[2]
