"""bench/gpu_check.sh, run with a fake python that notes its arguments and ends as told, and with little time."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import compile as compile_command
from bench.gradients import cases
from bench.measuring.selection import chosen
from bench.training import models

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"
SCALE = 0.02  # where a step takes all of its time

# What the script needs of a machine; nvcc, compute-sanitizer and ncu are not among it.
TOOLS = "awk bash cat cp dirname env gzip grep mkdir mktemp mv nproc realpath rm sed sleep tail tar tee timeout touch"

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *cuda.is_available*) echo True; exit ;;
    *find_spec*) for module; do [[ " $LACKS " != *" $module "* ]] || echo "$module"; done; exit ;;
esac
waits=
for word in $WAITS; do [[ "$*" != *"$word"* ]] || waits=1; done
[[ -z $waits ]] || trap 'echo interrupted; kill $!; exit 1' INT
(IFS=$'\\t'; echo "$*" >>"$CALLS")
for word in $FAILS; do [[ "$*" != *"$word"* ]] || exit 3; done
for word in $HANGS; do if [[ "$*" == *"$word"* ]]; then echo begun; trap '' INT; sleep 600; sleep 600; fi; done
if [[ -n $waits ]]; then sleep 600 & wait; fi
echo done
"""

STEPS = {
    "build": "setup.py",
    "info": "build_info",
    "environment": "bench.measuring.environment",
    "smoke": "bench.gpu.smoke",
    "tests": "pytest",
    "memcheck": "sanitized_run",
    "kernels": "--no-compile",
    "steps": "bench steps",
    "operators": "bench operators",
    "distributed": "bench distributed",
    "ncu": "bench.gpu.ncu_run",
    "compile": "kernels-compile.json",
    "goals": "bench.tabulating.goals",
    "compiled_steps": "bench compile",
}


class Machine:
    """A folder with tools, a python and the folder of results."""

    def __init__(self, folder):
        self.out, self.calls, self.printed = folder / "out", folder / "calls", folder / "printed"
        self.tools = folder / "tools"
        self.tools.mkdir()
        for tool in TOOLS.split():
            (self.tools / tool).symlink_to(shutil.which(tool))
        self.add("python", PYTHON)
        self.variables = {
            "PATH": str(self.tools),
            "PYTHON": str(self.tools / "python"),
            "CUDA_HOME": str(folder),
            "CALLS": str(self.calls),
            **dict.fromkeys(("FAILS", "HANGS", "WAITS", "LACKS"), ""),
        }

    def add(self, name, script='#!/usr/bin/env bash\nwhile [[ $1 != */python ]]; do shift; done; "$@"\n'):
        (self.tools / name).write_text(script)
        (self.tools / name).chmod(0o755)

    def start(self, **variables):
        command = ["bash", str(SCRIPT), str(self.out)]
        with self.printed.open("w") as printed:
            return subprocess.Popen(command, env=self.variables | variables, stdout=printed, stderr=printed)

    def run(self, **variables):
        return self.start(**variables).wait(timeout=60), self.printed.read_text()

    def commands(self):
        """The arguments of each call of python."""
        return [line.split("\t") for line in self.calls.read_text().splitlines()]

    def ran(self):
        """The steps whose command was run, in order."""
        lines = map(" ".join, self.commands())
        return list(dict.fromkeys(step for line in lines for step, word in STEPS.items() if word in line))

    def archive(self):
        with tarfile.open(self.out / "gpu_check.tar.gz") as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            return {Path(member.name).name: archive.extractfile(member).read().decode() for member in members}

    def outcomes(self):
        """The summary: by step, how it ended and in how many seconds."""
        lines = [line.split() for line in self.archive()["summary.txt"].splitlines()[1:] if line.endswith(" s")]
        return {name: (" ".join(outcome), float(duration)) for name, *outcome, duration, _ in lines}


@pytest.fixture
def machine(tmp_path):
    found = Machine(tmp_path)
    found.add("compute-sanitizer")
    found.add("ncu")
    return found


