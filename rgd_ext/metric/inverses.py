"""The weights on the samples by which either inverse of the metric acts on the gradient.

Both inverses of the metric I + eps D, eq. (6), applied to g are weighted sums of per-sample gradients, sum_i w_i g_i
with sum_i w_i = 1.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .stats import Statistics

Inverse: TypeAlias = Literal["weak-field", "exact"]
INVERSES: tuple[Inverse, ...] = get_args(Inverse)


def weak_field_weights(statistics: Statistics, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Epsilon, 0 where D = 0 to rounding, and w of shape (B,) with sum_i w_i g_i = (I - eps D) g.

    With D = 0 there is only rounding error to divide by, which a policy would amplify: the plain gradient is the
    answer.
    """
    return torch.ops.rgd_ext.sample_weights(
        statistics.squared_grad_norm, statistics.alignments, statistics.squared_norms, epsilon, statistics.ulp
    )


def exact_weights(statistics: Statistics, epsilon: Tensor) -> Tensor:
    """w of shape (B,) with sum_i w_i g_i = (I + eps D)^-1 g.

    By Woodbury's identity it is g - (eps / B) C^T (I + eps Kc / B)^-1 a, with C the matrix of the g_i - g, Kc their
    Gramian and a the alignments; the coefficients sum to zero, so C^T may be replaced by G^T.
    """
    identity = torch.eye(statistics.batch_size, dtype=statistics.alignments.dtype, device=statistics.alignments.device)
    scaled = epsilon / statistics.batch_size * statistics.centred_gram  # type: ignore[operator]  # `Relativistic.needs`
    system = identity + scaled
    coefficients = torch.linalg.solve_ex(system, statistics.alignments)[0]
    return (1 - epsilon * coefficients) / statistics.batch_size
