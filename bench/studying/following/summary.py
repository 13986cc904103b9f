"""The numbers in the text of the page."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparisons import Interval
from .curves import BATCH_SIZES
from .paths import SHUFFLED, WITH_REPLACEMENT
from .shares import Setting
from .tables import NEGATIVE, POSITIVE

ALL = BATCH_SIZES[-1]


def numbers(settings: Sequence[Setting]) -> dict[str, str]:
    """Counts and ranges, for noisy SGD of either sampling and for gradient descent, in which a batch has all samples.

    Settings in which SGD is not farther from the gradient flow than the noise are left out of all but `settings`.
    """
    resolved = [each for each in settings if each.resolved]
    found = {"settings": str(len(settings)), "resolved": str(len(resolved))}
    groups = {
        "replacement": [each for each in resolved if each.sampling == WITH_REPLACEMENT],
        "shuffled": [each for each in resolved if each.sampling == SHUFFLED and each.batch_size < ALL],
        "whole": [each for each in resolved if each.batch_size == ALL],
    }
    for name, group in groups.items():
        if group:
            found |= {f"{name}.{number}": text for number, text in of_group(group).items()}
    return found


def of_group(group: Sequence[Setting]) -> dict[str, str]:
    """Of settings of one kind: the best c, and the shares, in percent, of the best of either sign and other curves.

    A share is counted as clear where its interval is above zero.
    """
    chosen = [each.best() for each in group]
    found = {
        "count": str(len(group)),
        "best": f"{min(chosen):+g} to {max(chosen):+g}",
        "best_negative": str(sum(c < 0 for c in chosen)),
        "best_positive": str(sum(c > 0 for c in chosen)),
    }
    kinds = {
        "negative": [each.share_of_fraction(each.best(NEGATIVE)) for each in group],
        "positive": [each.share_of_fraction(each.best(POSITIVE)) for each in group],
        "constant_positive": [
            each.share_of_fraction(each.best(POSITIVE, "constant c"), "constant c") for each in group
        ],
        "descent": [each.share("gradient descent") for each in group],
        "modified": [each.share("modified, gradient descent") for each in group],
        "modified_shuffled": [each.share("modified, shuffled SGD") for each in group],
    }
    for name, shares in kinds.items():
        found |= {f"{name}_share": span(shares), f"{name}_clear": str(sum(share.low > 0 for share in shares))}
    return found


def span(shares: Sequence[Interval]) -> str:
    """The least and the largest share, in percent."""
    means = [round(100 * share.mean) for share in shares]
    return f"{min(means)} to {max(means)}"