def test_all_steps_run_in_their_order_and_leave_few_files(machine):
    status, printed = machine.run()
    assert status == 0, printed
    beside = {"environment", "smoke"}, {"tests", "memcheck"}  # in either order
    ran = machine.ran()
    assert [step for step in ran if step not in set.union(*beside)] == [
        step for step in STEPS if step not in set.union(*beside)
    ]
    assert [set(ran[2:4]), set(ran[4:6])] == list(beside)
    outcomes = machine.outcomes()
    halves = {f"{tool}-{dtype}" for tool in ("memcheck", "racecheck", "initcheck") for dtype in ("float32", "bfloat16")}
    assert outcomes.keys() == (STEPS.keys() - {"memcheck"}) | halves
    assert {outcome for outcome, _ in outcomes.values()} == {"ok"}
    assert {path.name for path in machine.out.iterdir()} == {"gpu_check.tar.gz", "summary.txt"}
    assert {f"{step}.log" for step in outcomes} | {"summary.txt"} == machine.archive().keys()
    assert (machine.out / "summary.txt").read_text() == machine.archive()["summary.txt"]
    assert printed.endswith(machine.archive()["summary.txt"])


def test_the_marks_leave_time_to_a_lease_of_ten_minutes():
    marks = [int(mark) for mark in re.findall(r'^ *(?:start|step) (?:"[^"]+"|\w+) (\d+) ', SCRIPT.read_text(), re.M)]
    assert len(marks) == len(STEPS)
    assert marks == sorted(marks)
    assert marks[-1] <= 590


def test_the_cases_that_it_names_exist(machine):
    machine.run(STEPS="kernels steps compile compiled_steps")
    known = {
        "kernels": {case.name: case for case in cases.cases(20 << 30, quick=False)},
        "steps": models.cases(quick=False, device="cuda"),
        "compile": compile_command.models(quick=False, device="cuda"),
    }
    lists = [(words[2], words[words.index("--only") + 1 :]) for words in machine.commands()]
    assert [name for name, _ in lists] == ["kernels", "steps", "kernels", "compile"]
    found = [list(chosen(known[name], only)) for name, only in lists]
    assert list(map(len, found)) == [20, 8, 2, 3]
    assert found[0][:2] == found[2]


@pytest.mark.parametrize("variables", [{"FAILS": "smoke"}, {"FAILS": "pytest kernels"}], ids=str)
def test_a_step_that_fails_stops_no_other(machine, variables):
    status, _ = machine.run(**variables)
    assert status == 1
    assert set(machine.ran()) == set(STEPS)
    failed = {step for step, (outcome, _) in machine.outcomes().items() if outcome == "failed (3)"}
    assert failed == ({"smoke"} if "smoke" in variables["FAILS"] else {"tests", "kernels", "compile"})


@pytest.mark.parametrize("word", ["setup.py", "build_info"])
def test_without_the_kernels_nothing_is_checked(machine, word):
    status, _ = machine.run(FAILS=word)
    assert status == 1
    assert set(machine.ran()) <= {"build", "info"}
    assert "failed (3)" in machine.archive()["summary.txt"]
    assert "build.log" in machine.archive()


@pytest.mark.parametrize(
    ("word", "step", "mark"), [("bench.gpu.smoke", "smoke", 130), ("--no-compile", "kernels", 360)]
)
def test_a_step_that_hangs_is_killed_at_its_mark_and_the_next_ones_run(machine, word, step, mark):
    begin = time.monotonic()
    status, printed = machine.run(HANGS=word, SCALE=str(SCALE))
    assert status == 1
    assert mark * SCALE - 1 < time.monotonic() - begin < mark * SCALE + 5, printed
    assert set(machine.ran()) == set(STEPS)
    outcomes = machine.outcomes()
    assert outcomes[step][0] == "killed"
    assert {outcome for name, (outcome, _) in outcomes.items() if name != step} == {"ok"}
    assert machine.archive()[f"{step}.log"].startswith("begun")


def test_a_step_that_is_late_is_interrupted_first_even_if_the_caller_ignores_interrupts(machine):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script in the background has it
    try:
        machine.run(WAITS="bench.gpu.smoke", STEPS="smoke", SCALE=str(SCALE))
    finally:
        signal.signal(signal.SIGINT, before)
    assert machine.outcomes()["smoke"][0] == "over its mark"
    assert "interrupted" in machine.archive()["smoke.log"]


