"""The command line of the benchmarks."""

from __future__ import annotations

import argparse

from . import kernels, steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in {"kernels": kernels, "steps": steps}.items():
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0], description=module.__doc__)
        command.add_argument("--quick", action="store_true", help="small sizes, few rounds")
        command.add_argument("--json", metavar="PATH", help="also write raw samples and environment")
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(quick=arguments.quick, json_path=arguments.json)


if __name__ == "__main__":
    main()
