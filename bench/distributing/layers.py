"""The measured seconds of each layer of a model, while all processes run the same layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..simulating.schedule import total
from ..simulating.workload import Layer
from ..training.models import loss
from .clocks import clock
from .processes import Member

CALLS = 4


def measured_layers(member: Member, model: nn.Module, x: Tensor, y: Tensor) -> list[Layer]:
    """The modules with parameters, in the order of the forward, each run alone on its own input.

    What forward and backward of the model take beyond the sum of its modules, as activations and attention do, is
    divided among them in proportion to their own times. All times are means over calls and over processes.
    """
    found = [_layer(member, *call) for call in calls_of(model, x)]
    forward, backward = _of_model(member, model, x, y)
    factors = {"forward": forward / total(found, "forward"), "backward": backward / total(found, "backward")}
    return [replace(one, **{part: getattr(one, part) * factor for part, factor in factors.items()}) for one in found]


def calls_of(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The modules that have parameters of their own and their inputs, detached, in the order of their calls."""
    found: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((module, inputs[0].detach().requires_grad_(inputs[0].requires_grad)))

    modules = [module for module in model.modules() if [*module.parameters(recurse=False)]]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def _layer(member: Member, module: nn.Module, x: Tensor) -> Layer:
    parameters = [*module.parameters(recurse=False)]
    output = module(x)
    grad = torch.randn_like(output)
    gradient = partial(torch.autograd.grad, output, grad_outputs=grad, retain_graph=True)
    backward = partial(gradient, [*parameters, x] if x.requires_grad else parameters)
    times = _seconds(member, [partial(module, x), backward, partial(gradient, parameters)])
    return Layer(0, sum(p.numel() for p in parameters), *times)


def _of_model(member: Member, model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Seconds of the forward and of the backward."""
    value = loss(model(x), y)
    backward = partial(torch.autograd.grad, value, [*model.parameters()], retain_graph=True)
    return _seconds(member, [lambda: loss(model(x), y), backward])


def _seconds(member: Member, functions: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of a call of each function, while the other processes call the same one."""
    return member.means([clock(member, function, CALLS)() / 1e3 for function in functions])
