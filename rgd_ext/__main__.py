"""The command line: `python -m rgd_ext COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

# What `pip install 'rgd_ext[all]'` adds, by import name.
OPTIONAL = {"matplotlib": "matplotlib", "rich": "rich", "scipy": "scipy", "sklearn": "scikit-learn"}
FACTORY = (
    "MODULE:FACTORY names a function without arguments in a module that can be imported, also from the current"
    " directory."
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rgd_ext", description="Relativistic gradient descent for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_demo, _add_plan, _add_plot, _add_spectrum, _add_gallery, _add_info):
        add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"{package} is missing: pip install 'rgd_ext[all]'", file=sys.stderr)
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


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="how the capture would treat each layer of a model, and what a step costs: a table",
        epilog=FACTORY,
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="returns the model, or a tuple (model, x) with a batch")
    parser.add_argument(
        "--data", metavar="MODULE:FACTORY", help="returns a batch (x, y), or a loader, whose first batch is taken"
    )
    parser.add_argument(
        "--policy",
        choices=["spectral", "trace", "rayleigh"],
        default="spectral",
        help="for epsilon (default: %(default)s)",
    )
    parser.add_argument("--inverse", choices=["weak-field", "exact"], default="weak-field", help="default: %(default)s")
    parser.add_argument("--batch-norm", choices=["error", "contribution"], default="error", help="default: %(default)s")
    parser.add_argument(
        "--memory-budget", type=float, metavar="BYTES", help="inf for no limit (default: by what each layer is given)"
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from . import Rayleigh, Spectral, Trace, plan_command

    policy = {"spectral": Spectral, "trace": Trace, "rayleigh": Rayleigh}[options.policy]()

    def run() -> None:
        choices = policy, options.inverse, options.batch_norm, options.memory_budget
        print(plan_command.plan(options.model, options.data, *choices))

    return _reporting(run)


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


def _add_spectrum(commands) -> None:
    parser = commands.add_parser(
        "spectrum",
        help="the largest eigenvalues of D of a model and a data set: a table and a figure",
        epilog=f"{FACTORY} The model is put in evaluation mode.",
    )
    parser.add_argument("model", metavar="MODULE:FACTORY", help="returns the model, with its weights loaded")
    parser.add_argument(
        "--data",
        required=True,
        metavar="MODULE:FACTORY",
        help="returns a loader, an iterable of the same pairs (x, y) in every pass; or a tuple (x, y), one batch",
    )
    parser.add_argument(
        "--loss",
        default="torch.nn:CrossEntropyLoss",
        metavar="MODULE:FACTORY",
        help="returns the criterion, (output, y) -> loss (default: %(default)s)",
    )
    parser.add_argument("-k", type=_positive, metavar="K", help="how many eigenvalues (default: 20, or d if less)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a folder from which an interrupted computation goes on"
    )
    parser.add_argument(
        "--out", type=_png, default="rgd_spectrum.png", metavar="PATH", help="the figure (default: %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no estimate of the time, and no bars")
    parser.set_defaults(run=_spectrum)


def _spectrum(options: argparse.Namespace) -> int:
    from torch import nn

    from . import resolve, spectrum

    def run() -> None:
        model = resolve.make(options.model, nn.Module, "a torch.nn.Module")
        data = resolve.make(options.data, Iterable, "a loader, which gives pairs (x, y), or a tuple (x, y)")
        loss = resolve.make(options.loss, Callable, "a criterion, (output, y) -> loss")
        matrix = spectrum.build(model, loss, data, options.checkpoint, progress=not options.quiet)
        spectrum.run(matrix, options.k, options.out, options.quiet)

    return _reporting(run)


def _reporting(run: Callable[[], None]) -> int:
    """The exit code of a command that works on a user's code: errors of ours are a line, others have a traceback."""
    try:
        run()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if not _is_ours(error):
            raise
        print(error, file=sys.stderr)
        return 1
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether the message is enough: errors in the user's code need their traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].partition(".")[0] == __package__ or isinstance(error, OSError)


def _add_gallery(commands) -> None:
    parser = commands.add_parser("gallery", help="four pictures of what the metric does, computed in half a minute")
    parser.add_argument("folder", type=_folder, metavar="DIR", help="for the pictures; made if it is missing")
    parser.add_argument("--quick", action="store_true", help="a few seconds: two epochs of each training")
    parser.set_defaults(run=_gallery)


def _gallery(options: argparse.Namespace) -> int:
    from .gallery.command import run

    try:
        run(options.folder, 2 if options.quick else 20)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
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


def _folder(text: str) -> Path:
    path = Path(text)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: pass a folder, which may be missing")
    return path


if __name__ == "__main__":
    sys.exit(main())
