"""The arguments of the `spectrum` command, and its run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import resolve
from ..arguments import FACTORY, png, positive


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "spectrum",
        help="compute the largest eigenvalues of D for a model and a data set: a table and a figure",
        epilog=f"{FACTORY} The model is put in evaluation mode.",
    )
    resolve.add_model_and_data(
        parser,
        data="returns a loader, an iterable of the same pairs (x, y) in every pass; or a tuple (x, y), one batch",
    )
    parser.add_argument("-k", type=positive, metavar="K", help="how many eigenvalues (default: 20, or d if less)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a folder from which an interrupted computation continues"
    )
    parser.add_argument(
        "--out", type=png, default="rgd_spectrum.png", metavar="PATH", help="the figure (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no estimate of the time, and no progress bars")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the tables, write the figure and print its path."""
    from .computation import build
    from .report import report

    model, data, loss = resolve.model_and_data(options)
    matrix = build(model, loss, data, options.checkpoint, progress=not options.quiet)
    report(matrix, options.k, options.out, options.quiet)
