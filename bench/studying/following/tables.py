"""The tables of the page: which flows explain how much of the distance of SGD from the gradient flow, in percent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..inference import Interval
from ..question import Table
from .curves import BATCH_SIZES, FRACTIONS, MAGNITUDES
from .paths import SHUFFLED, WITH_REPLACEMENT
from .shares import Setting, speeds
from .shares import fractions as fractions_of

POSITIVE, NEGATIVE = MAGNITUDES, tuple(-c for c in MAGNITUDES)
SOME, ALL = BATCH_SIZES[:-1], BATCH_SIZES[-1]
MIDDLE = BATCH_SIZES[1]
CURVES = {
    "gradient descent": "GD",
    "modified, gradient descent": "modified flow of GD",
    "modified, shuffled SGD": "modified flow of shuffled SGD",
}


def percent(share: Interval) -> str:
    """The share, and its interval where there are several seeds."""
    low, mean, high = (round(100 * value) for value in (share.low, share.mean, share.high))
    return f"{mean} [{low}, {high}]" if share.low < share.high else str(mean)


def best(setting: Setting, among: Iterable[float] = FRACTIONS) -> str:
    """The best c among these or 0, marked at an end of the grid, and what it explains."""
    c, share = setting.best(fractions_of(among))
    end = "†" if c is not None and abs(c) in (MAGNITUDES[0], MAGNITUDES[-1]) else ""
    return "none" if c is None else f"{c:+g}{end}: {percent(share)}"


def best_speed(setting: Setting) -> str:
    """The best speed of the gradient flow, and what it explains."""
    speed, share = setting.best(speeds())
    return "1" if speed is None else f"{speed:g}: {percent(share)}"


def shares(setting: Setting) -> list[str]:
    """What the curves without a c explain."""
    return [percent(setting.share(curve)) for curve in CURVES]


def fractions(settings: Sequence[Setting]) -> Table:
    """The best c for each batch size, drawn with replacement, and for all samples in one batch."""
    columns = [(WITH_REPLACEMENT, size) for size in SOME] + [(SHUFFLED, ALL)]
    found = {(each.problem, each.lr, each.sampling, each.batch_size): each for each in settings}
    rows = [
        [problem, f"{lr:g}", *(_cell(found.get((problem, lr, *column)), best) for column in columns)]
        for problem, lr in dict.fromkeys((each.problem, each.lr) for each in settings)
    ]
    return Table(("problem", "rate", *(f"B = {size}" for size in SOME), f"B = N = {ALL}"), rows)


def flows(settings: Sequence[Setting]) -> Table:
    """All curves at one batch size, drawn with replacement."""
    rows = []
    for setting in settings:
        if setting.sampling == WITH_REPLACEMENT and setting.batch_size == MIDDLE:
            signs = [_cell(setting, lambda each, among=among: best(each, among)) for among in (NEGATIVE, POSITIVE)]
            speed = _cell(setting, best_speed)
            rows.append([setting.problem, f"{setting.lr:g}", _distance(setting), *_shares(setting), *signs, speed])
    return Table(("problem", "rate", "distance", *CURVES.values(), "best c < 0", "best c > 0", "best speed"), rows)


def shuffled(settings: Sequence[Setting]) -> Table:
    """The curves at the lowest rate, in shuffled epochs."""
    lowest = min(each.lr for each in settings)
    rows = [
        [each.problem, str(each.batch_size), _distance(each), *_shares(each), _cell(each, best)]
        for each in settings
        if each.sampling == SHUFFLED and each.lr == lowest and each.batch_size < ALL
    ]
    return Table(("problem", "B", "distance", *CURVES.values(), "best c"), rows)


def _cell(setting: Setting | None, text: Callable[[Setting], str]) -> str:
    """What `text` says of a setting, if it was run and there is something to explain."""
    if setting is None:
        return "not run"
    return text(setting) if setting.resolved else "within noise"


def _shares(setting: Setting) -> list[str]:
    return shares(setting) if setting.resolved else ["within noise"] * len(CURVES)


def _distance(setting: Setting) -> str:
    """The distance of SGD from the gradient flow in percent of the length of that."""
    return f"{100 * setting.distance('gradient flow') / setting.mean_of('length'):.2g}"
