"""The checks of single operators that bench/gpu_check.sh runs, on the CPU."""

import pytest
import torch

import rgd_ext
from bench.gpu import ncu_run, sanitized_run, smoke
from bench.gpu.operator_inputs import INPUTS, compiled


def test_every_operator_has_inputs():
    names = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    assert set(INPUTS) == {name for namespace, _, name in names if namespace == "rgd_ext"}


def test_smoke_prints_a_line_for_each_result_and_finds_what_is_wrong(monkeypatch, capsys):
    assert smoke.check("precondition", "cpu") == []
    assert len(capsys.readouterr().out.splitlines()) == 12
    monkeypatch.setattr(smoke, "call", lambda name, arguments: [1.01 * g.mean(0) for g in arguments[0]])
    assert all("WRONG" in line for line in smoke.check("precondition", "cpu"))


def test_smoke_names_an_operator_whose_process_dies(monkeypatch):
    monkeypatch.setattr(smoke, "INPUTS", {"gram": None, "none": None})
    monkeypatch.setattr(smoke.sys, "executable", "false")
    assert smoke.check_all("cpu") == ["gram: exit status 1", "none: exit status 1"]


@pytest.mark.skipif(not rgd_ext.build_info()["compiled"], reason="needs kernels")
def test_sanitized_run_takes_all_kernels_and_the_named_dtypes(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(sanitized_run, "call", lambda name, arguments: ran.append(name) or torch.zeros(1))
    sanitized_run.run("cpu", [torch.float32])
    assert set(ran) == set(compiled("cpu")) > {"moments", "gram", "layer_norm_grads"}
    assert len(capsys.readouterr().out.splitlines()) == len(sanitized_run.SHAPES)


def test_the_kernels_that_ncu_profiles_run(monkeypatch, capsys):
    small = [(name, (8, 64) if len(shape) == 2 else (2, 3, 8), dtype) for name, shape, dtype in ncu_run.RUNS]
    monkeypatch.setattr(ncu_run, "RUNS", small)
    ncu_run.run("cpu")
    assert len(capsys.readouterr().out.splitlines()) == len(small)
