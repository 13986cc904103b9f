"""The arms that run on a model and have the right direction, with the error, memory and price of a step of each."""

from __future__ import annotations

import gc
from functools import partial

import torch
from torch import Tensor, nn

from ..measuring.agreement import without_tf32
from ..measuring.memory import extra_memory, limited_memory
from ..measuring.report import reason
from ..measuring.timing import host_clock, synchronize
from . import oracle
from .arms import FRACTION, OURS, PEERS, UNDER_AUTOCAST, Arm, Training
from .result import Result

# For each policy. On CUDA, convolutions may have larger rounding errors (Winograd, FFT). Rayleigh divides by g^T D g,
# which is small compared with |g|^4 where the samples nearly agree.
TOLERANCE = {"cpu": {"Spectral": 1e-5, "Rayleigh": 1e-4}, "cuda": {"Spectral": 1e-4, "Rayleigh": 1e-3}}
# A model in bfloat16 has rounding errors of this size in the gradient of SGD as well. The quotient of Rayleigh has no
# correct digits where the samples agree, so it is not compared.
HALF_TOLERANCE = {"Spectral": 5e-2}
# Peers may compute the forward with other rounding errors, which move inputs of ReLUs across the kink.
PEER_TOLERANCE = 1e-2

Directions = dict[str, list[Tensor]]


def in_half_precision(model: nn.Module, arms: dict[str, Arm]) -> bool:
    return arms is UNDER_AUTOCAST or next(model.parameters()).dtype == torch.bfloat16


def compare_with_float64(model: nn.Module, x: Tensor, y: Tensor, result: Result, arms: dict[str, Arm] = OURS) -> None:
    """Compare our directions with those from explicit gradients; raises AssertionError if one differs."""
    grads = None
    tolerances = HALF_TOLERANCE if in_half_precision(model, arms) else TOLERANCE[x.device.type]
    for policy, tolerance in tolerances.items():
        name = f"RGD {policy}"
        training = Training(arms[name], model, x, y)
        training.model(x)  # the capture is verified in this forward
        with without_tf32(), oracle.Sides() as sides:
            training()
        grads = grads or oracle.per_sample_grads(model, x, y, sides)
        wanted = oracle.direction(grads, policy, FRACTION)
        wrong = result.error[name] = oracle.relative_error(training.direction(), wanted)
        if not wrong < tolerance:
            raise AssertionError(f"{name}: the direction differs from float64 by {wrong:.1e}")


def candidates(
    model: nn.Module, x: Tensor, y: Tensor, quick: bool, result: Result, ours: dict[str, Arm] = OURS
) -> tuple[dict[str, Training], dict[str, float]]:
    """The arms by name, and milliseconds of one step of each. Notes in `result` why peers are left out.

    Errors and memory are noted in `result` as well. Peers take part in float32 only.
    """
    found, price, directions = {}, {}, {}
    peers = {} if quick or in_half_precision(model, ours) else PEERS
    for name, arm in (ours | peers).items():
        try:
            with limited_memory(x.device.type):
                training = Training(arm, model, x, y)
                with without_tf32():
                    training()  # our first step also measures the rates of the device
                    compare(name, arm, training.direction(), directions, result)
                gc.collect()  # hooks make cycles
                training = Training(arm, model, x, y)
                training()  # our first step is verified
                training.optimizer.zero_grad()
                result.peak_bytes[name] = extra_memory(partial(two_steps, training), x.device.type)
                price[name] = host_clock(training, synchronize=synchronize(x.device.type))()
                found[name] = training
        except Exception as problem:
            if arm.same_as is None:
                raise
            result.left_out[name] = reason(problem)
        training = None
        gc.collect()
    return found, price


def two_steps(training: Training) -> None:
    """Make two steps, so that memory which ours keep from step to step is counted."""
    training()
    training()


def compare(name: str, arm: Arm, direction: list[Tensor], directions: Directions, result: Result) -> None:
    """Note the direction of one of ours; raises AssertionError if that of a peer differs."""
    if arm.same_as is None:
        directions[name] = [part.clone() for part in direction]
        return
    wrong = result.error[name] = oracle.relative_error(direction, directions[arm.same_as])
    if not wrong < PEER_TOLERANCE:
        raise AssertionError(f"its direction differs from that of {arm.same_as} by {wrong:.1e}")
