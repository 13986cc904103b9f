"""The commands run, and leave the records and tables that they promise."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import compile as compilation
from bench import fit, modules, observe, operators, overhead, scaling, torchjd
from bench.fitting.methods import Method
from bench.training.arms import Arm, sgd
from bench.training.models import SMALL, Case, mlp


def test_kernels(run, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    run("kernels", "--only", "d = 1e+04, B = 16", "--json", str(path))
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


def test_steps(run, tmp_path, capsys):
    path = tmp_path / "steps.json"
    run("steps", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    (model,) = record["models"]
    arms = {"SGD", "RGD Spectral", "RGD Rayleigh"}
    assert set(model["milliseconds"]) == set(model["peak_bytes"]) == arms
    assert len({len(times) for times in model["milliseconds"].values()}) == 1
    assert set(model["error"]) == arms - {"SGD"}
    # The gradient, at least.
    assert min(model["peak_bytes"].values()) >= 4 * (784 * 1024 + 1024 * 1024 + 1024 * 10)
    assert model["model"] in printed


def only_a_small_mlp(monkeypatch, benchmark):
    """The only model of a benchmark is a small MLP."""
    monkeypatch.setattr(benchmark, "cases", lambda *_: {"small MLP": Case(partial(mlp, 8, width=16))})


@pytest.fixture
def small_mlp(monkeypatch):
    """The only model of the benchmark of TorchJD is a small MLP; skips where TorchJD or its solver is not installed."""
    for package in ("torchjd", "qpsolvers", "quadprog"):
        pytest.importorskip(package)
    only_a_small_mlp(monkeypatch, torchjd)


def test_torchjd(run, tmp_path, capsys, small_mlp):
    path = tmp_path / "torchjd.json"
    run("torchjd", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    (model,) = record["models"]
    upgrad = {"UPGrad, ours", "autogram", "autojac"}
    assert set(model["peak_bytes"]) == {"SGD", "RGD Spectral"} | upgrad
    assert set(model["milliseconds"]) == set(model["peak_bytes"]) | {"rule"}
    assert set(model["from_float64"]) == upgrad
    assert max(model["from_float64"].values()) < 1e-5
    assert set(model["error"]) == upgrad - {"UPGrad, ours"}
    assert all(name in printed for name in ("small MLP", *model["peak_bytes"]))


def test_direction_along_upgrad_that_is_wrong_fails(run, monkeypatch, small_mlp):
    monkeypatch.setattr(torchjd, "FromGramian", lambda rule: lambda stats: rule(stats.gram) * (1 + 1e-4))
    with pytest.raises(SystemExit, match="UPGrad, ours: the direction differs from float64 by"):
        run("torchjd")


@pytest.fixture
def tiny_mlp(monkeypatch):
    """The only model of the benchmark of `observe` is a small MLP."""
    only_a_small_mlp(monkeypatch, observe)


def test_observe(run, tmp_path, capsys, tiny_mlp):
    path = tmp_path / "observe.json"
    run("observe", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    (model,) = record["models"]
    assert set(model["milliseconds"]) == set(model["peak_bytes"]) == {*observe.ARMS}
    assert set(model["error"]) == {*observe.ARMS} - {"SGD"}
    assert max(model["error"].values()) < 1e-6
    assert all(name in printed for name in (*observe.ARMS, "per parameter / without"))


def test_a_gradient_that_observation_changes_fails(run, monkeypatch, tiny_mlp):
    def on_others(model, x, y):
        return observe.ordinary(model, x + 1, y)

    wrong = replace(observe.ARMS[observe.PER_PARAMETER], backward=on_others)
    monkeypatch.setitem(observe.ARMS, observe.PER_PARAMETER, wrong)
    with pytest.raises(SystemExit, match=r"observe, per parameter.*differs from that of SGD"):
        run("observe")


# Of tensors that are no leaves, in every compiled function.
dynamo_asks_for_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def compiled_mlp(monkeypatch):
    """The only model of the benchmark of torch.compile is a small MLP, and what compiles is fast."""
    only_a_small_mlp(monkeypatch, compilation)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@dynamo_asks_for_grad
def test_compile(run, tmp_path, capsys, compiled_mlp):
    path = tmp_path / "compile.json"
    run("compile", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    (model,) = record["models"]
    assert model["milliseconds"].keys() == model["first_step"].keys() == compilation.ARMS.keys()
    graphs = {name: int(name in ("SGD, compiled", "RGD, compiled loss")) for name in compilation.ARMS}
    assert model["graphs_run"] == {name: made["graphs"] for name, made in model["compilation"].items()} == graphs
    breaks = {name: sum(made["breaks"].values()) for name, made in model["compilation"].items()}
    assert {name for name, count in breaks.items() if count} == {"RGD, compiled before", "RGD, compiled after"}
    assert any(
        why.startswith("a captured model (rgd_ext)") for why in model["compilation"]["RGD, compiled after"]["breaks"]
    )
    assert max(model["error"].values()) < 1e-5
    assert all(name in printed for name in ("small MLP", "a captured model (rgd_ext) runs uncompiled", *graphs))


@dynamo_asks_for_grad
def test_an_arm_that_is_wrong_or_runs_uncompiled_fails(run, monkeypatch, compiled_mlp):
    def on_others(model, x, y):
        return compilation.compiled(model, 1.001 * x, y)

    def undefined(model, x, y):
        return compilation.compiled(model, torch.nan * x, y)

    for name, backward, message in (
        ("RGD, compiled after", on_others, "differs from that of RGD by"),
        ("SGD, compiled", undefined, "differs from that of SGD by nan"),
        ("SGD, compiled", observe.ordinary, "runs uncompiled"),
        ("RGD, compiled loss", observe.ordinary, "runs uncompiled"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(compilation.ARMS, name, replace(compilation.ARMS[name], backward=backward))
            with pytest.raises(SystemExit, match=f"{name}: .*{message}"):
                run("compile")


def test_directions_of_16_bit_models_are_compared_and_not_judged(monkeypatch):
    def on_others(model, x, y):
        return observe.ordinary(model, x + 1, y)

    monkeypatch.setattr(compilation, "ARMS", {"SGD": Arm(sgd), "other": Arm(sgd, on_others, same_as="SGD")})
    model, x, y = mlp(8, width=16)
    result = compilation.Result("bfloat16")
    compilation.first_steps(model.bfloat16(), x.bfloat16(), y, result)
    assert result.error["other"] > 0.1
    with pytest.raises(AssertionError, match="other: the direction differs"):
        compilation.first_steps(model.float(), x, y, result)


def test_times_are_divided_by_those_of_the_uncompiled_arm():
    times = {name: [2.0**power] for power, name in enumerate(compilation.ARMS)}
    rows = compilation.time_rows(compilation.Result("model", times))
    beside = {name: last.partition(" ")[0] for _, name, *_, last in rows}
    assert beside.pop("SGD") == beside.pop("RGD") == ""
    assert list(beside.values()) == ["2.00", "2.00", "4.00", "8.00"]


def test_compile_takes_large_models_on_cuda_alone_and_none_under_autocast():
    assert set(compilation.models(False, "cpu")) == set(SMALL)
    large = {"MLP 784-2048-2048-10, B = 256", "GPT-2 small's shape, bfloat16, B = 8"}
    assert set(compilation.models(False, "cuda")) == {*SMALL, *large}


def test_operators(run, tmp_path, capsys):
    path = tmp_path / "operators.json"
    run("operators", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    kinds = {case["case"].partition(",")[0].partition(" (")[0] for case in record["cases"]}
    assert kinds == {
        "lambda_max",
        "moments of a Gramian",
        "GroupNorm",
        "LayerNorm",
        "RMSNorm",
        "Gramian",
        "Conv2d 3 x 3",
    }
    for case in record["cases"]:
        assert len(case["milliseconds"]) > 1
        assert case["milliseconds"].keys() == case["error"].keys()
        assert case["case"] in printed


def test_scaling(run, tmp_path, capsys):
    path, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    run("scaling", "--only", "MLP 784-512", "--json", str(path), "--plot", str(plot))
    (series,) = json.loads(path.read_text())["series"]
    assert list(series["milliseconds"]) == ["2", "4"]
    assert all(set(samples) == {"SGD", "RGD"} for samples in series["milliseconds"].values())
    assert "layers^" in capsys.readouterr().out
    assert plot.read_bytes()[1:4] == b"PNG"


def test_overhead(run, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    run("overhead", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    for layer, depths in record["milliseconds"].items():
        assert layer in printed
        shallow, deep = depths.values()
        assert shallow.keys() == deep.keys() >= {"SGD", "RGD Spectral", "RGD Rayleigh"}
        assert min(deep["SGD"]) > min(shallow["SGD"])


def test_modules(run, tmp_path, capsys):
    path = tmp_path / "modules.json"
    run("modules", "--only", "PReLU", "--json", str(path))
    assert set(json.loads(path.read_text())["milliseconds"]["PReLU"]) == {"SGD", "RGD"}
    assert "PReLU" in capsys.readouterr().out


def test_verification(run, tmp_path, capsys):
    path = tmp_path / "verification.json"
    run("verification", "--json", str(path))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    for model, result in record["results"].items():
        assert model in printed
        times = result["milliseconds"]
        assert times.keys() == {f"{which}, {arm}" for which in ("first", "later") for arm in result["bytes"]}
        assert min(times["first, verified"]) > min(times["first, not verified"])


def test_fit(run, tmp_path, capsys):
    path, plot = tmp_path / "fit.json", tmp_path / "fit.png"
    run("fit", "--only", "1-64-64-1", "diabetes", "heat", "--json", str(path), "--plot", str(plot))
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record["failures"] == []
    assert record["environment"]["threads"] == 1
    (cost,) = record["steps"]
    assert set(cost["peak_bytes"]) == set(cost["milliseconds"]) == {"SGD", "GaussNewton", "of it the linear system"}
    methods = {"GaussNewton", "GaussNewton, geodesic", "Adam", "SGD, momentum", "L-BFGS"}
    for problem in record["problems"]:
        assert set(problem["curves"]) == set(problem["settings"]) == methods
        assert set(problem["tuning"]) == {"Adam", "SGD, momentum"}
        first = {runs[0]["error"][0] for runs in problem["curves"].values()}
        assert len(first) == 1, "all start from the same weights"
        for (curve,) in problem["curves"].values():
            assert curve["steps"][-1] > 0
            assert curve["seconds"] == sorted(curve["seconds"])
            assert len(curve["solution_error"]) == (len(curve["error"]) if problem["problem"] == "heat" else 0)
    assert all(name in printed for name in (*methods, "diabetes", "heat", "MLP 1-64-64-1"))
    assert plot.read_bytes()[1:4] == b"PNG"


def test_a_fit_by_ours_that_fails_is_a_failure(run, monkeypatch):
    def failing(problem, model):
        raise RuntimeError("no step")

    monkeypatch.setitem(fit.PROBLEMS, "heat", (fit.PROBLEMS["heat"][0], {"GaussNewton": Method(failing)}))
    with pytest.raises(SystemExit, match="heat: AssertionError: GaussNewton: RuntimeError: no step"):
        run("fit", "--only", "heat")


COMMANDS = "kernels steps compile distributed observe torchjd operators scaling modules verification fit"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_name_that_no_case_has_is_refused(run, command):
    with pytest.raises(SystemExit, match="no case has 'no such' in its name: "):
        run(command, "--only", "no such")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "cuda", "finds no CUDA device; pass cpu"),
        ("--json", "file/record.json", "File exists: 'file'): pass a file in a folder that"),
        ("--json", "folder.png", "Is a directory: 'folder.png'): pass a file in a folder that"),
        ("--plot", "file/plot.png", "File exists: 'file'): pass a file in a folder that"),
        ("--plot", "folder.png", "Is a directory: 'folder.png'): pass a file in a folder that"),
        ("--plot", "plot.txt", "pass a path that ends in .png"),
        ("--plot", "plot.png", "cannot be drawn without matplotlib: pip install matplotlib"),
    ],
)
def test_what_is_missing_or_cannot_be_written_is_named_before_anything_runs(
    run, monkeypatch, tmp_path, capsys, option, value, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(scaling, "run", lambda **options: pytest.fail("it runs"))
    with pytest.raises(SystemExit):
        run("scaling", option, value)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: '{value}'" in last
    assert message in last


def test_files_stay_as_they_were_until_there_are_results(run, tmp_path):
    before, new = tmp_path / "before.json", tmp_path / "folder" / "new.json"
    before.write_text("{}")
    for path in (before, new):
        with pytest.raises(SystemExit, match="no case has"):
            run("scaling", "--only", "no such", "--json", str(path))
    assert before.read_text() == "{}"
    assert not new.exists()


def test_an_operator_that_is_wrong_fails_and_another_way_is_left_out():
    def inputs():
        return (torch.ones(3),)

    ways = {"operator": lambda x: 2 * x, "other": lambda x: 3 * x, "right": lambda x: x + 0}
    result = operators.bench("case", operators.Case(inputs, lambda x: x, ways), "cpu", quick=True)
    assert set(result.milliseconds) == {"right"}
    assert operators.failures_of(result) == ["case: operator: differs from float64 by 1.0e+00 of its largest value"]


def test_every_module_with_parameters_has_a_case(monkeypatch):
    known = {name.partition(",")[0] for name in modules.cases()} | modules.EXCEPTIONS
    assert modules.with_parameters() <= known
    assert {"Linear", "Transformer", "GRUCell", "AdaptiveLogSoftmaxWithLoss", "PReLU"} <= modules.with_parameters()
    monkeypatch.setattr(modules, "EXCEPTIONS", modules.EXCEPTIONS - {"SyncBatchNorm"})
    assert modules.run("cpu", True, None, ["PReLU"]) == ["torch.nn.SyncBatchNorm has no case"]


def test_overhead_is_the_slope_between_the_depths(monkeypatch):
    costs, once = {"SGD": 40, "RGD": 55}, 1e3  # us
    samples = {
        str(depth): {name: [(once + depth * cost) / 1e3] * 3 for name, cost in costs.items()}
        for depth in (overhead.SHALLOW, overhead.DEEP)
    }
    monkeypatch.setattr(overhead, "OURS", {"SGD": None, "RGD": None})
    assert overhead.section("layer", samples) == [
        ["layer", "SGD", "40.0", ""],
        ["", "RGD", "55.0", "15.0 (15.0 to 15.0)"],
    ]
