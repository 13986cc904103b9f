"""Arguments for every operator, shared by smoke.py, sanitized_run.py and ncu_run.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rgd_ext.linalg import accumulate_dtype
from rgd_ext.ops import DEFAULTS

from ..measuring.agreement import TOLERANCE
from ..measuring.inputs import random

DTYPES = tuple(TOLERANCE)

Grads = list[Tensor]


def random_like(like: Tensor, *shape: int) -> Tensor:
    """Random numbers with the dtype and device of `like`, made on the CPU: only the operator runs on the device."""
    return random(shape, like.dtype).to(like.device)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulate_dtype(tensor.dtype))


def per_sample(grads: Grads) -> Tensor:
    """A random number for each sample, in the accumulation dtype."""
    return random((len(grads[0]),), accumulate_dtype(grads[0].dtype)).to(grads[0].device)


def gramian(grads: Grads) -> Tensor:
    """G G^T in the accumulation dtype."""
    return DEFAULTS["gram"]([g.double().cpu() for g in grads]).to(grads[0].device, accumulate_dtype(grads[0].dtype))


def statistics(grads: Grads) -> tuple[Tensor, ...]:
    """The arguments of `sample_weights`: statistics of the Gramian, epsilon and ulp."""
    found = [part.to(grads[0].device) for part in DEFAULTS["gram_moments"](gramian(grads).cpu())[:3]]
    return *found, torch.tensor(0.1, dtype=torch.float64).to(grads[0].device), 1e-7


def layers(grads: Grads) -> tuple[Grads, Grads, list[bool]]:
    """Linear layers whose inputs are as wide as the tensors of `grads`, and whose outputs are as wide in reverse."""
    inputs = [g.flatten(1) for g in grads]
    return inputs, [random_like(x, *x.shape) for x in reversed(inputs)], [index % 2 == 0 for index in range(len(grads))]


def convolution(grads: Grads) -> tuple:
    """A 3 x 3 convolution from 5 to 4 channels of 7 x 6 places."""
    x, e = (random_like(grads[0], len(grads[0]), channels, 7, 6) for channels in (5, 4))
    return e, x, [3, 3], [1, 1], [1, 1], [1, 1]


def norm(grads: Grads) -> tuple[Tensor, Tensor]:
    return grads[0], random_like(grads[0], *grads[0].shape)


def small_layers(grads: Grads) -> tuple:
    """One layer of each kind that `layer_grads` supports."""
    kinds = ["linear", "layer_norm", "rms_norm", "group_norm"]
    e, x = ([random_like(grads[0], len(grads[0]), 6, n) for n in widths] for widths in ((3, 8, 8, 8), (5, 8, 8, 8)))
    return kinds, e, x, [0, 0, 0, 2], [0.0, 1e-5, 1e-5, 1e-5], [True, True, False, True]


# The arguments of each operator of torch.ops.rgd_ext, made from a list of per-sample gradients.
INPUTS: dict[str, Callable[[Grads], tuple]] = {
    "moments": lambda g: (g,),
    "scalar_moments": lambda g: (g,),
    "squared_norm": lambda g: ([one[0] for one in g],),
    "combine": lambda g: (g, per_sample(g)),
    "diffusion_mv": lambda g: (g, [random_like(one, 3, *one.shape[1:]) for one in g]),
    "gram": lambda g: (g,),
    "precondition": lambda g: (g, per_sample(g).new_full((), 0.1)),
    "ghost_gram": layers,
    "ghost_combine": lambda g: (*layers(g), per_sample(g)),
    "gram_moments": lambda g: (gramian(g),),
    "sample_weights": statistics,
    "largest_eigenvalue": lambda g: (gramian(g), torch.finfo(accumulate_dtype(g[0].dtype)).eps),
    "embedding_gram": lambda g: (2 * torch.arange(len(g[0])).to(g[0].device), wide(g[0].flatten(1)), 2, len(g[0])),
    "conv_weight_grads": lambda g: (*convolution(g), 1, random_like(g[0], len(g[0]), 4, 5, 3, 3)),
    "conv_gram": convolution,
    "conv_scalar_moments": convolution,
    "group_norm_grads": lambda g: (*norm(g), 1, 1e-5),
    "layer_norm_grads": lambda g: (*norm(g), 1e-5, True),
    "layer_grads": small_layers,
}


def compiled(device: str) -> list[str]:
    """The operators that have a compiled kernel for `device`."""
    key = device.upper()
    return [name for name in INPUTS if torch._C._dispatch_has_kernel_for_dispatch_key(f"rgd_ext::{name}", key)]


def call(name: str, arguments: tuple) -> object:
    """The result of an operator, or its last argument where it writes into that."""
    result = getattr(torch.ops.rgd_ext, name)(*arguments)
    return arguments[-1] if result is None else result


def exact(name: str, arguments: tuple) -> object:
    """The result of the operator's default kernel, in float64 on the CPU."""
    in_float64 = tree_map_only(Tensor, lambda t: t.cpu().double() if t.is_floating_point() else t.cpu(), arguments)
    result = DEFAULTS[name](*in_float64)
    return in_float64[-1] if result is None else result
