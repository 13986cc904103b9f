"""Examples in docstrings, in the README and in the guides run; links and names in the pages lead to what exists."""

import doctest
import importlib.util
import os
import pkgutil
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_project import targets

import rgd_ext
from rgd_ext.commands.main import COMMANDS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted(ROOT.glob("docs/**/*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *GUIDES]
MODULES = [
    m.name for m in pkgutil.walk_packages(rgd_ext.__path__, "rgd_ext.") if not m.name.endswith(("__main__", "_C"))
]


def label(page):
    return str(page.relative_to(ROOT))


def is_importable(name):
    """Whether the trainer that a module of rgd_ext.integrations is for is installed; True for other names."""
    trainer = re.match(r"rgd_ext\.integrations\.(\w+)", name)
    return trainer is None or importlib.util.find_spec(trainer[1]) is not None


@pytest.mark.parametrize("name", [*filter(is_importable, MODULES)])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch, "rgd_ext": rgd_ext})
    assert results.failed == 0


def blocks(page, language):
    text = page.read_text()
    found = re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in found]  # line numbers of the page


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_examples_in_the_readme_run(code):
    exec(compile(code, README, "exec"), {})


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch where it imports Dynamo
@pytest.mark.parametrize("page", [page for page in GUIDES if page.name != "trainers.md"], ids=label)
def test_blocks_of_a_guide_run_one_after_the_other(page):
    run_blocks(page)


@pytest.mark.filterwarnings("ignore")  # of the trainers
def test_blocks_about_trainers_run_one_after_the_other(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)  # where they leave logs
    run_blocks(ROOT / "docs/trainers.md")


def run_blocks(page):
    namespace = {}
    with mock.patch.dict(os.environ):  # which later tests would see
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), namespace)


def test_readme_begins_with_the_two_commands():
    commands = [line.partition("#")[0].strip() for line in blocks(README, "sh")[0].strip().splitlines()]
    assert commands == ["make demo", "make test"]


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_to_files_and_headings(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
        target = page.parent / path if path else page
        assert target.is_file(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_names_and_files_in_a_page_exist(page):
    for name in filter(is_importable, re.findall(r"\brgd_ext(?:\.\w+)+", page.read_text())):
        pkgutil.resolve_name(name)
    for path in re.findall(r"(?<!/)\b(?:rgd_ext|csrc|tests|bench)/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_names_that_a_page_places_in_a_file_are_there(page):
    text = page.read_text()
    for name, path in re.findall(r"`([\w.]+)`(?:\*\*)?\s+(?:there\s+)?(?:in|of|\()\s*`([\w/]+\.\w+)`", text):
        word = name.rpartition(".")[2]
        assert re.search(rf"^ *(?:def |class |struct )?{word}\b", (ROOT / path).read_text(), re.MULTILINE), (name, path)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_in_a_page_exist(page):
    text = page.read_text()
    assert set(re.findall(r"(?:^|`|\| )make (\w+)", text, re.MULTILINE)) <= targets()
    commands = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    assert set(re.findall(r"python -m rgd_ext ([a-z]\w*)", text)) <= commands
    for module in re.findall(r"python -m (bench[.\w]*)", text) + re.findall(r"python -m bench ([a-z]\w*)", text):
        assert importlib.util.find_spec(module if module.startswith("bench") else f"bench.{module}"), module


def test_public_names_have_docstrings():
    for name in rgd_ext.__all__:
        assert getattr(rgd_ext, name).__doc__, name


@pytest.mark.parametrize("module", [rgd_ext, rgd_ext.ops, rgd_ext.geometry], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    text = "".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    documented = re.findall(r"^\.\. (?:auto|py:)\w+:: ([\w.]+)", text, re.MULTILINE)
    assert len(documented) == len({*documented})
    assert {f"{module.__name__}.{name}" for name in module.__all__} <= {*documented}
