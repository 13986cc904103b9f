"""The numbers in the text of the page."""

from __future__ import annotations

from collections.abc import Sequence

from ..inference import Interval
from .curves import BATCH_SIZES, FRACTIONS
from .paths import WITH_REPLACEMENT
from .shares import Setting, fractions, speeds
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
    chosen = [each.best(fractions(FRACTIONS))[0] or 0 for each in group]
    found = {
        "count": str(len(group)),
        "best": f"{min(chosen):+g} to {max(chosen):+g}",
        "best_negative": str(sum(c < 0 for c in chosen)),
        "best_positive": str(sum(c > 0 for c in chosen)),
    }
    families = {
        "negative": fractions(NEGATIVE),
        "positive": fractions(POSITIVE),
        "constant_positive": fractions(POSITIVE, "constant c"),
        "speed": speeds(),
    }
    kinds = {name: [each.best(curves)[1] for each in group] for name, curves in families.items()}
    faster = zip(kinds["positive"], kinds["speed"], strict=True)
    found["positive_beats_speed"] = str(sum(positive.mean > speed.mean for positive, speed in faster))
    curves = {
        "gradient_descent": "gradient descent",
        "modified": "modified, gradient descent",
        "modified_shuffled": "modified, shuffled SGD",
    }
    kinds |= {name: [each.share(curve) for each in group] for name, curve in curves.items()}
    for name, shares in kinds.items():
        found |= {f"{name}.share": span(shares), f"{name}.clear": str(sum(share.low > 0 for share in shares))}
    return found


def span(shares: Sequence[Interval]) -> str:
    """The least and the largest share, in percent."""
    means = [round(100 * share.mean) for share in shares]
    return f"{min(means)} to {max(means)}"
