"""torch.func: per-sample gradients by vmap(grad)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem, flat_rows
from .found import Found, Package


def vmap_grad(problem: Problem) -> Found:
    """As torch's tutorial on per-sample gradients does it."""
    trained = {name: p.detach() for name, p in problem.model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in problem.model.named_parameters() if not p.requires_grad}
    fixed |= {name: b.detach() for name, b in problem.model.named_buffers()}

    def loss(trained: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def model(x: Tensor) -> Tensor:
            return torch.func.functional_call(problem.model, trained | fixed, (x,))

        return problem.loss(model, x.unsqueeze(problem.batch_dim), y[None])

    grads = torch.func.vmap(torch.func.grad(loss), (None, problem.batch_dim, 0))
    rows = [flat_rows(list(grads(trained, x, y).values())) for x, y in problem.batches()]
    return Found({"gradients": torch.cat(rows)}, problem.model)


PACKAGE = Package("torch", "gradients", {"": vmap_grad})
