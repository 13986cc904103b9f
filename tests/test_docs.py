"""Examples in docstrings, in the README and in the guides run, and the README names what exists."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import rgd_ext

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted(ROOT.glob("docs/*.md"))
MODULES = [
    m.name for m in pkgutil.walk_packages(rgd_ext.__path__, "rgd_ext.") if not m.name.endswith(("__main__", "_C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch, "rgd_ext": rgd_ext})
    assert results.failed == 0


def blocks(page, language):
    text = page.read_text()
    found = re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]  # line numbers of the page


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readme_examples(code):
    exec(compile(code, README, "exec"), {})


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_blocks_of_a_guide_run_one_after_the_other(page):
    namespace = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), namespace)


def test_readme_begins_with_the_two_commands():
    commands = [line.partition("#")[0].strip() for line in blocks(README, "sh")[0].strip().splitlines()]
    assert commands == ["make demo", "make test"]


def test_public_names_have_docstrings():
    for name in rgd_ext.__all__:
        assert getattr(rgd_ext, name).__doc__, name
