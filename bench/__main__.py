"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from . import (
    cluster,
    compare,
    distributed,
    fit,
    kernels,
    modules,
    observe,
    operators,
    overhead,
    scaling,
    steps,
    study,
    table1,
    tables,
    torchjd,
    verification,
)
from . import compile as compilation  # not to hide the builtin function


def device(text: str) -> str:
    """A device that is there."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: torch {torch.__version__} finds no CUDA device; pass cpu")
    return text


def file(text: str) -> str:
    """The path of a file that can be written. Its folder is made, since nothing but an attempt tells whether it can."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as problem:
        about = f"{text!r} cannot be written ({problem}): pass a file in a folder that you may write to"
        raise argparse.ArgumentTypeError(about) from problem
    return text


def png(text: str) -> str:
    """The path of a PNG that can be drawn and written."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r}: pass a path that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be drawn without matplotlib: pip install matplotlib")
    return file(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module in (
        kernels,
        steps,
        compilation,
        distributed,
        observe,
        torchjd,
        operators,
        scaling,
        overhead,
        modules,
        verification,
        fit,
    ):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0], description=module.__doc__)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        about = "default: cuda where there is"
        command.add_argument("--device", type=device, choices=["cpu", "cuda"], default=default, help=about)
        command.add_argument("--quick", action="store_true", help="small sizes, few rounds")
        command.add_argument("--json", type=file, metavar="PATH", help="also write raw samples and environment")
        command.set_defaults(run=module.run)
        if module is not overhead:
            about = "only what has a TEXT in its name, and in this order"
            command.add_argument("--only", metavar="TEXT", nargs="+", default=[""], help=about)
        if module is kernels:
            command.add_argument("--no-compile", action="store_true", help="without the arms by torch.compile")
        if module is fit:
            command.add_argument("--seconds", type=float, help="for each method and seed; default: 5, or 0.05 if quick")
        if module in (kernels, scaling, fit):
            command.add_argument("--plot", type=png, metavar="PATH.png", help="also draw it (needs matplotlib)")
    command = commands.add_parser("cluster", help=cluster.__doc__, description=cluster.__doc__)
    command.add_argument("--quick", action="store_true", help="one model, few ranks")
    command.add_argument("--json", type=file, metavar="PATH", help="also write the numbers of the tables")
    command.add_argument("--plot", type=png, metavar="PATH.png", help="also draw the ratios (needs matplotlib)")
    command.set_defaults(run=cluster.run)
    compare.add(commands)
    study.add(commands)
    tables.add(commands)
    command = commands.add_parser("table1", help=table1.__doc__, description=table1.__doc__)
    command.set_defaults(run=table1.run)
    arguments = vars(parser.parse_args())
    failures = arguments.pop("run")(**arguments)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
