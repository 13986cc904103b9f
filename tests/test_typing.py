"""What type checkers of users see of the package. Nothing here needs a type checker."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typed_program

import rgd_ext

ROOT = Path(__file__).parents[1]
needs_binary = pytest.mark.skipif(find_spec("rgd_ext._C") is None, reason="nothing was compiled")


def test_the_marker_and_the_stub_are_installed(tmp_path):
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    subprocess.run(command, env=os.environ | {"RGD_EXT_BUILD": "none"}, cwd=ROOT, capture_output=True, check=True)
    assert {"py.typed", "_C.pyi", "__init__.py"} <= {path.name for path in (tmp_path / "rgd_ext").iterdir()}


@pytest.mark.parametrize("part", ["optimise", "capture", "analyse", "follow"])
def test_the_program_that_the_checker_reads_runs(part, tmp_path):
    getattr(typed_program, part)(*([tmp_path] if part in ("optimise", "capture") else []))


def members(body):
    """What the statements of a stub declare: functions with the names of their arguments, and variables."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = members(node.body)
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = "variable"
        elif isinstance(node, ast.FunctionDef):
            is_property = any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
            found[node.name] = "property" if is_property else arguments(node.args)
    return {name: kind for name, kind in found.items() if re.fullmatch(r"__init__|[^_].*", name)}


def arguments(declared):
    """The names of arguments as pybind11 shows them, which has none for those that are positional only."""
    positional = [each.arg for each in declared.posonlyargs]
    unnamed = [name if name == "self" else f"arg{n - 1}" for n, name in enumerate(positional)]
    return [*unnamed, *(each.arg for each in declared.args)]


def bound(attributes):
    """The same of what pybind11 has bound, from the signatures that it writes into docstrings."""
    found = {}
    for name, value in attributes.items():
        if isinstance(value, type):
            found[name] = bound(vars(value))
        elif isinstance(value, property):
            found[name] = "property" if value.fset is None else "variable"
        elif re.fullmatch(r"__init__|[^_].*", name):
            found[name] = re.findall(r"[(,] ?(\w+): ", value.__doc__.splitlines()[0])
    return found


@needs_binary
def test_the_stub_declares_what_is_compiled():
    from rgd_ext import _C

    assert members(ast.parse((ROOT / "rgd_ext" / "_C.pyi").read_text()).body) == bound(vars(_C))
    assert rgd_ext.build_info().keys() == {"compiled", *_C.build_info()}
