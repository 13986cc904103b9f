"""Tables and numbers of the comparison of batches with the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scipy.stats import spearmanr

from ..contests.ratios import interval_text, ratio_text, ratio_to_baseline
from ..inference import Comparison, mean
from ..question import Table, slug
from ..ranges import ranges
from .comparison import SIZES
from .decreases import Decreases, pooled
from .settings import ALL, SIMILARITIES, Setting

SHOWN = 60  # the step of which there is a table of similarities
D_OF = {"batch": "the batch", "other": "another batch", "data": "the data set"}  # in words, by owner


def similarities(found: Sequence[Setting]) -> Table:
    """A row for each training and size, after `SHOWN` steps."""
    rows = []
    for setting in found:
        if setting.step == SHOWN and setting.size_name != ALL:
            means = [mean(setting.values(quantity)) for quantity in SIMILARITIES]
            cells = [each.text() for each in means]
            rows.append([*setting.training, setting.size_name, *cells])
    return Table(("data", "labels", "B", *SIMILARITIES.values()), rows)


def ratio_table(found: Sequence[Setting], compared: Callable[[Decreases], Mapping[str, Comparison]]) -> Table:
    """Ratios of decreases: rows for each training, and for all together, by step and owner of D; columns for sizes."""
    names = {each.size_name: "all samples" if each.size_name == ALL else f"B = {each.size_name}" for each in found}
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    of_each = {(*each.training, str(each.step), each.size_name): each.decreases for each in found}
    of_all = {("all", "all", str(step), size): each for (step, size), each in over_trainings(found).items()}
    for (*key, size), decreases in (of_each | of_all).items():
        for owner, comparison in compared(decreases).items():
            cells.setdefault((*key, D_OF[owner]), {})[size] = ratio_text(comparison)
    order = sorted(names, key=lambda name: (name == ALL, len(name), name))
    rows = [[*key, *(row.get(name, "") for name in order)] for key, row in cells.items()]
    return Table(("data", "labels", "step", "D of", *(names[name] for name in order)), rows)


def over_trainings(found: Sequence[Setting]) -> dict[tuple[int, str], Decreases]:
    """Those of all trainings together, by step and name of the size, where there are several."""
    groups: dict[tuple[int, str], list[Decreases]] = {}
    for setting in found:
        groups.setdefault((setting.step, setting.size_name), []).append(setting.decreases)
    found_together = {key: pooled(group) for key, group in groups.items() if len(group) > 1}
    return {key: decreases for key, decreases in found_together.items() if decreases is not None}


def numbers(found: Sequence[Setting]) -> dict[str, str]:
    """The least and the largest of means over the seeds, such as eigenvalue.16.least, and `rank_correlation`.

    They are those of all settings with this size, of those at one step, such as eigenvalue.16.60.least, and of those
    with one kind of labels at one step, such as eigenvalue.16.60.clean.least. The gains of all trainings together have
    their intervals, such as gain_batch.16.60.
    """
    means = [
        ((quantity, setting.size_name, setting.step, setting.labels), value)
        for setting in found
        for quantity, value in setting.means.items()
    ]
    together = {
        slug(f"gain {owner}", size, step): interval_text(ratio_to_baseline(comparison))
        for (step, size), decreases in over_trainings(found).items()
        for owner, comparison in decreases.gains.items()
    }
    later = rank_correlation([setting for setting in found if setting.step])  # than the initial weights
    correlations = rank_correlation(found) | {slug("later", name): text for name, text in later.items()}
    return ranges(means, shortest=2) | together | correlations


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
