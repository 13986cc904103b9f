"""Tables and figures of question 5: the losses that methods reach on their training set in equal numbers of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from math import exp, inf, log
from statistics import geometric_mean
from typing import Any

from rgd_ext.commands.colours import GREY

from ..inference import Comparison, mean
from ..plotting import COLOURS, dots, logarithmic, panels_of_methods
from ..question import Table, slug
from .contest import Entry, Group, grouped
from .ratios import ratio_text, ratio_to_baseline, short

SETTING = ("data", "batch_size", "momentum")  # what has the same baseline
SPREAD = 100.0
HEADER = ("B", "momentum", "method", "training loss", "loss / SGD's", "best rate", "largest rate", "test accuracy, %")


def logarithms(entry: Entry) -> list[float]:
    """Of the losses at the end, by seed. A training that diverged has the loss at its start."""
    pairs = zip(entry.values("training_loss"), entry.values("initial_loss"), strict=True)
    return [log(initial if loss is None else loss) for loss, initial in pairs]


def final_loss(outcome: dict[str, Any]) -> float:
    """Over the whole training set, at the end; infinite if the training diverged."""
    return inf if outcome["training_loss"] is None else outcome["training_loss"]


def is_failure(outcome: dict[str, Any]) -> bool:
    """Whether a training has not halved the loss. A network whose units are all dead has one just below its start."""
    return final_loss(outcome) >= outcome["initial_loss"] / 2


def compared(group: Group) -> dict[str, Comparison]:
    """The logarithms of the losses less those of SGD, by method."""
    return group.compared(logarithms)


def table(entries: Iterable[Entry], largest_rate: Callable[[Entry], float | None]) -> Table:
    """A row for each method in each setting of one data set."""
    rows = []
    for (batch_size, momentum), group in grouped(entries, "batch_size", "momentum").items():
        comparisons = compared(group)
        for name, entry in group.items():
            ratio = ratio_text(comparisons[name]) if name in comparisons else "1"
            rows.append([str(batch_size), f"{momentum:g}", name, *cells(entry, ratio, largest_rate(entry))])
    return Table(HEADER, rows)


def cells(entry: Entry, ratio: str, largest_rate: float | None) -> list[str]:
    """The columns from the training loss on; that is a geometric mean."""
    accuracy = mean(entry.percent("accuracy"))
    failed = sum(map(is_failure, entry.outcomes))
    return [
        f"{exp(mean(logarithms(entry)).mean):.3g}" + f" ({failed} failed)" * (failed > 0),
        ratio,
        f"{entry.config['lr']:.3g}",
        "" if largest_rate is None else f"{largest_rate:.3g}",
        accuracy.text("{:.1f}".format),
    ]


def numbers(entries: Iterable[Entry]) -> dict[str, str]:
    """Ratios of losses by data, batch, momentum and method, such as digits.50.0_9.spectral_0_5, and their summaries."""
    groups = grouped(entries, *SETTING)
    comparisons = {setting: compared(group) for setting, group in groups.items()}
    found = {
        slug(*setting, name): short(ratio_to_baseline(comparison).mean)
        for setting, of_setting in comparisons.items()
        for name, comparison in of_setting.items()
    }
    settled = [comparisons[setting] for setting, group in groups.items() if is_settled(group)]
    for name in dict.fromkeys(name for of_setting in settled for name in of_setting):
        of_method = [of_setting[name] for of_setting in settled if name in of_setting]
        found |= {slug(name, number): text for number, text in summary(of_method).items()}
        found[slug(name, "below_longer")] = str(sum(is_below_longer(name, each) for each in settled))
    return found | {"settings": str(len(groups)), "settled": str(len(settled))}


def is_settled(group: Group) -> bool:
    """Whether no seed of SGD ends at more than `SPREAD` times the loss of another one, which would decide its mean."""
    losses = logarithms(group.baseline)
    return max(losses) - min(losses) < log(SPREAD)


def larger_rates(entries: Iterable[Entry], largest_rate: Callable[[Entry], float | None]) -> dict[str, str]:
    """For each method in how many settings it trains with a larger rate than SGD, by names such as trace_0_5.faster."""
    counts: Counter[str] = Counter()
    for group in grouped(entries, *SETTING).values():
        of_baseline = largest_rate(group.baseline) or inf
        counts.update({name: (largest_rate(entry) or 0) > of_baseline for name, entry in group.items()})
    return {slug(name, "faster"): str(count) for name, count in counts.items()}


def is_below_longer(name: str, comparisons: Mapping[str, Comparison]) -> bool:
    """Whether the method ends below SGD with more steps, in a setting that has both."""
    longer = [each for other, each in comparisons.items() if other.startswith("SGD,")]
    return name in comparisons and any(comparisons[name].difference.mean < each.difference.mean for each in longer)


def summary(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Of a method in the settled settings: their number, and in how many its loss is clearly above or below SGD's.

    Also the geometric mean of the ratios, the least and the largest one.
    """
    ratios = [ratio_to_baseline(each).mean for each in comparisons]
    clear = [each.difference.mean for each in comparisons if each.significant]
    return {
        "settings": str(len(comparisons)),
        "below": str(sum(each < 0 for each in clear)),
        "above": str(sum(each > 0 for each in clear)),
        "mean": short(geometric_mean(ratios)),
        "least": short(min(ratios)),
        "largest": short(max(ratios)),
    }


def draw(figure: Any, entries: Sequence[Entry]) -> None:
    """A panel for each data set and batch size, with the ratio of each method's loss to SGD's."""
    groups = grouped(entries, *SETTING)
    data, sizes, momenta = (sorted({key[at] for key in groups}) for at in range(3))
    methods = list(dict.fromkeys(name for group in groups.values() for name in compared(group)))
    panels = panels_of_methods(figure, len(data), len(sizes), methods, sharex="col")
    for (name, size), axes in zip(product(data, sizes), panels.flat, strict=False):
        axes.set_title(f"{name}, B = {size}", fontsize="medium")
        for at, momentum in enumerate(momenta):
            group = groups.get((name, size, momentum))
            ratios = {method: ratio_to_baseline(each) for method, each in compared(group).items()} if group else {}
            places = [methods.index(method) + 0.3 * (at - (len(momenta) - 1) / 2) for method in ratios]
            dots(axes, list(ratios.values()), places, COLOURS[at], f"momentum {momentum:g}")
        axes.axvline(1, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
    for axes in panels[-1]:
        axes.set_xlabel("training loss at the end / SGD's")
        logarithmic(axes.xaxis)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
