"""The command line: arguments, missing packages, and what each command shares with the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rgd_ext
from rgd_ext.__main__ import main

OPTIONAL = "matplotlib", "rich", "scipy", "sklearn"
COMMANDS = [[], ["demo"], ["plan"], ["plot"], ["noise"], ["spectrum"], ["gallery"], ["info"]]


def run(code, without):
    """Run `code` in a process that cannot import the packages `without`, but the same rgd_ext as this one."""
    path = os.pathsep.join([str(Path(rgd_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    code = f"import sys; sys.modules.update(dict.fromkeys({without}))\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "two"], "at least 1"),
        (["demo", "--output", "figure.pdf"], "ends in .png"),
        (["demo", "--output", "no/such/folder/x.png"], "folder that exists"),
        (["dance"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_what_to_pass(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_is_a_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "x.png"
    folder.mkdir()
    with pytest.raises(SystemExit):
        main(["demo", "--output", str(folder)])
    assert "cannot be written" in capsys.readouterr().err


MODULE = """
import torch
model = lambda: torch.nn.Linear(60_000, 3)
data = lambda: [(torch.randn(100, 60_000, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 3)]
"""
SPECTRUM = ["spectrum", "wide:model", "--data", "wide:data", "-k", "1", "--quiet"]
NOISE = ["noise", "wide:model", "--data", "wide:data"]
NEEDS = [
    *((["demo"], module, package) for module, package in (("rich", "rich"), ("sklearn", "scikit-learn"))),
    *((["gallery", "new"], package, package) for package in ("matplotlib", "scipy")),
    *((SPECTRUM, package, package) for package in ("rich", "matplotlib", "scipy")),
    *((NOISE, package, package) for package in ("rich", "matplotlib")),
]


@pytest.mark.parametrize(
    ("arguments", "module", "package"), NEEDS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_missing_package_is_one_line_that_names_the_remedy(arguments, module, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wide.py").write_text(MODULE)
    done = run(f"from rgd_ext.__main__ import main; sys.exit(main({arguments}))", without=[module])
    assert done.returncode == 1
    assert done.stderr == f"{package} is missing: pip install 'rgd_ext[all]'\n"


def test_importing_the_package_needs_none_of_them():
    assert run("import rgd_ext, rgd_ext.commands.resolve", without=OPTIONAL).returncode == 0


def test_help_needs_none_of_them():
    code = f"""
from rgd_ext.__main__ import main
for command in {COMMANDS}:
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    usages = [line for line in run(code, without=OPTIONAL).stdout.splitlines() if line.startswith("usage: ")]
    found = [usage.partition(" [-h]")[0] for usage in usages]
    assert found == [" ".join(["usage: python -m rgd_ext", *command]) for command in COMMANDS]


def info(capsys):
    """What `info` prints, by name."""
    assert main(["info"]) == 0
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_info_prints_the_version_the_build_and_what_runs(capsys):
    lines = info(capsys)
    assert lines["rgd_ext"] == rgd_ext.__version__
    assert lines["folder"] == str(Path(rgd_ext.__file__).parent)
    assert lines["compiled"] == ("yes" if rgd_ext.build_info()["compiled"] else "no")
    assert set(rgd_ext.build_info()) < set(lines)
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads" in lines["running"]


@pytest.mark.parametrize(
    ("compiled", "cuda", "gpu", "slower"),
    [
        (False, None, False, "RGD_EXT_BUILD=cpu"),
        (True, None, False, "none"),
        (True, None, True, "RGD_EXT_BUILD=cuda"),
        (True, "13.0", True, "none"),
    ],
)
def test_info_says_what_is_slower_and_how_to_mend_it(compiled, cuda, gpu, slower, capsys, monkeypatch):
    build = rgd_ext.build_info() | {"compiled": compiled, "cuda": cuda}
    monkeypatch.setattr(rgd_ext, "build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert slower in info(capsys)["slower"]


def test_info_says_that_a_checkout_hides_the_installed_package(capsys, monkeypatch, tmp_path):
    (tmp_path / "rgd_ext").mkdir()
    (tmp_path / "rgd_ext" / "_C.json").touch()

    class Installed:
        def locate_file(self, name):
            return tmp_path / name

    build = rgd_ext.build_info() | {"compiled": False}
    monkeypatch.setattr(rgd_ext, "build_info", lambda: build)
    monkeypatch.setattr("rgd_ext.commands.info.distribution", lambda name: Installed())
    assert f"installed in {tmp_path / 'rgd_ext'}. Run Python in another folder" in info(capsys)["slower"]


def test_info_lists_the_optional_packages_that_are_missing():
    lines = run("from rgd_ext.__main__ import main; main(['info'])", without=["scipy", "rich"]).stdout.splitlines()
    assert [line.split(None, 1)[1] for line in lines if line.startswith("missing")] == [
        "rich, scipy: pip install 'rgd_ext[all]'"
    ]
