"""Examples in docstrings and in the README run, and the README names what exists."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import rgd_ext

README = Path(__file__).parent.parent / "README.md"
MODULES = [
    m.name for m in pkgutil.walk_packages(rgd_ext.__path__, "rgd_ext.") if not m.name.endswith(("__main__", "_C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch, "rgd_ext": rgd_ext})
    assert results.failed == 0


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_examples(code):
    exec(compile(code, "README.md", "exec"), {})


def test_readme_begins_with_the_two_commands():
    commands = [line.partition("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make demo", "make test"]


def test_public_names_have_docstrings():
    for name in rgd_ext.__all__:
        assert getattr(rgd_ext, name).__doc__, name
