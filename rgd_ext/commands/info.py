"""The `info` command: what is installed."""

from __future__ import annotations

import argparse


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="print the version, and what this installation was built with")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a line for the version, and one for each fact about the build."""
    from .. import __version__, build_info

    for name, value in {"rgd_ext": __version__, **build_info()}.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        print(f"{name:<14}{value or 'none'}")
