"""Tables and numbers of the comparison of batches with the data set."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import spearmanr

from ..contests.ratios import ratio_text
from ..inference import mean
from ..question import Table, slug
from .comparison import SIZES
from .settings import ALL, SIMILARITIES, Setting

SHOWN = 60  # the step of which there is a table of similarities
D_OF = {"batch": "the batch", "other": "another batch", "data": "the data set"}  # in words, by owner


def similarities(found: Sequence[Setting]) -> Table:
    """A row for each training and size, after `SHOWN` steps."""
    rows = []
    for setting in found:
        if setting.step == SHOWN and setting.size_name != ALL:
            means = [mean(setting.values(quantity)) for quantity in SIMILARITIES]
            cells = [f"{each.mean:.2f} ({each.low:.2f} to {each.high:.2f})" for each in means]
            rows.append([*setting.training, setting.size_name, *cells])
    return Table(("data", "labels", "B", *SIMILARITIES.values()), rows)


def gains(found: Sequence[Setting]) -> Table:
    """A row for each training, step and owner of D, a column for each size."""
    names = sorted({each.size_name for each in found} - {ALL}, key=int)
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for setting in found:
        for owner, comparison in setting.gains.items():
            row = cells.setdefault((*setting.training, str(setting.step), D_OF[owner]), {})
            row[setting.size_name] = ratio_text(comparison)
    rows = [[*key, *(row.get(name, "") for name in (*names, ALL))] for key, row in cells.items()]
    return Table(("data", "labels", "step", "D of", *(f"B = {name}" for name in names), "all samples"), rows)


def numbers(found: Sequence[Setting]) -> dict[str, str]:
    """The least and the largest of means over the seeds, such as eigenvalue.16.least, and `rank_correlation`.

    They are those of all settings with this size, of those at one step, such as eigenvalue.16.60.least, and of those
    with one kind of labels at one step, such as eigenvalue.16.60.clean.least.
    """
    values: dict[tuple[object, ...], list[float]] = {}
    for setting in found:
        for quantity, value in setting.means.items():
            key = (quantity, setting.size_name, setting.step, setting.labels)
            for length in (2, 3, 4):
                values.setdefault(key[:length], []).append(value)
    least = {slug(*key, "least"): f"{min(group):.2f}" for key, group in values.items()}
    largest = {slug(*key, "largest"): f"{max(group):.2f}" for key, group in values.items()}
    return least | largest | rank_correlation(found)


def rank_correlation(found: Sequence[Setting]) -> dict[str, str]:
    """Spearman's, over trainings and steps, of two numbers, and over how many; none of fewer than three settings.

    One is the gain by D of the data set with the smallest batches. The other one is how much more of their gradients
    than of the whole gradient is along eps D, by lengths.
    """
    small, whole = ([each.means for each in found if each.size_name == name] for name in (str(SIZES[0]), ALL))
    shares = [batch["length data"] - every["length data"] for batch, every in zip(small, whole, strict=True)]
    if len(shares) < 3:
        return {}
    statistic = spearmanr(shares, [batch["gain data"] for batch in small]).statistic
    return {"settings": str(len(shares)), "rank_correlation": f"{statistic:.2f}"}
