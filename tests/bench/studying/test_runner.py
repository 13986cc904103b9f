"""The runs of the study: once each, shared by several processes, with their progress."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
from squares import SCOPE, finish, seeds, squares

from bench.studying import runner
from bench.studying.data import Sources
from bench.studying.question import Question
from bench.studying.runner import work
from bench.studying.store import Store

fork = multiprocessing.get_context("fork")


def test_a_run_that_fails_is_named_and_leaves_no_line(tmp_path):
    def fails(config, sources):
        return {"value": float("nan") if config["seed"] == 1 else 0.0}

    with pytest.raises(RuntimeError, match=r"the run \{'seed': 1\} failed: Out of range float"):
        finish(tmp_path, squares(run=fails))
    assert seeds(tmp_path) == [0]


def test_a_run_is_not_repeated(tmp_path):
    calls = []
    question = squares(3, run=lambda config, sources: calls.append(config) or {})
    finish(tmp_path, question)
    finish(tmp_path, question)
    assert len(calls) == 3


def test_later_runs_may_depend_on_earlier_ones(tmp_path):
    def plan(finished, scope):
        best = max((each.outcome["square"] for each in finished if each.config["seed"] < 4), default=None)
        return [{"seed": seed} for seed in range(4)] + ([] if len(finished) < 4 else [{"seed": best}])

    question = squares()
    finish(tmp_path, Question(question.title, plan, question.run, question.answer))
    assert seeds(tmp_path) == [0, 1, 2, 3, 9]


def test_process_that_waits_for_others_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "WAIT", 0.01)
    process = start(tmp_path, squares(1, seconds=1))
    while not list(tmp_path.glob("*.lock")):
        time.sleep(0.01)
    time.sleep(0.2)
    finish(tmp_path, squares(1))
    process.join(30)
    assert capsys.readouterr().err.count("squares: waiting for 1 runs of other processes") == 1
    assert seeds(tmp_path) == [0]


def test_run_that_is_to_be_alone_waits_for_those_of_other_questions(tmp_path):
    def alone(config, sources):
        assert (tmp_path / "squares.jsonl").exists()
        return {}

    process = start(tmp_path, squares(1, seconds=1))
    while not (tmp_path / "running.lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    question = squares(1, run=alone)
    work(replace(question, alone=True), Store(tmp_path, "times"), SCOPE, Sources())
    process.join(30)


def start(folder, question):
    process = fork.Process(target=partial(finish, folder, question))
    process.start()
    return process


def test_processes_share_the_runs(tmp_path):
    processes = [start(tmp_path, squares(20, seconds=0.05)) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(seeds(tmp_path)) == list(range(20))
    store = Store(tmp_path, "squares")
    store.refresh()
    assert {each.outcome["process"] for each in store.finished} == {process.pid for process in processes}


def test_study_that_is_killed_goes_on_where_it_was(tmp_path):
    process = start(tmp_path, squares(20, seconds=0.1))
    while not (tmp_path / "squares.jsonl").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    before = seeds(tmp_path)
    assert 0 < len(before) < 20
    finish(tmp_path, squares(20))
    assert seeds(tmp_path)[: len(before)] == before
    assert sorted(seeds(tmp_path)) == list(range(20))


def test_progress_tells_the_time_that_is_left(tmp_path, capsys):
    finish(tmp_path, squares(2))
    assert "squares: 1 of 2 runs, 0.0 minutes left" in capsys.readouterr().err
