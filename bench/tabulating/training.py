"""Tables of training steps on several models."""

from __future__ import annotations

from .columns import Cell, field, joined, over, peak, time

MODEL = {"training step": field("model")}

STEPS: dict[str, Cell] = {
    **MODEL,
    "SGD": time("SGD"),
    "RGD, Spectral": time("RGD Spectral"),
    "ratio": over("RGD Spectral"),
    "peak memory / SGD": peak("RGD Spectral"),
    "Opacus": over("Opacus, Rayleigh"),
    "vmap(grad)": over("vmap(grad), Rayleigh"),
    "BackPACK": over("BackPACK, Rayleigh"),
    "TorchJD": over("TorchJD, Spectral"),
}

OBSERVE: dict[str, Cell] = {
    **MODEL,
    "SGD": time("SGD"),
    "`observe`": over("observe"),
    "with `per_parameter=True`": over("observe, per parameter"),
    "with `align(v)`": over("observe, align"),
    "with `record(index)`": over("observe, record"),
    "with `gram=True`": over("observe, gram"),
    "peak memory": peak("observe"),
}

TORCHJD: dict[str, Cell] = {
    "training step along UPGrad": field("model"),
    "SGD": time("SGD"),
    "ours / SGD": over("UPGrad, ours"),
    "of it the rule": time("rule"),
    "autogram / ours": over("autogram", "UPGrad, ours"),
    "autojac / ours": over("autojac", "UPGrad, ours"),
    "peak memory / SGD: ours, autogram, autojac": joined(peak("UPGrad, ours"), peak("autogram"), peak("autojac")),
}


def first_step(arm: str) -> Cell:
    """The time of an arm's first step."""
    return lambda result: f"{result['first_step'][arm] / 1e3:.1f} s"


COMPILE: dict[str, Cell] = {
    **MODEL,
    "SGD": time("SGD"),
    "SGD compiled / SGD": over("SGD, compiled"),
    "RGD / SGD": over("RGD"),
    "RGD / SGD, both compiled": over("RGD, compiled before", "SGD, compiled"),
    "RGD compiled / RGD": over("RGD, compiled before", "RGD"),
    "RGD, compiled loss / RGD": over("RGD, compiled loss", "RGD"),
    "first step compiled: SGD, RGD": joined(first_step("SGD, compiled"), first_step("RGD, compiled before")),
}
