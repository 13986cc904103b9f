"""The arms that run on a model and agree, with the error, the memory and the price of a step of each."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from . import oracle
from .measure import host_clock, synchronize
from .memory import extra_memory, limited_memory
from .report import reason
from .step_result import Result
from .training_steps import FRACTION, OURS, PEERS, UNDER_AUTOCAST, Arm, Training

# Convolutions on CUDA may round more (Winograd, FFT). Rayleigh divides by g^T D g, which is small beside |g|^4 where
# the samples nearly agree.
TOLERANCE = {"cpu": {"Spectral": 1e-5, "Rayleigh": 1e-4}, "cuda": {"Spectral": 1e-4, "Rayleigh": 1e-3}}
# The rounding errors of a model in bfloat16, which SGD's gradient has as well. Where samples agree, Rayleigh's quotient
# has no correct digits.
HALF_TOLERANCE = {"Spectral": 5e-2}
# Peers may round the forward otherwise, which moves inputs of ReLUs across the kink.
PEER_TOLERANCE = 1e-2

Directions = dict[str, list[Tensor]]


def without_tf32() -> AbstractContextManager:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def in_half_precision(model: nn.Module, arms: dict[str, Arm]) -> bool:
    return arms is UNDER_AUTOCAST or next(model.parameters()).dtype == torch.bfloat16


def compare_with_float64(model: nn.Module, x: Tensor, y: Tensor, result: Result, arms: dict[str, Arm] = OURS) -> None:
    """The directions of ours against those from explicit gradients; AssertionError where one is not exact."""
    grads = None
    tolerances = HALF_TOLERANCE if in_half_precision(model, arms) else TOLERANCE[x.device.type]
    for policy, tolerance in tolerances.items():
        name = f"RGD {policy}"
        training = Training(arms[name], model, x, y)
        training.model(x)  # verified
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
    """Arms by name, and milliseconds of one step; records errors, memory, and why peers are left out.

    Peers are compared in float32 only.
    """
    found, price, directions = {}, {}, {}
    peers = {} if quick or in_half_precision(model, ours) else PEERS
    for name, arm in (ours | peers).items():
        try:
            with limited_memory(x.device.type):
                training = Training(arm, model, x, y)
                with without_tf32():
                    training()  # in which ours measure the device
                    compare(name, arm, training.direction(), directions, result)
                gc.collect()  # hooks make cycles
                training = Training(arm, model, x, y)
                training()  # in which ours are verified
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
    """The first two: what ours keep from step to step is there in the second."""
    training()
    training()


def compare(name: str, arm: Arm, direction: list[Tensor], directions: Directions, result: Result) -> None:
    """Keep the direction of one of ours; AssertionError where a peer goes elsewhere."""
    if arm.same_as is None:
        directions[name] = [part.clone() for part in direction]
        return
    wrong = result.error[name] = oracle.relative_error(direction, directions[arm.same_as])
    if not wrong < PEER_TOLERANCE:
        raise AssertionError(f"its direction differs from that of {arm.same_as} by {wrong:.1e}")
