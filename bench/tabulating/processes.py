"""Tables of training steps in several processes, as measured and as predicted."""

from __future__ import annotations

import re

from ..measuring.pages import number
from .columns import Cell, field, over


def without_batch(result: dict) -> str:
    """The model's name without its batch size, which is that of `steps`."""
    return re.sub(r", B = \d+$", "", result["model"])


def gradients(arm: str) -> Cell:
    """How many gradients a process hands to collectives in a step."""
    return lambda result: f"{result['gradients'][arm]:.2g}"


def predicted(arm: str) -> Cell:
    """The predicted time, divided by that of SGD."""
    return lambda result: number(result["predicted"][arm] / result["predicted"]["SGD"])


MEASURED: dict[str, Cell] = {
    "model, batch of a process": lambda result: f"{without_batch(result)}, B = {result['samples']}",
    "processes": field("processes"),
    "RGD local": over("RGD local"),
    "RGD Rayleigh": over("RGD Rayleigh"),
    "Spectral, bound": over("RGD Spectral, bound"),
    "Spectral, `every=10`": over("RGD Spectral, every=10"),
    "Spectral": over("RGD Spectral"),
    "Rayleigh, FSDP2": over("RGD Rayleigh, FSDP2", "SGD, FSDP2"),
    "gradients sent, `every=10`": gradients("RGD Spectral, every=10"),
    "gradients sent, Spectral": gradients("RGD Spectral"),
}

PREDICTED: dict[str, Cell] = {
    "model": without_batch,
    "processes": field("processes"),
    "RGD local, measured": over("RGD local"),
    "RGD local, predicted": predicted("RGD local"),
    "Rayleigh, measured": over("RGD Rayleigh"),
    "Rayleigh, predicted": predicted("RGD Rayleigh"),
    "Spectral, measured": over("RGD Spectral"),
    "Spectral, predicted": predicted("RGD Spectral"),
}
