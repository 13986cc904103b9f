"""curvlinops: products with the empirical Fisher, (1/B) sum_i g_i g_i^T, which is D + g g^T."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..problem import Problem, probes
from .found import Found, Package


def empirical_fisher(problem: Problem, attention: bool = False) -> Found:
    """Products with some vectors; with `attention`, by the attention that has forward derivatives."""
    from curvlinops import EFLinearOperator

    class Logits(nn.Module):
        """The classes in dimension 1, where CrossEntropyLoss has them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = problem.model

        def forward(self, x: Tensor) -> Tensor:
            with problem.mode():
                return self.model(x).movedim(-1, 1)

    trained = problem.trained()
    with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
        operator = EFLinearOperator(
            Logits(),
            nn.CrossEntropyLoss(reduction=problem.reduction),
            trained,
            list(problem.batches()),
            batch_size_fn=lambda x: x.shape[problem.batch_dim],
        )
        return Found({"empirical Fisher": operator @ probes(trained)}, problem.model)


PACKAGE = Package(
    "curvlinops-for-pytorch",
    "products with D + g gᵀ",
    {"": empirical_fisher, "`sdpa_kernel(SDPBackend.MATH)`": partial(empirical_fisher, attention=True)},
)
