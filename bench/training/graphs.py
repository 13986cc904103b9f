"""Training steps that are replayed as CUDA graphs, without what Python and launches cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..measuring import cuda_timing
from ..measuring.report import reason
from ..measuring.timing import Clock
from . import oracle
from .arms import Arm, Training, repeat
from .candidates import PEER_TOLERANCE
from .result import Result, graph_of


def graph_clocks(
    model: nn.Module, x: Tensor, y: Tensor, arms: dict[str, Training], ours: dict[str, Arm], result: Result
) -> dict[str, Clock]:
    """A clock for each arm of ours whose step a CUDA graph can capture, by the name of its graph.

    Args:
        arms: the same arms after an ordinary step, whose directions those of the graphs have to agree with. Errors are
            noted in `result`, and why an arm is left out.
    """
    timer, found = cuda_timing.timer(x.device.type), {}
    for name, arm in ours.items():
        graph, training = graph_of(name), Training(arm, model, x, y)
        repeat(training)  # the first step is verified, which cannot be captured
        clock, problem = timer(lambda _, step=training: step(), [None])
        if problem is not None:
            result.left_out[graph] = reason(problem)
            continue
        for part in training.direction():
            part.fill_(torch.nan)  # so that what is compared is of a replay
        clock()
        wrong = result.error[graph] = oracle.relative_error(training.direction(), arms[name].direction())
        if wrong < PEER_TOLERANCE:
            found[graph] = clock
        else:
            result.left_out[graph] = f"its direction differs from that of {name} by {wrong:.1e}"
    return found
