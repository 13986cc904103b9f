"""What the files of the project say of each other is so: versions, commands of workflows, templates of issues."""

import re
from pathlib import Path

import pytest

import rgd_ext

ROOT = Path(__file__).parents[1]
YAML = [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff"]


def read(path):
    return pytest.importorskip("yaml").safe_load(path.read_text())


def commands(workflow):
    """The shell lines of all jobs."""
    steps = [step for job in read(workflow)["jobs"].values() for step in job["steps"]]
    return [line for step in steps if "run" in step for line in step["run"].splitlines()]


def targets():
    """What `make` makes."""
    found = re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {*" ".join(found).split()}


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_is_yaml(path):
    assert read(path)


@pytest.mark.parametrize("workflow", [*ROOT.glob(".github/workflows/*.yml")], ids=lambda path: path.name)
def test_workflows_run_what_a_developer_runs(workflow):
    known, found = targets(), commands(workflow)
    assert found
    for line in found:
        target = re.match(r"make (\w+)( |$)", line)
        assert line == ".ci/run" or target[1] in known, line


def test_the_citation_is_of_this_version():
    assert read(ROOT / "CITATION.cff")["version"] == rgd_ext.__version__.partition("+")[0]


def test_the_changelog_has_this_version():
    version = rgd_ext.__version__.partition("+")[0]
    assert re.search(rf"^## {re.escape(version)}( |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
