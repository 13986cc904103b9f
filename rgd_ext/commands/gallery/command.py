"""The arguments of the `gallery` command, and its run."""

from __future__ import annotations

import argparse

from ..arguments import folder


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("gallery", help="draw four pictures of what the metric does, in half a minute")
    parser.add_argument("folder", type=folder, metavar="DIR", help="the folder of the pictures; made if it is missing")
    parser.add_argument("--quick", action="store_true", help="train for 2 epochs in place of 20: a few seconds")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the pictures, and print their paths."""
    from .pictures import draw_all

    draw_all(options.folder, 2 if options.quick else 20)
