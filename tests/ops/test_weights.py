"""From a Gramian to the weights on the samples."""

from functools import partial

import pytest
import torch
from operator_cases import DEVICES, opcheck, sample_grads, sample_layers
from oracle import TOLERANCE

from rgd_ext import ops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["flat", "one sample", "wide, many samples"])
def test_gram_moments_are_the_moments_of_the_gradients(name, dtype, device):
    grads = sample_grads(name, dtype, device)
    squared, alignments, squared_norms, centred = ops.gram_moments(ops.gram(grads))
    assert {t.dtype for t in (squared, alignments, squared_norms, centred)} == {torch.float64}
    wide = torch.cat([g.double().flatten(1) for g in grads], 1)
    mean = wide.mean(0)
    for found, want in (
        (squared, mean.square().sum()),
        (alignments, (wide - mean) @ mean),
        (squared_norms, (wide - mean).square().sum(1)),
        (centred, (wide - mean) @ (wide - mean).T),
    ):
        # What is left after centring is as exact as the Gramian it came from.
        scale = wide.square().sum(1).max().item()
        torch.testing.assert_close(found, want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_moments_of_rounding_errors_are_not_negative_and_nan_stays(device):
    ones = torch.ones(3, 3, device=device)
    squared, _, squared_norms, _ = ops.gram_moments(-1e-7 * torch.eye(3, device=device))
    assert squared == 0
    assert torch.equal(squared_norms, torch.zeros_like(squared_norms))
    assert all(part.isnan().all() for part in ops.gram_moments(torch.nan * ones))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_weights_are_those_of_eq_10_or_equal(dtype, device):
    scalar = partial(torch.tensor, dtype=dtype, device=device)
    alignments, ulp = scalar([0.5, -2.0, 1.5]), torch.finfo(dtype).eps
    epsilon, weights = ops.sample_weights(scalar(4.0), alignments, scalar([1.0, 2.0, 3.0]), scalar(0.25), ulp)
    assert epsilon == 0.25
    torch.testing.assert_close(weights, (1 - 0.25 * alignments) / 3)
    for chosen in (0.25, float("inf"), float("nan")):
        norms = scalar([0.0, 30 * ulp, 60 * ulp])  # tr D is 30 ulps, |g|^2 is 4
        epsilon, weights = ops.sample_weights(scalar(4.0), alignments, norms, scalar(chosen), ulp)
        assert epsilon == 0
        assert torch.equal(weights, torch.full_like(weights, 1) / 3)
    assert ops.sample_weights(scalar(3.0), alignments, norms, scalar(0.25), ulp)[0] == 0.25


@pytest.mark.parametrize("device", DEVICES)
def test_operators_on_gramians_work_under_compile_and_opcheck(device):
    for dtype in (torch.float32, torch.float64):
        gram = ops.gram(torch.randn(5, 7, dtype=dtype, device=device))
        opcheck("largest_eigenvalue", (gram, 1e-7))
        opcheck("gram_moments", (gram,))
        statistics = gram[0, 0], gram[0], gram[1], gram[2, 2], 1e-7
        opcheck("sample_weights", statistics)

    def weights(inputs, output_grads):
        gram = ops.ghost_gram(inputs, output_grads, [True] * len(inputs))
        *statistics, centred = ops.gram_moments(gram)
        return ops.sample_weights(*statistics, 1 / ops.largest_eigenvalue(centred), 1e-7)[1]

    layers = sample_layers("few", torch.float32, device)[:2]
    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*layers), weights(*layers))
