"""The arguments of the `demo` command, and its run."""

from __future__ import annotations

import argparse

from ..arguments import png, positive


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("demo", help="compare RGD with SGD on handwritten digits: a table and a figure")
    parser.add_argument("--seeds", type=positive, help="how often each training is repeated (default: 3; --quick: 1)")
    parser.add_argument("--quick", action="store_true", help="train for 2 epochs in place of 20: a few seconds")
    parser.add_argument(
        "--output", type=png, default="rgd_demo.png", metavar="PATH", help="the figure (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, print the table, write the figure and print its path."""
    from .comparison import compare

    compare(options.seeds or (1 if options.quick else 3), 2 if options.quick else 20, options.output)
