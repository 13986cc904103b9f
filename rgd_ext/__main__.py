"""The command line: `python -m rgd_ext COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# What `pip install 'rgd_ext[demo]'` adds, by import name.
OPTIONAL = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rgd_ext", description="Relativistic gradient descent for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_demo, _add_plot, _add_info):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"{package} is missing: pip install 'rgd_ext[demo]'", file=sys.stderr)
        return 1


def _add_demo(commands) -> None:
    parser = commands.add_parser("demo", help="RGD beside SGD on handwritten digits: a table and a figure")
    parser.add_argument("--seeds", type=_positive, default=None, help="trainings of each kind (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: two epochs, one seed")
    parser.add_argument(
        "--output", type=_png, default="rgd_demo.png", metavar="PATH", help="the figure (default: %(default)s)"
    )
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from .demo.command import run

    run(options.seeds or (1 if options.quick else 3), 2 if options.quick else 20, options.output)
    return 0


def _add_plot(commands) -> None:
    parser = commands.add_parser("plot", help="a figure of the CSV file that rgd_ext.Monitor wrote")
    parser.add_argument("csv", type=Path, metavar="RUN.csv", help="the file, finished or not")
    parser.add_argument("--out", type=_png, metavar="PATH", help="the figure (default: RUN.png beside the file)")
    parser.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from . import monitor, plot

    output = options.out or options.csv.with_suffix(".png")
    try:
        plot.draw(monitor.read(options.csv), output)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(output.resolve())
    return 0


def _add_info(commands) -> None:
    parser = commands.add_parser("info", help="version, and what this installation was built with")
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from . import __version__, build_info

    for name, value in {"rgd_ext": __version__, **build_info()}.items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        print(f"{name:<14}{value or 'none'}")
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: pass a whole number of at least 1")
    return int(text)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r}: pass a path that ends in .png")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: pass a file in a folder that exists")
    return path


if __name__ == "__main__":
    sys.exit(main())
