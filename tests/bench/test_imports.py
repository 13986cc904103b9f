"""The imports between the modules of bench."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MODULES = {path: ("bench", *path.relative_to(BENCH).with_suffix("").parts) for path in BENCH.rglob("*.py")}
# From a folder, which folders may be imported, beside the folder itself.
BELOW = {
    "measuring": set(),
    **{folder: {"measuring"} for folder in ("gradients", "training", "fitting", "gpu", "simulating", "studying")},
    "comparing": {"measuring", "training"},
    "distributing": {"measuring", "simulating", "training"},
    "tabulating": {"measuring", "gradients", "training"},
}


def imports(path):
    """The modules of bench that a module imports, in functions and for type checking as well."""
    *package, _ = MODULES[path]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
            modules = {(*source, alias.name) for alias in node.names} & set(MODULES.values())
            found |= modules or {source}
    return found


def test_there_is_no_circle():
    order = list(TopologicalSorter({module: imports(path) for path, module in MODULES.items()}).static_order())
    assert order.index(("bench", "measuring", "timing")) < order.index(("bench", "kernels"))


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_only_those_below_it(folder):
    for path in (BENCH / folder).rglob("*.py"):
        assert {source[1] for source in imports(path)} <= {folder} | BELOW[folder], path


def test_the_command_line_starts_without_the_compiler():
    code = "import sys, bench.__main__; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=BENCH.parent).returncode == 0


def test_every_folder_has_its_place():
    assert {module[1] for module in MODULES.values() if len(module) > 2} == set(BELOW)
