"""The equations of the paper as functions of per-sample losses: for models of small d, in float64, by torch.func.

Every function takes `losses`, a function of `x` (d,) that returns the N per-sample losses f_i(x) as a float64 tensor
(N,) and is made of operations that torch.func can differentiate and vmap. f is their mean, g_i = grad f_i, and D the
covariance of the g_i. With N = 1, D = 0: the metric is the identity, and every flow is the gradient flow.

`epsilon` is a number, a policy such as `rgd_ext.Spectral`, or a callable Stats -> epsilon. A policy is evaluated at
every point, so epsilon changes along a flow. In derivatives of the metric epsilon is held constant, as in the paper
from eq. (7) on, although its eq. (6) lets it depend on x. Where D = 0 to rounding, epsilon is 0.

Eq. (6) asks for epsilon < 1 / lambda_max(D) so that the metric I + eps D is non-singular. In fact epsilon >
-1 / lambda_max is sufficient for that, and it is the weak-field inverse I - eps D that needs the paper's bound.
Therefore functions raise ValueError where epsilon <= -1 / lambda_max, so that I + eps D is no metric, and with
`weak_field=True` also where epsilon >= 1 / lambda_max.

All functions raise TypeError or ValueError where `x` is not a finite floating-point tensor (d,), `losses(x)` is not
(N,) in float64, gradients are not finite, or a dense result would take more than 4 GiB. Those that integrate in time
need SciPy.
"""

from .currents import current, metric_divergence, potential_gradient
from .dropped import acceleration_term, boundary_term, derivative_spread, third_order_term, weak_field_error
from .flows import geodesic, gradient_flow, rgd_flow, sgd_paths
from .tensors import (
    christoffel,
    christoffel_closed_form,
    diffusion_matrix,
    diffusion_matrix_pairwise,
    inverse_metric,
    metric,
)

__all__ = [
    "acceleration_term",
    "boundary_term",
    "christoffel",
    "christoffel_closed_form",
    "current",
    "derivative_spread",
    "diffusion_matrix",
    "diffusion_matrix_pairwise",
    "geodesic",
    "gradient_flow",
    "inverse_metric",
    "metric",
    "metric_divergence",
    "potential_gradient",
    "rgd_flow",
    "sgd_paths",
    "third_order_term",
    "weak_field_error",
]
