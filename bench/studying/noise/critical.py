"""The table and the numbers of critical batch sizes and what predicts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import geometric_mean

import numpy as np

from ..data.defects import described
from ..question import Table, slug
from .cells import short, text
from .predictions import PREDICTORS, Setting, over_trunks

USUAL_GOAL = 0.7  # of the settings over which predictions are judged


def table(found: Sequence[Setting]) -> Table:
    """A row for each setting; predictions are in units of the measured critical batch size."""
    rows = [
        [
            f"{setting.data}, {setting.model}",
            described(setting.labels),
            str(setting.step),
            f"{setting.goal:g}",
            text(setting.fewest()),
            text(setting.critical()),
            *(_cell(setting, predictor) for predictor in PREDICTORS),
        ]
        for setting in found
    ]
    return Table(("model", "labels", "step", "goal", "fewest steps", "critical B", *PREDICTORS), rows)


def _cell(setting: Setting, predictor: str) -> str:
    """The mean ratio, and of how many trunks it is if some have no prediction."""
    ratios, trunks = setting.ratios(predictor), len(setting.trunks)
    few = f" [{len(ratios)} of {trunks}]" * (len(ratios) < trunks)
    return text(over_trunks(ratios)) + few if ratios else "none"


def numbers(found: Sequence[Setting]) -> dict[str, str]:
    """Of settings, such as digits.mlp.200.0_7.critical, and of predictors over all settings, such as simple.factor."""
    texts = {}
    for setting in found:
        name = slug(setting.data, setting.model, setting.labels, setting.step, setting.goal)
        texts[f"{name}.critical"] = short(setting.critical().mean)
        for predictor in PREDICTORS:
            if ratios := setting.ratios(predictor):
                texts[f"{name}.{slug(predictor)}"] = short(geometric_mean(ratios))
    if usual := [setting for setting in found if setting.goal == USUAL_GOAL]:
        fits = [trunk.fit for setting in usual for trunk in setting.trunks]
        texts["trunks"] = str(len(fits))
        texts["misfit"] = f"{100 * math.sqrt(np.mean([fit.misfit**2 for fit in fits])):.0f}"
        texts["constant.spread"] = short(_spread([math.log(fit.critical) for fit in fits]))
        for predictor in PREDICTORS:
            logarithms = [math.log(ratio) for setting in usual for ratio in setting.ratios(predictor)]
            texts |= {f"{slug(predictor)}.{number}": each for number, each in _judged(logarithms).items()}
    return texts


def _judged(logarithms: Sequence[float]) -> dict[str, str]:
    """How well a predictor does, by the logarithms of predicted / measured.

    Returns:
        factor: by which it misses, as a root mean square of the logarithms.
        median: the factor that half of the trunks do not exceed.
        spread: the same after multiplication with the one constant that is best for all of them.
        trunks: how many have a prediction.
    """
    if not logarithms:
        return {"trunks": "0"}
    factor = math.exp(math.sqrt(np.mean(np.square(logarithms))))
    found = {"factor": factor, "median": math.exp(np.median(np.abs(logarithms))), "spread": _spread(logarithms)}
    return {name: short(each) for name, each in found.items()} | {"trunks": str(len(logarithms))}


def _spread(logarithms: Sequence[float]) -> float:
    return math.exp(float(np.std(logarithms)))
