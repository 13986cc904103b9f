"""The entry point of the command line."""

from __future__ import annotations

import argparse

from . import demo, gallery, info, noise, plan, plot, spectrum
from .errors import exit_code

COMMANDS = (demo, plan, plot, noise, spectrum, gallery, info)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    parser = argparse.ArgumentParser(prog="python -m rgd_ext", description="Relativistic gradient descent for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    return exit_code(options.run, options)
