"""How operators are registered with PyTorch, and the tables of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Kernel = TypeVar("Kernel", bound=Callable[..., object])

LIBRARY = torch.library.Library("rgd_ext", "DEF")

# The devices for which each operator has a compiled kernel. docs/kernels.md says why some have none for CUDA.
KERNELS = {
    **dict.fromkeys(("moments", "scalar_moments", "squared_norm", "combine", "precondition"), ("CPU", "CUDA")),
    **dict.fromkeys(("gram", "ghost_gram", "ghost_combine", "diffusion_mv"), ("CPU", "CUDA")),
    **dict.fromkeys(("gram_moments", "sample_weights", "largest_eigenvalue"), ("CPU", "CUDA")),
    **dict.fromkeys(("group_norm_grads", "layer_norm_grads"), ("CPU", "CUDA")),
    "embedding_gram": ("CUDA",),
    **dict.fromkeys(("layer_grads", "conv_weight_grads", "conv_gram", "conv_scalar_moments"), ("CPU",)),
}

# The default kernel of each operator, which runs on every device without a compiled one.
DEFAULTS: dict[str, Callable[..., object]] = {}


def register_fake(name: str) -> Callable[[Kernel], Kernel]:
    """Register the decorated function as the kernel of an operator on fake and meta tensors, which hold no data."""

    def register(kernel: Kernel) -> Kernel:
        # Torch looks up the module of the caller, which takes time for each new one: here it is always this module.
        torch.library.register_fake(f"rgd_ext::{name}", kernel, lib=LIBRARY)
        return kernel

    return register


def register_default(name: str) -> Callable[[Kernel], Kernel]:
    """Register the decorated function as the default kernel of an operator."""

    def register(kernel: Kernel) -> Kernel:
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        DEFAULTS[name] = kernel
        return kernel

    return register
