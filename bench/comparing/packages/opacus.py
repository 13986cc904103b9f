"""Opacus: per-sample gradients in `grad_sample`, as its optimizer reads them."""

from __future__ import annotations

import copy
from functools import partial

import torch

from ..problem import Problem, flat_rows
from .found import Found, Package


def wrapped(problem: Problem, mode: str = "hooks", fix: bool = False, wrap: bool = True) -> Found:
    """What `PrivacyEngine.make_private` does to a model: a check, and the wrapper or the hooks of that mode."""
    from opacus.grad_sample import GradSampleHooks
    from opacus.grad_sample.utils import wrap_model
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

    model, instead = problem.model, None
    if fix:
        model = ModuleValidator.fix(model)
        instead = copy.deepcopy(model)
    ModuleValidator.validate(model, strict=True)
    options = {"batch_first": problem.batch_dim == 0, "loss_reduction": problem.reduction}
    if wrap:
        model = wrap_model(model, grad_sample_mode=mode, **options)
    else:
        GradSampleHooks(model, **options)
    for x, y in problem.batches():
        problem.loss(model, x, y).backward()
    options = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": len(problem)}
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    return Found({"gradients": flat_rows(optimizer.grad_samples)}, model, instead)


PACKAGE = Package(
    "opacus",
    "gradients",
    {
        "": wrapped,
        "`ModuleValidator.fix`": partial(wrapped, fix=True),
        '`grad_sample_mode="functorch"`': partial(wrapped, mode="functorch"),
        '`grad_sample_mode="ew"`': partial(wrapped, mode="ew"),
        "`wrap_model=False`": partial(wrapped, wrap=False),
    },
)