def test_marks_count_from_the_start_of_the_run(machine):
    begin = time.monotonic()
    machine.run(HANGS="bench.gpu.smoke pytest", STEPS="smoke tests", SCALE=str(SCALE))
    assert 250 * SCALE < time.monotonic() - begin < 340 * SCALE
    durations = {step: duration for step, (_, duration) in machine.outcomes().items()}
    assert durations.keys() == {"smoke", "tests"}
    assert durations["tests"] < 140 * SCALE


def test_steps_beside_each_other_have_their_own_time(machine):
    machine.run(HANGS="pytest", STEPS="tests memcheck", SCALE=str(SCALE))
    outcomes = machine.outcomes()
    assert outcomes["tests"][0] == "killed"
    assert outcomes["memcheck-float32"][1] < outcomes["tests"][1] / 2


def test_steps_that_no_time_is_left_for_are_named(machine):
    status, _ = machine.run(STEPS="kernels", SCALE="0")
    assert status == 1
    assert machine.outcomes()["kernels"][0] == "no time left"


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_the_archive_of_a_run_that_is_killed_is_whole(machine, number, left):
    process = machine.start(WAITS="--no-compile", STEPS="build smoke kernels steps", SCALE="0.5")
    try:
        while not (machine.calls.exists() and "kernels" in machine.ran()):
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=30)
    finally:
        process.kill()
    assert process.returncode == (1 if left else -signal.SIGKILL)
    assert {"build.log", "smoke.log", "summary.txt"} <= machine.archive().keys()
    assert machine.ran() == ["build", "smoke", "kernels"]
    assert len(list(machine.out.iterdir())) <= 3
    if left:  # what the step had written as well
        assert "interrupted" in machine.archive()["kernels.log"]
        assert "interrupted in: kernels" in machine.archive()["summary.txt"]


def test_tools_that_are_missing_are_named(tmp_path):
    machine = Machine(tmp_path)
    status, _ = machine.run(LACKS="pytest")
    assert status == 0
    outcomes = {name: outcome for name, (outcome, _) in machine.outcomes().items()}
    assert outcomes["tests"] == "no pytest"
    assert outcomes["memcheck"] == outcomes["racecheck"] == outcomes["initcheck"] == "no compute-sanitizer"
    assert outcomes["ncu"] == "no ncu"


def test_test_files_that_cannot_be_imported_are_left_out_by_name(machine):
    machine.run(LACKS="numpy xdist", STEPS="tests")
    (monitor,) = (str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_monitor.py"))
    assert f"tests: without {monitor}: no numpy" in machine.archive()["summary.txt"]
    (call,) = [command for command in machine.commands() if "pytest" in command]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-m", "gpu", "tests"]
    collected = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with_gpu_tests = re.findall(r"(?m)^(tests/[\w/]+\.py): \d+$", collected)
    assert [word for word in call if word.endswith(".py")] == sorted({*with_gpu_tests} - {monitor})
    assert "-n" not in call


def test_python_without_a_device_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    variables = os.environ | {"PYTHON": sys.executable}
    command = ["bash", SCRIPT, tmp_path / "out"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()


FAILING_DEVICE = """
import pytest
import torch

from bench.gradients import cases
from bench.measuring.selection import chosen
from bench.training import models

def fail():
    raise RuntimeError("an illegal memory access was encountered")

torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lambda: None

@pytest.mark.parametrize("number", range(8))
def test_number(number):
    if number == 2:
        torch.cuda.synchronize = fail
    assert torch.cuda.synchronize is not fail

def test_opcheck():
    torch.library.opcheck(None)
"""


def test_worker_whose_device_has_failed_gets_a_successor_and_missing_tools_skip(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_device.py").write_text(FAILING_DEVICE)
    (tmp_path / "without_expecttest.py").write_text("import sys; sys.modules['expecttest'] = None")
    plugins = "-p", "no:cacheprovider", "-p", "without_expecttest"
    command = [sys.executable, "-m", "pytest", "-n", "1", "-rA", *plugins, str(tmp_path)]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path)))
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "an illegal memory access was encountered" in result.stderr
    passed = [line for line in result.stdout.splitlines() if line.startswith("PASSED")]
    assert len(passed) == 7, result.stdout
    assert "assert <function fail" in result.stdout
    assert "torch.library.opcheck needs expecttest" in result.stdout
