"""BackPACK: per-sample gradients by the extension BatchGrad."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from ..problem import Problem, flat_rows
from .found import Found, Package


def batch_grad(problem: Problem, use_converter: bool = False) -> Found:
    """`grad_batch` of all parameters, times B where the loss is a mean."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, instead = problem.model, None
    if use_converter:
        model = extend(model, use_converter=True)
        instead = copy.deepcopy(problem.model)
    else:
        model = extend(model)
    criterion = extend(nn.CrossEntropyLoss(reduction=problem.reduction))
    rows = []
    for x, y in problem.batches():
        with backpack(BatchGrad()):
            with problem.mode():
                loss = criterion(model(x).movedim(-1, 1), y)
            loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        scale = len(y) if problem.reduction == "mean" else 1
        rows.append(scale * flat_rows([p.grad_batch for p in trained]))
    return Found({"gradients": torch.cat(rows)}, model, instead)


PACKAGE = Package(
    "backpack-for-pytorch",
    "gradients",
    {"": batch_grad, "`use_converter=True`": partial(batch_grad, use_converter=True)},
)
