"""A module of a user, for commands that take the names of its functions."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def mine(request, tmp_path, monkeypatch):
    """The name of a module in the current directory, with the SOURCE of the module of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(request.module.SOURCE)
    yield name
    sys.modules.pop(name, None)
