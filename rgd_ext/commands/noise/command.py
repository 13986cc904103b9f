"""The arguments of the `noise` command, and its run."""

from __future__ import annotations

import argparse

from .. import resolve
from ..arguments import FACTORY, png, positive


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "noise",
        help="measure the gradient noise scale of each parameter and module of a model: a table and a figure",
        epilog=f"{FACTORY} The model is put in evaluation mode.",
    )
    resolve.add_model_and_data(parser, data="returns a loader of pairs (x, y); or one batch (x, y)")
    parser.add_argument(
        "--batches", type=positive, default=10, metavar="N", help="take at most N batches (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=png, default="rgd_noise.png", metavar="PATH", help="the figure (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the table, write the figure and print its path."""
    from .figure import draw
    from .measurement import measure
    from .table import show

    model, data, loss = resolve.model_and_data(options)
    noise = measure(model, loss, data, options.batches)
    show(noise)
    draw(noise, options.out)
    print(options.out.resolve())
