"""How the benchmarks measure: choosing cases, sampling times, counting memory, writing records."""

import json
import re
import resource
import subprocess

import pytest
import torch

from bench.measuring import environment
from bench.measuring.memory import extra_memory, limited_memory
from bench.measuring.profiling import profiled
from bench.measuring.report import Record
from bench.measuring.selection import chosen, run_cases
from bench.measuring.timing import interleave, ratio


def test_only_chooses_in_its_order():
    cases = {"a 1": 1, "b 1": 2, "b 2": 3}
    assert list(chosen(cases, ["b 2", "1"])) == ["b 2", "a 1", "b 1"]
    assert chosen(cases, [""]) == cases


def test_cases_that_fail_or_are_interrupted_leave_the_others():
    def bench(name, case):
        if case is not None:
            raise case
        return name

    cases = {
        "first": None,
        "second": ValueError("too large"),
        "third": None,
        "fourth": KeyboardInterrupt(),
        "fifth": None,
    }
    results, failures = [], []
    run_cases(cases, bench, results.append, failures)
    assert results == ["first", "third"]
    assert failures[0].startswith("second: ")
    assert "too large" in failures[0]
    assert failures[1:] == ["interrupted: the cases that follow are missing"]


def test_slow_arms_are_sampled_less_and_paired_with_their_rounds():
    times = iter(range(1, 100))
    clocks = {"fast": lambda: float(next(times)), "slow": lambda: 100.0}
    samples = interleave(clocks, rounds=8, warm_up=0, counts={"slow": 3})
    assert samples == {"fast": [1, 2, 3, 4, 5, 6, 7, 8], "slow": [100, 100, 100]}
    assert ratio(samples, "slow", "fast")[0] == 100 / 4  # rounds 1, 4 and 7
    assert ratio({"fast": [1.0, 2.0], "slow": [6.0]}, "slow", "fast") == (6, 6, 6)


def test_peak_memory_counts_what_lives_at_once():
    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        kept.append((second, torch.empty(700)))

    kept = []
    assert extra_memory(call, "cpu") == 4 * 1500
    assert extra_memory(lambda: None, "cpu") == 0


def test_peak_memory_does_not_depend_on_tensors_that_were_there_before():
    def call():
        before.clear()
        return torch.empty(500)

    before = []
    extra_memory(lambda: before.append(torch.empty(1000)), "cpu")
    assert extra_memory(call, "cpu") == 4 * 500


def test_memory_is_limited_within_and_not_afterwards():
    def allocate():
        return torch.empty(2**36, dtype=torch.uint8)  # not touched, so nothing is used

    with limited_memory("cpu", share=0.5), pytest.raises(RuntimeError, match="memory"):
        allocate()
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_profile_of_a_step_names_what_takes_time():
    x = torch.randn(100, 100)
    launches, table = profiled(lambda: x @ x, "cpu")
    assert launches == 0
    assert "aten::mm" in table


def test_record_that_was_written_before_stays_whole(tmp_path):
    path = tmp_path / "record.json"
    record = Record(str(path), "name", "cpu")
    record.write(number=1)
    with pytest.raises(TypeError):
        record.write(number=torch.nn)
    assert json.loads(path.read_text())["number"] == 1


def test_commit_is_dirty_with_changes_other_than_results(monkeypatch, tmp_path):
    def git(*arguments):
        command = ("git", "-c", "user.name=n", "-c", "user.email=e", "-C", tmp_path, *arguments)
        subprocess.run(command, check=True, capture_output=True)

    folder = tmp_path / "bench" / "measuring"
    results = tmp_path / "bench" / "results" / "lines.jsonl"
    for file in (folder / "environment.py", results):
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    assert environment.commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = environment.commit()
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    results.write_text("2\n")
    (tmp_path / "new").touch()
    assert environment.commit() == clean
    (folder / "environment.py").write_text("2\n")
    assert environment.commit() == f"{clean}-dirty"
