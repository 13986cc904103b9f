"""The numbers of a step for logs: those of its statistics, and the noise scale of all steps."""

import pytest
import torch

import rgd_ext
from rgd_ext.metric.noise import NoiseScale
from rgd_ext.metric.recorded import RECORDED, RunningRecord


def statistics(count, epsilon=None):
    """Statistics of several batches whose gradients have a mean that noise does not hide."""
    for _ in range(count):
        yield rgd_ext.direction([3 + torch.randn(16, 5, dtype=torch.float64)], epsilon=epsilon)[1]


def test_a_record_has_the_numbers_of_the_statistics_and_a_running_noise_scale():
    record, noise = RunningRecord(), NoiseScale()
    for stats in statistics(3):
        noise.add(16, stats.grad_norm.item() ** 2, stats.trace.item())
        found = record.of(stats, "part/")
        assert found.keys() == {f"rgd/part/{name}" for name in ("batch_size", "noise_scale", *RECORDED)}
        assert found["rgd/part/noise_scale"] == pytest.approx(noise.value, rel=1e-12)
        assert found["rgd/part/batch_size"] == 16
        for name, attribute in RECORDED.items():
            assert found[f"rgd/part/{name}"] == float(getattr(stats, attribute))


def test_what_the_statistics_lack_is_left_out():
    (stats,) = statistics(1, rgd_ext.Rayleigh(0.3))
    assert "rgd/lambda_max" not in RunningRecord().of(stats)


def test_the_noise_scale_is_left_out_where_noise_hides_the_gradient():
    stats = rgd_ext.direction([torch.tensor([[1.0], [-1.0]])])[1]
    assert "rgd/noise_scale" not in RunningRecord().of(stats)
