"""The arguments of the `plot` command, and its run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ... import monitor
from ..arguments import png


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("plot", help="draw a figure of the CSV file that rgd_ext.Monitor wrote")
    parser.add_argument("csv", type=Path, metavar="RUN.csv", help="the file, which may still be written to")
    parser.add_argument("--out", type=png, metavar="PATH", help="the figure (default: RUN.png beside the file)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the figure, and print its path."""
    from .figure import draw

    output = options.out or options.csv.with_suffix(".png")
    draw(monitor.read(options.csv), output)
    print(output.resolve())
