"""What each process does to measure the arms on one model: the checks, the traffic, the times and the prediction."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict

import torch

from ..measuring.timing import Samples, interleave
from ..training.arms import CONSECUTIVE, Training
from ..training.models import cases
from .agreement import Batch, compare
from .arms import AMORTISED, EVERY, FSDP2, arms, base_of
from .clocks import clock, slowest
from .layers import measured_layers
from .link import measured_link
from .order import predicted
from .processes import Member
from .result import Result
from .traffic import counted, of_ddp, of_gradient

# Milliseconds for the rounds of each arm, and from which on its steps are timed one by one.
ARM_TIME, LONG = 1_500, 150
LEAST, MOST, QUICK = 3, 20, 3  # rounds


def measure(member: Member, name: str, samples: int, quick: bool) -> Result:
    """All arms on a model of `bench steps`, with so many samples of its batch in each process."""
    torch.manual_seed(0)  # the same model and batch in all processes
    model, x, y = (part.to(member.device) for part in cases(quick=False, device=member.device)[name].build())
    parts: list[Batch] = [*zip(x.split(samples), y.split(samples), strict=True)][: member.size]
    own = parts[member.rank]
    result = Result(name, member.size, samples, of_gradient(model))
    trainings = {arm: Training(how, model, *own) for arm, how in arms(member.size).items()}
    result.error = compare(member, trainings, model, parts)
    prices, traffic = _prices(member, trainings)
    result.bytes = traffic | {"SGD": of_ddp(model, *own)}
    result.gradients = {arm: each / result.gradient_bytes for arm, each in result.bytes.items()}
    result.milliseconds = _times(member, trainings, prices, quick)
    if member.size > 1:
        layers, link = measured_layers(member, model, *own), measured_link(member)
        result.layers, result.link = [*map(asdict, layers)], asdict(link)
        # Messages of gloo take processors of the host.
        overlap = member.device == "cuda" or member.size < (os.cpu_count() or 1)
        result.compare_order(predicted(layers, link, member.size, samples, result.gradients, overlap))
    return result


def _prices(member: Member, trainings: Mapping[str, Training]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a step of each arm, and the bytes that it hands to collectives; not with FSDP2."""
    prices, traffic = {}, {}
    for arm, training in trainings.items():
        steps = EVERY if arm == AMORTISED else 1
        with counted() as found:
            prices[arm] = slowest(member, clock(member, training, steps, settles=False))()
        if not arm.endswith(FSDP2):  # whose collectives are others than those that are counted
            traffic[arm] = sum(found.values()) / steps
    return prices, traffic


def _times(member: Member, trainings: Mapping[str, Training], prices: Mapping[str, float], quick: bool) -> Samples:
    """Milliseconds of a step of each arm. Arms whose steps take long have fewer samples than SGD, which has the most.

    Of an arm that estimates lambda_max in some of its steps, as many steps are timed at once as have one estimate.
    """
    clocks, counts = {}, {}
    for arm, training in trainings.items():
        is_long = prices[arm] > LONG
        steps = EVERY if arm == AMORTISED else 1 if is_long else CONSECUTIVE
        clocks[arm] = slowest(member, clock(member, training, steps, settles=not is_long))
        counts[arm] = max(LEAST, min(int(ARM_TIME / steps / prices[arm]), MOST))
    for arm in counts:
        if (base := base_of(arm)) != "SGD":  # which are compared round by round
            counts[arm] = counts[base] = min(counts[arm], counts[base])
    return interleave(clocks, QUICK if quick else counts["SGD"], warm_up=0, counts=counts)
