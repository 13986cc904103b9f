"""How a command ends: with one line for an error that a user can mend, with a traceback for any other."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable

# What `pip install 'rgd_ext[all]'` adds, by import name.
OPTIONAL = {"matplotlib": "matplotlib", "rich": "rich", "scipy": "scipy", "sklearn": "scikit-learn"}


def exit_code(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Call `run(options)`; 0, or 1 where a line on standard error says what is wrong and what to do."""
    try:
        run(options)
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"{package} is missing: pip install 'rgd_ext[all]'", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if not _is_ours(error):
            raise
        print(error, file=sys.stderr)
        return 1
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether the message is enough: an error that the user's code or another package raises needs its traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].partition(".")[0] == __name__.partition(".")[0] or isinstance(error, OSError)
