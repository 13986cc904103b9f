"""The table of cost, from the record of training steps."""

from __future__ import annotations

from ..measuring.pages import number
from ..measuring.timing import ratio
from ..training.models import SMALL
from .cells import Footnotes, code

# The arms of `steps`, and their columns here.
ARMS = {
    "RGD Spectral": "rgd_ext, Spectral",
    "RGD Rayleigh": "rgd_ext, Rayleigh",
    "Opacus, Rayleigh": "Opacus",
    "vmap(grad), Rayleigh": "torch.func",
    "BackPACK, Rayleigh": "BackPACK",
    "TorchJD, Spectral": "TorchJD",
}
HEADER = ["training step", *ARMS.values()]


def rows(record: dict, notes: Footnotes) -> list[list[str]]:
    """Time and peak memory of each arm, divided by those of SGD."""
    models = {model["model"]: model for model in record["models"]}
    return [[name, *(cell(models[name], arm, notes) for arm in ARMS)] for name in SMALL]


def cell(model: dict, arm: str, notes: Footnotes) -> str:
    """Median ratio of times and ratio of peaks; "refused" where an arm was left out, "-" where it took no part."""
    if arm in model["milliseconds"]:
        time = ratio(model["milliseconds"], arm, "SGD")[0]
        return f"{number(time)} / {number(model['peak_bytes'][arm] / model['peak_bytes']['SGD'])}"
    return "refused" + notes.mark(f"refused, {code(model['left_out'][arm])}") if arm in model["left_out"] else "-"
