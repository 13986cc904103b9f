"""The numbers in the text of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..comparisons import Interval
from .curves import BATCH_SIZES
from .paths import WITH_REPLACEMENT
from .shares import Setting
from .tables import NEGATIVE, POSITIVE

NETWORKS = ("small MLP", "small CNN")
ALL = BATCH_SIZES[-1]


def numbers(settings: Sequence[Setting]) -> dict[str, str]:
    """Counts and ranges, for networks and for the problems of at most five parameters.

    Each is for SGD of either sampling, and for gradient descent, in which a batch has all samples. Settings in which
    SGD is not farther from the gradient flow than the noise are left out of all but `settings`.
    """
    resolved = [each for each in settings if each.resolved]
    found = {"settings": str(len(settings)), "resolved": str(len(resolved))}
    groups: dict[str, list[Setting]] = {}
    for each in resolved:
        kind = "networks" if each.problem in NETWORKS else "few_parameters"
        sampling = "replacement" if each.sampling == WITH_REPLACEMENT else "shuffled"
        groups.setdefault(f"{kind}.{sampling if each.batch_size < ALL else 'descent'}", []).append(each)
    for name, group in groups.items():
        found |= {f"{name}.{number}": text for number, text in of_group(group).items()}
    return found


def of_group(group: Sequence[Setting]) -> dict[str, str]:
    """Of settings of one kind: the best c, and the shares, in percent, of the best of either sign and other curves.

    A share is counted as clear where its interval is above zero.
    """
    chosen = [each.best() for each in group]
    found = {
        "count": str(len(group)),
        "best": " to ".join(f"{c:+g}" if c else "0" for c in (min(chosen), max(chosen))),
        "best_negative": str(sum(c < 0 for c in chosen)),
        "best_positive": str(sum(c > 0 for c in chosen)),
        "positive_beats_speed": str(sum(positive_beats_speed(each) for each in group)),
    }
    kinds = {
        "negative": [each.share_of_fraction(each.best(NEGATIVE)) for each in group],
        "positive": [each.share_of_fraction(each.best(POSITIVE)) for each in group],
        "constant_positive": [
            each.share_of_fraction(each.best(POSITIVE, "constant c"), "constant c") for each in group
        ],
        "speed": [each.share_of_speed(each.best_speed()) for each in group],
        "gradient_descent": [each.share("gradient descent") for each in group],
        "modified": [each.share("modified, gradient descent") for each in group],
        "modified_shuffled": [each.share("modified, shuffled SGD") for each in group],
    }
    for name, shares in kinds.items():
        found |= {f"{name}.share": span(shares), f"{name}.clear": str(sum(share.low > 0 for share in shares))}
    return found | of_seeds(group)


def positive_beats_speed(setting: Setting) -> bool:
    """Whether the best positive c explains more than the gradient flow at its best speed."""
    positive, speed = setting.share_of_fraction(setting.best(POSITIVE)), setting.share_of_speed(setting.best_speed())
    return positive.mean > speed.mean


def of_seeds(group: Sequence[Setting]) -> dict[str, str]:
    """In how many single runs a positive c is the best, and the most that it explains there."""
    runs = [replace(each, lines=[line]) for each in group for line in each.lines]
    resolved = [each for each in runs if each.resolved]
    positive = [each for each in resolved if each.best() > 0]
    most = max((each.share_of_fraction(each.best()).mean for each in positive), default=0.0)
    return {
        "runs": str(len(resolved)),
        "runs.best_positive": str(len(positive)),
        "runs.largest_positive_share": f"{100 * most:.0f}",
    }


def span(shares: Sequence[Interval]) -> str:
    """The least and the largest share, in percent."""
    means = [round(100 * share.mean) for share in shares]
    return f"{min(means)} to {max(means)}"
