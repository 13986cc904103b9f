"""The operators of RGD on materialised per-sample gradients.

Each file has the operators of one family, and of each operator: its schema; its fake kernel, which gives the shapes;
its default kernel in plain PyTorch, which is also the definition that tests and benchmarks compare with; and, for the
public ones, the function that checks the arguments. Where the compiled extension has a kernel for a device (`KERNELS`),
that one runs instead of the default. None of the operators has a derivative.

`grads` is always a (B, d) tensor or a sequence of (B, *shape) tensors, one per parameter, never concatenated. They are
the rows g_i of the matrix G of per-sample gradients; g is their mean, C = G - 1 g^T, and D = C^T C / B is the diffusion
matrix, eqs. (2) and (3). Supported dtypes: float32, float64, bfloat16 and float16; sums over weights and samples are
accumulated in float32 (float64 for float64).
"""

from . import embedding, layer  # noqa: F401  they have no public function
from .checks import Tensors, as_list, check_vector, checked_grads
from .combine import combine
from .convolution import conv_weight_grads
from .diffusion_mv import diffusion_mv
from .eigenvalues import largest_eigenvalue
from .ghost import ghost_combine, ghost_gram
from .gram import gram
from .library import DEFAULTS, KERNELS
from .moments import moments, scalar_moments
from .norm import group_norm_grads, layer_norm_grads
from .precondition import precondition
from .weights import gram_moments, sample_weights

__all__ = [
    "DEFAULTS",
    "KERNELS",
    "Tensors",
    "as_list",
    "check_vector",
    "checked_grads",
    "combine",
    "conv_weight_grads",
    "diffusion_mv",
    "ghost_combine",
    "ghost_gram",
    "gram",
    "gram_moments",
    "group_norm_grads",
    "largest_eigenvalue",
    "layer_norm_grads",
    "moments",
    "precondition",
    "sample_weights",
    "scalar_moments",
]
