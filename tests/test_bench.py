"""The benchmarks run and leave what they promise; what they measure on is what they say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.sh"


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch):
    def run(*arguments):
        from bench.__main__ import main

        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--device", "cpu", "--quick"])
        main()

    return run


def test_kernels(bench, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    bench("kernels", "--only", "d = 1e+04, B = 16", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["environment"]["torch"] == torch.__version__
    assert {"clocks", "ceilings", "device", "failures"} <= set(record)
    assert [case["dtype"] for case in record["cases"]] == ["float32", "bfloat16"]
    for case in record["cases"]:
        assert {"precondition", "naive", "gram", "G @ G.T", "moments"} <= set(case["milliseconds"])
        roles = [name.partition(":")[0] for name in case["milliseconds"]]
        assert roles.count("eager") == roles.count("read") == 1
        assert case["milliseconds"].keys() == case["bytes_moved"].keys()
        assert all(time > 0 for times in case["milliseconds"].values() for time in times)
        assert case["case"].partition(",")[0] in printed


def test_steps(bench, tmp_path):
    path = tmp_path / "steps.json"
    bench("steps", "--json", str(path))
    record = json.loads(path.read_text())
    assert record["failures"] == []
    for samples in record["milliseconds"].values():
        assert len({len(times) for times in samples.values()}) == 1


def test_overhead(bench, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    bench("overhead", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    for layer, depths in record["milliseconds"].items():
        assert layer in printed
        shallow, deep = depths.values()
        assert shallow.keys() == deep.keys() >= {"SGD", "RGD Spectral", "RGD Rayleigh"}
        assert min(deep["SGD"]) > min(shallow["SGD"])


def test_overhead_is_the_slope_between_the_depths(monkeypatch):
    from bench import overhead

    costs, once = {"SGD": 40, "RGD": 55}, 1e3  # us
    samples = {
        str(depth): {name: [(once + depth * cost) / 1e3] * 3 for name, cost in costs.items()}
        for depth in (overhead.SHALLOW, overhead.DEEP)
    }
    monkeypatch.setattr(overhead.steps, "OPTIMIZERS", {"SGD": None, "RGD": None})
    assert overhead.section("layer", samples) == [
        ["layer", "SGD", "40.0", ""],
        ["", "RGD", "55.0", "15.0 (15.0 to 15.0)"],
    ]


def test_parameter_lists_are_those_of_the_networks():
    from bench.cases import gpt2_small_shapes, resnet50_shapes

    for shapes, tensors, weights in (
        (resnet50_shapes(), 161, 25_557_032),
        (gpt2_small_shapes(), 148, 124_439_808),
    ):
        assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, weights)


def test_tensors_and_one_tensor_lie_in_the_same_memory():
    from bench.cases import ALIGNMENT, Case, fill

    case = Case("odd", 3, [5, 1, 400], torch.bfloat16)
    buffer = fill(case, "cpu")
    assert [tuple(t.shape) for t in buffer.tensors] == [(3, 5), (3, 1), (3, 400)]
    assert [tuple(t.shape) for t in buffer.flat] == [(3, 406)]
    assert all(t.is_contiguous() for t in buffer.tensors + buffer.flat)
    assert all((t.data_ptr() - buffer.tensors[0].data_ptr()) % ALIGNMENT == 0 for t in buffer.tensors)
    buffer.flat[0].zero_()
    assert not buffer.tensors[0].any()


def test_gpu_check_needs_a_gpu(tmp_path):
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    variables = os.environ | {"PYTHON": sys.executable}
    command = ["bash", SCRIPT, tmp_path / "out"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()
