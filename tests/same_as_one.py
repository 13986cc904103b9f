"""The comparison of several processes with one that has all their samples, and the options for which they agree."""

import numpy as np
import torch
from distributing import by_norm
from oracle import assert_close, flat

import rgd_ext

OPTIONS = {
    "Spectral": {},
    "Spectral, negative": {"epsilon": rgd_ext.Spectral(-0.7)},
    "Spectral, sometimes": {"epsilon": rgd_ext.Spectral(0.5, every=3)},
    "Trace": {"epsilon": rgd_ext.Trace(0.5)},
    "Rayleigh": {"epsilon": rgd_ext.Rayleigh(0.5)},
    "Ascent": {"epsilon": rgd_ext.Ascent(0.1)},
    "Fixed": {"epsilon": 0.3},
    "exact inverse": {"epsilon": rgd_ext.Spectral(5.0), "inverse": "exact"},
    "exact inverse of Trace": {"epsilon": rgd_ext.Trace(3.0), "inverse": "exact"},
    "clipped": {"weights": rgd_ext.weights.Clip(0.05)},
    "normalised": {"weights": rgd_ext.weights.Normalise()},
    "of the Gramian": {"weights": rgd_ext.weights.FromGramian(by_norm)},
    "observed": {"observe": True},
    "observed, with the Gramian": {"observe": True, "gram": True},
}
EIGENVALUES = ("largest_eigenvalue", "rank")  # missing without the Gramian


def assert_same_as_one(found, expected):
    """Each process has the gradients and the statistics of one process, and the bits of the others."""
    (grads, stats, _), *others = found
    for other in others:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, other.grads, strict=True))
        assert all(np.array_equal(stats[key], other.stats[key], equal_nan=True) for key in stats)
    assert [g is None for g in grads] == [g is None for g in expected.grads]
    used = [(g, of_one) for g, of_one in zip(grads, expected.grads, strict=True) if g is not None]
    assert_close(flat(g for g, _ in used), flat(of_one for _, of_one in used))
    for key, value in stats.items():
        if key not in EIGENVALUES or np.isfinite(value):
            np.testing.assert_allclose(value, expected.stats[key], rtol=1e-8, atol=1e-12, err_msg=key)
