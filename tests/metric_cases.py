"""Gradients and policies on which the properties of the metric are tested."""

import torch
from hypothesis import strategies as st

from rgd_ext import Ascent, Fixed, Rayleigh, Spectral, Trace

POLICIES = [
    *(Fixed(0.05), Spectral(0.5), Spectral(-0.5), Trace(0.5), Trace(-0.9), Rayleigh(0.5), Rayleigh(-2.0), Ascent(0.2)),
]
# Each policy with the inverses that it suits.
PAIRS = [(policy, "weak-field") for policy in POLICIES]
PAIRS += [(policy, "exact") for policy in POLICIES if not isinstance(policy, Ascent)]
SHAPES = [(6, 3), (6, 2, 4), (6,)]
# Rows of small whole numbers.
batches = st.integers(2, 6).flatmap(
    lambda b: st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=b, max_size=b)
)


def number_of(policy):
    """The first argument of a policy."""
    return next(iter(vars(policy).values()))


def sample(dtype=torch.float64, scale=1.0):
    return [(torch.randn(s) * scale + 0.3).to(dtype) for s in SHAPES]


def rows_of(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads], 1).double()


class Methods:
    """A source of per-sample gradients with nothing but the required methods, and an attribute for the batch size."""

    def __init__(self, rows):
        self.rows, self.batch_size = rows, len(rows)

    def mean(self):
        return [self.rows.mean(0)]

    def align(self, vector):
        return self.rows @ vector[0]

    def gram(self):
        return self.rows @ self.rows.T

    def combine(self, weights):
        return [weights @ self.rows]
